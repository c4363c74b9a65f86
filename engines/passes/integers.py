"""Indices in int32 where an operator takes them: TensorRT below 10 has no int64.

What is computed from shapes alone stays int64, as ONNX has it and TensorRT folds it; a Cast stands where the two meet.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from . import array_of, constant, insert, replace

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
FIXED = {"tensor(bool)": ir.DataType.BOOL, "tensor(float)": ir.DataType.FLOAT, "tensor(int64)": INT64}


def apply(model: ir.Model) -> int:
    """Makes the graph's int64 inputs int32, and what is computed from them; returns how many inputs of the graph and of
    nodes it changed. The nodes have to be sorted, and of the opset that the model imports."""
    graph, changed = model.graph, 0
    for value in graph.inputs:
        if value.dtype == INT64:
            value.type = ir.TensorType(INT32)
            changed += 1
    for node in list(graph):
        if node.op_type == "Cast":
            changed += _cast(node)
        else:
            changed += _conform(node, onnx.defs.get_schema(node.op_type, graph.opset_imports[""], ""))
    return changed


def _cast(node: ir.Node) -> bool:
    """A cast to int64 goes to int32, and goes altogether where it was int32 before."""
    source, target = node.inputs[0], node.attributes.get_int("to")
    assert source is not None
    if target == INT64:
        if source.dtype == INT32:
            replace(node, source)
            return True
        node.attributes["to"] = ir.AttrInt64("to", INT32)
        target = INT32
    node.outputs[0].type = ir.TensorType(ir.DataType(target))
    return target == INT32


def _conform(node: ir.Node, schema: onnx.defs.OpSchema) -> int:
    """One letter of the operator's signature is one type: int32 where any of its inputs is, and it may be."""
    formal = [schema.inputs[min(position, len(schema.inputs) - 1)] for position in range(len(node.inputs))]
    types: dict[str, ir.DataType] = {}
    for value, parameter in zip(node.inputs, formal, strict=True):
        if value is not None and value.dtype is not None and types.get(parameter.type_str) != INT32:
            wide = value.dtype == INT32 and "tensor(int32)" not in parameter.types
            types[parameter.type_str] = INT64 if wide else value.dtype
    changed = 0
    for position, (value, parameter) in enumerate(zip(node.inputs, formal, strict=True)):
        target = types.get(parameter.type_str)
        if value is not None and value.dtype in (INT32, INT64) and target in (INT32, INT64) and value.dtype != target:
            node.replace_input_with(position, _converted(node, value, target))
            changed += 1
    for position, value in enumerate(node.outputs):
        parameter = schema.outputs[min(position, len(schema.outputs) - 1)]
        fixed = FIXED.get(next(iter(parameter.types))) if len(parameter.types) == 1 else None
        if dtype := types.get(parameter.type_str) or fixed:
            value.type = ir.TensorType(dtype)
    return changed


def _converted(node: ir.Node, value: ir.Value, target: ir.DataType) -> ir.Value:
    """The value in that type: a constant is made anew, what is computed goes through a Cast that its readers share."""
    name = f"{value.name}.{target.name.lower()}"
    if value.const_value is not None:
        assert isinstance(node.graph, ir.Graph)
        bounds = np.iinfo(target.numpy())  # an end that means "to the end" lies beyond them
        return constant(node.graph, name, np.clip(array_of(value), bounds.min, bounds.max).astype(target.numpy()))
    for use in value.uses():
        if use.node.op_type == "Cast" and use.node.attributes.get_int("to") == target:
            return use.node.outputs[0]
    cast = insert(node, "Cast", [value], name, to=int(target)).outputs[0]
    cast.type, cast.shape = ir.TensorType(target), value.shape
    return cast
