"""A graph in pieces is the graph: they share nothing large, hand over little, and compute the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vlmc.artifact import Artifact
from vlmc.calibration.plan import read_plan
from vlmc.engines import builders, pieces
from vlmc.engines.builders import tensorrt as builder
from vlmc.engines.passes import quantize
from vlmc.profiles.device import load_device

Written = Callable[..., ir.Model]
# Three layers of a residual each, whose scale every piece can work out from the place.
LAYERS = """(float[1,n,4] x, int64[1] place) => (float[1,n,4] y) {
  one = Cast<to=1>(place) scale = Sin(one)
  a = MatMul(x, w0) a1 = Mul(a, scale) x1 = Add(x, a1)
  b = MatMul(x1, w1) b1 = Mul(b, scale) x2 = Add(x1, b1)
  c = MatMul(x2, w2) c1 = Mul(c, scale) y = Add(x2, c1) }"""
WEIGHTS = {f"w{i}": np.random.default_rng(i).normal(size=(4, 4)).astype(np.float32) for i in range(3)}
WEIGHT = 4 * 4 * 4  # bytes


def run(models: list[ir.Model], given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All that the models make, one after another."""
    known = dict(given)
    for index, model in enumerate(models):
        path = folder / f"{index}.onnx"
        ir.save(model, path, external_data=f"{path.name}.data")
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        found = session.run(names, {value.name: known[value.name] for value in session.get_inputs()})
        known |= dict(zip(names, found, strict=True))
    return known


def names(values: Any) -> list[str]:
    return [str(value.name) for value in values]


def test_the_cut_goes_where_least_crosses_it(written: Written, tmp_path: Path) -> None:
    found = pieces.cut(written(LAYERS, WEIGHTS), WEIGHT)
    assert [names(piece.graph.inputs) for piece in found] == [["x", "place"], ["place", "x1"], ["place", "x2"]]
    assert [names(piece.graph.outputs) for piece in found] == [["x1"], ["x2"], ["y"]]
    assert [names(piece.graph.initializers.values()) for piece in found] == [["w0"], ["w1"], ["w2"]]
    given = {"x": np.ones((1, 3, 4), np.float32), "place": np.array([5])}
    whole = run([written(LAYERS, WEIGHTS)], given, tmp_path)["y"]
    np.testing.assert_array_equal(run(found, given, tmp_path)["y"], whole)


def test_what_is_small_enough_stays_the_model_itself(written: Written) -> None:
    model = written(LAYERS, WEIGHTS)
    assert pieces.constant_bytes(model) == 3 * WEIGHT
    assert pieces.cut(model, 3 * WEIGHT) == [model]
    assert len(pieces.cut(model, 3 * WEIGHT - 1)) == 2


def test_an_output_that_others_read_is_both(written: Written, tmp_path: Path) -> None:
    graph = LAYERS.replace("(float[1,n,4] y)", "(float[1,n,4] x1, float[1,n,4] y, float[1] scale)")
    found = pieces.cut(written(graph, WEIGHTS), WEIGHT)
    assert [names(piece.graph.outputs) for piece in found] == [["x1"], ["x2"], ["y", "scale"]]


def test_an_input_that_nothing_reads_is_the_last_pieces(written: Written) -> None:
    found = pieces.cut(written(LAYERS.replace("int64[1] place", "int64[1] place, float[n] spare"), WEIGHTS), WEIGHT)
    assert [("spare" in names(piece.graph.inputs)) for piece in found] == [False, False, True]


def test_no_tensor_of_unknown_size_crosses(written: Written) -> None:
    model = written(LAYERS, WEIGHTS)
    next(node for node in model.graph if node.outputs[0].name == "x1").outputs[0].shape = None
    assert [names(piece.graph.outputs) for piece in pieces.cut(model, WEIGHT)] == [["a1"], ["x2"], ["y"]]


def test_small_tables_are_in_every_piece_and_large_ones_in_one(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = LAYERS.replace("one = Cast<to=1>(place)", "one = Gather(table, place)")
    weights = WEIGHTS | {"table": np.arange(9, dtype=np.float32)}

    def with_table() -> list[bool]:
        found = pieces.cut(written(graph, weights), WEIGHT + 36)
        return ["table" in piece.graph.initializers for piece in found]

    assert with_table() == [True, True, True]
    monkeypatch.setattr(pieces, "SMALL", 35)
    assert with_table() == [True, False, False]


def test_lengths_and_what_is_made_of_constants_cross_nothing(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = LAYERS.replace("one = Cast<to=1>(place)", "size = Shape(x) one = Cast<to=1>(size)")
    graph = graph.replace("scale = Sin(one)", "scale = ReduceMax(one) v2 = Neg(w2)").replace("(x2, w2)", "(x2, v2)")
    monkeypatch.setattr(pieces, "SMALL", 0)
    found = pieces.cut(written(graph, WEIGHTS), WEIGHT)
    assert [names(piece.graph.outputs) for piece in found] == [["x1"], ["x2"], ["y"]]
    assert [names(piece.graph.initializers.values()) for piece in found] == [["w0"], ["w1"], ["w2"]]


@pytest.mark.parametrize("recipe", ["fp16", "int8"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(count=st.integers(1, 12))
def test_a_decoder_in_any_number_of_pieces_is_the_decoder(
    count: int, recipe: str, planned: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, kv = tmp_path_factory.mktemp("pieces"), planned.manifest.kv
    model = ir.load(planned.graph("decoder"))
    if recipe != "fp16":
        quantize.apply(model, read_plan(planned, recipe), "decoder")
    embed = ir.load(planned.graph("embed_tokens"))
    job = builders.Job("decoder", recipe, load_device("h100"), kv, folder, lambda: embed, {}, folder)
    builder.lower(model, job)
    random, length = np.random.default_rng(0), 3
    given: dict[str, Any] = {
        "inputs_embeds": random.normal(size=(1, length, 64)).astype(np.float32),
        "position_ids": np.arange(7, 7 + length, dtype=np.int32)[None],
        "write_index": np.array([7], np.int32),
        "logits_index": np.array([2], np.int32),
        "input_ids": np.array([[5, -1, 9]], np.int32),
    }
    for value in model.graph.inputs:
        if str(value.name).startswith("past_key_values."):
            given[str(value.name)] = random.normal(size=tuple(value.shape or ())).astype(np.float32)
    outputs = names(model.graph.outputs)
    found = pieces.cut(model, pieces.constant_bytes(model) / count)
    assert len(found) >= min(count, 2)
    whole, parts = run([model], given, folder), run(found, given, folder)
    for name in outputs:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-3, atol=1e-4)
