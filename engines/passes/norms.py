"""Norms that a graph spells out, found and named as decompositions.py names those that it spells out itself, but SPELT.

A sum of squares leaves float16's range where what it is the norm of does not: 256² is beyond 65504. So passes and
builders keep the nodes of these names in float32, from the square to the root.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from . import array_of

SQUARE, NORMAL = ".square", ".normal"
SPELT = ".spelt"  # in the names of norms that were found so
PARTS = (SQUARE, ".mean", ".total", ".shifted", ".root", NORMAL)  # how the names of a norm's nodes end
SUMS = ("ReduceMean", "ReduceSum")
SHIFTED = ("Add", "Max", "Clip", "Mul", "Div")  # by a constant
MOVED = ("Reshape", "Expand", "Unsqueeze", "Squeeze")


def apply(model: ir.Model) -> int:
    """Names the square, its sum and all up to the root, each after the square; returns how many squares there are."""
    found = 0
    for node in model.graph:
        sums = [use.node for use in node.outputs[0].uses() if use.node.op_type in SUMS and use.idx == 0]
        if not sums or not _squares(node) or str(node.name).endswith(PARTS):
            continue
        norm = f"{node.name}{SPELT}"
        node.name = norm + SQUARE
        for total in sums:
            total.name = f"{norm}.{total.name}.total"
            _name_behind(total.outputs[0], norm)
        found += 1
    return found


def _name_behind(value: ir.Value, norm: str) -> None:
    """Everything that a sum of squares goes through until its root is taken."""
    for node in [use.node for use in value.uses() if use.idx == 0]:
        if node.op_type == "Sqrt" or _power(node) == 0.5:
            node.name = f"{norm}.{node.name}.root"
        elif node.op_type in MOVED or (node.op_type in SHIFTED and _by_constants(node)):
            node.name = f"{norm}.{node.name}.shifted"
            _name_behind(node.outputs[0], norm)


def _squares(node: ir.Node) -> bool:
    return _power(node) == 2 or (node.op_type == "Mul" and node.inputs[0] is node.inputs[1])


def _power(node: ir.Node) -> float | None:
    """The exponent of a Pow, where it is one constant number."""
    exponent = node.inputs[1] if node.op_type == "Pow" else None
    if exponent is None or exponent.const_value is None or exponent.const_value.size != 1:
        return None
    return float(np.ravel(array_of(exponent))[0])


def _by_constants(node: ir.Node) -> bool:
    return all(value is None or value.const_value is not None for value in node.inputs[1:])
