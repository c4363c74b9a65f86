"""A float32 graph, Q/DQ included, → float16 arithmetic, for backends that take every precision from the graph.

Weights, activations, the scales of Q/DQ and the KV cache become float16. float32 stays, with a Cast on either side,
- at the border: other inputs and outputs keep their types, so a runtime passes the same arrays to every engine;
- in norms, also in those that are spelt out, for sums of squares leave float16's range;
- in what is computed from positions alone (rotary tables): float16 cannot tell 2049 from 2048;
- where float16 cannot hold a constant: one beyond 65504, or a scale so small that rounding it would show;
- in Q/DQ of an opset that knows no other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from . import array_of, constant, drop, insert, norms, prune

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
STATES = ("past_key_values.", "present.")  # the KV cache stays on the device, in float16
NORMS = ("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "ReduceL2")
HALF_SCALES = 19  # the first opset whose Q/DQ take float16
LARGEST = float(np.finfo(np.float16).max)
SMALLEST_SCALE = 2.0**-17  # float16 is spaced 2^-24 there: rounding moves a scale by 1/256, as much as int8 rounds


def apply(model: ir.Model) -> int:
    """Changes the types in place; returns how many nodes compute in float16 now."""
    from onnx_ir.passes import common

    common.ShapeInferencePass()(model)  # nodes that other passes made have no types yet
    graph, changed = model.graph, 0
    norms.apply(model)
    exact: set[ir.Value] = set()  # computed from positions alone
    for value in graph.inputs:
        if value.dtype == FLOAT and _is_state(value):
            value.type = ir.TensorType(HALF)
    for node in list(graph):
        if node.op_type == "Shape":  # of whatever type
            continue
        floats = [value for value in node.inputs if value is not None and value.dtype in (FLOAT, HALF)]
        variable = [value for value in floats if value.const_value is None]
        made = [value for value in node.outputs if value.dtype in (FLOAT, HALF)]
        if (variable and exact.issuperset(variable)) or (made and not floats):
            exact.update(made)
            continue
        norm = node.op_type in NORMS or str(node.name).endswith(norms.PARTS)
        wanted = FLOAT if norm or not _fits(node, graph.opset_imports[""]) else HALF
        for position, source in enumerate(node.inputs):
            if source is not None and source in floats:
                node.replace_input_with(position, _as(graph, source, wanted, node))
                if source.const_value is not None:
                    drop(graph, source)
        for value in made:
            value.type = ir.TensorType(wanted)
        if node.op_type == "Cast" and made:
            node.attributes["to"] = ir.AttrInt64("to", wanted.value)
        changed += wanted == HALF and bool(floats)
    for position, value in enumerate(graph.outputs):
        wanted = HALF if _is_state(value) else FLOAT
        if value.dtype in (FLOAT, HALF) and value.dtype != wanted:
            graph.outputs[position] = _output(graph, value, wanted)
    prune(model)
    return changed


def _is_state(value: ir.Value) -> bool:
    return (value.name or "").startswith(STATES)


def _fits(node: ir.Node, opset: int) -> bool:
    """Whether float16 holds the node's constants, and its operator takes them."""
    scale = node.inputs[1] if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
    if scale is not None and opset < HALF_SCALES:
        return False
    for value in node.inputs:
        if value is not None and value.const_value is not None and value.dtype == FLOAT:
            array = array_of(value)
            if LARGEST < magnitude(array) < np.inf:
                return False
            if value is scale and array[array > 0].min(initial=1) < SMALLEST_SCALE:
                return False
    return True


def magnitude(array: NDArray[Any]) -> float:
    """The largest absolute value; of an array with infinities, which float16 has too, that of the others."""
    largest = max(array.max(initial=0), -array.min(initial=0))
    return float(largest if np.isfinite(largest) else magnitude(array[np.isfinite(array)]))


def _as(graph: ir.Graph, value: ir.Value, wanted: ir.DataType, user: ir.Node) -> ir.Value:
    """The value in that type, for the node and all behind it."""
    if value.dtype == wanted:
        return value
    name = f"{value.name}.{wanted.numpy().name}"
    if value.const_value is not None:
        return constant(graph, name, array_of(value).astype(wanted.numpy()))
    for use in value.uses():
        if use.node.op_type == "Cast" and use.node.outputs[0].name == f"{name}.out":
            return use.node.outputs[0]
    cast = insert(user, "Cast", [value], name, to=wanted.value).outputs[0]
    cast.shape, cast.type = value.shape, ir.TensorType(wanted)
    return cast


def _output(graph: ir.Graph, value: ir.Value, wanted: ir.DataType) -> ir.Value:
    """A graph output of that type under the value's name."""
    cast = ir.node("Cast", [value], attributes={"to": wanted.value}, name=f"{value.name}.{wanted.numpy().name}")
    graph.append(cast)
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(wanted)
    cast.outputs[0].name, value.name = value.name, f"{value.name}.{HALF.numpy().name}"
    return cast.outputs[0]
