"""Norms that a graph spells out are found, named, and kept in float32, where float16 has no place for their squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from vlmc.engines.passes import half_precision, norms

SIZE = 3000.0  # whose square float16 does not hold

CHANNELS = """(float[1,8,2,2] x) => (float[1,8,2,2] y) {
    s = Pow(x, two) m = ReduceMean(s, first) e = Add(m, tiny) r = Sqrt(e) i = Reciprocal(r) y = Mul(x, i) }"""
MAGNITUDE = (
    "(float[2,8] x) => (float[2,8] y) { s = Pow(x, two) m = ReduceMean(s, first) r = Pow(m, half) y = Div(x, r) }"
)
CLIPPED = """(float[2,8] x) => (float[2,8] y) {
    s = Mul(x, x) m = ReduceMean(s, first) c = Clip(m, tiny) r = Sqrt(c) y = Div(x, r) }"""
SPREAD = """(float[2,8] x) => (float[2,8] y) {
    s = Mul(x, x) m = ReduceSum(s, first) w = Reshape(m, wide) d = Mul(w, half) e = Expand(d, like) r = Sqrt(e)
    y = Div(x, r) }"""
L2 = "(float[2,8] x) => (float[2,8] y) { r = ReduceL2(x, first) y = Div(x, r) }"
SPELT_OUT = [CHANNELS, MAGNITUDE, CLIPPED, SPREAD]
CONSTANTS = {
    "two": np.array(2.0, np.float32),
    "half": np.array(0.5, np.float32),
    "tiny": np.array(1e-6, np.float32),
    "first": np.array([1]),
    "wide": np.array([2, 1]),
    "like": np.array([2, 8]),
}


@pytest.fixture
def graph(written: Any) -> Callable[[str], ir.Model]:
    return lambda text: written(text, CONSTANTS, 24)


def run(model: ir.Model) -> np.ndarray:
    """In the types that the graph says, which ONNX Runtime does not keep to on a CPU."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = ReferenceEvaluator(ir.to_proto(model)).run(None, values(model))
    return np.asarray(found[0])  # type: ignore[index]


def values(model: ir.Model) -> dict[str, np.ndarray]:
    shape = model.graph.inputs[0].shape
    assert shape is not None
    return {"x": np.random.default_rng(0).normal(size=[*shape]).astype(np.float32) * SIZE}


@pytest.mark.parametrize("text", [*SPELT_OUT, L2])
def test_squares_of_what_float16_holds_are_no_infinities(text: str, graph: Any) -> None:
    exact, model = graph(text), graph(text)
    half_precision.apply(model)
    np.testing.assert_allclose(run(model), run(exact), rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("text", SPELT_OUT)
def test_without_their_names_they_would_be(text: str, monkeypatch: pytest.MonkeyPatch, graph: Any) -> None:
    monkeypatch.setattr(norms, "apply", lambda model: 0)
    model = graph(text)
    half_precision.apply(model)
    found = run(model)
    assert not np.isfinite(found).all() or not found.any()


@pytest.mark.parametrize("text", SPELT_OUT)
def test_all_from_the_square_to_the_root_is_named_once(text: str, graph: Any) -> None:
    model = graph(text)
    assert norms.apply(model) == 1
    names = [str(node.name) for node in model.graph]
    assert names[0] == "node0.spelt.square"
    behind = len(names) - (2 if text == CHANNELS else 1)  # what divides by the root is none of it
    assert all(name.startswith("node0.") and name.endswith(norms.PARTS) for name in names[:behind])
    assert names[behind - 1].endswith(".root")
    assert names[behind:] == [f"node{index}" for index in range(behind, len(names))]
    assert norms.apply(model) == 0
    assert [str(node.name) for node in model.graph] == names


@pytest.mark.parametrize(
    "text",
    [
        "(float[2,8] x) => (float[2,8] y) { y = Pow(x, two) }",
        "(float[2,8] x) => (float[2,1] y) { s = Pow(x, half) y = ReduceMean(s, first) }",
        "(float[2,8] x, float[2,8] z) => (float[2,1] y) { s = Mul(x, z) y = ReduceMean(s, first) }",
    ],
)
def test_other_powers_and_products_are_no_norms(text: str, graph: Any) -> None:
    assert norms.apply(graph(text)) == 0
