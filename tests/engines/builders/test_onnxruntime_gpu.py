"""What the builder for ONNX Runtime's CUDA provider writes and what it leaves to others; that it is right is shown in
tests/runtime/backends/test_onnxruntime_gpu.py."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from vlmc.artifact import Artifact
from vlmc.calibration.plan import read_plan
from vlmc.engines import builders
from vlmc.engines.builders import onnxruntime_gpu as builder
from vlmc.engines.passes import quantize
from vlmc.profiles.device import load_device

H100 = load_device("h100")


@pytest.mark.parametrize(
    ("component", "precision", "products"),
    [
        ("vision_encoder", "fp16", {"float16": 14, "float16 attention": 4}),
        ("decoder", "fp16", {"float16": 15, "float16 attention": 4}),
        ("decoder", "w4", {"w4": 14, "w8": 1, "float16 attention": 4}),
        ("decoder", "w8", {"w8": 15, "float16 attention": 4}),
    ],
)
def test_every_product_is_float16_or_of_packed_weights(
    component: str, precision: str, products: dict[str, int], planned: Artifact, tmp_path: Path
) -> None:
    model = ir.load(planned.graph(component))
    if precision != "fp16":
        quantize.apply(model, read_plan(planned, precision), component)
    kv = planned.manifest.kv
    job = builders.Job(component, precision, H100, kv, tmp_path, lambda: ir.load(""), {}, tmp_path / "timing.cache")
    built = builder.build(model, job)
    assert builder.products(tmp_path / built.file, built.settings) == products
    written = ir.load(tmp_path / built.file)
    assert written.graph.opset_imports[""] == 23
    casts = [node for node in written.graph if node.op_type == "Cast"]
    assert len(casts) <= 4  # at the borders
    if component == "decoder":
        assert built.kv is not None
        assert (built.kv.form, built.kv.dtype, built.kv.capacity) == ("shared", "float16", 128)
        borders = {str(value.name): value.dtype for value in (*written.graph.inputs, *written.graph.outputs)}
        assert borders["inputs_embeds"] == borders["logits"] == ir.DataType.FLOAT
        assert borders["past_key_values.0.key"] == borders["present.0.key"] == ir.DataType.FLOAT16
    else:
        assert built.kv is None


def test_it_offers_floats_and_packed_weights_and_says_why_not_int8() -> None:
    for precision in ("fp16", "w4", "w8"):
        assert builder.refuses("decoder", precision, H100) == ""
    for precision in ("int8", "int8-minmax"):
        assert "no int8 product" in builder.refuses("vision_encoder", precision, H100)
    assert "NumPy" in builder.refuses("embed_tokens", "fp16", H100)


def test_it_needs_no_gpu() -> None:
    assert builder.unavailable() == ""
