"""Norms between casts become norms in float16; what would lose by it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from vlmc.artifact import Artifact
from vlmc.engines.passes import half_norms, half_precision

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def norm(operator: str, scale: float = 1.0, reads: tuple[ir.DataType, ...] = (HALF,), **attributes: Any) -> ir.Model:
    """float16 x (rows, 8) → Cast → norm → a Cast for each of `reads`."""
    x = ir.Value(name="x", shape=ir.Shape(["rows", 8]), type=ir.TensorType(HALF))
    tensor = ir.tensor(np.linspace(0.5, 1.5, 8, dtype=np.float32) * np.float32(scale), name="scale")
    weight = ir.Value(name="scale", shape=ir.Shape([8]), type=ir.TensorType(FLOAT), const_value=tensor)
    cast = ir.node("Cast", [x], attributes={"to": FLOAT.value}, name="up")
    made = ir.node(operator, [cast.outputs[0], weight], attributes=attributes or None, name="norm")
    ends = [ir.node("Cast", [made.outputs[0]], attributes={"to": kind.value}, name=f"down.{kind}") for kind in reads]
    for node, kind in ((cast, FLOAT), (made, FLOAT), *zip(ends, reads, strict=True)):
        node.outputs[0].shape, node.outputs[0].type = x.shape, ir.TensorType(kind)
        node.outputs[0].name = f"{node.name}.out"
    outputs = [ir.node("Neg", [end.outputs[0]], name=f"y.{end.name}") for end in ends]
    for node, kind in zip(outputs, reads, strict=True):
        node.outputs[0].shape, node.outputs[0].type = x.shape, ir.TensorType(kind)
        node.outputs[0].name = f"{node.name}.out"
    nodes = [cast, made, *ends, *outputs]
    values = [node.outputs[0] for node in outputs]
    graph = ir.Graph([x], values, nodes=nodes, initializers=[weight], opset_imports={"": 23}, name="small")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("operator", ["LayerNormalization", "RMSNormalization"])
def test_the_casts_go_and_the_outputs_stay(operator: str, load: Any, operators: Any) -> None:
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16) * np.float16(200)  # squares beyond float16
    before = load(norm(operator)).run(None, {"x": x})[0]
    model = norm(operator)
    assert half_norms.apply(model) == 1
    assert operators(model) == {operator: 1, "Neg": 1}
    after = load(model).run(None, {"x": x})[0]
    assert after.dtype == np.float16
    np.testing.assert_allclose(after, before, rtol=4e-3)


@pytest.mark.parametrize(
    "model",
    [
        lambda: norm("RMSNormalization", stash_type=10),
        lambda: norm("RMSNormalization", scale=1e5),
        lambda: norm("RMSNormalization", reads=(HALF, FLOAT)),
        lambda: norm("Softmax"),
    ],
    ids=["sums in float16", "large scale", "read as float32", "no norm"],
)
def test_what_would_lose_by_it_stays(model: Callable[[], ir.Model], operators: Any) -> None:
    made = model()
    before = operators(made)
    assert half_norms.apply(made) == 0
    assert operators(made) == before


def test_in_a_real_decoder_only_what_reads_the_borders_stays(tiny: Artifact, operators: Any) -> None:
    model = ir.load(tiny.graph("decoder"))
    half_precision.apply(model)
    casts, norms = operators(model)["Cast"], operators(model)["RMSNormalization"]
    changed = half_norms.apply(model)
    assert norms - 1 <= changed <= norms
    assert operators(model)["Cast"] <= casts - 2 * changed + 1
