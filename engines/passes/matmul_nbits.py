"""Blockwise weight-only products → ONNX Runtime's MatMulNBits, which keeps the weights packed in memory.

4-bit values are stored as q + 8 and 8-bit ones as q + 128, two or one a byte, in rows of output channels; the
activations are quantised to int8 on the fly (accuracy level 4), which is what makes it fast on CPUs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from . import MICROSOFT, array_of, constant, insert, producer, prune, replace

INT8_ACTIVATIONS = 4  # the operator's accuracy_level


def apply(model: ir.Model) -> int:
    """Rewrites every MatMul whose weight is dequantised in blocks."""
    graph, changed = model.graph, 0
    for node in list(graph):
        dequantize = producer(node.inputs[1], "DequantizeLinear") if len(node.inputs) == 2 else None
        if node.op_type != "MatMul" or dequantize is None or "block_size" not in dequantize.attributes:
            continue
        block = dequantize.attributes["block_size"].as_int()
        integers, scales = dequantize.inputs[0], dequantize.inputs[1]
        assert integers is not None
        values = array_of(integers).astype(np.int16).T  # (out, in)
        bits = 4 if integers.dtype == ir.DataType.INT4 else 8
        rows, columns = values.shape
        groups = -(-columns // block)
        stored = np.full((rows, groups * block), 1 << (bits - 1), np.uint8)  # the zero point, where a block is padded
        stored[:, :columns] = values + (1 << (bits - 1))
        if bits == 4:
            stored = stored[:, 0::2] | (stored[:, 1::2] << 4)
        inputs = [
            node.inputs[0],
            constant(graph, f"{node.name}.weight.packed", stored.reshape(rows, groups, block * bits // 8)),
            constant(graph, f"{node.name}.weight.scales", np.ascontiguousarray(array_of(scales).T)),
        ]
        attributes: dict[str, Any] = {
            "K": columns,
            "N": rows,
            "bits": bits,
            "block_size": block,
            "accuracy_level": INT8_ACTIVATIONS,
        }
        name = f"{node.name}.int{bits}"
        fused = insert(node, "MatMulNBits", [*inputs], name, domain=MICROSOFT, **attributes)
        replace(node, fused.outputs[0])
        changed += 1
    if changed:
        graph.opset_imports[MICROSOFT] = 1
    prune(model)
    return changed
