"""Qwen2.5-VL: transformers' own model and processor are the judge, at pictures of any size and any number."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vlmc.artifact import Artifact
from vlmc.calibration import recipes
from vlmc.calibration.calibrate import plan_for
from vlmc.calibration.plan import write_plan
from vlmc.calibration.sets import load_set
from vlmc.engines import build, child
from vlmc.errors import VlmcError
from vlmc.exporter import golden, parity
from vlmc.exporter.checkpoint import load_components
from vlmc.exporter.family import family_for
from vlmc.exporter.processor import describe
from vlmc.exporter.torch_runner import torch_session
from vlmc.profiles.device import load_device
from vlmc.runtime import preprocessing
from vlmc.runtime.prompt import Tokenizer, render
from vlmc.runtime.session import open_session

CHAT = (  # Qwen/Qwen2.5-VL-3B-Instruct's, less the branches for video and numbered pictures
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>"]
PATCH, MERGE, WINDOW = 4, 2, 16  # windows of 2 × 2 tokens
QUESTION = "How many {red} boats are on the water? 42 €"


class WithoutVideo(Qwen2_5_VLProcessor):
    """transformers' processor without its part for videos, which needs torchvision; saved as the hub has it."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)

    def save(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(CHAT)


def processor() -> WithoutVideo:
    vocab = {token: id for id, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL}, replace_extra_special_tokens=False)
    pictures = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": 4 * 64, "longest_edge": 40 * 64}
    )
    return WithoutVideo(pictures, tokenizer, None, chat_template=CHAT)


def config(**text: Any) -> Qwen2_5_VLConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"patch_size": PATCH, "spatial_merge_size": MERGE, "window_size": WINDOW, "fullatt_block_indexes": [1]}
    ids = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}
    more = {"num_key_value_heads": 2, "vocab_size": 272, "rope_scaling": rope, "tie_word_embeddings": True}
    return Qwen2_5_VLConfig(vision_config=vision, text_config=sizes | more | text, tie_word_embeddings=True, **ids)


@pytest.fixture(scope="module")
def whole(
    randomise: Any, export_tiny: Callable[[Path], Artifact], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Artifact, Qwen2_5_VLForConditionalGeneration]:
    folder = tmp_path_factory.mktemp("qwen") / "checkpoint"
    model = Qwen2_5_VLForConditionalGeneration(config()).eval()
    randomise(model, 4)
    model.save_pretrained(folder)
    processor().save(folder)
    GenerationConfig(eos_token_id=[2, 0]).save_pretrained(folder)
    return folder, export_tiny(folder), model


def processed(pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """What transformers' own processor makes of the pictures and the question."""
    whole = processor()
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": QUESTION}]
    text = whole.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(whole(text=[text], images=pictures or None, return_tensors="pt"))


SIZES = [[], [(28, 28)], [(90, 31)], [(33, 64)], [(61, 25), (40, 40)], [(30, 30), (17, 200), (64, 48)]]


@pytest.mark.parametrize("sizes", SIZES)
def test_the_onnx_graphs_compute_what_transformers_does(sizes: Any, whole: Any, make_picture: Any) -> None:
    """Features, logits of the prompt and greedy tokens. Tolerance: float32 sums in another order."""
    _, artifact, model = whole
    pictures = [make_picture(*size) for size in sizes]
    session, reference = parity.canonical_session(artifact), processed(pictures)
    inputs = session.prepare(pictures, QUESTION)
    assert inputs.input_ids.tolist() == reference["input_ids"][0].tolist()
    with torch.inference_mode():
        if pictures:
            found = session.vision.run(inputs.vision)["image_features"]
            features = model.get_image_features(reference["pixel_values"], reference["image_grid_thw"]).pooler_output
            np.testing.assert_allclose(found, torch.cat(features).numpy(), atol=2e-4, rtol=2e-4)
        next(session.generate(inputs, 1, ignore_eos=True))
        model.model.rope_deltas = None
        logits = model(**reference).logits[0, -1]
        np.testing.assert_allclose(session.decoder.logits(), logits.numpy(), atol=5e-4, rtol=5e-4)
        model.model.rope_deltas = None
        output = model.generate(**reference, do_sample=False, max_new_tokens=6, min_new_tokens=6, eos_token_id=None)
    expected = output[0, reference["input_ids"].shape[1] :].tolist()
    assert list(session.generate(inputs, 6, ignore_eos=True)) == expected


@pytest.mark.parametrize("sizes", SIZES[1:])
def test_windows_and_positions_are_those_of_transformers(sizes: Any, whole: Any, make_picture: Any) -> None:
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    folder, _, model = whole
    pictures = [make_picture(*size) for size in sizes]
    reference = processed(pictures)
    grid, ids = reference["image_grid_thw"], reference["input_ids"]
    preprocess: Any = preprocessing.load(describe(folder)[0])
    prepared = preprocess(pictures)
    vision = prepared.vision
    patches = reference["pixel_values"].numpy()
    assert np.array_equal(vision["pixel_values"].reshape(patches.shape), patches)
    assert np.array_equal(vision["patch_positions"].reshape(-1, 2), get_vision_position_ids(grid, MERGE).numpy())
    order, ends = get_vision_window_index(grid, MERGE, WINDOW, PATCH)
    windows = [row[row >= 0].tolist() for row in vision["window_index"]]
    assert [token for window in windows for token in window] == order.tolist()
    assert np.cumsum([MERGE**2 * len(window) for window in windows]).tolist() == ends[1:].tolist()
    assert vision["window_index"].ravel()[vision["window_places"]].tolist() == list(range(len(order)))
    positions, _ = model.model.get_rope_index(ids, (ids == 5).int(), image_grid_thw=grid)
    assert preprocess.positions((ids == 5)[0].numpy(), prepared).tolist() == positions[:, 0].tolist()


def test_a_prompt_without_pictures_has_its_places_three_times(whole: Any) -> None:
    preprocess: Any = preprocessing.load(describe(whole[0])[0])
    assert preprocess.positions(np.zeros(4, bool), None).tolist() == [[0, 1, 2, 3]] * 3


def test_the_template_is_rendered_as_transformers_does(whole: Any) -> None:
    described, prompt = describe(whole[0])
    assert (described["before_image"], described["after_image"]) == ("<|vision_start|>", "<|vision_end|>")
    assert described["window"] == WINDOW
    assert prompt.eos_token_ids == (2, 0)
    text = render(prompt, QUESTION, ())
    assert Tokenizer(whole[1].root / "tokenizer.json").encode(text).tolist() == processed([])["input_ids"][0].tolist()


def test_the_manifest_says_what_the_graphs_take(whole: Any) -> None:
    _, artifact, _ = whole
    vision, decoder = (artifact.manifest.components[name] for name in ("vision_encoder", "decoder"))
    shapes = {tensor.name: tensor.shape for tensor in (*vision.inputs, *vision.outputs, *decoder.inputs)}
    assert shapes["pixel_values"] == ("tokens", 4, 96)
    assert shapes["window_index"] == ("windows", 4)
    assert shapes["image_features"] == ("tokens", 64)
    assert shapes["position_ids"] == (3, 1, "length")
    assert decoder.further_inputs() == ("position_ids",)


def test_the_parts_miss_no_weight(whole: Any) -> None:
    _, artifact, model = whole
    components = load_components(artifact)
    weights = {weight.data_ptr(): weight for _, component in components.items() for weight in component.parameters()}
    assert sum(weight.numel() for weight in weights.values()) == sum(weight.numel() for weight in model.parameters())


def test_it_is_calibrated_and_built(
    whole: Any, picture_set: Path, step_here: Any, make_picture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact(Path(shutil.copytree(whole[1].root, tmp_path / "copy")))
    components = load_components(artifact)
    plan = plan_for(
        torch_session(artifact, components), components, recipes.load("int8"), load_set(picture_set), lambda *_: None
    )
    assert {"vision_encoder/blocks.0.attn.qkv", "vision_encoder/merger.mlp.0"} <= plan.modules.keys()
    assert plan.modules["vision_encoder/blocks.0.attn.qkv"].absorbed_by == "vision_encoder/blocks.0.norm1"
    write_plan(artifact, plan)
    monkeypatch.setattr(child, "run", step_here)
    record, _ = build.build(artifact, load_device("cpu"), "int8", lambda *_: None)
    for component in ("vision_encoder", "decoder"):
        engines = {name: artifact.engine("cpu", component, name)[0] for name in record.choices[component].candidates}
        assert {name.partition("-")[2] for name in engines} == {"fp32", "int8"}
        for name, spec in engines.items():
            assert spec.report.agreement > (0.9999 if name.endswith("fp32") else 0.9), name
            assert spec.report.products.get("int8", 0) > 0 or name.endswith("fp32")
    chosen = {component: choice.engine for component, choice in record.choices.items()}
    chosen["decoder"] = "onnxruntime-fp32"
    chosen["vision_encoder"] = "onnxruntime-fp32"
    session, exact = open_session(artifact, "cpu", chosen, threads=1), parity.canonical_session(artifact)
    inputs = exact.prepare([make_picture(61, 25)], QUESTION)
    answers = [list(one.generate(inputs, 5, ignore_eos=True)) for one in (session, exact)]
    assert answers[0] == answers[1]


def test_the_preset_has_as_many_weights_as_the_published_model() -> None:
    from vlmc.exporter.checkpoint import resolve

    found = resolve("qwen2_5_vl-3b", random_weights=True)
    assert found.preset is not None
    with torch.device("meta"):
        model = found.family.randomise(found.config, 0)
    published = found.preset["published_parameters"]
    assert abs(sum(weight.numel() for weight in model.parameters()) - published) < 0.01 * published


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding windows"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [2, 3, 3]}}, "linear RoPE"),
    ],
)
def test_what_the_family_does_not_cover_is_refused(text: Any, says: str) -> None:
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config(**text))
    with pytest.raises(VlmcError, match=says):
        family_for("qwen2_5_vl", "here").kv(model, 8)


def test_a_step_on_a_gpu_needs_no_host(whole: Any, assert_steps_need_no_host: Any) -> None:
    assert_steps_need_no_host(whole[1])


def test_the_readme_says_what_it_can_be_made_into(whole: Any, assert_supported: Any) -> None:
    assert_supported(whole[1], "qwen2_5_vl")


def test_tensorrt_gets_all_that_the_encoder_takes_and_refuses_what_is_larger(whole: Any, as_tensorrt: Any) -> None:
    artifact = whole[1]
    arrays, inputs = golden.read(artifact)[1], artifact.manifest.components["vision_encoder"].inputs
    runner = as_tensorrt(artifact, "vision_encoder")
    larger = {tensor.name: np.repeat(arrays[f"0.{tensor.name}"], 2, axis=0) for tensor in inputs}
    with pytest.raises(VlmcError, match=r"not built for inputs of these sizes.*at most .*image_ids 40\b"):
        runner.run(larger)
