"""Every builder keeps its contract; what they build computes what the canonical graph does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from vlmc.artifact import COMPONENTS, FLOATS, Artifact, EngineSpec
from vlmc.calibration import recipes
from vlmc.calibration.plan import read_plan
from vlmc.engines import builders
from vlmc.engines.build import refuses
from vlmc.engines.builders import MODEL, Built
from vlmc.engines.passes import quantize
from vlmc.engines.passes.joined_products import AND
from vlmc.engines.trial import cosine
from vlmc.exporter import golden
from vlmc.profiles.device import Device, device_names, load_device
from vlmc.runtime import backends
from vlmc.runtime.backends.openvino import OpenvinoRunner, compile_model

CPU = load_device("cpu")


def build(artifact: Artifact, backend: str, component: str, recipe: str, folder: Path, device: Device = CPU) -> Built:
    model = ir.load(artifact.graph(component))

    def embed() -> ir.Model:
        return ir.load(artifact.graph("embed_tokens"))

    if recipe != "fp32":
        quantize.apply(model, read_plan(artifact, recipe), component)
    job = builders.Job(component, recipe, device, artifact.manifest.kv, folder, embed, {}, folder / "timing.cache")
    built = builders.load(backend).build(model, job)
    assert isinstance(built, Built)
    return built


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    before = sorted(folder.rglob("*"))
    yield
    assert sorted(folder.rglob("*")) == before


def test_a_builder_is_found_by_its_file_and_has_a_backend_that_runs_what_it_builds() -> None:
    assert builders.names() == [
        "handover",
        "numpy",
        "onnxruntime",
        "onnxruntime_gpu",
        "openvino",
        "tensorrt",
        "tensorrt_rtx",
    ]
    for name in builders.names():
        module = builders.load(name)
        assert isinstance(module.PACKAGES, tuple)
        assert module.FLOAT in FLOATS
        assert isinstance(module.unavailable(), str)
        assert name in backends.names()
        own = [device for device in map(load_device, device_names()) if name in device.backends]
        device = own[0] if own else load_device("orin")  # a handover is for devices whose TensorRT is not here
        offered = [component for component in COMPONENTS if not module.refuses(component, module.FLOAT, device)]
        assert offered, name


@pytest.mark.parametrize(
    ("component", "recipe", "products"),
    [
        ("vision_encoder", "fp32", {"float32": 14, "float32 attention": 4}),
        ("vision_encoder", "int8", {"float32": 1, "int8": 13, "float32 attention": 4}),  # the patch convolution
        ("decoder", "fp32", {"float32": 15, "float32 attention": 4}),
        ("decoder", "int8", {"int8": 15, "float32 attention": 4}),
        ("decoder", "w4", {"w4": 14, "w8": 1, "float32 attention": 4}),
        ("decoder", "w8", {"w8": 15, "float32 attention": 4}),
        ("embed_tokens", "fp32", {}),
    ],
)
def test_onnx_runtime_executes_the_products_in_the_recipes_precision(
    component: str, recipe: str, products: dict[str, int], planned: Artifact, tmp_path: Path
) -> None:
    built = build(planned, "onnxruntime", component, recipe, tmp_path)
    with untouched(tmp_path):
        assert builders.load("onnxruntime").products(tmp_path / built.file, built.settings) == products
    stored = {"MatMulNBits": "w", "MatMulIntegerToFloat": "int8"}  # not left to ONNX Runtime to find at every start
    nodes = list(ir.load(tmp_path / built.file).graph)
    for operator, kind in stored.items():
        made_of = [name for node in nodes if node.op_type == operator for name in str(node.name).split(AND)]
        assert len(made_of) == sum(count for name, count in products.items() if name.startswith(kind))
    if component == "decoder":
        assert built.kv is not None
        assert (built.kv.form, built.kv.capacity) == ("shared", 128)
    else:
        assert built.kv is None


def test_onnx_runtime_1_23_has_a_kernel_for_what_quantises(planned: Artifact, tmp_path: Path) -> None:
    """Its newest opset is 23, and there it has none of ONNX's own QuantizeLinear."""
    built = build(planned, "onnxruntime", "vision_encoder", "int8", tmp_path)
    model = ir.load(tmp_path / built.file)
    domains = [node.domain for node in model.graph if node.op_type == "QuantizeLinear"]
    assert domains and set(domains) == {"com.microsoft"}
    assert dict(model.opset_imports) == {"": 23, "com.microsoft": 1}


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_openvino_sees_what_pytorch_sees(recipe: str, planned: Artifact, tmp_path: Path) -> None:
    """Float: float32 sums in another order. int8: OpenVINO keeps sums in int32 where the fake-quant model has floats
    and may leave products float; what it gives is as near to PyTorch as the Q/DQ graph itself."""
    built = build(planned, "openvino", "vision_encoder", recipe, tmp_path)
    runner = OpenvinoRunner(compile_model(tmp_path / built.file))
    arrays = golden.read(planned)[1]
    for case in ("0", "1"):  # 5 tiles, then 9: the number is free
        exact = arrays[f"{case}.image_features"]
        found = runner.run({"pixel_values": arrays[f"{case}.pixel_values"]})["image_features"]
        if recipe == "fp32":
            np.testing.assert_allclose(found, exact, atol=1e-3)
        else:
            assert cosine(found, exact) > 0.999


def test_openvino_tells_the_precision_of_its_products(planned: Artifact, tmp_path: Path) -> None:
    for recipe in ("fp32", "int8"):
        (tmp_path / recipe).mkdir()
        built = build(planned, "openvino", "vision_encoder", recipe, tmp_path / recipe)
        counts = builders.load("openvino").products(tmp_path / recipe / built.file, built.settings)
        assert sum(counts.values()) == 14 + 2 * 2, counts  # layers, and attention's two products, fused or not
        assert (counts.get("int8", 0) > 0) == (recipe == "int8")
        if "int8 attention" in counts:  # where the processor's instructions let OpenVINO fuse it
            assert recipe == "int8"
            assert counts["int8 attention"] == counts["float32 attention"] == 2


def test_openvino_offers_vision_alone_and_says_why() -> None:
    module = builders.load("openvino")
    assert module.refuses("vision_encoder", "int8", CPU) == ""
    assert "KV cache" in module.refuses("decoder", "int8", CPU)
    assert module.refuses("embed_tokens", "fp32", CPU)
    assert "in blocks" in module.refuses("text_encoder", "w4", CPU)


@pytest.mark.parametrize(
    ("backend", "device", "pairs"),
    [("openvino", "cpu", 4), ("onnxruntime", "cpu", 0), ("handover", "orin", 0)],  # a handover is TensorRT's lowering
)
def test_queries_and_keys_are_rounded_for_openvino_alone(
    backend: str, device: str, pairs: int, planned: Artifact, tmp_path: Path
) -> None:
    built = build(planned, backend, "vision_encoder", "int8", tmp_path, load_device(device))
    nodes = [node for node in ir.load(tmp_path / built.file).graph if node.op_type == "QuantizeLinear"]
    assert len(nodes) > pairs
    assert sum(str(node.name).endswith(".output.quantize") for node in nodes) == pairs


def test_what_is_handed_over_is_the_quantised_graph_as_the_devices_tensorrt_takes_it(
    planned: Artifact, tmp_path: Path
) -> None:
    built = build(planned, "handover", "decoder", "int8", tmp_path, load_device("orin"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL, f"{MODEL}.data"]
    model = ir.load(tmp_path / built.file)
    assert dict(model.opset_imports) == {"": 17}
    assert "next_token" in [value.name for value in model.graph.outputs]
    assert [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert builders.load("handover").products(tmp_path / built.file, {}) == {}


def test_the_engines_of_a_build_agree_with_pytorch(built: Artifact) -> None:
    for component, backend, precision in (
        ("vision_encoder", "onnxruntime", "fp32"),
        ("vision_encoder", "onnxruntime", "int8"),
        ("vision_encoder", "openvino", "int8"),
        ("decoder", "onnxruntime", "fp32"),
        ("decoder", "onnxruntime", "int8"),
    ):
        spec, _ = built.engine("cpu", component, f"{backend}-{precision}")
        assert isinstance(spec, EngineSpec)
        assert spec.report.agreement is not None
        assert spec.report.agreement > (0.99999 if precision == "fp32" else 0.9)


@pytest.mark.parametrize("name", device_names())
def test_a_device_names_the_precisions_that_its_builders_offer(name: str) -> None:
    device = load_device(name)
    known = [builders.load(backend) for backend in device.backends]
    offered = {builder.FLOAT for builder in known}
    for recipe in set(recipes.names()) - {"fp32"}:
        if not all(
            refuses(builder, part, recipe, device) for builder in known for part in ("vision_encoder", "decoder")
        ):
            offered.add(recipe.partition("-")[0])
    assert set(device.precisions) == offered


def test_an_engines_record_names_openvino_no_folder_to_write_to(built_copy: Path, tmp_path: Path) -> None:
    path = built_copy / "engines/cpu/vision_encoder/openvino-fp32/engine.json"
    record = json.loads(path.read_text()) | {"settings": {"CACHE_DIR": str(tmp_path / "outside")}}
    path.write_text(json.dumps(record))
    backends.load_runner(Artifact(built_copy), "cpu", "vision_encoder", "openvino-fp32", 1)
    assert not (tmp_path / "outside").exists()


def test_a_recipe_of_another_name_is_taken_for_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = recipes.load
    monkeypatch.setattr(recipes, "load", lambda name: usual(name.removeprefix("our-")))
    cpu, h100, said = load_device("cpu"), load_device("h100"), {}
    for recipe in ("our-w4", "our-w8", "our-int8"):
        said[recipe] = [
            builders.load("openvino").refuses("vision_encoder", recipe, cpu),
            builders.load("onnxruntime_gpu").refuses("decoder", recipe, h100),
            builders.load("tensorrt").refuses("decoder", recipe, h100),
        ]
    assert [bool(why) for why in said["our-w4"]] == [True, False, True]
    assert "TensorRT 10.0, and" in said["our-w4"][2]
    assert "TensorRT 10.15, and" in said["our-w8"][2]
    assert [bool(why) for why in said["our-int8"]] == [False, True, False]
