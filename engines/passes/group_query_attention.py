"""Canonical attention over a scattered cache → ONNX Runtime's GroupQueryAttention on one shared buffer.

The canonical graph attends over the whole capacity under a mask; GroupQueryAttention reads only what is filled,
writes the new keys and values itself, and rotates queries and keys from tables. Its KV contract is `shared`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...artifact import KvSpec
from . import MICROSOFT, causal, constant, insert, only_user, producer, prune, replace, size


def apply(model: ir.Model, kv: KvSpec) -> int:
    """Rewrites every Attention whose keys and values come from TensorScatter; other graphs stay as they are, and so do
    those that GroupQueryAttention cannot express."""
    graph = model.graph
    attentions = causal.attentions(graph)
    if not attentions or inexpressible(attentions, kv):
        return 0
    rotary = _rotations(attentions[0])[0]
    assert rotary is not None
    tables = [constant(graph, name, table) for name, table in _tables(model, rotary, kv.capacity).items()]
    lengths = [_input(graph, "seqlens_k", (1,)), _input(graph, "total_sequence_length", ())]
    for node in attentions:
        query, key, value = node.inputs[0], *(producer(v, "TensorScatter") for v in node.inputs[1:3])
        assert query is not None and key is not None and value is not None
        rotated = _rotations(node)
        assert rotated[0] is not None and rotated[1] is not None
        heads = size(query, 1)
        flat = [_unsplit(rotated[0].inputs[0]), _unsplit(rotated[1].inputs[0]), _unsplit(value.inputs[1])]
        attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv.kv_heads, "do_rotary": 1}
        attributes["scale"] = node.attributes["scale"].as_float()
        inputs = [*flat, key.inputs[0], value.inputs[0], *lengths, *tables]
        fused = insert(
            node, "GroupQueryAttention", inputs, f"{node.name}.gqa", domain=MICROSOFT, outputs=3, **attributes
        )
        replace(_merged(node), fused.outputs[0])
        replace(key, fused.outputs[1])
        replace(value, fused.outputs[2])
    graph.opset_imports[MICROSOFT] = 1
    prune(model)
    for unused in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(unused)
    return len(attentions)


def inexpressible(attentions: list[ir.Node], kv: KvSpec) -> str:
    """Why these attentions over a cache are no GroupQueryAttention; empty where they are."""
    if kv.head_dim % 16:
        return f"keys of {kv.head_dim} channels, which are no multiple of 16"
    if other := causal.other_than_causal(attentions, kv):
        return other
    tables = set()
    for node in attentions:
        rotations = _rotations(node)
        if rotations[0] is None or rotations[1] is None:
            return f"{node.name} turns its queries and keys otherwise than by RotaryEmbedding"
        for rotary in (rotations[0], rotations[1]):
            if len(rotary.inputs) != 3 or rotary.attributes:
                return f"{node.name} turns but a part of its channels"
            tables.add(tuple(value.name for value in rotary.inputs[1:] if value is not None))
    if len(tables) > 1:
        return "layers with rotary positions of their own"
    if any(len(value.shape or ()) != 2 for value in _positions(attentions[0])):
        return "several positions a token"
    return ""


def _rotations(attention: ir.Node) -> tuple[ir.Node | None, ir.Node | None]:
    """What turns the queries, and what the new keys."""
    key = producer(attention.inputs[1], "TensorScatter")
    assert key is not None
    return producer(attention.inputs[0], "RotaryEmbedding"), producer(key.inputs[1], "RotaryEmbedding")


def _positions(attention: ir.Node) -> list[ir.Value]:
    assert isinstance(attention.graph, ir.Graph)
    return [value for value in attention.graph.inputs if value.name == "position_ids"]


def _input(graph: ir.Graph, name: str, shape: tuple[int, ...]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT32))
    graph.inputs.append(value)
    return value


def _unsplit(value: ir.Value | None) -> ir.Value:
    """(1, length, heads × dim), of which `value` (1, heads, length, dim) is the transposed reshape."""
    transpose = producer(value, "Transpose")
    reshape = producer(transpose.inputs[0], "Reshape") if transpose else None
    assert reshape is not None and reshape.inputs[0] is not None, (
        "attention's inputs are split by Reshape and Transpose"
    )
    return reshape.inputs[0]


def _merged(attention: ir.Node) -> ir.Node:
    """The Reshape behind the attention that puts the heads side by side again."""
    transpose = only_user(attention.outputs[0], "Transpose")
    reshape = only_user(transpose.outputs[0], "Reshape") if transpose else None
    assert reshape is not None, "attention's output is merged by Transpose and Reshape"
    return reshape


def _tables(model: ir.Model, rotary: ir.Node, capacity: int) -> dict[str, NDArray[Any]]:
    """cos and sin (capacity, dim / 2) of every position, computed by the graph's own nodes."""
    from onnx.reference import ReferenceEvaluator  # a few nodes; an ONNX Runtime need not be where this is built

    wanted = [value for value in rotary.inputs[1:3] if value is not None]
    positions = next(value for value in model.graph.inputs if value.name == "position_ids")
    part = ir.convenience.extract(model.graph, inputs=[positions], outputs=wanted)
    small = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=model.ir_version)))
    tables = small.run(None, {"position_ids": np.arange(capacity, dtype=np.int64)[None]})
    return {name: np.asarray(table[0]) for name, table in zip(("rotary.cos", "rotary.sin"), tables, strict=True)}
