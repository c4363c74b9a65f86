"""Tables that rows are looked up in → float16, with a Cast behind the look-up, where floats are typed weakly.

TensorRT 8.6 may compute a region in FP16, and yet keeps a table in float32 where nothing beside the look-up asks for
less: of Gemma 3n E4B in pieces 11.6 GB where 5.8 do, in int8 engines every model's embeddings (docs/experiments.md).
"""

from __future__ import annotations

import onnx_ir as ir

from . import array_of, constant, drop, insert, replace
from .half_precision import FLOAT, HALF, LARGEST, magnitude

LEAST = 1 << 20  # elements of a table below which little is saved


def apply(model: ir.Model, least: int = LEAST) -> int:
    """Halves every float32 constant that a Gather alone reads, that has `least` elements or more, and none that float16
    cannot hold. Returns the tables halved."""
    graph, halved = model.graph, 0
    for node in list(graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.const_value is None or table.dtype != FLOAT or len(table.uses()) > 1:
            continue
        if table.const_value.size < least or magnitude(array_of(table)) > LARGEST:
            continue
        half = constant(graph, f"{table.name}.float16", _half(table.const_value))
        rows = insert(
            node, "Gather", [half, node.inputs[1]], f"{node.name}.half", axis=node.attributes.get_int("axis", 0)
        )
        replace(node, insert(node, "Cast", list(rows.outputs), f"{node.name}.float", to=FLOAT.value).outputs[0])
        drop(graph, table)
        halved += 1
    return halved


def _half(table: ir.TensorProtocol) -> ir.LazyTensor:
    """Made when it is written, for it may be gigabytes."""
    return ir.LazyTensor(
        lambda: ir.tensor(table.numpy().astype(HALF.numpy())), dtype=HALF, shape=ir.Shape(table.shape.numpy())
    )
