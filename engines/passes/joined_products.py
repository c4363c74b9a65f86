"""Weight products of one input → one product with their outputs side by side, for ONNX Runtime.

What a product costs beside its arithmetic, handing rows to threads and waiting for them, is then paid once. A decode
step multiplies a single row, so it is a good part of it (docs/experiments.md). GroupQueryAttention takes queries, keys
and values in one piece; others get theirs by Split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from . import array_of, constant, drop, insert, prune, replace

# The inputs that have a part for every output channel, and on which axis.
WEIGHTS = {"MatMulNBits": ((1, 2), 0), "MatMulIntegerToFloat": ((1, 3, 6), -1)}
AND = " + "  # between the names of the products that a node was made of


def apply(model: ir.Model) -> int:
    """Joins the products of ONNX Runtime's own operators that differ in their weights alone."""
    alike: dict[object, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type in WEIGHTS:
            alike.setdefault(_all_but_weights(node), []).append(node)
    several = [nodes for nodes in alike.values() if len(nodes) > 1]
    for nodes in several:
        _join(model.graph, nodes)
    prune(model)
    return len(several)


def _all_but_weights(node: ir.Node) -> object:
    weights = _weights(node)
    inputs = tuple((i, value) for i, value in enumerate(node.inputs) if i not in weights and value is not None)
    settings = tuple(sorted((name, str(value.value)) for name, value in node.attributes.items() if name != "N"))
    return node.op_type, inputs, tuple(weights), settings


def _weights(node: ir.Node) -> dict[int, ir.Value]:
    """What of the node's inputs has a part for every output channel, by their places."""
    places = WEIGHTS[node.op_type][0]
    return {i: value for i, value in enumerate(node.inputs) if i in places and value is not None}


def _join(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    first, (_, axis) = nodes[0], WEIGHTS[nodes[0].op_type]  # what all of them read stands before the first
    attention = _attention(nodes)
    if attention is not None:
        nodes = sorted(nodes, key=lambda node: attention.inputs.index(node.outputs[0]))
    name, inputs = AND.join(str(node.name) for node in nodes), list(first.inputs)
    parts = [_weights(node) for node in nodes]
    for i in parts[0]:
        joined = np.concatenate([array_of(own[i]) for own in parts], axis)
        inputs[i] = constant(graph, f"{name}.{i}", joined)
    widths = [array_of(own[1]).shape[axis] for own in parts]
    settings = {key: value.value for key, value in first.attributes.items()}
    settings |= {"N": sum(widths)} if "N" in settings else {}
    product = insert(first, first.op_type, inputs, name, domain=first.domain, **settings).outputs[0]
    if attention is not None:
        for i, value in enumerate((product, None, None)):
            attention.replace_input_with(i, value)
        graph.remove(nodes, safe=True)
    else:
        sizes = constant(graph, f"{name}.widths", np.array(widths, np.int64))
        split = insert(first, "Split", [product, sizes], f"{name}.split", outputs=len(nodes), axis=-1)
        for node, value in zip(nodes, split.outputs, strict=True):
            replace(node, value)
    for own in parts:
        for value in own.values():
            drop(graph, value)


def _attention(nodes: Sequence[ir.Node]) -> ir.Node | None:
    """The GroupQueryAttention whose queries, keys and values these are, and nothing else's."""
    uses = [use for node in nodes for use in node.outputs[0].uses()]
    found = uses[0].node if len(nodes) == len(uses) == 3 else None
    if found is None or found.op_type != "GroupQueryAttention":
        return None
    return found if set(found.inputs[:3]) == {node.outputs[0] for node in nodes} else None
