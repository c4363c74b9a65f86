"""Angles become tables: the same numbers for every position below the capacity, however the positions lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from vlmc.artifact import Artifact
from vlmc.engines.passes import opset17, rotary_tables, two_segment_attention

CAPACITY = 300
CONSTANTS = {"last": np.array([-1]), "frequencies": np.array([1.0, 0.65, 0.1, 1e-3], np.float32)}

ROWS = """(int64[1,length] p) => (float[1,length,8] y) {
    l = Unsqueeze(p, last) f = Cast<to = 1>(l) a = Mul(f, frequencies) b = Concat<axis = -1>(a, a) y = Cos(b) }"""
THREE_ROWS = """(int64[3,1,length] p) => (float[3,1,length,4] y) {
    l = Unsqueeze(p, last) f = Cast<to = 1>(l) a = Mul(f, frequencies) y = Sin(a) }"""
RELATIVE = """(int64[1,length] p) => (float[1,length,4] y) {
    l = Unsqueeze(p, last) f = Cast<to = 1>(l) most = ReduceMax<axes = [1]>(f) r = Sub(f, most)
    a = Mul(r, frequencies) y = Cos(a) }"""
TWO_SOURCES = """(int64[1,length] p, int64[1,length] q) => (float[1,length,4] y) {
    l = Unsqueeze(p, last) f = Cast<to = 1>(l) k = Unsqueeze(q, last) g = Cast<to = 1>(k)
    s = Add(f, g) a = Mul(s, frequencies) y = Cos(a) }"""
FLOATS = "(float[1,length,4] x) => (float[1,length,4] y) { y = Cos(x) }"


@pytest.fixture
def graph(written: Any) -> Callable[[str], ir.Model]:
    return lambda text: written(text, CONSTANTS)


@pytest.mark.parametrize("text", [ROWS, THREE_ROWS])
def test_a_table_gives_what_was_computed(text: str, load: Any, operators: Any, graph: Any) -> None:
    exact, model = load(graph(text)), graph(text)
    assert rotary_tables.apply(model, CAPACITY) == 1
    assert operators(model) == {"Gather": 1}
    session, shape = load(model), [size if isinstance(size, int) else 7 for size in model.graph.inputs[0].shape or ()]
    for low, high in ((0, CAPACITY), (CAPACITY - 8, CAPACITY), (0, 1)):
        given = {"p": np.random.default_rng(low).integers(low, high, shape)}
        np.testing.assert_allclose(session.run(None, given)[0], exact.run(None, given)[0], atol=1e-6)


def test_frequencies_may_lie_beside_the_graph(tmp_path: Path, graph: Any) -> None:
    ir.save(graph(ROWS), tmp_path / "g.onnx", external_data="g.onnx.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "g.onnx")
    assert rotary_tables.apply(model, CAPACITY) == 1


@pytest.mark.parametrize("text", [RELATIVE, TWO_SOURCES, FLOATS])
def test_what_does_not_follow_from_each_position_alone_stays(text: str, graph: Any) -> None:
    model = graph(text)
    assert rotary_tables.apply(model, CAPACITY) == 0
    assert {"Cos"} <= {node.op_type for node in model.graph}


def test_a_decoder_looks_its_angles_up_at_every_place(
    tiny: Artifact, steps: Callable[..., Any], close: Any, operators: Any
) -> None:
    kv = tiny.manifest.kv

    def lowered() -> ir.Model:
        model = ir.load(tiny.graph("decoder"))
        two_segment_attention.apply(model, kv)
        opset17.apply(model)
        return model

    model = lowered()
    assert rotary_tables.apply(model, kv.capacity) == 2
    assert not {"Cos", "Sin"} & operators(model).keys()
    pair = steps(lowered(), kv), steps(model, kv)
    for seed, length in enumerate([kv.capacity - 3, 1, 1, 1]):
        embeds = np.random.default_rng(seed).normal(size=(1, length, 64)).astype(np.float32)
        expected, found = (decoder(embeds)["logits"] for decoder in pair)
        close(found, expected)
