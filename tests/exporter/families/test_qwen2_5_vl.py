"""Qwen2.5-VL: transformers' own model and processor are the judge, at pictures of any size and any number."""

from __future__ import annotations

import json
import logging
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
from vlmc.exporter.checkpoint import load_components, load_model, resolve
from vlmc.exporter.family import config_of, family_for
from vlmc.exporter.processor import describe
from vlmc.exporter.torch_runner import torch_session
from vlmc.profiles.device import load_device
from vlmc.runtime import preprocessing
from vlmc.runtime.prompt import Tokenizer, render
from vlmc.runtime.session import open_session

from .conftest import change

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


# As published: config.json of Qwen/Qwen2.5-VL-3B-Instruct from github.com/zhanggaojian/Qwen2.5-VL-3B-LLMQ_Samples
# (f119d33), preprocessor_config.json of the 7B one from github.com/Harrison-HXLiu/vlm_api_test (b7e6491).
ROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
PUBLISHED: dict[str, Any] = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": ROPE,
    "vocab_size": 151936,
}
PICTURES: dict[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


def test_the_preset_is_the_published_model() -> None:
    found = resolve("qwen2_5_vl-3b", random_weights=True)
    assert found.preset is not None
    ours, theirs = (config_of(config).to_dict() for config in (found.config, PUBLISHED))
    text, vision = (set(ours[part]) - {"dtype"} for part in ("text_config", "vision_config"))
    text -= {"max_window_layers", "tie_word_embeddings"}  # there are no windows; the whole model says what is tied
    vision -= {"tokens_per_second"}  # of videos
    assert {name: ours["text_config"][name] for name in text} == {name: theirs["text_config"][name] for name in text}
    assert {name: ours["vision_config"][name] for name in vision} == {
        name: theirs["vision_config"][name] for name in vision
    }
    assert ours["tie_word_embeddings"] is theirs["tie_word_embeddings"] is True
    with torch.device("meta"):
        model = found.family.randomise(PUBLISHED, 0)
    assert sum(weight.numel() for weight in model.parameters()) == found.preset["published_parameters"]


def with_pictures(folder: Path, target: Path, **pictures: Any) -> Path:
    """The checkpoint without its weights, with this preprocessor_config.json and the published windows."""
    change(folder, target, vision_config={"window_size": 112})
    (target / "preprocessor_config.json").write_text(json.dumps(pictures))
    return target


@pytest.mark.parametrize(
    "saved",  # by transformers 4.46, and from 4.49 on
    [{}, {"size": {"max_pixels": 12845056, "min_pixels": 3136}}, {"size": {"longest_edge": 1, "shortest_edge": 1}}],
)
def test_pictures_are_prepared_as_published_say_also_where_they_were_saved_again(
    saved: Any, whole: Any, tmp_path: Path
) -> None:
    found = resolve("qwen2_5_vl-3b", random_weights=True)
    assert found.preset is not None
    described, _ = describe(with_pictures(whole[0], tmp_path, **PICTURES, **saved))
    wanted = found.preset["preprocessing"] | {"image_token": "<|image_pad|>"}
    assert described | {"before_image": "", "after_image": ""} == wanted


def test_a_size_in_older_words_alone_is_refused(whole: Any, tmp_path: Path) -> None:
    pictures = {name: value for name, value in PICTURES.items() if not name.endswith("_pixels")}
    folder = with_pictures(whole[0], tmp_path, **pictures, size={"max_pixels": 12845056, "min_pixels": 3136})
    with pytest.raises(VlmcError, match=r"how many pixels.*max_pixels.*12845056.*outside of size"):
        describe(folder)


def test_a_config_that_is_flat_and_nested_is_the_same_model_and_read_in_silence(
    whole: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 4.53 to 4.57 saved models that were trained further, here the 3B one: the decoder's fields twice,
    what is tied within `text_config` alone, the vision encoder's model type that of the whole."""
    folder = whole[0]
    saved = json.loads((change(folder, tmp_path) / "config.json").read_text())
    text, vision = saved["text_config"], saved["vision_config"]
    del saved["tie_word_embeddings"], text["rope_parameters"]
    text |= {"rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"}, "rope_theta": 1e6}
    flat = {name: text[name] for name in text if name not in ("model_type", "layer_types", "tie_word_embeddings")}
    older = flat | saved | {"text_config": text, "vision_config": vision | {"model_type": "qwen2_5_vl"}}
    (tmp_path / "config.json").write_text(json.dumps(older))
    shutil.copy(folder / "model.safetensors", tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert describe(tmp_path) == describe(folder)
    found, expected = (load_model(resolve(str(each))) for each in (tmp_path, folder))
    assert caplog.text == ""
    weights = expected.state_dict()
    assert [name for name, weight in found.state_dict().items() if not torch.equal(weight, weights[name])] == []
    assert found.lm_head.weight is found.get_input_embeddings().weight
    text, wanted = (model.config.text_config for model in (found, expected))
    assert text.layer_types == wanted.layer_types
    assert text.rope_parameters == wanted.rope_parameters | {"type": "default"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding windows"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [2, 3, 3]}}, "linear RoPE"),
        ({"rope_scaling": ROPE}, r"do not turn all of a head.*\[16, 24, 24\], heads of 16.*add up to 8"),
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
