"""A plan applied to a canonical float graph: smoothing, then Q/DQ in the one form that every backend can lower.

Weights: symmetric int8 a channel, or blocks of int8 or int4, behind DequantizeLinear. Activations: symmetric int8 a
tensor between QuantizeLinear and DequantizeLinear (ONNX opset 21 and later), before a layer and, where the plan has an
`output_scale`, behind its bias. The numbers are the plan's and the arithmetic is `calibration.weights`, so the PyTorch
fake-quant model computes the same.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...calibration.plan import ModulePlan, Plan
from ...calibration.weights import quantize_weight
from ...errors import VlmcError
from . import array_of, constant, drop, insert, is_bias, module_of, prune, weight_of

OUTPUT = "output"  # in the names of Q/DQ behind a layer


def apply(model: ir.Model, plan: Plan, component: str) -> int:
    """Quantises all calls of the modules that the plan names; a module of the plan that the graph lacks is an error."""
    prefix = f"{component}/"
    nodes: dict[str, list[ir.Node]] = {}  # by module: one for each time that it is called
    for node in model.graph:
        nodes.setdefault(module_of(node), []).append(node)
    absorbers = {
        k.removeprefix(prefix): np.array(v, np.float32) for k, v in plan.absorbers.items() if k.startswith(prefix)
    }
    modules = {k.removeprefix(prefix): v for k, v in plan.modules.items() if k.startswith(prefix)}
    if missing := sorted((absorbers.keys() | modules.keys()) - nodes.keys()):
        raise VlmcError(
            f"The plan {plan.recipe.name!r} names modules that the graph of {component} does not have",
            found=", ".join(missing[:3]),
            expected="a named node for each",
            fix="calibrate and export with the same version of vlmc; in a family of your own, a module that the graph "
            "has as arithmetic, or under another name, cannot be quantised",
        )
    for path in absorbers.keys() | modules.keys():
        for node in nodes[path]:
            _require_channels(node, absorbers.get(path), modules.get(path))
    for path, divisor in absorbers.items():
        for node in nodes[path]:
            _absorb(model.graph, node, divisor)
    for path, module in modules.items():
        for node in nodes[path]:
            _quantize(model.graph, node, module)
    prune(model)
    return len(modules)


def _require_channels(node: ir.Node, divisor: NDArray[np.float32] | None, module: ModulePlan | None) -> None:
    """Raises where the node has no weight, or another number of channels than the plan has divisors or factors."""
    takes = makes = 0
    if node.op_type.endswith("Normalization"):
        makes = array_of(node.inputs[1]).size
    elif (weight := weight_of(node)) is not None:
        takes, makes = (weight.shape[1], weight.shape[0]) if node.op_type == "Conv" else weight.shape
    smoothing = module.smoothing if module else None
    fits = smoothing is None or len(smoothing) == takes
    if not fits or (divisor is not None and len(divisor) != makes) or (module is not None and not takes):
        raise VlmcError(f"The plan does not fit the layer {node.name} of the graph", fix="run `vlmc calibrate` again")


def _absorb(graph: ir.Graph, node: ir.Node, divisor: NDArray[np.float32]) -> None:
    """Divides the node's output channels: its weight's columns and its bias (of a norm: both vectors)."""
    shape = (-1, 1, 1, 1) if node.op_type == "Conv" else (-1,)
    _put(graph, node, 1, array_of(node.inputs[1]) / divisor.reshape(shape))
    if len(node.inputs) > 2:
        _put(graph, node, 2, array_of(node.inputs[2]) / divisor)
    if add := _bias(node):
        position = next(i for i, value in enumerate(add.inputs) if is_bias(value, node))
        _put(graph, add, position, array_of(add.inputs[position]) / divisor)


def _bias(node: ir.Node) -> ir.Node | None:
    """The Add behind the product that adds the layer's own bias, which carries its name."""
    adds = (use.node for use in node.outputs[0].uses() if use.node.op_type == "Add")
    return next((add for add in adds if any(is_bias(value, node) for value in add.inputs)), None)


def _put(graph: ir.Graph, node: ir.Node, position: int, smoothed: NDArray[Any]) -> None:
    """Gives the node the smoothed constant in the place of the one it has."""
    value = node.inputs[position]
    assert value is not None
    node.replace_input_with(position, constant(graph, f"{value.name}.smoothed", smoothed.astype(np.float32)))


def _quantize(graph: ir.Graph, node: ir.Node, module: ModulePlan) -> None:
    weight, before = weight_of(node), node.inputs[1]
    assert weight is not None and before is not None and node.name is not None
    if module.smoothing is not None:
        factor = np.array(module.smoothing, np.float32).reshape((-1, 1, 1) if node.op_type == "Conv" else (-1, 1))
        weight = weight * factor
    if module.weight_bits:
        node.replace_input_with(1, _dequantized(graph, node, weight, module))
    elif module.smoothing is not None:
        _put(graph, node, 1, weight)
    drop(graph, before)
    if module.activation_scale is not None:
        node.replace_input_with(0, _quantized_input(node, module.activation_scale))
    if module.output_scale is not None:
        _quantize_output(node, module.output_scale)


def _dequantized(graph: ir.Graph, node: ir.Node, weight: NDArray[np.float32], module: ModulePlan) -> ir.Value:
    """The weight, (in, out) of a MatMul or (out, in, h, w) of a Conv, as integers behind a DequantizeLinear."""
    name = f"{node.name}.weight"
    convolution = node.op_type == "Conv"
    rows = weight.reshape(len(weight), -1) if convolution else weight.T
    values, scales = quantize_weight(rows, module.weight_bits, module.block)
    integers = values.reshape(weight.shape) if convolution else np.ascontiguousarray(values.T)
    if module.weight_bits == 4:
        integers = integers.astype(ml_dtypes.int4)
    attributes: dict[str, Any] = {"axis": 0 if convolution or module.block else 1}
    if module.block:
        attributes["block_size"] = module.block
        scales = np.ascontiguousarray(scales.T)
    else:
        scales = scales[:, 0]
    inputs = [constant(graph, f"{name}.int{module.weight_bits}", integers), constant(graph, f"{name}.scale", scales)]
    return insert(node, "DequantizeLinear", [*inputs], f"{name}.dequantize", **attributes).outputs[0]


def _quantized_input(node: ir.Node, scale: float) -> ir.Value:
    """The node's input through int8; consumers that share the input and the scale share the pair of nodes."""
    source = node.inputs[0]
    assert source is not None and node.graph is not None
    for use in source.uses():
        if use.node.op_type == "QuantizeLinear" and use.idx == 0:
            known = use.node.inputs[1]
            if (
                known is not None
                and known.const_value is not None
                and float(known.const_value.numpy()) == np.float32(scale)
            ):
                return next(iter(use.node.outputs[0].uses())).node.outputs[0]
    return _pair(node, source, scale, "input")[1].outputs[0]


def _quantize_output(node: ir.Node, scale: float) -> None:
    """Puts all that the layer makes, its bias added, through int8."""
    value = (_bias(node) or node).outputs[0]
    quantize, dequantize = _pair(node, value, scale, OUTPUT)
    made = dequantize.outputs[0]
    made.shape, made.type = value.shape, value.type
    if value.is_graph_output():
        made.name, value.name = value.name, made.name
    ir.convenience.replace_all_uses_with(value, made, replace_graph_outputs=True)
    quantize.replace_input_with(0, value)


def _pair(node: ir.Node, value: ir.Value, scale: float, place: str) -> tuple[ir.Node, ir.Node]:
    """QuantizeLinear and DequantizeLinear of the value, named after the layer and the place."""
    assert isinstance(node.graph, ir.Graph)
    name = f"{node.name}.{place}"
    parameters = [
        constant(node.graph, f"{name}.scale", np.array(scale, np.float32)),
        constant(node.graph, f"{name}.zero", np.array(0, np.int8)),
    ]
    quantize = insert(node, "QuantizeLinear", [value, *parameters], f"{name}.quantize")
    return quantize, insert(node, "DequantizeLinear", [quantize.outputs[0], *parameters], f"{name}.dequantize")
