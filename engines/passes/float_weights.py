"""Weights stored as int8 → float weights, where TensorRT takes no such constants; nothing changes in value.

TensorRT below 10 takes int8 weights as floats behind QuantizeLinear, which makes q of q · scale again (`apply`). Below
10.15 it takes blocks of int4 and none of int8, so those become plain floats (`without_blocks`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from . import array_of, constant, insert, prune, replace


def without_blocks(model: ir.Model) -> int:
    """Replaces every constant in blocks of int8 by the floats that it stands for."""
    graph, changed = model.graph, 0
    for node in list(graph):
        integers, block = node.inputs[0] if node.inputs else None, node.attributes.get_int("block_size", 0)
        if node.op_type == "DequantizeLinear" and block and integers is not None and integers.dtype == ir.DataType.INT8:
            axis, values = node.attributes.get_int("axis", 1), array_of(integers)
            scales = np.repeat(array_of(node.inputs[1]), block, axis)
            scales = np.take(scales, range(values.shape[axis]), axis)  # the last block may be shorter
            replace(node, _floats(graph, f"{integers.name}.float", values, scales))
            changed += 1
    prune(model)
    return changed


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
        floats = _floats(graph, f"{integers.name}.float", values, scales.reshape(shape))
        zero = constant(graph, f"{integers.name}.zero", np.zeros(scales.shape, np.int8))
        attributes: dict[str, Any] = {"axis": axis} if scales.ndim else {}
        quantize = insert(node, "QuantizeLinear", [floats, scale, zero], f"{node.name}.quantize", **attributes)
        node.replace_input_with(0, quantize.outputs[0])
        changed += 1
    prune(model)
    return changed


def _floats(graph: ir.Graph, name: str, values: NDArray[Any], scales: NDArray[np.float32]) -> ir.Value:
    """values · scales as a float32 constant that is computed when it is written, one at a time: four times the bytes
    of the integers would otherwise lie in memory beside the builder."""
    lazy = ir.LazyTensor(
        lambda: ir.tensor(values.astype(np.float32) * scales, name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(values.shape),
        name=name,
    )
    return constant(graph, name, lazy)
