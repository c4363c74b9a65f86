"""What a plan rounds behind layers is taken out again; what it rounds before them stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from vlmc.artifact import Artifact
from vlmc.calibration.plan import ModulePlan, read_plan
from vlmc.engines.passes import float_outputs, quantize

WEIGHT = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)
BIAS = np.random.default_rng(1).normal(size=24).astype(np.float32)
INPUT = np.random.default_rng(2).normal(size=(5, 40)).astype(np.float32)


@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
def test_the_layer_is_then_as_if_the_plan_had_no_scale_of_its_output(
    bias: np.ndarray | None, linear: Any, plan_of: Any, run: Any, operators: Any
) -> None:
    with_output, without = linear(WEIGHT, bias), linear(WEIGHT, bias)
    quantize.apply(with_output, plan_of(fc=ModulePlan(8, 0, activation_scale=0.1, output_scale=0.25)), "part")
    quantize.apply(without, plan_of(fc=ModulePlan(8, 0, activation_scale=0.1)), "part")
    assert float_outputs.apply(with_output) == 1
    assert operators(with_output) == operators(without)
    assert [value.name for value in with_output.graph.outputs] == ["y"]
    np.testing.assert_array_equal(run(with_output, INPUT), run(without, INPUT))


def test_a_graph_without_rounded_outputs_is_left_as_it_is(planned: Artifact, operators: Any) -> None:
    model = ir.load(planned.graph("decoder"))
    quantize.apply(model, read_plan(planned, "int8"), "decoder")
    before = operators(model)
    assert float_outputs.apply(model) == 0
    assert operators(model) == before


def test_of_a_vision_encoder_it_takes_the_queries_and_keys(planned: Artifact, operators: Any) -> None:
    model = ir.load(planned.graph("vision_encoder"))
    quantize.apply(model, read_plan(planned, "int8"), "vision_encoder")
    before = operators(model)["QuantizeLinear"]
    assert float_outputs.apply(model) == 4
    assert operators(model)["QuantizeLinear"] == before - 4
