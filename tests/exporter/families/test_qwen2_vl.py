"""Qwen2-VL: transformers' own model and processor are the judge, at pictures of any size and any number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from vlmc.artifact import Artifact
from vlmc.calibration import recipes
from vlmc.calibration.command import make_plan
from vlmc.errors import VlmcError
from vlmc.exporter.checkpoint import load_components, resolve
from vlmc.exporter.family import family_for
from vlmc.exporter.processor import describe
from vlmc.runtime import preprocessing
from vlmc.runtime.prompt import Tokenizer, render

from . import test_qwen2_5_vl as successor
from .test_qwen2_5_vl import CHAT, MERGE, PATCH, QUESTION

IMAGE, GRID = 5, "image_grid_thw"
PIXELS = {"min_pixels": 4 * 64, "max_pixels": 40 * 64}
VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "in_chans": 3}
VISION |= {"patch_size": PATCH, "spatial_merge_size": MERGE, "spatial_patch_size": PATCH, "temporal_patch_size": 2}
CONFIG: dict[str, Any] = {  # flat, as the hub has it
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 272,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "use_sliding_window": False,
    "sliding_window": 8,
    "max_window_layers": 1,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "image_token_id": IMAGE,
    "video_token_id": 6,
    "vision_config": VISION,
}
SIZES = [[], [(28, 28)], [(90, 31)], [(200, 17)], [(61, 25), (40, 40)], [(30, 30), (17, 200), (64, 48)]]
Whole = tuple[Path, Artifact, Qwen2VLForConditionalGeneration]


class WithoutVideo(Qwen2VLProcessor):
    """transformers' processor without its part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


@pytest.fixture(scope="module")
def whole(randomise: Any, export_tiny: Callable[[Path], Artifact], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("qwen2") / "checkpoint"
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**CONFIG)).eval()
    randomise(model, 4)
    model.save_pretrained(folder)
    successor.processor().tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[2, 0]).save_pretrained(folder)
    pictures = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE, **PIXELS}
    pictures |= {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    pictures |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    files = {"config": {"model_type": "qwen2_vl", **CONFIG}, "chat_template": {"chat_template": CHAT}}
    for name, content in (files | {"preprocessor_config": pictures}).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder, export_tiny(folder), model


def processed(pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """What transformers' own processor makes of the pictures and the question."""
    alike = successor.processor()  # the tokenizer and the picture processor are the same
    processor = WithoutVideo(alike.image_processor, alike.tokenizer, None, chat_template=CHAT)
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=[text], images=pictures or None, return_tensors="pt"))


class Reference:
    """transformers' whole model, on what its processor makes of these pictures."""

    def __init__(self, model: Qwen2VLForConditionalGeneration, pictures: list[Image.Image]) -> None:
        self.model = model
        self.made = {name: array for name, array in processed(pictures).items() if name in ("pixel_values", GRID)}

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.model.get_image_features(**self.made).pooler_output)

    def logits(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        self.model.model.rope_deltas = None
        return self.model(input_ids=input_ids, mm_token_type_ids=(input_ids == IMAGE).int(), **self.made).logits[0]


@pytest.mark.parametrize("sizes", SIZES)
def test_the_onnx_graphs_compute_what_transformers_does(
    sizes: Any, whole: Whole, assert_parity: Any, make_picture: Any
) -> None:
    _, artifact, model = whole
    pictures = [make_picture(*size) for size in sizes]
    assert_parity(artifact, Reference(model, pictures), [pictures])


@pytest.mark.parametrize("sizes", SIZES)
def test_pictures_and_question_become_transformers_arrays(sizes: Any, whole: Whole, make_picture: Any) -> None:
    folder, _, model = whole
    pictures = [make_picture(*size) for size in sizes]
    reference, (config, prompt) = processed(pictures), describe(folder)
    preprocess: Any = preprocessing.load(config)
    prepared = preprocess(pictures)
    ids = Tokenizer(whole[1].root / "tokenizer.json").encode(render(prompt, QUESTION, prepared.image_texts))
    assert ids.tolist() == reference["input_ids"][0].tolist()
    assert prompt.eos_token_ids == (2, 0)
    if pictures:
        patches = reference["pixel_values"].numpy()
        assert np.array_equal(prepared.vision["pixel_values"].reshape(patches.shape), patches)
        kinds = (reference["input_ids"] == IMAGE).int()
        positions, _ = model.model.get_rope_index(reference["input_ids"], kinds, image_grid_thw=reference[GRID])
        assert preprocess.positions(ids == IMAGE, prepared).tolist() == positions[:, 0].tolist()


def test_the_encoder_takes_no_windows(whole: Whole) -> None:
    inputs = whole[1].manifest.components["vision_encoder"].inputs
    assert [tensor.name for tensor in inputs] == ["pixel_values", "patch_positions", "image_ids"]


def test_the_parts_miss_no_weight(whole: Whole) -> None:
    _, artifact, model = whole
    components = load_components(artifact)
    weights = {weight.data_ptr(): weight for _, component in components.items() for weight in component.parameters()}
    assert sum(weight.numel() for weight in weights.values()) == sum(weight.numel() for weight in model.parameters())


def test_layer_norms_take_what_int8_smooths(whole: Whole, picture_set: Path) -> None:
    modules = make_plan(whole[1], recipes.load("int8"), picture_set).modules
    for product, norm in (("attn.qkv", "norm1"), ("mlp.fc1", "norm2")):
        assert modules[f"vision_encoder/blocks.0.{product}"].absorbed_by == f"vision_encoder/blocks.0.{norm}"
    assert {"vision_encoder/blocks.1.mlp.fc2", "vision_encoder/merger.mlp.0"} <= modules.keys()


# config.json of Qwen/Qwen2-VL-2B as published, from github.com/whalefal1/ASR-LLM-TTS-Pipeline-with-live2d (5232608).
PUBLISHED: dict[str, Any] = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def test_the_preset_is_the_published_model() -> None:
    found = resolve("qwen2_vl-2b", random_weights=True)
    assert found.preset is not None
    assert found.config == {name: value for name, value in PUBLISHED.items() if name != "vision_token_id"}
    with torch.device("meta"):
        model = found.family.randomise(PUBLISHED, 0)
    assert sum(weight.numel() for weight in model.parameters()) == found.preset["published_parameters"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_sliding_window": True}, "sliding windows"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [2, 3, 3]}}, "linear RoPE"),
    ],
)
def test_what_the_family_does_not_cover_is_refused(change: Any, says: str) -> None:
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**CONFIG | change))
    with pytest.raises(VlmcError, match=says):
        family_for("qwen2_vl", "here").kv(model, 8)


def test_a_step_on_a_gpu_needs_no_host(whole: Whole, assert_steps_need_no_host: Any) -> None:
    assert_steps_need_no_host(whole[1])


def test_tensorrt_gets_the_encoder(whole: Whole, as_tensorrt: Any) -> None:
    as_tensorrt(whole[1], "vision_encoder")


def test_the_readme_says_what_it_can_be_made_into(whole: Whole, assert_supported: Any) -> None:
    assert_supported(whole[1], "qwen2_vl")
