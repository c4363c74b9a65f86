"""Engines for GPUs that are not here, built by TensorRT-RTX itself from the same graphs as every other backend's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tensorrt_rtx as trt
from vlmc.artifact import Artifact
from vlmc.calibration.plan import read_plan
from vlmc.engines import tensorrt_network
from vlmc.engines.builders import Built, Job, tensorrt_rtx
from vlmc.engines.passes import group_query_attention, half_precision, quantize
from vlmc.engines.tensorrt_profiles import ranges
from vlmc.engines.trial import cosine
from vlmc.errors import VlmcError
from vlmc.exporter import golden
from vlmc.profiles.device import device_names, load_device


def job(artifact: Artifact, component: str, precision: str, folder: Path, device: str = "gb10") -> Job:
    return Job(
        component=component,
        precision=precision,
        device=load_device(device),
        kv=artifact.manifest.kv,
        folder=folder,
        embed=lambda: ir.load(artifact.graph("embed_tokens")),
        sizes=ranges(artifact, component),
        cache=folder / "timing.cache",
    )


def graph(artifact: Artifact, component: str, precision: str) -> ir.Model:
    model = ir.load(artifact.graph(component))
    if precision != tensorrt_rtx.FLOAT:
        quantize.apply(model, read_plan(artifact, precision), component)
    return model


def build(artifact: Artifact, component: str, precision: str, folder: Path, device: str = "gb10") -> Built:
    return tensorrt_rtx.build(
        graph(artifact, component, precision), job(artifact, component, precision, folder, device)
    )


@pytest.mark.parametrize(
    ("component", "precision", "products"),
    [
        ("vision_encoder", "fp16", {"float16": 14, "float16 attention": 4}),
        ("vision_encoder", "int8", {"float16": 1, "int8": 13, "float16 attention": 4}),  # the patch convolution
        ("embed_tokens", "fp16", {}),
        ("decoder", "fp16", {"float16": 15, "float16 attention": 4}),
        ("decoder", "int8", {"int8": 15, "float16 attention": 4}),
        ("decoder", "w8", {"w8": 15, "float16 attention": 4}),
        ("decoder", "w4", {"w4": 14, "w8": 1, "float16 attention": 4}),
    ],
)
def test_an_engine_for_a_gb10_without_a_gpu(
    component: str, precision: str, products: dict[str, int], planned: Artifact, tmp_path: Path
) -> None:
    built = build(planned, component, precision, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [built.file]
    assert (tmp_path / built.file).stat().st_size > 10_000
    assert tensorrt_rtx.products(tmp_path / built.file, built.settings) == products
    assert (built.settings["sm"], built.settings["version"]) == (121, trt.__version__)
    if component == "decoder":
        assert built.kv is not None
        assert (built.kv.form, built.kv.capacity, built.kv.dtype) == ("shared", 128, "float16")
    else:
        assert built.kv is None


def test_what_it_builds_computes_what_pytorch_does(planned: Artifact, load: Any, tmp_path: Path) -> None:
    """The lowered decoder in ONNX Runtime: a prompt, then a step whose token is looked up by the graph itself."""
    model = graph(planned, "decoder", "fp16")
    tensorrt_rtx.lower(model, job(planned, "decoder", "fp16", tmp_path))
    session, arrays, kv = load(model), golden.read(planned)[1], planned.manifest.kv
    embeds = arrays["0.inputs_embeds"]
    length, nothing = embeds.shape[1], np.zeros((1, 1, embeds.shape[2]), np.float32)
    empty = np.zeros((1, kv.kv_heads, kv.capacity, kv.head_dim), np.float16)
    states = [value.name for value in session.get_outputs() if value.name.startswith("present.")]

    def run(embeds: np.ndarray, token: int, start: int, cache: list[np.ndarray]) -> list[np.ndarray]:
        count = embeds.shape[1]
        feeds = {"inputs_embeds": embeds, "input_ids": np.full((1, count), token, np.int32)}
        feeds |= {"position_ids": np.arange(start, start + count)[None], "write_index": np.array([start])}
        feeds |= {"logits_index": np.array([count - 1])}
        feeds |= {f"past_key_values.{name[8:]}": past for name, past in zip(states, cache, strict=True)}
        return list(session.run(["logits", "next_token", *states], feeds))

    logits, token, *cache = run(embeds, -1, 0, [empty] * len(states))
    assert cosine(logits, arrays["0.prefill_logits"]) > 0.9999
    assert token.item() == arrays["0.prefill_logits"].argmax()
    logits, _, *_ = run(nothing, int(arrays["0.step_tokens"][0]), length, cache)
    assert cosine(logits, arrays["0.step_logits"][0]) > 0.9999


def test_queries_and_keys_of_vision_are_not_rounded_for_it(planned: Artifact, tmp_path: Path) -> None:
    model = graph(planned, "vision_encoder", "int8")
    assert [node for node in model.graph if str(node.name).endswith(".output.quantize")]
    tensorrt_rtx.lower(model, job(planned, "vision_encoder", "int8", tmp_path))
    assert not [node for node in model.graph if str(node.name).endswith(".output.quantize")]


@pytest.mark.parametrize("device", ["rtx3060", "rtx4090", "rtx5090"])
def test_each_kind_of_card_gets_an_engine_of_its_own(device: str, planned: Artifact, tmp_path: Path) -> None:
    built = build(planned, "vision_encoder", "int8", tmp_path, device)
    assert built.settings["sm"] == load_device(device).sm
    assert f"sm{load_device(device).sm}".encode() in (tmp_path / built.file).read_bytes()


def test_every_device_that_names_it_can_be_built_for() -> None:
    named = [device for device in map(load_device, device_names()) if "tensorrt_rtx" in device.backends]
    assert named
    for device in named:
        assert tensorrt_rtx.refuses("decoder", tensorrt_rtx.FLOAT, device) == ""
    assert tensorrt_rtx.unavailable() == ""


def test_a_gpu_that_it_does_not_build_for_is_refused_in_a_sentence(planned: Artifact, tmp_path: Path) -> None:
    orin = load_device("orin")
    said = f"TensorRT-RTX builds for SM 75, 80, 86, 89, 120, 121, and {orin.title} is SM 87"
    assert tensorrt_rtx.refuses("decoder", "int8", orin) == said
    assert tensorrt_rtx.refuses("decoder", "int8", load_device("cpu")).endswith("has no GPU")
    with pytest.raises(VlmcError, match="is SM 87"):
        build(planned, "embed_tokens", "fp16", tmp_path, "orin")
    assert list(tmp_path.iterdir()) == []


def test_one_profile_holds_steps_and_prompts_that_fill_the_cache(planned: Artifact, tmp_path: Path) -> None:
    model, decoder = graph(planned, "decoder", "fp16"), job(planned, "decoder", "fp16", tmp_path)
    tensorrt_rtx.lower(model, decoder)
    (shapes,) = tensorrt_rtx.profiles(model, decoder)
    assert shapes.keys() == {"inputs_embeds", "position_ids", "input_ids"}
    assert shapes["inputs_embeds"] == ((1, 1, 64), (1, 1, 64), (1, 128, 64))
    assert shapes["input_ids"] == ((1, 1), (1, 1), (1, 128))


def test_vision_takes_what_the_golden_pictures_have_and_more(planned: Artifact, tmp_path: Path) -> None:
    vision = job(planned, "vision_encoder", "fp16", tmp_path)
    (profile,) = tensorrt_rtx.profiles(graph(planned, "vision_encoder", "fp16"), vision)
    assert [shape[0] for shape in profile["pixel_values"]] == [1, 9, 17]


def test_onnx_runtimes_operators_are_refused_by_name(planned: Artifact, tmp_path: Path) -> None:
    model = graph(planned, "decoder", "fp16")
    group_query_attention.apply(model, planned.manifest.kv)
    half_precision.apply(model)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    with pytest.raises(VlmcError, match="refuses the decoder") as caught:
        tensorrt_network.parse(trt, tmp_path / "model.onnx", "decoder")
    assert caught.value.found.startswith("GroupQueryAttention '")


def test_a_float32_decoder_ends_in_a_sentence(
    planned: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_precision, "apply", lambda model: 0)
    with pytest.raises(VlmcError, match="does not build the decoder") as caught:
        build(planned, "decoder", "fp16", tmp_path)
    assert "Attention" in caught.value.found
    assert list(tmp_path.iterdir()) == []
