"""Q/DQ around a weight product → ONNX Runtime's MatMulIntegerToFloat, with the bias inside.

Activations become unsigned with zero point 128, which is exact (q + 128) and what x86's VNNI multiplies: in signed
form MLAS falls back to a kernel that is slower than float (docs/experiments.md).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from . import MICROSOFT, constant, insert, is_bias, only_user, producer, prune, replace


def apply(model: ir.Model) -> int:
    """Rewrites every MatMul whose two inputs are dequantised int8, the weight a channel at a time."""
    graph, changed = model.graph, 0
    for node in list(graph):
        if node.op_type != "MatMul":
            continue
        left, right = (producer(value, "DequantizeLinear") for value in node.inputs)
        quantize = producer(left.inputs[0], "QuantizeLinear") if left else None
        if quantize is None or right is None or "block_size" in right.attributes:
            continue
        zero = constant(graph, "unsigned.zero", np.array(128, np.uint8))
        for half in (quantize, left):  # whatever else reads the pair gets the same numbers as before
            assert half is not None
            half.replace_input_with(2, zero)
        quantize.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        add = only_user(node.outputs[0], "Add")
        bias = _bias(add, node)
        last = node if add is None or bias is None else add
        inputs = [quantize.outputs[0], right.inputs[0], quantize.inputs[1], right.inputs[1], zero, None, bias]
        fused = insert(last, "MatMulIntegerToFloat", inputs, f"{node.name}.int8", domain=MICROSOFT)
        replace(last, fused.outputs[0])
        changed += 1
    if changed:
        model.graph.opset_imports[MICROSOFT] = 1
    prune(model)
    return changed


def _bias(add: ir.Node | None, node: ir.Node) -> ir.Value | None:
    """The layer's own bias where the Add behind it adds that, and not a residual."""
    return next((value for value in add.inputs if is_bias(value, node)), None) if add else None
