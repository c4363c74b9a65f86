"""What the builder for TensorRT decides before TensorRT is there: dialect, shapes, what stays float32, what was run.

The rest is seen on a GPU (benchmarks/gpu_host.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tensorrt_rtx
from vlmc.artifact import Artifact, KvSpec
from vlmc.calibration.plan import read_plan
from vlmc.engines import builders, tensorrt_network
from vlmc.engines.builders import tensorrt as builder
from vlmc.engines.passes import quantize
from vlmc.engines.tensorrt_profiles import Range
from vlmc.exporter import golden
from vlmc.profiles.device import load_device

ORIN = load_device("orin")
KV = KvSpec(layers=2, kv_heads=2, head_dim=16, capacity=128)


def lowered(
    artifact: Artifact, component: str, tensorrt: str, folder: Path, recipe: str = "int8"
) -> tuple[ir.Model, str]:
    model = ir.load(artifact.graph(component))
    quantize.apply(model, read_plan(artifact, recipe), component)
    device = replace(ORIN, tensorrt=tensorrt)
    embed = ir.load(artifact.graph("embed_tokens"))
    job = builders.Job(
        component, "int8", device, artifact.manifest.kv, folder, lambda: embed, {}, folder / "timing.cache"
    )
    return model, builder.lower(model, job)


@pytest.mark.parametrize(
    ("version", "opset", "form", "half"),
    [
        ("8.6", 17, "append", False),
        ("10.3", 17, "append", False),
        ("10.13", 17, "append", True),
        ("10.16", 24, "shared", True),
    ],
)
def test_the_graph_speaks_the_devices_tensorrt(
    version: str, opset: int, form: str, half: bool, planned: Artifact, tmp_path: Path
) -> None:
    model, found = lowered(planned, "decoder", version, tmp_path)
    assert (dict(model.opset_imports)[""], found) == (opset, form)
    floats = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT  # else the builder types them
    assert {node.outputs[0].dtype for node in model.graph if node.op_type == "MatMul"} == {floats}
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    assert list(past.shape or ()) == [1, 2, planned.manifest.kv.capacity, 16]
    assert past.dtype == floats
    assert {"input_ids", "inputs_embeds"} <= {str(value.name) for value in model.graph.inputs}


def test_a_decoder_has_a_profile_for_the_step_and_prompts_by_length(planned: Artifact, tmp_path: Path) -> None:
    model, _ = lowered(planned, "decoder", "8.6", tmp_path)
    step, prompt = builder.profiles(model, job("decoder", 128))
    assert step["inputs_embeds"] == ((1, 1, 64),) * 3
    assert prompt["position_ids"] == ((1, 1), (1, 128), (1, 128))
    for capacity, lengths in ((2048, [1, 256, 2048]), (256, [1, 256])):
        assert [p["input_ids"][2][1] for p in builder.profiles(model, job("decoder", capacity))] == lengths


def test_vision_has_a_profile_for_one_tile_and_one_for_more(planned: Artifact, tmp_path: Path) -> None:
    model, form = lowered(planned, "vision_encoder", "8.6", tmp_path)
    assert form == ""
    vision = job("vision_encoder", 128, tiles=Range(1, 5, 17))
    found = [tuple(shape[0] for shape in shapes["pixel_values"]) for shapes in builder.profiles(model, vision)]
    assert found == [(1, 1, 1), (2, 5, builder.MOST)]


def job(component: str, capacity: int, **sizes: Range) -> builders.Job:
    kv, folder = replace(KV, capacity=capacity), Path()
    return builders.Job(component, "int8", ORIN, kv, folder, lambda: pytest.fail("not needed"), sizes, folder)


def test_what_a_version_cannot_do_is_said_before_anything_is_built() -> None:
    assert builder.refuses("decoder", "int8", ORIN) == ""
    assert builder.refuses("embed_tokens", "fp16", ORIN)
    assert "need TensorRT 10.15" in builder.refuses("decoder", "w8", ORIN)
    assert builder.refuses("decoder", "w8", replace(ORIN, tensorrt="10.16")) == ""
    assert builder.refuses("decoder", "w4", ORIN) == ""
    assert "need TensorRT 10.0, and H100" in builder.refuses("decoder", "w4", load_device("h100"))


def test_tensorrt_10_gets_blocks_of_int4_and_what_it_lacks_as_floats(planned: Artifact, tmp_path: Path) -> None:
    model, form = lowered(planned, "decoder", "10.3", tmp_path, "w4")
    assert (dict(model.opset_imports)[""], form) == (21, "append")
    blocks = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert {node.inputs[0].dtype for node in blocks if node.inputs[0] is not None} == {ir.DataType.INT4}
    assert len(blocks) == 14  # the head's blocks of int8 became floats
    ir.save(model, tmp_path / "w4.onnx", external_data="w4.onnx.data")
    parsed = tensorrt_network.parse(tensorrt_rtx, tmp_path / "w4.onnx", "decoder")  # the parser of TensorRT's family
    assert tensorrt_network.products(parsed)["w4"] == 14


def test_blocks_of_int4_compute_what_the_canonical_graph_does(planned: Artifact, tmp_path: Path) -> None:
    model, _ = lowered(planned, "decoder", "10.3", tmp_path, "w4")
    canonical = ir.load(planned.graph("decoder"))
    quantize.apply(canonical, read_plan(planned, "w4"), "decoder")
    arrays, kv = golden.read(planned)[1], planned.manifest.kv
    embeds = arrays["0.inputs_embeds"]
    length = embeds.shape[1]
    feeds: dict[str, Any] = {
        "inputs_embeds": embeds,
        "position_ids": np.arange(length)[None],
        "write_index": np.zeros(1, np.int64),
        "logits_index": np.array([length - 1]),
    }
    for index in range(kv.layers):
        for part in ("key", "value"):
            state = np.zeros((1, kv.kv_heads, kv.capacity, kv.head_dim), np.float32)
            feeds[f"past_key_values.{index}.{part}"] = state
    wanted = logits(canonical, feeds, tmp_path / "canonical")
    narrow = {name: a.astype(np.int32) if a.dtype == np.int64 else a for name, a in feeds.items()}
    found = logits(model, narrow | {"input_ids": np.full((1, length), -1, np.int32)}, tmp_path / "lowered")
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def logits(model: ir.Model, feeds: dict[str, Any], folder: Path) -> Any:
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # fused kernels round activations
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize(
    ("version", "convolutions", "quick"), [("8.6", 8, True), ("8.6", 7, False), ("10.3", 8, False)]
)
def test_a_convolutional_network_is_built_quickly_by_tensorrt_8(version: str, convolutions: int, quick: bool) -> None:
    image = ir.Value(name="image")
    nodes = [ir.node("Conv", [image, image]) for _ in range(convolutions)]
    model = ir.Model(ir.Graph([image], [], nodes=[*nodes, ir.node("MatMul", [image, image])]), ir_version=10)
    assert builder.quick(model, replace(ORIN, tensorrt=version)) is quick


def test_norms_stay_float32_and_the_cache_becomes_float16() -> None:
    class Layer:
        def __init__(self, name: str) -> None:
            self.name, self.precision, self.output = name, "", ""

        def set_output_type(self, index: int, kind: str) -> None:
            self.output = kind

    layers = [Layer("layers.0.norm.square"), Layer("layers.0.mlp.up_proj"), Layer("layers.0.norm.normal")]
    inputs = [SimpleNamespace(name=name, dtype="f32") for name in ("inputs_embeds", "past_key_values.0.key")]
    outputs = [SimpleNamespace(name=name, dtype="f32") for name in ("logits", "present.0.key")]
    network = SimpleNamespace(
        num_layers=3,
        get_layer=layers.__getitem__,
        num_inputs=2,
        get_input=inputs.__getitem__,
        num_outputs=2,
        get_output=outputs.__getitem__,
    )
    parsed: Any = SimpleNamespace(network=network)
    builder._type_weakly(SimpleNamespace(float32="f32", float16="f16"), parsed)
    assert [layer.precision for layer in layers] == ["f32", "", "f32"]
    assert [tensor.dtype for tensor in inputs + outputs] == ["f32", "f16", "f32", "f16"]


@pytest.mark.parametrize(
    ("version", "precision", "operator"),
    [("8.6", "fp16", "Max"), ("8.6", "int8", "Clip"), ("10.13", "fp16", "Clip")],
)
def test_a_bound_from_below_is_a_maximum_where_floats_are_typed_weakly(
    version: str, precision: str, operator: str, tmp_path: Path
) -> None:
    x, y = (ir.val(name, ir.DataType.FLOAT, [2, 3]) for name in "xy")
    low = ir.val("low", const_value=ir.tensor(np.float32(0), name="low"))
    graph = ir.Graph([x], [y], nodes=[ir.Node("", "Clip", [x, low], outputs=[y])], initializers=[low])
    graph.opset_imports[""] = 17
    model, device = ir.Model(graph, ir_version=8), replace(ORIN, tensorrt=version)
    builder.lower(
        model, builders.Job("vision_encoder", precision, device, KV, tmp_path, lambda: model, {}, tmp_path / "cache")
    )
    assert operator in [node.op_type for node in model.graph]


def test_products_are_the_inspectors_where_it_shows_layers() -> None:
    layers = [
        {"LayerType": "CaskGemm", "Inputs": [{"Format/Datatype": "Row major Int8 format"}]},
        {"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Row major linear FP16 format"}]},
        {"LayerType": "PointWise", "Inputs": [{"Format/Datatype": "Row major Int8 format"}]},
    ]
    assert builder.executed(layers, {"int8": 9}, True) == {"int8": 1, "float16": 1}


def test_a_fused_region_shows_none_and_the_report_says_so() -> None:
    region, asked = [{"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin"}], {"int8": 9, "float32 attention": 2}
    assert builder.executed(region, asked, weak=False) == {"int8 (asked)": 9, "float32 attention (asked)": 2}
    weakly = {"int8 (asked)": 9, "float16 or float32 attention (asked)": 2}
    assert builder.executed(region, asked, weak=True) == weakly
    beside = {"LayerType": "CaskGemm", "Inputs": [{"Format/Datatype": "Row major Int8 format"}]}
    assert builder.executed([beside, *region], asked, weak=True) == weakly


@pytest.mark.parametrize(
    ("kept", "fits", "taken"), [(b"ours", True, b"ours"), (b"another GPU's", False, b""), (b"", True, b"")]
)
def test_a_timing_cache_of_another_gpu_is_begun_anew(kept: bytes, fits: bool, taken: bytes, tmp_path: Path) -> None:
    if kept:
        (tmp_path / "timing.cache").write_bytes(kept)
    used: list[Any] = []

    def take(cache: Any, ignore_mismatch: bool) -> bool:
        used.append(cache)
        return not ignore_mismatch and (fits or cache.content == b"")

    made = SimpleNamespace(
        create_timing_cache=lambda content: SimpleNamespace(content=content, serialize=lambda: content + b" and more"),
        set_timing_cache=take,
    )
    cache = builder._TimingCache(None, tmp_path / "timing.cache")
    cache.use(made)
    cache.keep()
    assert used[-1].content == taken
    assert (tmp_path / "timing.cache").read_bytes() == taken + b" and more"
