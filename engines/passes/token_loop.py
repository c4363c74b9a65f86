"""The decoder with the look-up of embeddings in front and the greedy choice behind, so that a step needs no host.

A step's `next_token` is the following step's `input_ids`, in the same place of device memory. One rule holds for all
that a token brings along: where its id is 0 or more the graph finds it, and otherwise, in a prompt, it was given.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from . import constant, insert

PREFIX = "embed_tokens."
OFFSET = "position_offset"


def apply(decoder: ir.Model, embed_tokens: ir.Model) -> int:
    """Moves embed_tokens into the decoder, which leaves it empty; both are of one opset, canonical or lowered.

    New input `input_ids` (1, length) int32: where an id is 0 or more its embedding is taken, and otherwise the row of
    inputs_embeds; so are further outputs of embed_tokens that the decoder takes. New output `next_token` (1, 1) int32:
    where the logits are greatest. Where a token has several positions, (rows, 1, length), there is a new input
    `position_offset` (1,) as well: those of an id are all its place in the cache plus that. Returns the nodes moved."""
    assert decoder.graph.opset_imports == embed_tokens.graph.opset_imports
    graph = decoder.graph
    inputs = {str(value.name): value for value in graph.inputs}
    embeds, positions = inputs["inputs_embeds"], inputs["position_ids"]
    assert embeds.shape is not None and positions.shape is not None
    several = [positions] if len(positions.shape) > 2 else []
    given = [inputs[str(value.name)] for value in embed_tokens.graph.outputs] + several
    readers = {value: [use for use in value.uses() if use.node.op_type != "Shape"] for value in given}
    reading = {use.node for uses in readers.values() for use in uses}
    first = next(node for node in graph if node in reading)
    ids = ir.Value(name="input_ids", shape=ir.Shape(embeds.shape[:2]), type=ir.TensorType(ir.DataType.INT32))
    graph.inputs.append(ids)
    zero = constant(graph, "input_ids.zero", np.array(0, np.int32))
    known = insert(first, "Max", [ids, zero], "input_ids.known").outputs[0]
    found, moved = _move(embed_tokens.graph, first, known)
    found += [_positions(first, ids, inputs["write_index"]) for _ in several]
    absent = insert(first, "Less", [ids, zero], "input_ids.absent").outputs[0]
    for value, own in zip(given, found, strict=True):
        chosen = insert(first, "Where", [_rows(first, absent, value), value, own], f"{value.name}.chosen").outputs[0]
        chosen.shape, chosen.type = value.shape, value.type
        for use in readers[value]:
            use.node.replace_input_with(use.idx, chosen)
    graph.outputs.append(_greatest(graph))
    return moved


def _rows(anchor: ir.Node, absent: ir.Value, like: ir.Value) -> ir.Value:
    """(1, length) as it broadcasts to `like`, whose length is the second axis or, of positions, the last."""
    assert isinstance(anchor.graph, ir.Graph) and like.shape is not None
    if like.name == "position_ids":
        return absent
    rank = len(like.shape)
    axes = constant(anchor.graph, f"input_ids.axes.{rank}", np.arange(2, rank, dtype=np.int64))
    return insert(anchor, "Unsqueeze", [absent, axes], f"{like.name}.rows").outputs[0]


def _positions(anchor: ir.Node, ids: ir.Value, write_index: ir.Value) -> ir.Value:
    """The places of the tokens in the cache plus the new input, (length,)."""
    graph = anchor.graph
    assert isinstance(graph, ir.Graph)
    offset = ir.Value(name=OFFSET, shape=write_index.shape, type=write_index.type)
    graph.inputs.append(offset)
    zero, one = (constant(graph, f"{OFFSET}.{number}", np.array(number, np.int64)) for number in (0, 1))
    shape = insert(anchor, "Shape", [ids], f"{OFFSET}.shape").outputs[0]
    length = insert(anchor, "Gather", [shape, one], f"{OFFSET}.length").outputs[0]
    places = insert(anchor, "Range", [zero, length, one], f"{OFFSET}.places").outputs[0]
    start = insert(anchor, "Add", [write_index, offset], f"{OFFSET}.start").outputs[0]
    return insert(anchor, "Add", [places, start], f"{OFFSET}.positions").outputs[0]


def _move(embed: ir.Graph, anchor: ir.Node, ids: ir.Value) -> tuple[list[ir.Value], int]:
    """embed's nodes and constants go before `anchor`, under names of their own, and read `ids`; its outputs and how
    many nodes there are."""
    graph = anchor.graph
    assert isinstance(graph, ir.Graph)
    source, outputs = embed.inputs[0], list(embed.outputs)
    if source.dtype != ir.DataType.INT32:
        ids = insert(anchor, "Cast", [ids], "input_ids.cast", to=int(source.dtype or 0)).outputs[0]
    ir.convenience.replace_all_uses_with(source, ids)
    embed.outputs.clear()
    for name in list(embed.initializers):
        value = embed.initializers.pop(name)
        value.name = PREFIX + name
        graph.initializers[value.name] = value
    nodes = list(embed)
    embed.remove(nodes)
    for node in nodes:
        node.name = f"{PREFIX}{node.name}"
        for value in node.outputs:
            value.name = f"{PREFIX}{value.name}"
        graph.insert_before(anchor, node)
    return outputs, len(nodes)


def _greatest(graph: ir.Graph) -> ir.Value:
    logits = next(value for value in graph.outputs if value.name == "logits")
    choice = ir.node("ArgMax", [logits], attributes={"axis": -1, "keepdims": 1}, name="next_token.index")
    cast = ir.node("Cast", choice.outputs, attributes={"to": int(ir.DataType.INT32)}, name="next_token")
    choice.outputs[0].name = "next_token.index"
    token = cast.outputs[0]
    token.name, token.shape, token.type = "next_token", ir.Shape((1, 1)), ir.TensorType(ir.DataType.INT32)
    graph.extend([choice, cast])
    return token
