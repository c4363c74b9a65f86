"""Patch embedding as a weight product: a convolution whose patches do not overlap is a MatMul over folded patches.

TensorRT 8.6 runs such a convolution in a slow kernel, and a MatMul in the one that every other layer uses. Nodes and
constants keep the module's path, so plans and counts find it as before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from . import array_of, constant, insert, only_user, producer, prune, replace, reshaped, size


def apply(model: ir.Model) -> int:
    """Rewrites every Conv over whole patches of an input (tiles, channels, height, width) of known size, with or
    without Q/DQ around it. Where its output is only flattened to (tiles, patches, out), that is what MatMul gives."""
    convolutions = [node for node in model.graph if node.op_type == "Conv" and _over_patches(node)]
    for node in convolutions:
        _rewrite(node)
    prune(model)
    return len(convolutions)


def _over_patches(node: ir.Node) -> bool:
    """Whether the kernel is more than a pixel and steps by its own size, from edge to edge."""
    attributes, sizes = node.attributes, list(_source(node).shape or ())[2:]
    kernel = list(attributes.get_ints("kernel_shape", ()))
    return (
        len(sizes) == len(kernel) == 2
        and kernel != [1, 1]  # a layer of a convolutional network, as Gemma 3n's has by the hundred
        and list(attributes.get_ints("strides", (1, 1))) == kernel
        and all(isinstance(size, int) and size % step == 0 for size, step in zip(sizes, kernel, strict=True))
        and not any(attributes.get_ints("pads", ()))
        and all(step == 1 for step in attributes.get_ints("dilations", ()))
        and attributes.get_int("group", 1) == 1
        and attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    )


def _pair(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """QuantizeLinear and DequantizeLinear between the node and its input."""
    dequantize = producer(node.inputs[0], "DequantizeLinear")
    quantize = producer(dequantize.inputs[0], "QuantizeLinear") if dequantize else None
    return (quantize, dequantize) if quantize is not None and dequantize is not None else None


def _source(node: ir.Node) -> ir.Value:
    """What the node reads, before Q/DQ."""
    pair = _pair(node)
    value = pair[0].inputs[0] if pair else node.inputs[0]
    assert value is not None
    return value


def _rewrite(node: ir.Node) -> None:
    path, source = str(node.name), _source(node)
    assert source.shape is not None
    tiles, (channels, height, width) = source.shape[0], (size(source, axis) for axis in (1, 2, 3))
    high, wide = node.attributes["kernel_shape"].as_ints()
    rows, columns = height // high, width // wide
    folded = reshaped(node, source, (-1, channels, rows, high, columns, wide), f"{path}.patches.grid")
    folded = insert(node, "Transpose", [folded], f"{path}.patches.turned", perm=[0, 2, 4, 1, 3, 5]).outputs[0]
    patches: ir.Value = reshaped(node, folded, (-1, rows * columns, channels * high * wide), f"{path}.patches")
    if pair := _pair(node):  # each number is rounded as before, and the pair stands where TensorRT looks for it
        for half in pair:
            inputs, what = [patches, *half.inputs[1:]], half.op_type.removesuffix("Linear").lower()
            patches = insert(node, half.op_type, inputs, f"{path}.patches.{what}").outputs[0]
    result = insert(node, "MatMul", [patches, _weight(node)], path).outputs[0]
    if len(node.inputs) > 2:
        result = insert(node, "Add", [result, node.inputs[2]], f"{path}.biased").outputs[0]
    out = size(node.outputs[0], 1)
    result.type = node.outputs[0].type
    result.shape = ir.Shape([tiles, rows * columns, out])
    if (flattened := _flattened(node, rows * columns)) is not None:
        replace(flattened, result)
        return
    turned = insert(node, "Transpose", [result], f"{path}.channels", perm=[0, 2, 1]).outputs[0]
    replace(node, reshaped(node, turned, (-1, out, rows, columns), f"{path}.grid"))


def _weight(node: ir.Node) -> ir.Value:
    """The weight (in, out) under the name that (out, in, high, wide) had, dequantised by column where it was."""
    weight = node.inputs[1]
    dequantize = producer(weight, "DequantizeLinear")
    if dequantize is None:
        return _exchange(node, weight)
    inputs = [_exchange(node, dequantize.inputs[0]), *dequantize.inputs[1:]]
    return insert(node, "DequantizeLinear", inputs, str(dequantize.name), axis=1).outputs[0]


def _exchange(node: ir.Node, old: ir.Value | None) -> ir.Value:
    """A constant of the graph, (out, …), as (in, out) in its own place."""
    graph, array = node.graph, array_of(old)
    assert isinstance(graph, ir.Graph) and old is not None
    matrix: NDArray[Any] = np.ascontiguousarray(array.reshape(len(array), -1).T)
    name = str(old.name)
    graph.initializers.pop(name)
    return constant(graph, name, matrix)


def _flattened(node: ir.Node, patches: int) -> ir.Node | None:
    """The Transpose that ends the way from (tiles, out, rows, columns) over (tiles, out, patches) to (tiles, patches,
    out), where the convolution's output goes that way only."""
    reshape = only_user(node.outputs[0], "Reshape")
    if reshape is None or reshape.outputs[0].shape is None or list(reshape.outputs[0].shape)[2:] != [patches]:
        return None
    transpose = only_user(reshape.outputs[0], "Transpose")
    return transpose if transpose and list(transpose.attributes.get_ints("perm", ())) == [0, 2, 1] else None
