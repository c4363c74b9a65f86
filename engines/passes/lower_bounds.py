"""What is clipped from below alone, as a maximum.

TensorRT 8.6 does not build a float decoder whose norm ends a fused region before such a Clip ("Could not find any
implementation for node {ForeignNode[…]}"), seen with Gemma 3n's magnitudes; it builds it with a Max.
"""

from __future__ import annotations

import onnx_ir as ir

from . import insert, prune, replace


def apply(model: ir.Model) -> int:
    """Clip(x, low) → Max(x, low); returns how many."""
    found = [node for node in model.graph if node.op_type == "Clip" and _from_below(node)]
    for node in found:
        replace(node, insert(node, "Max", list(node.inputs[:2]), str(node.name)).outputs[0])
    prune(model)
    return len(found)


def _from_below(node: ir.Node) -> bool:
    low, high = [*node.inputs[1:], None, None][:2]
    return low is not None and high is None
