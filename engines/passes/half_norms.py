"""A norm in float32 between casts → the norm in float16, for backends whose kernel sums in float32 all the same.

That is what ONNX asks for (stash_type 1, its default), but not every backend keeps to it (see `half_precision`).
Two casts a norm are two launches of a kernel on a GPU, as costly there as a small product.
"""

from __future__ import annotations

import onnx_ir as ir

from . import array_of, constant, producer, prune
from .half_precision import HALF, LARGEST

NORMS = ("LayerNormalization", "RMSNormalization")


def apply(model: ir.Model) -> int:
    """Rewrites every norm with constant parameters that reads a cast float16 and is read as float16 alone."""
    graph, changed = model.graph, 0
    for node in list(graph):
        cast = producer(node.inputs[0], "Cast") if node.op_type in NORMS else None
        if cast is None or cast.inputs[0] is None or cast.inputs[0].dtype != HALF or not _in_half(node):
            continue
        node.replace_input_with(0, cast.inputs[0])
        for position, value in enumerate(node.inputs[1:], 1):
            if value is not None:
                halved = constant(graph, f"{value.name}.{HALF.numpy().name}", array_of(value).astype(HALF.numpy()))
                node.replace_input_with(position, halved)
        output = node.outputs[0]
        output.type = ir.TensorType(HALF)
        for use in list(output.uses()):
            ir.convenience.replace_all_uses_with(use.node.outputs[0], output)
        changed += 1
    prune(model)
    return changed


def _in_half(node: ir.Node) -> bool:
    """Whether it sums in float32, has constants that float16 holds, and is cast to float16 wherever it is used."""
    stash = node.attributes.get("stash_type")
    if len(node.outputs) > 1 or node.outputs[0].is_graph_output() or (stash is not None and stash.as_int() != 1):
        return False
    for value in node.inputs[1:]:
        if value is not None and (value.const_value is None or abs(array_of(value)).max() > LARGEST):
            return False
    return all(
        use.node.op_type == "Cast" and use.node.outputs[0].dtype == HALF and not use.node.outputs[0].is_graph_output()
        for use in node.outputs[0].uses()
    )
