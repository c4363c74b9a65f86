"""Tables with more elements than TensorRT 8.6 lets a tensor have → tables side by side, looked up alike and joined.

Gemma 3n E4B's per-layer embeddings are 262,144 × 8,960, and the limit is 2³¹ - 1 (NVIDIA/TensorRT, issue 1348: "exceeds
the maximum element count of 2147483647"; TensorRT-RTX 1.7.1 takes them whole).
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from . import constant, drop, insert, replace, size

MOST = 2**31 - 1  # elements


def apply(model: ir.Model, most: int = MOST) -> int:
    """Splits the columns of every constant table (rows, columns) that a Gather reads rows of and that has more elements
    than `most`, into the fewest tables of one width, the last of which may be narrower. Returns the tables split."""
    graph, split = model.graph, 0
    for node in list(graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.const_value is None or table.const_value.size <= most:
            continue
        assert len(table.const_value.shape) == 2 and node.attributes.get_int("axis", 0) == 0
        rows, columns = table.const_value.shape.numpy()
        width = math.ceil(columns / math.ceil(columns / (most // rows)))
        starts = range(0, columns, width)
        parts = [_columns(graph, table, start, min(start + width, columns)) for start in starts]
        found = [insert(node, "Gather", [part, node.inputs[1]], f"{node.name}.{i}") for i, part in enumerate(parts)]
        joined = insert(node, "Concat", [one.outputs[0] for one in found], f"{node.name}.joined", axis=-1)
        replace(node, joined.outputs[0])
        drop(graph, table)
        split += 1
    return split


def _columns(graph: ir.Graph | ir.GraphView, table: ir.Value, start: int, end: int) -> ir.Value:
    whole = table.const_value
    assert isinstance(graph, ir.Graph) and whole is not None
    shape = ir.Shape((size(table, 0), end - start))
    name = f"{table.name}.{start}"

    def make() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(whole.numpy()[:, start:end]))

    return constant(graph, name, ir.LazyTensor(make, dtype=whole.dtype, shape=shape, name=name))
