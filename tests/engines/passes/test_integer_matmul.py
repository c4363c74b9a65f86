"""Unsigned activations with zero point 128 are the signed ones exactly, bias inside or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vlmc.artifact import Artifact
from vlmc.calibration.plan import ModulePlan, read_plan
from vlmc.engines.passes import float_outputs, integer_matmul, quantize
from vlmc.exporter import golden

Run = Callable[[ir.Model, np.ndarray], np.ndarray]


@pytest.fixture
def quantised(linear: Any, plan_of: Any) -> Callable[..., ir.Model]:
    """quantised(weight, bias, scale, block=0): a layer with 8-bit weights and input."""

    def make(weight: np.ndarray, bias: np.ndarray | None, scale: float, block: int = 0) -> ir.Model:
        model = linear(weight, bias)
        quantize.apply(model, plan_of(fc=ModulePlan(8, block, activation_scale=scale)), "part")
        return model

    return make


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 9),
    inside=st.integers(1, 70),
    columns=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_rewrite_is_exact(
    rows: int, inside: int, columns: int, bias: bool, seed: int, quantised: Any, run: Run
) -> None:
    """The integers are those of Q/DQ: the float result differs by the rounding of one product and sum (1e-6)."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(inside, columns)).astype(np.float32)
    offset = random.normal(size=columns).astype(np.float32) if bias else None
    x = random.normal(size=(rows, inside)).astype(np.float32) * 40  # some of it is clipped
    signed, unsigned = (quantised(weight, offset, 0.7) for _ in range(2))
    assert integer_matmul.apply(unsigned) == 1
    expected = run(signed, x)
    np.testing.assert_allclose(run(unsigned, x), expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_weights_and_inputs_at_the_ends_of_their_range_do_not_overflow(quantised: Any, run: Run) -> None:
    weight = np.full((64, 8), 127, np.float32)
    weight[:, 1::2] = -127
    x = np.full((2, 64), 127, np.float32)
    x[1] = -128
    model = quantised(weight, None, 1.0)
    integer_matmul.apply(model)
    np.testing.assert_allclose(run(model, x), x @ weight, rtol=1e-6)


def test_the_product_its_input_and_its_bias_become_one_node(
    quantised: Any, operators: Callable[..., dict[str, int]]
) -> None:
    weight, bias = np.eye(8, dtype=np.float32), np.ones(8, np.float32)
    model = quantised(weight, bias, 1.0)
    integer_matmul.apply(model)
    assert operators(model) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}
    assert model.graph.outputs[0].name == "y"


def test_a_residual_is_no_bias(linear: Any, plan_of: Any, run: Run, operators: Callable[..., dict[str, int]]) -> None:
    """The Add behind the product adds the input itself."""
    model = linear(np.eye(8, dtype=np.float32) * 2, np.zeros(8, np.float32))
    add = next(node for node in model.graph if node.op_type == "Add")
    add.replace_input_with(1, model.graph.inputs[0])
    quantize.apply(model, plan_of(fc=ModulePlan(8, 0, activation_scale=0.1)), "part")
    integer_matmul.apply(model)
    assert operators(model)["Add"] == 1
    x = np.full((1, 8), 0.5, np.float32)
    np.testing.assert_allclose(run(model, x), np.full((1, 8), 1.5), rtol=1e-2)


def test_another_reader_of_the_quantised_input_gets_the_same_numbers(quantised: Any, run: Run) -> None:
    model = quantised(np.eye(4, dtype=np.float32), None, 0.1)
    pair = next(node for node in model.graph if node.name == "fc.input.dequantize")
    relu = ir.node("Relu", [pair.outputs[0]], name="relu")
    model.graph.append(relu)
    relu.outputs[0].name, relu.outputs[0].type = "z", ir.TensorType(ir.DataType.FLOAT)
    relu.outputs[0].shape = ir.Shape(["rows", 4])
    model.graph.outputs.insert(0, relu.outputs[0])
    integer_matmul.apply(model)
    x = np.array([[0.5, -0.5, 99.0, 0.04]], np.float32)
    np.testing.assert_allclose(run(model, x), [[0.5, 0.0, 12.7, 0.0]], rtol=1e-5)


@pytest.mark.parametrize("block", [0, 4])
def test_what_is_not_quantised_by_channel_stays(block: int, linear: Any, quantised: Any, operators: Any) -> None:
    model = linear(np.eye(8, dtype=np.float32))
    if block:
        model = quantised(np.eye(8, dtype=np.float32), None, 1.0, block)
    before = operators(model)
    assert integer_matmul.apply(model) == 0
    assert operators(model) == before
    assert "com.microsoft" not in model.graph.opset_imports


def test_every_product_of_the_vision_encoder_is_rewritten_and_the_features_stay(planned: Artifact, run: Run) -> None:
    plan, pixels = read_plan(planned, "int8"), golden.read(planned)[1]["0.pixel_values"]
    signed, unsigned = (ir.load(planned.graph("vision_encoder")) for _ in range(2))
    for model in (signed, unsigned):
        quantize.apply(model, plan, "vision_encoder")
        float_outputs.apply(model)
    assert integer_matmul.apply(unsigned) == 13
    assert not [node for node in unsigned.graph if node.op_type == "DequantizeLinear"]
    # Layer by layer it is exact, as above; over layers a last bit may push a value over the edge of a step.
    expected = run(signed, pixels)
    assert np.linalg.norm(run(unsigned, pixels) - expected) < 0.02 * np.linalg.norm(expected)
