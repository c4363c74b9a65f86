"""Operators that are newer than opset 17, each as nodes of opset 17 that compute the same.

Where TensorRT documents a pattern that it fuses (GELU), the nodes are written in that form. All that comes from one
node carries its name, so that a builder can find, say, the squares of a norm and keep them in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ...errors import VlmcError
from . import HIDDEN, constant, insert, reshaped

Made = dict[str, ir.Value]  # values that several nodes of a graph share


def refuse(node: ir.Node, found: str, fix: str = "") -> VlmcError:
    """The error for a node that opset 17 cannot say."""
    fix = fix or "use a TensorRT whose parser takes it (the device's file names the opset), or another backend"
    return VlmcError(f"ONNX opset 17 cannot say {node.op_type}, the node {node.name}", found=found, fix=fix)


def rms_normalization(node: ir.Node, made: Made) -> ir.Value:
    """x / sqrt(mean(x²) + epsilon) · weight, the mean over the axes from `axis` on."""
    x, axis = node.inputs[0], node.attributes.get_int("axis", -1)
    axes = list(range(axis if axis < 0 else axis - len(_shape(x)), 0))
    square = _add(node, "square", "Pow", [x, _number(node, 2.0)])
    mean = _add(node, "mean", "ReduceMean", [square], axes=axes, keepdims=1)
    shifted = _add(node, "shifted", "Add", [mean, _number(node, node.attributes.get_float("epsilon", 1e-5))])
    root = _add(node, "root", "Sqrt", [shifted])
    return _add(node, "scaled", "Mul", [_add(node, "normal", "Div", [x, root]), node.inputs[1]])


def l2_norm(node: ir.Node, made: Made) -> ir.Value:
    """The root of the sum of squares over the axes, without which it is over all."""
    x, *axes = node.inputs
    square = _add(node, "square", "Pow", [x, _number(node, 2.0)])
    total = _add(node, "total", "ReduceSum", [square, *axes], keepdims=node.attributes.get_int("keepdims", 1))
    return _add(node, "root", "Sqrt", [total])


def rotary_embedding(node: ir.Node, made: Made) -> ir.Value:
    """x · [cos, cos] + [second half, first half] · [-sin, sin]; x (batch, heads, length, dim), of which the first
    rotary_embedding_dim channels are turned; cos and sin (batch, length, half of those)."""
    x, cos, sin, *positions = node.inputs
    interleaved = node.attributes.get_int("interleaved", 0)
    if positions or interleaved or len(_shape(x)) != 4:
        raise refuse(node, "position_ids, interleaved channels or an input that is not split into heads")
    width = int(_shape(x)[3])
    turned = node.attributes.get_int("rotary_embedding_dim", 0) or width
    rest = None
    if turned < width:
        x, rest = _split(node, "parts", x, [turned, width - turned])
    swapped = _add(node, "swapped", "Concat", _split(node, "halves", x, [turned // 2, turned // 2])[::-1], axis=3)
    cosines, sines = _twice(node, "cos", cos, made), _twice(node, "sin", sin, made)
    products = [_add(node, "cos", "Mul", [x, cosines]), _add(node, "sin", "Mul", [swapped, sines])]
    result = _add(node, "turned", "Add", products)
    return result if rest is None else _add(node, "whole", "Concat", [result, rest], axis=3)


def _twice(node: ir.Node, part: str, table: ir.Value | None, made: Made) -> ir.Value:
    """(batch, length, half) as (batch, 1, length, dim): a cosine twice, a sine negative and positive."""
    assert table is not None
    key = f"{part} {table.name}"
    if key not in made:
        row = _add(node, f"{part}.row", "Unsqueeze", [table, _integers(node, [1])])
        first = _add(node, f"{part}.negative", "Neg", [row]) if part == "sin" else row
        made[key] = _add(node, f"{part}.table", "Concat", [first, row], axis=3)
    return made[key]


def gelu(node: ir.Node, made: Made) -> ir.Value:
    """x · (1 + erf(x / √2)) / 2, or with tanh(√(2/π) · (x + 0.044715 · x³)) in the place of erf."""
    x = node.inputs[0]
    if node.attributes.get_string("approximate", "none") == "tanh":
        cube = _add(node, "cube", "Mul", [_add(node, "power", "Pow", [x, _number(node, 3.0)]), _number(node, 0.044715)])
        inner = _add(node, "inner", "Mul", [_add(node, "sum", "Add", [x, cube]), _number(node, math.sqrt(2 / math.pi))])
        curve = _add(node, "tanh", "Tanh", [inner])
    else:
        curve = _add(node, "erf", "Erf", [_add(node, "inner", "Div", [x, _number(node, math.sqrt(2))])])
    product = _add(node, "product", "Mul", [x, _add(node, "one", "Add", [curve, _number(node, 1.0)])])
    return _add(node, "half", "Mul", [product, _number(node, 0.5)])


def swish(node: ir.Node, made: Made) -> ir.Value:
    """x · sigmoid(alpha · x)."""
    x, alpha = node.inputs[0], node.attributes.get_float("alpha", 1.0)
    inner = x if alpha == 1.0 else _add(node, "inner", "Mul", [x, _number(node, alpha)])
    return _add(node, "product", "Mul", [x, _add(node, "sigmoid", "Sigmoid", [inner])])


def attention(node: ir.Node, made: Made) -> ir.Value:
    """softmax(scale · q · kᵀ, masked) · v without a cache; q (batch, heads, length, dim), k and v (batch, kv_heads,
    keys, dim), a boolean or additive mask broadcastable to (batch, heads, length, keys)."""
    query, key, value, *others = node.inputs
    mask = others[0] if others else None
    if any(others[1:]) or node.attributes.keys() - {"scale"} or len(_shape(query)) != 4:
        raise refuse(node, "a cache inside, an input that is not split into heads, or an attribute other than scale")
    heads, kv_heads, width = int(_shape(query)[1]), int(_shape(key)[1]), int(_shape(query)[3])
    grouped = heads != kv_heads
    scale = node.attributes.get_float("scale", width**-0.5)
    query = _add(node, "query", "Mul", [query, _number(node, scale)])
    if grouped:  # queries that share a key are rows of one product, so no key is repeated
        query = reshaped(node, query, (0, kv_heads, -1, width), f"{node.name}.grouped")
    turned = _add(node, "key", "Transpose", [key], perm=[0, 1, 3, 2])
    scores = _add(node, "scores", "MatMul", [query, turned])
    if mask is not None:
        if grouped:
            scores = reshaped(node, scores, (0, heads, -1, 0), f"{node.name}.ungrouped")
        if mask.dtype == ir.DataType.BOOL:
            scores = _add(node, "masked", "Where", [mask, scores, _number(node, HIDDEN)])
        else:
            scores = _add(node, "masked", "Add", [scores, mask])
        if grouped:
            scores = reshaped(node, scores, (0, kv_heads, -1, 0), f"{node.name}.regrouped")
    result = _add(node, "values", "MatMul", [_add(node, "weights", "Softmax", [scores], axis=3), value])
    return reshaped(node, result, (0, heads, -1, int(_shape(value)[3])), f"{node.name}.heads") if grouped else result


DECOMPOSITIONS: dict[str, Callable[[ir.Node, Made], ir.Value]] = {
    "Attention": attention,
    "Gelu": gelu,
    "ReduceL2": l2_norm,
    "RMSNormalization": rms_normalization,
    "RotaryEmbedding": rotary_embedding,
    "Swish": swish,
}


def _add(node: ir.Node, part: str, operator: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
    """The output of a new node before the one that it is a part of."""
    return insert(node, operator, list(inputs), f"{node.name}.{part}", **attributes).outputs[0]


def _split(node: ir.Node, part: str, value: ir.Value | None, sizes: list[int]) -> Sequence[ir.Value]:
    """Pieces of these sizes of the last of four axes."""
    inputs = [value, _integers(node, sizes)]
    return insert(node, "Split", inputs, f"{node.name}.{part}", outputs=len(sizes), axis=3).outputs


def _number(node: ir.Node, value: float) -> ir.Value:
    assert isinstance(node.graph, ir.Graph)
    return constant(node.graph, f"number.{value!r}", np.array(value, np.float32))


def _integers(node: ir.Node, values: list[int]) -> ir.Value:
    assert isinstance(node.graph, ir.Graph)
    return constant(node.graph, f"integers.{'x'.join(map(str, values))}", np.array(values, np.int64))


def _shape(value: ir.Value | None) -> Sequence[Any]:
    assert value is not None and value.shape is not None
    return list(value.shape)
