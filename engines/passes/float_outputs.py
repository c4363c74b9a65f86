"""Takes the Q/DQ behind layers out again, for backends that would only round there and still multiply floats.

What they compute is then slightly nearer to the float model than the plan and the fake-quant model are.
"""

from __future__ import annotations

import onnx_ir as ir

from . import producer, prune, replace
from .quantize import OUTPUT


def apply(model: ir.Model) -> int:
    """Removes every pair that `quantize` put behind a layer; Q/DQ of layers' inputs stay."""
    changed = 0
    for node in list(model.graph):
        quantize = producer(node.inputs[0], "QuantizeLinear") if node.op_type == "DequantizeLinear" else None
        if quantize is not None and (quantize.name or "").endswith(f".{OUTPUT}.quantize"):
            value = quantize.inputs[0]
            assert value is not None
            replace(node, value)
            changed += 1
    prune(model)
    return changed
