"""A norm's weight is multiplied with the reciprocal of its root, and then both with the input.

TensorRT 8.6 makes a scale of a product by a constant a channel, merges it with the QuantizeLinear behind it, and does
not build ("mergeScales … equalOrZero"), seen with Gemma 3n's tower. A product of two computed tensors is no such scale.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from . import insert, only_user, producer, prune
from .norms import NORMAL


def apply(model: ir.Model) -> int:
    """x · (1/root) · weight → x · ((1/root) · weight), the weight a constant of a number a channel of (…, channels,
    height, width). The new product is named as a norm's own: it stays float32, for at a root of nothing it may leave
    float16's range. Returns how many."""
    changed = 0
    for node in list(model.graph):
        inner = producer(node.inputs[0], "Mul") if node.op_type == "Mul" and _a_channel(node.inputs[1]) else None
        if inner is None or only_user(inner.outputs[0], "Mul") is not node:
            continue
        if producer(inner.inputs[1], "Reciprocal") is not None:
            product = insert(node, "Mul", [inner.inputs[1], node.inputs[1]], f"{node.name}{NORMAL}").outputs[0]
            node.replace_input_with(0, inner.inputs[0])
            node.replace_input_with(1, product)
            changed += 1
    prune(model)
    return changed


def _a_channel(value: ir.Value | None) -> bool:
    constant = None if value is None else value.const_value
    shape = [] if constant is None else [*constant.shape]
    return len(shape) >= 3 and shape[-3] == np.prod(shape)
