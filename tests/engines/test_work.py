"""Operations and bytes, counted from the graph, held against counting by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from vlmc.artifact import Artifact, ComponentSpec, KvSpec, TensorSpec
from vlmc.engines import work


def test_the_vision_encoders_operations_are_those_of_its_layers(tiny: Artifact) -> None:
    tiles, patches, hidden, inner, layers = 3, 16, 64, 96, 2
    layer = 4 * hidden * hidden + 2 * hidden * inner
    products = tiles * patches * (3 * 8 * 8 * hidden + layers * layer) + tiles * 4 * (4 * hidden) * hidden
    attention = layers * tiles * 2 * patches * patches * hidden
    model = ir.load(tiny.graph("vision_encoder"))
    assert work.flops(model, {"tiles": tiles}) == 2 * (products + attention)


@pytest.mark.parametrize(("length", "keys"), [(40, 40), (1, 41)])
def test_the_decoders_operations_are_those_of_its_layers_and_one_row_of_logits(
    length: int, keys: int, tiny: Artifact
) -> None:
    hidden, inner, kv, layers, vocabulary = 64, 96, 32, 2, 336
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    products = length * layers * layer + hidden * vocabulary
    attention = layers * 2 * length * keys * hidden
    model = ir.load(tiny.graph("decoder"))
    assert work.flops(model, {"length": length, "capacity": 128}, keys=keys) == 2 * (products + attention)


def test_only_the_caches_positions_are_counted_by_how_many_are_seen() -> None:
    def attention(keys: str | int) -> ir.Node:
        shapes = [ir.Shape((1, 2, length, 8)) for length in ("length", keys, keys)]
        return ir.node("Attention", [ir.Value(name=str(shape), shape=shape) for shape in shapes])

    graph = ir.Graph([], [], nodes=[attention("capacity"), attention(30)])
    found = work.flops(ir.Model(graph, ir_version=10), {"length": 5, "capacity": 128}, keys=3)
    assert found == 4 * 2 * 5 * 8 * (3 + 30)


def test_some_products_alone_can_be_counted(tiny: Artifact) -> None:
    model = ir.load(tiny.graph("decoder"))
    assert work.flops(model, {"length": 5, "capacity": 128}, only=["lm_head"]) == 2 * 64 * 336


def test_weights_count_once_at_the_width_that_they_have(tiny: Artifact) -> None:
    hidden, inner, kv, layers, vocabulary = 64, 96, 32, 2, 336
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    model = ir.load(tiny.graph("decoder"))
    assert work.weight_bytes(model, {}, 2) == 2 * (layers * layer + hidden * vocabulary)
    assert work.weight_bytes(model, {"lm_head": 4}, 4) == 4 * layers * layer + hidden * vocabulary / 2
    again = next(node for node in model.graph if node.name == "lm_head")
    model.graph.append(ir.node("MatMul", again.inputs, name="once.more"))
    assert work.weight_bytes(model, {}, 2) == 2 * (layers * layer + hidden * vocabulary)


def test_bytes_of_the_cache_and_of_inputs_and_outputs(tiny: Artifact) -> None:
    assert work.kv_bytes(KvSpec(2, 3, 16, 128), 10, 4) == 2 * 2 * 3 * 16 * 10 * 4
    model = ir.load(tiny.graph("vision_encoder"))
    assert work.io_bytes(model, {"tiles": 3}) == 4 * (3 * 3 * 32 * 32 + 3 * 4 * 64)


def test_sizes_are_read_from_arrays_and_worked_out_from_terms() -> None:
    spec = ComponentSpec(
        "x",
        (TensorSpec("a", "float32", ("tokens", 4, 6)), TensorSpec("b", "int64", ("windows", 2))),
        (TensorSpec("c", "float32", ("tokens", 6)),),
        0,
    )
    sizes = work.free_sizes(spec, {"a": np.zeros((7, 4, 6)), "b": np.zeros((3, 2)), "other": np.zeros(1)})
    assert sizes == {"tokens": 7, "windows": 3}
    for term, size in (("4*tokens", 28), ("tokens//2", 3), ("2*windows + tokens - 1", 12)):
        assert work._dims(ir.Value(name="x", shape=ir.Shape((term, 5))), sizes) == [size, 5]
    with pytest.raises(AssertionError, match=r"no size: .*tokens / 2"):
        work._dims(ir.Value(name="x", shape=ir.Shape(("tokens / 2",))), sizes)
