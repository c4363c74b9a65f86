"""Lowering passes, one a file: `apply` takes an `onnx_ir.Model`, changes it in place, and says how many places it
changed. Two files are parts of passes: `causal` of those for attention over a cache, `decompositions` of `opset17`.

This file holds the few moves that every pass is made of.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
# What a masked score becomes: finite in FP16, and nothing after a softmax that has a score of usual size.
HIDDEN = -3e4


def constant(graph: ir.Graph, name: str, array: NDArray[Any] | ir.LazyTensor) -> ir.Value:
    """The graph's initializer of that name, made from the array, or from what gives one when it is written, unless it
    is there."""
    if name not in graph.initializers:
        tensor = array if isinstance(array, ir.LazyTensor) else ir.tensor(array, name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.initializers[name] = value
    return graph.initializers[name]


def insert(
    anchor: ir.Node,
    operator: str,
    inputs: list[ir.Value | None],
    name: str,
    *,
    domain: str = "",
    outputs: int = 1,
    **attributes: Any,
) -> ir.Node:
    """A new node before `anchor`, itself and its outputs named after `name`."""
    node = ir.node(operator, inputs, attributes=attributes or None, domain=domain, num_outputs=outputs, name=name)
    for index, value in enumerate(node.outputs):
        value.name = f"{name}.out{index}" if outputs > 1 else f"{name}.out"
    assert anchor.graph is not None
    anchor.graph.insert_before(anchor, node)
    return node


def size(value: ir.Value | None, axis: int) -> int:
    """The value's size on the axis, where it is no free one."""
    assert value is not None and value.shape is not None
    found = value.shape[axis]
    assert isinstance(found, int)
    return found


def replace(node: ir.Node, value: ir.Value) -> None:
    """Everything that used the node's first output uses `value`, graph outputs included; the node goes."""
    old = node.outputs[0]
    graph = node.graph
    assert graph is not None
    value.shape, value.type = value.shape or old.shape, value.type or old.type
    if old.is_graph_output():
        value.name, old.name = old.name, f"{old.name}.replaced"
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def prune(model: ir.Model) -> None:
    """Removes nodes and constants that nothing uses any more, each node behind those that it reads."""
    from onnx_ir.passes import common

    model.graph.sort()
    common.RemoveUnusedNodesPass()(model)


def drop(graph: ir.Graph, value: ir.Value) -> None:
    """Removes a constant that nothing uses any more. At once and not when the graph is pruned, for with it goes what
    was read of its file."""
    if not value.uses() and graph.initializers.get(str(value.name)) is value:
        graph.initializers.pop(str(value.name)).const_value = None  # ONNX IR's shape inference keeps the value


def forget(model: ir.Model) -> None:
    """Lets go of all weights, once the model is written: whoever still holds it holds nothing of size."""
    for value in model.graph.initializers.values():
        value.const_value = None


def producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node that makes the value, where it is of that operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def only_user(value: ir.Value, operator: str) -> ir.Node | None:
    """The single node that uses the value, where it is of that operator and the value is no graph output."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != operator:
        return None
    return uses[0].node


def array_of(value: ir.Value | None) -> NDArray[Any]:
    """The constant behind a value that is known to be one."""
    assert value is not None and value.const_value is not None
    return np.asarray(value.const_value.numpy())


def module_of(node: ir.Node) -> str:
    """The path of the module whose call the node is: of a module that is called again they are PATH, PATH#2, …"""
    return str(node.name or "").partition("#")[0]


def is_bias(value: ir.Value | None, node: ir.Node) -> bool:
    """Whether the value is the bias of the node's own layer, by its name, smoothed (`quantize`) or not."""
    return value is not None and value.name in (f"{node.name}.bias", f"{node.name}.bias.smoothed")


def weight_of(node: ir.Node) -> NDArray[np.float32] | None:
    """The constant weight of a MatMul (in, out), Gemm or Conv node, or None where it multiplies two activations."""
    if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2 or node.inputs[1] is None:
        return None
    return None if node.inputs[1].const_value is None else array_of(node.inputs[1])


def reshaped(anchor: ir.Node, value: ir.Value | None, shape: tuple[int, ...], name: str) -> ir.Value:
    """The value in another shape, by a new Reshape before `anchor`: -1 is what remains, 0 the size that was there."""
    graph = anchor.graph
    assert isinstance(graph, ir.Graph)
    sizes = constant(graph, f"shape.{'x'.join(map(str, shape))}", np.array(shape, np.int64))
    return insert(anchor, "Reshape", [value, sizes], name).outputs[0]
