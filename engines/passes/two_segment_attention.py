"""Attention over a scattered cache → attention over two segments, what the cache holds and what is new.

The cache is then only read: the scores of both segments meet in the maximum and the sum of one softmax, and the graph
returns the new keys and values alone, which the runtime writes at write_index. Its KV contract is `append`.

The form is the one that TensorRT 8.6 makes the fewest kernels of (docs/experiments.md): nothing is put side by side or
cut apart, and the cached keys are a product's left operand, for as the right one they are turned at each step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ...artifact import KvSpec
from ...errors import VlmcError
from . import HIDDEN, causal, constant, insert, producer, prune, replace, reshaped

SEGMENTS = ("past", "new")
TURNED = [0, 1, 3, 2]
Segments = tuple[ir.Value, ir.Value]  # of what the cache holds, and of what is new


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
    hidden: dict[tuple[ir.Value, int], Segments] = {}  # by the mask and the number of queries that share a key
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
    query = node.inputs[0]
    assert query is not None and query.shape is not None
    return int(query.shape[1])  # type: ignore[arg-type]


def _hidden(anchor: ir.Node, mask: ir.Value, write_index: ir.Value | None, group: int, capacity: int) -> Segments:
    """Boolean (1, 1, group × length, capacity) and (1, 1, group × length, length): the keys that a query does not see.

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

    def unseen(keys: ir.Value, segment: str) -> ir.Value:
        if group > 1:  # rows in the order of _attend's queries
            keys = insert(anchor, "Concat", [keys] * group, f"{name}.{segment}.grouped", axis=2).outputs[0]
        return insert(anchor, "Less", [keys, some], f"{name}.{segment}.hidden").outputs[0]

    return unseen(past, "past"), unseen(new, "new")


def _attend(node: ir.Node, keys: ir.Node, values: ir.Node, hidden: Segments, kv: KvSpec) -> ir.Value:
    """softmax(q · [past, new]ᵀ) · [past, new], of which neither pair is ever put side by side."""
    graph, name, heads = node.graph, str(node.name), _heads(node)
    assert isinstance(graph, ir.Graph)
    last = constant(graph, "axis.last", np.array([-1], np.int64))
    # Chosen and not added: what an unwritten place holds may be of any size.
    fill = constant(graph, "hidden.score", np.array(HIDDEN, np.float32))

    def add(part: str, operator: str, inputs: list[ir.Value | None], **attributes: Any) -> ir.Value:
        return insert(node, operator, inputs, f"{name}.{part}", **attributes).outputs[0]

    scale = node.attributes.get_float("scale", kv.head_dim**-0.5)
    query = add("scaled", "Mul", [node.inputs[0], constant(graph, f"{name}.scale", np.array(scale, np.float32))])
    # Queries that share a key are rows of one product, so no key is repeated.
    query = reshaped(node, query, (1, kv.kv_heads, -1, kv.head_dim), f"{name}.grouped")
    columns = add("past.columns", "MatMul", [keys.inputs[0], add("columns", "Transpose", [query], perm=TURNED)])
    scores = [
        add("past.scores", "Transpose", [columns], perm=TURNED),
        add("new.scores", "MatMul", [query, add("new.key", "Transpose", [keys.inputs[1]], perm=TURNED)]),
    ]
    seen = [
        add(f"{segment}.seen", "Where", [unseen, fill, score])
        for segment, unseen, score in zip(SEGMENTS, hidden, scores, strict=True)
    ]
    tops = [add(f"{segment}.top", "ReduceMax", [score, last]) for segment, score in zip(SEGMENTS, seen, strict=True)]
    top = add("top", "Max", [*tops])
    sums, outputs, powers = [], [], []
    for segment, score in zip(SEGMENTS, seen, strict=True):
        powers.append(add(f"{segment}.power", "Exp", [add(f"{segment}.less", "Sub", [score, top])]))
        sums.append(add(f"{segment}.sum", "ReduceSum", [powers[-1], last]))
    total = add("sum", "Add", [*sums])
    for segment, power, scattered in zip(SEGMENTS, powers, values.inputs[:2], strict=True):
        share = add(f"{segment}.weights", "Div", [power, total])
        outputs.append(add(f"{segment}.values", "MatMul", [share, scattered]))
    return reshaped(node, add("values", "Add", [*outputs]), (1, heads, -1, kv.head_dim), f"{name}.heads")
