"""Attention over a scattered cache → attention over two segments, what the cache holds and what is new.

The cache is then only read: its products and those of the new keys and values meet in one softmax, and the graph
returns the new keys and values alone, which the runtime writes at write_index. Its KV contract is `append`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...artifact import KvSpec
from ...errors import VlmcError
from . import HIDDEN, causal, constant, insert, producer, prune, replace, reshaped, size

END = np.iinfo(np.int32).max  # of a slice


def apply(model: ir.Model, kv: KvSpec) -> int:
    """Rewrites every Attention whose keys and values come from TensorScatter; other graphs stay as they are.

    past_key_values.{i}.* become (1, kv_heads, capacity, head_dim) and present.{i}.* the new (1, kv_heads, length,
    head_dim). Any length, write_index and mask are right, as are any finite numbers in the places from write_index on;
    a layer may read what another one wrote. An attention that does more than mask and scale is a VlmcError."""
    graph = model.graph
    attentions = causal.attentions(graph)
    if not attentions:
        return 0
    for value in graph.inputs:
        if str(value.name).startswith("past_key_values."):
            value.shape = ir.Shape((1, kv.kv_heads, kv.capacity, kv.head_dim))
    hidden: dict[tuple[ir.Value, int], ir.Value] = {}  # by the mask and the number of queries that share a key
    scatters: dict[ir.Node, None] = {}
    for node in attentions:
        keys, values = (producer(scattered, "TensorScatter") for scattered in node.inputs[1:3])
        assert keys is not None and values is not None
        mask, group = _mask(node), _heads(node) // kv.kv_heads
        if (mask, group) not in hidden:
            hidden[mask, group] = _hidden(node, mask, keys.inputs[2], group, kv.capacity)
        replace(node, _attend(node, keys, values, hidden[mask, group], kv))
        scatters |= {keys: None, values: None}
    for scatter in scatters:
        new = scatter.inputs[1]
        assert new is not None
        replace(scatter, new)
    prune(model)
    return len(attentions)


def _mask(node: ir.Node) -> ir.Value:
    """The boolean mask (1, 1, length, capacity) of an attention that has one and a scale and nothing else."""
    more = sorted(node.attributes.keys() - {"scale"})
    mask = node.inputs[3] if len(node.inputs) == 4 else None
    if more or mask is None or mask.dtype != ir.DataType.BOOL:
        raise VlmcError(
            "The decoder's attention cannot be computed over two segments",
            found=f"the attribute {more[0]} of {node.name}" if more else f"{node.name} has no boolean mask",
            expected="attention with a boolean mask and a scale and nothing else",
            fix="build it for onnxruntime, which runs any decoder",
        )
    return mask


def _heads(node: ir.Node) -> int:
    return size(node.inputs[0], 1)


def _hidden(anchor: ir.Node, mask: ir.Value, write_index: ir.Value | None, group: int, capacity: int) -> ir.Value:
    """Boolean (1, 1, group × length, capacity + length): the keys that a query does not see.

    Of the cache that is what the mask hides, and all from write_index on; of the new ones what it hides where they
    would have been written. In int32, for TensorRT 8 gathers no booleans."""
    graph, name = anchor.graph, f"hidden.{mask.name}.{group}"
    assert isinstance(graph, ir.Graph)
    zero, one = (constant(graph, f"index.{number}", np.array(number, np.int64)) for number in (0, 1))
    none, some = (constant(graph, f"seen.{number}", np.array(number, np.int32)) for number in (0, 1))
    seen = insert(anchor, "Cast", [mask], f"{name}.seen", to=int(ir.DataType.INT32)).outputs[0]
    cache = constant(graph, "cache.places", np.arange(capacity, dtype=np.int64).reshape(1, 1, 1, -1))
    filled = insert(anchor, "Less", [cache, write_index], f"{name}.filled").outputs[0]
    past = insert(anchor, "Where", [filled, seen, none], f"{name}.past").outputs[0]
    embeds = next(value for value in graph.inputs if value.name == "inputs_embeds")  # (1, length, hidden)
    shape = insert(anchor, "Shape", [embeds], f"{name}.shape").outputs[0]
    length = insert(anchor, "Gather", [shape, one], f"{name}.length").outputs[0]
    steps = insert(anchor, "Range", [zero, length, one], f"{name}.steps").outputs[0]
    places = insert(anchor, "Add", [steps, write_index], f"{name}.places").outputs[0]
    new = insert(anchor, "Gather", [seen, places], f"{name}.new", axis=3).outputs[0]
    keys = insert(anchor, "Concat", [past, new], f"{name}.keys", axis=3).outputs[0]
    if group > 1:  # rows in the order of _attend's queries
        keys = insert(anchor, "Concat", [keys] * group, f"{name}.grouped", axis=2).outputs[0]
    return insert(anchor, "Less", [keys, some], name).outputs[0]


def _attend(node: ir.Node, keys: ir.Node, values: ir.Node, hidden: ir.Value, kv: KvSpec) -> ir.Value:
    """softmax(q · [past, new]ᵀ) · [past, new], of which neither pair is ever put side by side."""
    graph, name, heads = node.graph, str(node.name), _heads(node)
    assert isinstance(graph, ir.Graph)
    scale = node.attributes.get_float("scale", kv.head_dim**-0.5)
    factor = constant(graph, f"{name}.scale", np.array(scale, np.float32))
    query = insert(node, "Mul", [node.inputs[0], factor], f"{name}.scaled").outputs[0]
    # Queries that share a key are rows of one product, so no key is repeated.
    query = reshaped(node, query, (1, kv.kv_heads, -1, kv.head_dim), f"{name}.grouped")
    scores = []
    for segment, part in (("past", keys.inputs[0]), ("new", keys.inputs[1])):
        turned = insert(node, "Transpose", [part], f"{name}.{segment}.key", perm=[0, 1, 3, 2]).outputs[0]
        scores.append(insert(node, "MatMul", [query, turned], f"{name}.{segment}.scores").outputs[0])
    joined = insert(node, "Concat", [*scores], f"{name}.scores", axis=3).outputs[0]
    # Chosen and not added: what an unwritten place holds may be of any size.
    fill = constant(graph, "hidden.score", np.array(HIDDEN, np.float32))
    seen = insert(node, "Where", [hidden, fill, joined], f"{name}.seen").outputs[0]
    weights = insert(node, "Softmax", [seen], f"{name}.weights", axis=3).outputs[0]
    outputs = []
    segments = (("past", values.inputs[0], 0, kv.capacity), ("new", values.inputs[1], kv.capacity, END))
    for segment, part, start, end in segments:
        bounds = [constant(graph, f"bound.{bound}", np.array([bound], np.int64)) for bound in (start, end, 3)]
        share = insert(node, "Slice", [weights, *bounds], f"{name}.{segment}.weights").outputs[0]
        outputs.append(insert(node, "MatMul", [share, part], f"{name}.{segment}.values").outputs[0])
    total = insert(node, "Add", [*outputs], f"{name}.values").outputs[0]
    return reshaped(node, total, (1, heads, -1, kv.head_dim), f"{name}.heads")
