"""Weights as floats behind Q/DQ: no int8 constant is left, and no number changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from vlmc.artifact import Artifact
from vlmc.calibration.plan import ModulePlan, Plan, read_plan
from vlmc.engines.passes import float_weights, forget, opset17, patches_as_matmul, quantize
from vlmc.exporter import golden


def features(model: ir.Model, folder: Path, pixels: np.ndarray) -> np.ndarray:
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # fused kernels round otherwise
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"pixel_values": pixels})[0])


@pytest.fixture
def quantised(planned: Artifact) -> ir.Model:
    model = ir.load(planned.graph("vision_encoder"))
    quantize.apply(model, read_plan(planned, "int8"), "vision_encoder")
    patches_as_matmul.apply(model)
    opset17.apply(model)
    return model


def test_no_int8_constant_is_left_but_zero_points(quantised: ir.Model) -> None:
    weights = [node for node in quantised.graph if node.op_type == "DequantizeLinear"]
    constants = [node for node in weights if node.inputs[0] is not None and node.inputs[0].const_value is not None]
    assert float_weights.apply(quantised) == len(constants) > 0
    for value in quantised.graph.initializers.values():
        if value.dtype == ir.DataType.INT8:
            assert value.const_value is not None
            assert not value.const_value.numpy().any(), f"{value.name} is no zero point"
    assert float_weights.apply(quantised) == 0


def test_the_floats_are_made_when_they_are_written(quantised: ir.Model) -> None:
    float_weights.apply(quantised)
    made = [value for name, value in quantised.graph.initializers.items() if name.endswith(".float")]
    assert made and all(isinstance(value.const_value, ir.LazyTensor) for value in made)


def test_a_model_that_is_written_lets_go_of_its_weights(quantised: ir.Model) -> None:
    shapes = {name: value.shape for name, value in quantised.graph.initializers.items()}
    forget(quantised)
    found = quantised.graph.initializers
    assert {name: value.shape for name, value in found.items()} == shapes
    assert not any(value.const_value for value in found.values())


def test_the_numbers_stay_the_same(quantised: ir.Model, planned: Artifact, tmp_path: Path) -> None:
    pixels = golden.read(planned)[1]["0.pixel_values"]
    before = features(quantised, tmp_path, pixels)
    float_weights.apply(quantised)
    np.testing.assert_array_equal(features(quantised, tmp_path, pixels), before)


@pytest.mark.parametrize("inputs", [40, 64, 72])
def test_blocks_become_the_same_floats_where_the_last_one_is_shorter_too(
    inputs: int, linear: Callable[..., ir.Model], plan_of: Callable[..., Plan], run: Callable[..., np.ndarray]
) -> None:
    model = linear(np.random.default_rng(0).normal(size=(inputs, 8)).astype(np.float32))
    quantize.apply(model, plan_of(fc=ModulePlan(8, 32)), "part")
    before = run(model, np.eye(inputs, dtype=np.float32))
    assert float_weights.without_blocks(model) == 1
    assert "DequantizeLinear" not in [node.op_type for node in model.graph]
    np.testing.assert_array_equal(run(model, np.eye(inputs, dtype=np.float32)), before)
