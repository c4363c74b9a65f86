"""The canonical graph in ONNX opset 17, which the parsers of TensorRT 8.6 to 10.14 take: standard operators only.

Newer operators are decomposed, what newer versions of an operator added is said in the old way, and indices become
int32. The passes for attention over a cache and for patches go before this one.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from . import array_of, constant, insert, integers, prune, replace
from .decompositions import DECOMPOSITIONS, Made, refuse

OPSET, IR_VERSION = 17, 8
BLOCKS = 21, 10  # the opset and IR version that have weights in blocks
REDUCTIONS = {  # whose axes became an input in opset 18
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
}


def apply(model: ir.Model, int4: bool = False) -> int:
    """Returns how many nodes were decomposed or said in another way; raises VlmcError for what opset 17 cannot say.

    Inputs and outputs stay float32 and those of int64 become int32. With `int4` weights in blocks may stay: a graph
    that has any is then of opset 21, and of opset 17's operators otherwise, as TensorRT 10.0 to 10.14 take it."""
    graph, made, changed = model.graph, Made(), 0
    blocks = int4 and any(_in_blocks(node) for node in graph)
    graph.sort()
    canonical = graph.opset_imports[""]
    for node in list(graph):
        if node.op_type in DECOMPOSITIONS and not node.domain:
            replace(node, DECOMPOSITIONS[node.op_type](node, made))
            changed += 1
    for node in list(graph):
        if blocks and _in_blocks(node):
            continue
        changed += _rewrite(node)
        _check(node, canonical)
    graph.opset_imports[""], model.ir_version = BLOCKS if blocks else (OPSET, IR_VERSION)
    for node in list(graph) if blocks else ():
        if node.op_type in REDUCTIONS and (axes := node.attributes.pop("axes", None)) is not None:
            listed = constant(graph, f"{node.name}.axes", np.array(axes.as_ints(), np.int64))
            node.resize_inputs(2)
            node.replace_input_with(1, listed)
    prune(model)
    integers.apply(model)
    return changed


def _in_blocks(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear" and node.attributes.get_int("block_size", 0) > 0


def _rewrite(node: ir.Node) -> bool:
    """Says in opset 17 what the node's operator takes in another form there; whether there was anything."""
    if node.op_type in REDUCTIONS:
        return _reduction(node)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return _quantization(node)
    if node.op_type == "Shape":
        return _shape(node)
    if node.op_type == "Split" and (count := node.attributes.pop("num_outputs", None)) is not None:
        if len(node.inputs) < 2:  # equal parts are what opset 17 makes of no sizes, but not with a smaller last one
            whole = node.inputs[0]
            assert whole is not None and whole.shape is not None
            size = whole.shape[node.attributes.get_int("axis", 0)]
            if not isinstance(size, int) or size % count.as_int():
                raise refuse(node, f"a split of {size} into {count.as_int()} parts")
        return True
    return False


def _reduction(node: ir.Node) -> bool:
    """axes as an attribute. No axes are all of them, unless the node says that it then does nothing."""
    if node.attributes.get_int("noop_with_empty_axes", 0):
        raise refuse(node, "noop_with_empty_axes")
    node.attributes.pop("noop_with_empty_axes", None)
    if len(node.inputs) < 2:
        return False
    axes = node.inputs[1]
    if axes is not None:
        if axes.const_value is None:
            raise refuse(node, "axes that are computed")
        node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in array_of(axes)])
    node.resize_inputs(1)
    return True


def _quantization(node: ir.Node) -> bool:
    """Symmetric int8 with float32 scales, a tensor or an axis, its zero points written out as TensorRT 8 wants them."""
    if node.attributes.get_int("block_size", 0):
        raise refuse(node, "blocks of weights", "choose the recipe int8, or TensorRT 10 or later for int4 weights")
    node.attributes.pop("block_size", None)
    number, scale = node.inputs[0], node.inputs[1]
    assert number is not None and scale is not None and scale.const_value is not None
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None or node.op_type == "DequantizeLinear":
        dtype = (zero or number).dtype
    else:
        dtype = ir.DataType(node.attributes.get_int("output_dtype", int(ir.DataType.UINT8)))
    if dtype != ir.DataType.INT8 or scale.dtype != ir.DataType.FLOAT:
        raise refuse(node, f"{dtype} with a scale of {scale.dtype}", "choose the recipe int8")
    node.attributes.pop("output_dtype", None)
    if zero is not None:
        return False
    assert isinstance(node.graph, ir.Graph)
    zeros = constant(node.graph, f"{scale.name}.zero", np.zeros(array_of(scale).shape, np.int8))
    node.resize_inputs(3)
    node.replace_input_with(2, zeros)
    return True


def _shape(node: ir.Node) -> bool:
    """TensorRT 8.6 overlooks Shape's start and end, so the part is sliced out of the whole shape."""
    bounds = node.attributes.pop("start", None), node.attributes.pop("end", None)
    if bounds == (None, None):
        return False
    assert isinstance(node.graph, ir.Graph)
    start, end = (default if bound is None else bound.as_int() for bound, default in zip(bounds, (0, 99), strict=True))
    limits = [constant(node.graph, f"bound.{limit}", np.array([limit], np.int64)) for limit in (start, end, 0)]
    whole = insert(node, "Shape", [node.inputs[0]], f"{node.name}.whole").outputs[0]
    replace(node, insert(node, "Slice", [whole, *limits], f"{node.name}.part").outputs[0])
    return True


def _check(node: ir.Node, canonical: int) -> None:
    """Whether opset 17 has the operator with these inputs and attributes; those that say what is so anyway go."""
    if node.graph is None:
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
        newer = onnx.defs.get_schema(node.op_type, canonical, node.domain)
    except onnx.defs.SchemaError:
        raise refuse(node, f"an operator of {node.domain or 'a later opset'}") from None
    for name in sorted(node.attributes.keys() - schema.attributes.keys()):
        default = newer.attributes[name].default_value if name in newer.attributes else None
        if default is None or ir.serde.deserialize_attribute(default).value != node.attributes[name].value:
            raise refuse(node, f"the attribute {name}")
        node.attributes.pop(name)
    if len(node.inputs) > schema.max_input:
        raise refuse(node, f"{len(node.inputs)} inputs, where it takes {schema.max_input}")
