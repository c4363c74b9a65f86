"""Packed weights are the plan's weights, and only the activations are rounded on the way."""

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
from vlmc.calibration.weights import dequantize_weight, quantize_weight
from vlmc.engines.passes import matmul_nbits, quantize

FLOAT_ACTIVATIONS = 1  # the operator's accuracy_level that multiplies in float32


@pytest.fixture
def packed(linear: Any, plan_of: Any) -> Callable[..., ir.Model]:
    """packed(weight, bits, block, level=None): a layer with packed weights; `level` replaces its accuracy_level."""

    def make(weight: np.ndarray, bits: int, block: int, level: int | None = None) -> ir.Model:
        model = linear(weight)
        quantize.apply(model, plan_of(fc=ModulePlan(bits, block)), "part")
        assert matmul_nbits.apply(model) == 1
        if level is not None:
            (node,) = model.graph
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
        return model

    return make


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 5),
    inside=st.integers(1, 130),
    columns=st.integers(1, 40),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 99),
)
def test_the_weights_are_the_dequantised_ones(
    rows: int, inside: int, columns: int, bits: int, block: int, seed: int, packed: Any, run: Any
) -> None:
    """Blocks that end short included. Tolerance: float32 sums in another order."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(inside, columns)).astype(np.float32)
    x = random.normal(size=(rows, inside)).astype(np.float32)
    expected = x @ dequantize_weight(*quantize_weight(weight.T.copy(), bits, block), block).T
    found = run(packed(weight, bits, block, FLOAT_ACTIVATIONS), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 20])
def test_activations_are_rounded_to_eight_bits_a_block(bits: int, rows: int, packed: Any, run: Any) -> None:
    """Tolerance: an int8 step is at most 1/127 of a block's largest value, its error at most half of that and of either
    sign, so a sum over 256 of them is off by some tenths of a percent."""
    random = np.random.default_rng(3)
    weight = random.normal(size=(256, 48)).astype(np.float32)
    x = random.normal(size=(rows, 256)).astype(np.float32)
    expected = x @ dequantize_weight(*quantize_weight(weight.T.copy(), bits, 32), 32).T
    difference = run(packed(weight, bits, 32), x) - expected
    assert 1e-3 < np.linalg.norm(difference) / np.linalg.norm(expected) < 1e-2


@pytest.mark.parametrize(("bits", "size"), [(4, 48 * 128), (8, 48 * 256)])
def test_the_weights_stay_packed(bits: int, size: int, packed: Any) -> None:
    model = packed(np.ones((256, 48), np.float32), bits, 32)
    assert sorted(model.graph.initializers) == ["fc.weight.packed", "fc.weight.scales"]
    assert model.graph.initializers["fc.weight.packed"].const_value.nbytes == size


def test_products_that_are_not_in_blocks_stay(linear: Any, plan_of: Any, operators: Any) -> None:
    model = linear(np.eye(8, dtype=np.float32))
    quantize.apply(model, plan_of(fc=ModulePlan(8, 0)), "part")
    assert matmul_nbits.apply(model) == 0
    assert operators(model) == {"DequantizeLinear": 1, "MatMul": 1}


@pytest.mark.parametrize(("recipe", "widths"), [("w4", {4: 14, 8: 1}), ("w8", {8: 15})])
def test_every_product_of_the_decoder_is_rewritten(recipe: str, widths: dict[int, int], planned: Artifact) -> None:
    model = ir.load(planned.graph("decoder"))
    quantize.apply(model, read_plan(planned, recipe), "decoder")
    assert matmul_nbits.apply(model) == 15
    bits = [node.attributes["bits"].as_int() for node in model.graph if node.op_type == "MatMulNBits"]
    assert {width: bits.count(width) for width in set(bits)} == widths
    assert not [node for node in model.graph if node.op_type in ("MatMul", "DequantizeLinear")]
