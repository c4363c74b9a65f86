"""Weights stored as int8 → float weights behind QuantizeLinear: TensorRT below 10 takes no int8 constants.

Nothing changes in value: q · scale is quantised to q again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from . import array_of, constant, insert, prune


def apply(model: ir.Model) -> int:
    """Rewrites every DequantizeLinear of a constant that has a scale for the tensor or for each channel."""
    graph, changed = model.graph, 0
    for node in list(graph):
        integers, scale = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type != "DequantizeLinear" or integers is None or integers.const_value is None or scale is None:
            continue
        axis, scales = node.attributes.get_int("axis", 1), array_of(scale)
        values = array_of(integers)
        shape = [-1 if position == axis else 1 for position in range(values.ndim)] if scales.ndim else []
        floats = constant(graph, f"{integers.name}.float", values.astype(np.float32) * scales.reshape(shape))
        zero = constant(graph, f"{integers.name}.zero", np.zeros(scales.shape, np.int8))
        attributes: dict[str, Any] = {"axis": axis} if scales.ndim else {}
        quantize = insert(node, "QuantizeLinear", [floats, scale, zero], f"{node.name}.quantize", **attributes)
        node.replace_input_with(0, quantize.outputs[0])
        changed += 1
    prune(model)
    return changed
