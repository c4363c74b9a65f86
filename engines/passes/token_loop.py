"""The decoder with the look-up of embeddings in front and the greedy choice behind, so that a step needs no host.

A step's `next_token` is the following step's `input_ids`, in the same place of device memory.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from . import constant, insert

PREFIX = "embed_tokens."


def apply(decoder: ir.Model, embed_tokens: ir.Model) -> int:
    """Moves embed_tokens into the decoder, which leaves it empty; both are of one opset, canonical or lowered.

    New input `input_ids` (1, length) int32: where an id is 0 or more its embedding is taken, and otherwise the row of
    inputs_embeds. New output `next_token` (1, 1) int32: where the logits are greatest. Returns the nodes moved."""
    assert decoder.graph.opset_imports == embed_tokens.graph.opset_imports
    graph = decoder.graph
    given = next(value for value in graph.inputs if value.name == "inputs_embeds")
    assert given.shape is not None
    readers = [use for use in given.uses() if use.node.op_type != "Shape"]
    first = next(node for node in graph if any(node is use.node for use in readers))
    ids = ir.Value(name="input_ids", shape=ir.Shape(given.shape[:2]), type=ir.TensorType(ir.DataType.INT32))
    graph.inputs.append(ids)
    zero = constant(graph, "input_ids.zero", np.array(0, np.int32))
    known = insert(first, "Max", [ids, zero], "input_ids.known").outputs[0]
    embeds, moved = _move(embed_tokens.graph, first, known)
    absent = insert(first, "Less", [ids, zero], "input_ids.absent").outputs[0]
    axis = constant(graph, "input_ids.axis", np.array([2], np.int64))
    rows = insert(first, "Unsqueeze", [absent, axis], "input_ids.rows").outputs[0]
    chosen = insert(first, "Where", [rows, given, embeds], "input_ids.embeds").outputs[0]
    chosen.shape, chosen.type = given.shape, given.type
    for use in readers:
        use.node.replace_input_with(use.idx, chosen)
    graph.outputs.append(_greatest(graph))
    return moved


def _move(embed: ir.Graph, anchor: ir.Node, ids: ir.Value) -> tuple[ir.Value, int]:
    """embed's nodes and constants go before `anchor`, under names of their own, and read `ids`; its output and how
    many nodes there are."""
    graph = anchor.graph
    assert isinstance(graph, ir.Graph)
    source, output = embed.inputs[0], embed.outputs[0]
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
    return output, len(nodes)


def _greatest(graph: ir.Graph) -> ir.Value:
    logits = next(value for value in graph.outputs if value.name == "logits")
    choice = ir.node("ArgMax", [logits], attributes={"axis": -1, "keepdims": 1}, name="next_token.index")
    cast = ir.node("Cast", choice.outputs, attributes={"to": int(ir.DataType.INT32)}, name="next_token")
    choice.outputs[0].name = "next_token.index"
    token = cast.outputs[0]
    token.name, token.shape, token.type = "next_token", ir.Shape((1, 1)), ir.TensorType(ir.DataType.INT32)
    graph.extend([choice, cast])
    return token
