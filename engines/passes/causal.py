"""Whether an attention over a scattered cache is the plain causal one, which lowerings for engines with a cache of
their own take for granted: every query sees all keys up to itself, and nothing else.

The mask is not recognised by its nodes, which change with the exporter, but computed for the places that tell plain
causal masks from others within the cache's capacity.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...artifact import KvSpec
from . import producer

QUERIES = 8  # of the prompt that a mask is computed for


def attentions(graph: ir.Graph) -> list[ir.Node]:
    """Every Attention whose keys come from TensorScatter."""
    return [node for node in graph if node.op_type == "Attention" and producer(node.inputs[1], "TensorScatter")]


def other_than_causal(nodes: list[ir.Node], kv: KvSpec) -> str:
    """Empty where each of these attentions over a cache is plain and causal and has a cache of its own; otherwise what
    the first one does that is not."""
    caches: set[str] = set()
    masks: dict[str, str] = {}
    for node in nodes:
        if more := sorted(node.attributes.keys() - {"scale"}):
            return f"the attribute {more[0]} of {node.name}"
        scattered = [producer(value, "TensorScatter") for value in node.inputs[1:3]]
        names = {str(scatter.outputs[0].name) for scatter in scattered if scatter is not None}
        if len(names) != 2 or names & caches:
            return f"{node.name} reads keys and values that another layer wrote"
        caches |= names
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None:
            return f"{node.name} has no mask"
        if str(mask.name) not in masks:
            masks[str(mask.name)] = _other_mask(mask, kv)
        if masks[str(mask.name)]:
            return f"{node.name} {masks[str(mask.name)]}"
    return ""


def _other_mask(mask: ir.Value, kv: KvSpec) -> str:
    """Empty for the plain causal mask of `Decoder.forward`, otherwise what it is that makes it another one."""
    known = ("inputs_embeds", "write_index")
    read = sorted(value.name or "" for value in _sources(mask))
    if others := [name for name in read if name not in known and not name.startswith("past_key_values.")]:
        return f"has a mask that depends on {others[0]}"
    queries = min(QUERIES, kv.capacity)
    for start, length in ((0, queries), (kv.capacity - queries, queries)):
        seen = _computed(mask, start, length, kv)
        expected = np.arange(kv.capacity) <= start + np.arange(length)[:, None]
        if seen.shape != (1, 1, length, kv.capacity) or seen.dtype != np.bool_:
            return "has a mask of another form"
        if not np.array_equal(seen[0, 0], expected):
            hidden = bool((expected & ~seen[0, 0]).any())
            return "hides earlier keys (a sliding window)" if hidden else "sees keys behind the query"
    return ""


def _sources(value: ir.Value) -> Iterator[ir.Value]:
    """The graph's inputs that the value is computed from, each once."""
    waiting, met = [value], {id(value)}
    while waiting:
        node = (value := waiting.pop()).producer()
        if node is None and value.is_graph_input():
            yield value
        for source in node.inputs if node is not None else ():
            if source is not None and id(source) not in met:
                met.add(id(source))
                waiting.append(source)


def _computed(mask: ir.Value, start: int, length: int, kv: KvSpec) -> NDArray[np.bool_]:
    """The mask for `length` queries from the place `start` on; by ONNX's own reference, which needs no backend."""
    from onnx.reference import ReferenceEvaluator

    sources = list(_sources(mask))
    feeds: dict[str, NDArray[np.generic]] = {}
    for source in sources:
        name, free = str(source.name), {"length": length, "capacity": kv.capacity}
        sizes = [size if isinstance(size, int) else free[str(size.value)] for size in source.shape or ()]
        feeds[name] = np.array([start]) if name == "write_index" else np.zeros(sizes, np.float32)
    graph = mask.graph
    assert graph is not None
    part = ir.convenience.extract(graph, inputs=sources, outputs=[mask])
    proto = ir.serde.serialize_model(ir.Model(part, ir_version=10))
    (found,) = ReferenceEvaluator(proto).run(None, feeds)
    return np.asarray(found)
