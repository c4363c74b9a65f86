"""A convolution over whole patches and its MatMul give the same numbers, in float and in integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vlmc.artifact import Artifact
from vlmc.calibration.plan import ModulePlan, read_plan
from vlmc.engines.passes import constant, patches_as_matmul, quantize
from vlmc.exporter import golden


def embedding(
    sizes: tuple[int, int] = (8, 12),
    kernel: tuple[int, int] = (4, 3),
    bias: bool = True,
    flattened: bool = True,
    **attributes: Any,
) -> ir.Model:
    """A patch embedding of 3 to 5 channels, named `patches`, as the exporter writes it; random weights."""
    random = np.random.default_rng(0)
    text = {"strides": list(kernel), "kernel_shape": list(kernel), "pads": [0] * 4, **attributes}
    arrays = {"weight": random.normal(size=(5, 3 // text.get("group", 1), *kernel)), "bias": random.normal(size=5)}
    if not bias:
        del arrays["bias"]
    float32, constants = ir.TensorType(ir.DataType.FLOAT), []
    for name, array in arrays.items():
        tensor = ir.tensor(array.astype(np.float32), name=f"patches.{name}")
        shape = ir.Shape(array.shape)
        constants.append(ir.Value(name=tensor.name, shape=shape, type=float32, const_value=tensor))
    x = ir.Value(name="x", shape=ir.Shape(["tiles", 3, *sizes]), type=float32)
    nodes = [ir.node("Conv", [x, *constants], attributes=text, name="patches")]
    stride, pads = text["strides"], text["pads"]
    rows, columns = ((sizes[i] + pads[i] + pads[i + 2] - kernel[i]) // stride[i] + 1 for i in range(2))
    shapes: list[list[Any]] = [["tiles", 5, rows, columns]]
    if flattened:
        target = ir.tensor(np.array([-1, 5, rows * columns]), name="target")
        int64 = ir.TensorType(ir.DataType.INT64)
        constants.append(ir.Value(name="target", shape=ir.Shape([3]), type=int64, const_value=target))
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], constants[-1]], name="reshape"))
        nodes.append(ir.node("Transpose", nodes[-1].outputs, attributes={"perm": [0, 2, 1]}, name="transpose"))
        shapes += [["tiles", 5, rows * columns], ["tiles", rows * columns, 5]]
    for node, shape in zip(nodes, shapes, strict=True):
        node.outputs[0].name, node.outputs[0].type = f"{node.name}.y", float32
        node.outputs[0].shape = ir.Shape(shape)
    graph = ir.Graph([x], nodes[-1].outputs, nodes=nodes, initializers=constants, opset_imports={"": 24}, name="small")
    return ir.Model(graph, ir_version=10)


def pixels(sizes: tuple[int, int] = (8, 12), tiles: int = 2) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(tiles, 3, *sizes)).astype(np.float32)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)).filter(lambda sizes: sizes != (1, 1)),
    bias=st.booleans(),
    flattened=st.booleans(),
    tiles=st.integers(1, 3),
)
def test_the_same_numbers_in_the_same_shape(
    grid: Any, kernel: Any, bias: bool, flattened: bool, tiles: int, run: Any, close: Any
) -> None:
    sizes = (grid[0] * kernel[0], grid[1] * kernel[1])
    model = embedding(sizes, kernel, bias, flattened)
    expected = run(model, pixels(sizes, tiles))
    name = model.graph.outputs[0].name
    assert patches_as_matmul.apply(model) == 1
    close(run(model, pixels(sizes, tiles)), expected)
    assert model.graph.outputs[0].name == name


def test_a_flattened_output_comes_straight_from_the_product(operators: Any) -> None:
    model = embedding()
    patches_as_matmul.apply(model)
    assert operators(model) == {"Reshape": 2, "Transpose": 1, "MatMul": 1, "Add": 1}


def test_names_are_those_of_the_module_and_the_weight_is_in_by_out() -> None:
    model = embedding()
    patches_as_matmul.apply(model)
    (product,) = [node for node in model.graph if node.op_type == "MatMul"]
    assert product.name == "patches"
    assert [value.name for value in product.inputs[1:] if value is not None] == ["patches.weight"]
    assert list(model.graph.initializers["patches.weight"].shape) == [3 * 4 * 3, 5]
    assert "patches.bias" in model.graph.initializers


@pytest.mark.parametrize("activation", [0.02, None])
@pytest.mark.parametrize("flattened", [True, False])
def test_integers_stay_what_they_were(
    activation: float | None, flattened: bool, plan_of: Any, run: Any, close: Any
) -> None:
    """Inputs of 2.54 and more are clipped."""
    model = embedding(flattened=flattened)
    quantize.apply(model, plan_of(patches=ModulePlan(8, 0, activation_scale=activation)), "part")
    expected = run(model, pixels())
    assert patches_as_matmul.apply(model) == 1
    close(run(model, pixels()), expected)
    (product,) = [node for node in model.graph if node.op_type == "MatMul"]
    above = [value.producer().op_type for value in product.inputs]  # type: ignore[union-attr]
    assert above == ["DequantizeLinear" if activation else "Reshape", "DequantizeLinear"]
    weight = model.graph.initializers["patches.weight.int8"]
    assert (weight.dtype, list(weight.shape)) == (ir.DataType.INT8, [36, 5])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "attributes"),
    [
        ((8, 12), {"strides": [2, 3]}),
        ((8, 12), {"pads": [1, 0, 1, 0], "strides": [4, 3]}),
        ((9, 12), {}),
        ((12, 12), {"dilations": [2, 1]}),
    ],
)
def test_patches_that_overlap_or_miss_the_edge_stay_a_convolution(
    sizes: tuple[int, int], attributes: dict[str, Any], operators: Any
) -> None:
    model = embedding(sizes, flattened=False, **attributes)
    assert patches_as_matmul.apply(model) == 0
    assert operators(model) == {"Conv": 1}


def test_a_kernel_of_one_pixel_stays_a_convolution(operators: Any) -> None:
    model = embedding(kernel=(1, 1), flattened=False)
    assert patches_as_matmul.apply(model) == 0
    assert operators(model) == {"Conv": 1}


def test_convolutions_that_share_rounded_pixels_do_not_share_names(plan_of: Any, run: Any, close: Any) -> None:
    model = embedding(flattened=False)
    first = model.graph[0]
    weight = constant(model.graph, "again.weight", np.ones((5, 3, 4, 3), np.float32))
    second = ir.node("Conv", [first.inputs[0], weight], attributes=dict(first.attributes), name="again")
    total = ir.node("Add", [first.outputs[0], second.outputs[0]], name="total")
    for node in (second, total):
        made, like = node.outputs[0], first.outputs[0]
        made.name, made.type, made.shape = f"{node.name}.y", like.type, like.shape
        model.graph.append(node)
    model.graph.outputs[0] = total.outputs[0]
    entry = ModulePlan(8, 0, activation_scale=0.02)
    quantize.apply(model, plan_of(patches=entry, again=entry), "part")
    expected = run(model, pixels())
    assert patches_as_matmul.apply(model) == 2
    close(run(model, pixels()), expected)


@pytest.mark.parametrize("recipe", ["", "int8"])
def test_the_vision_encoders_patch_embedding(
    recipe: str, planned: Artifact, run: Any, close: Any, operators: Any
) -> None:
    model = ir.load(planned.graph("vision_encoder"))
    if recipe:
        quantize.apply(model, read_plan(planned, recipe), "vision_encoder")
    x = golden.read(planned)[1]["0.pixel_values"]
    expected = run(model, x)
    assert patches_as_matmul.apply(model) == 1
    close(run(model, x), expected)
    assert "Conv" not in operators(model)
    assert patches_as_matmul.apply(ir.load(planned.graph("decoder"))) == 0
