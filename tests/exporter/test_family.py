"""A family splits a checkpoint without changing what it computes: transformers' own whole model is the judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import checkpoint, golden, parity
from vlmc.exporter.export import Options, export
from vlmc.exporter.family import all_families, decoder_config, family_for, standard_kv
from vlmc.exporter.torch_runner import torch_session
from vlmc.runtime.images import open_image

Whole = tuple[Artifact, Any, Any]  # the artefact, transformers' model and its processor


@pytest.fixture(scope="module", params=["smolvlm", "idefics3"])
def whole(
    request: pytest.FixtureRequest,
    tiny: Artifact,
    save_tiny: Callable[..., Path],
    picture_set: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Whole:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    artifact = tiny
    if request.param == "idefics3":
        folder = save_tiny(tmp_path_factory.mktemp("idefics3") / "tiny", "idefics3", seed=3)
        options = Options(capacity=96, cases=1, picture_set=picture_set, max_new_tokens=6)
        artifact = export(checkpoint.resolve(str(folder)), folder.parent / "artefact", options, lambda *_: None)
    folder = Path(artifact.manifest.source.location)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__.lower().startswith(request.param)
    return artifact, model, AutoProcessor.from_pretrained(folder, local_files_only=True)


def processed(processor: Any, root: Path, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What transformers' own processor makes of a golden case."""
    content = [{"type": "image"}, {"type": "text", "text": case["prompt"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=text, images=[open_image(root / case["image"])], return_tensors="pt"))


def test_the_golden_tokens_are_those_of_transformers_generate(whole: Whole) -> None:
    artifact, model, processor = whole
    cases, _ = golden.read(artifact)
    for case in cases:
        inputs = processed(processor, artifact.root, case)
        length = inputs["input_ids"].shape[1]
        output = model.generate(**inputs, do_sample=False, max_new_tokens=len(case["tokens"]))
        assert output[0, length:].tolist() == case["tokens"]


def test_the_logits_of_every_step_are_those_of_one_whole_forward_pass(whole: Whole) -> None:
    """Tolerance: float32 sums in another order; the logits are of the size of 10."""
    artifact, model, processor = whole
    cases, arrays = golden.read(artifact)
    for index in range(min(golden.DETAILED, len(cases))):
        inputs = processed(processor, artifact.root, cases[index])
        length = inputs["input_ids"].shape[1]
        fed = torch.from_numpy(arrays[f"{index}.step_tokens"])[None]
        assert fed.shape[1] == golden.STEPS
        inputs["input_ids"] = torch.cat((inputs["input_ids"], fed), dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            logits = model(**inputs).logits[0, length - 1 :].numpy()
        found = np.concatenate((arrays[f"{index}.prefill_logits"][None], arrays[f"{index}.step_logits"]))
        np.testing.assert_allclose(found, logits, atol=1e-4, rtol=1e-4)


def test_the_onnx_graphs_give_the_same_tokens(whole: Whole) -> None:
    artifact, _, _ = whole
    session = parity.canonical_session(artifact)
    for case in golden.read(artifact)[0]:
        inputs = session.prepare([open_image(artifact.root / case["image"])], case["prompt"])
        assert list(session.generate(inputs, len(case["tokens"]))) == case["tokens"]


def test_the_parts_share_the_models_weights_and_miss_none(whole: Whole) -> None:
    artifact, model, _ = whole
    components = checkpoint.load_components(artifact)
    count = sum(weight.numel() for _, component in components.items() for weight in component.parameters())
    assert count == sum(weight.numel() for weight in model.parameters())
    assert count == sum(spec.parameters for spec in artifact.manifest.components.values())


def test_the_cache_and_the_tiles_are_read_from_the_config(whole: Whole) -> None:
    artifact, model, _ = whole
    family = family_for(artifact.manifest.family, "here")
    kv = family.kv(model, 77)
    assert (kv.layers, kv.kv_heads, kv.head_dim, kv.capacity) == (2, 2, 16, 77)
    assert family.image_size(model) == (32, 32)


def test_eager_pytorch_attends_to_the_filled_part_alone(whole: Whole) -> None:
    """What lies in the cache behind the write index must not matter."""
    artifact, _, _ = whole
    components = checkpoint.load_components(artifact)
    clean, dirty = (torch_session(artifact, components).decoder for _ in range(2))
    for state in dirty._past:
        state.fill_(1e9)
    embeds = golden.read(artifact)[1]["0.inputs_embeds"]
    assert [clean.prefill(embeds), *clean.decode(5)] == [dirty.prefill(embeds), *dirty.decode(5)]
    np.testing.assert_array_equal(clean.logits(), dirty.logits())


def test_a_family_is_found_by_its_model_type() -> None:
    assert {"smolvlm", "idefics3"} <= all_families().keys()
    assert family_for("smolvlm", "x") is family_for("idefics3", "x")


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("smolvlm2", r"'smolvlm2', which no family knows.*idefics3.*did you mean smolvlm\? Otherwise add .*md\)\.$"),
        ("florence2", r"mend it: add a file to exporter/families/ .*; no family is near, so begin with .*/llava.py\.$"),
        ("zz9", r"mend it: add a file to exporter/families/ \(docs/add-a-model.md\); no family is near"),
    ],
)
def test_an_unknown_model_type_is_answered_with_the_nearest(model_type: str, says: str) -> None:
    with pytest.raises(VlmcError, match=says):
        family_for(model_type, "the checkpoint")


def test_one_whose_config_is_like_a_familys_is_answered_with_that_family() -> None:
    config = AutoConfig.for_model("aya_vision").to_diff_dict()
    says = r"add a file .*add-a-model.md\); its config.json is nearest to those of exporter/families/llava.py"
    with pytest.raises(VlmcError, match=f"To mend it: {says}"):
        family_for("aya_vision", "the checkpoint", config)
    with pytest.raises(VlmcError, match=f"did you mean smolvlm\\? Otherwise {says}"):
        family_for("smolvlm2", "the checkpoint", config)


SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_decoders_rotation_is_read_as_transformers_5_writes_it(kind: str) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500_000.0}
    before = {"rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    for written in ({"rope_parameters": rope}, before):
        found = decoder_config(kind, SIZES | written).rope_parameters
        assert {name: found[name] for name in rope} == rope


def test_a_decoders_biases_are_read() -> None:
    config = decoder_config("llama", SIZES | {"attention_bias": True, "mlp_bias": True})
    assert (config.attention_bias, config.mlp_bias) == (True, True)


SLIDING = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("kind", "values"), [("mistral", {"sliding_window": 16}), ("phi3", {"sliding_window": 16}), ("qwen2", SLIDING)]
)
def test_a_window_shorter_than_the_cache_is_refused(kind: str, values: dict[str, Any]) -> None:
    for config in (decoder_config(kind, SIZES | values), AutoConfig.for_model(kind, pad_token_id=0, **SIZES, **values)):
        assert standard_kv(config, 16).capacity == 16  # within it every token sees all before
        with pytest.raises(VlmcError, match=r"sliding window.*16 tokens.*--capacity 16"):
            standard_kv(config, 17)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("llama", {"sliding_window": 16}),  # which it does not have
        ("qwen2", SLIDING | {"use_sliding_window": False}),
        ("qwen2", SLIDING | {"max_window_layers": 2}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_a_window_that_no_layer_has_is_none(kind: str, values: dict[str, Any]) -> None:
    assert standard_kv(AutoConfig.for_model(kind, **SIZES, **values), 1024).capacity == 1024


def test_a_decoder_that_caps_its_attention_is_refused() -> None:
    with pytest.raises(VlmcError, match=r"caps its attention's logits.*50"):
        standard_kv(AutoConfig.for_model("gemma2", **SIZES), 24)
