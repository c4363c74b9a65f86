"""Joined products give what they gave one by one; what differs in more than its weights stays apart.

Tolerance: ONNX Runtime sums a block's products in another order where it does not take 16 columns at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vlmc.artifact import Artifact
from vlmc.calibration.plan import ModulePlan, read_plan
from vlmc.engines.passes import group_query_attention, integer_matmul, joined_products, matmul_nbits, quantize

FLOAT32 = ir.TensorType(ir.DataType.FLOAT)
INT8, W4, W8 = ModulePlan(8, 0, activation_scale=0.05), ModulePlan(4, 32), ModulePlan(8, 32)
TOLERANCE = 1e-5
Layers = Callable[..., ir.Model]


@pytest.fixture
def layers(plan_of: Any) -> Layers:
    """layers(widths, plans, biases=0): layers fc0, fc1, … of one input `x`, as ONNX Runtime's own products, which all
    are outputs of the graph; the first `biases` of them have one."""

    def constant(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array.astype(np.float32), name=name)
        return ir.Value(name=name, shape=ir.Shape(array.shape), type=FLOAT32, const_value=tensor)

    def make(widths: Sequence[int], plans: Sequence[ModulePlan], biases: int = 0) -> ir.Model:
        random, nodes, weights = np.random.default_rng(0), [], []
        x = ir.Value(name="x", shape=ir.Shape(["rows", 96]), type=FLOAT32)
        for index, width in enumerate(widths):
            weights.append(constant(f"fc{index}.weight", random.normal(size=(96, width))))
            nodes.append(ir.node("MatMul", [x, weights[-1]], name=f"fc{index}"))
            if index < biases:
                weights.append(constant(f"fc{index}.bias", random.normal(size=width)))
                nodes.append(ir.node("Add", [nodes[-1].outputs[0], weights[-1]], name=f"add{index}"))
            y = nodes[-1].outputs[0]
            y.name, y.shape, y.type = f"y{index}", ir.Shape(["rows", width]), FLOAT32
        outputs = [node.outputs[0] for node in nodes if str(node.outputs[0].name).startswith("y")]
        graph = ir.Graph([x], outputs, nodes=nodes, initializers=weights, opset_imports={"": 24}, name="small")
        model = ir.Model(graph, ir_version=10)
        quantize.apply(model, plan_of(**{f"fc{index}": plan for index, plan in enumerate(plans)}), "part")
        assert integer_matmul.apply(model) + matmul_nbits.apply(model) == len(widths)
        return model

    return make


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    plan=st.sampled_from([INT8, W4, W8]),
    bias=st.booleans(),
    rows=st.integers(1, 5),
)
def test_every_product_gets_its_own_back(
    widths: list[int], plan: ModulePlan, bias: bool, rows: int, layers: Layers, load: Any, operators: Any
) -> None:
    apart, joined = (layers(widths, [plan] * len(widths), bias * len(widths)) for _ in range(2))
    assert joined_products.apply(joined) == 1
    counts = operators(joined)
    assert counts["Split"] == counts.get("MatMulNBits", 0) + counts.get("MatMulIntegerToFloat", 0) == 1
    x = np.random.default_rng(1).normal(size=(rows, 96)).astype(np.float32)
    expected, found = (load(model).run(None, {"x": x}) for model in (apart, joined))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=TOLERANCE * np.abs(one).max())


def test_its_name_has_theirs_and_weights_are_held_once(layers: Layers) -> None:
    model = layers((8, 24), (W4, W4))
    joined_products.apply(model)
    (product,) = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert str(product.name).split(joined_products.AND) == ["fc0.int4", "fc1.int4"]
    assert product.attributes["N"].as_int() == 32
    packed = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.UINT8]
    assert [value.shape for value in packed] == [(32, 3, 16)]


@pytest.mark.parametrize("plans", [(W4, W8), (W4, ModulePlan(4, 16)), (W8, INT8)])
def test_other_precisions_and_blocks_stay_apart(plans: tuple[ModulePlan, ModulePlan], layers: Layers) -> None:
    assert joined_products.apply(layers((8, 24), plans)) == 0


def test_inputs_of_other_scales_stay_apart(layers: Layers) -> None:
    assert joined_products.apply(layers((8, 24), (INT8, ModulePlan(8, 0, activation_scale=0.1)))) == 0


def test_one_with_its_bias_inside_and_one_without_stay_apart(layers: Layers) -> None:
    assert joined_products.apply(layers((8, 24), (INT8, INT8), biases=1)) == 0


@pytest.mark.parametrize("recipe", ["int8", "w4"])
def test_attention_takes_queries_keys_and_values_in_one_piece(recipe: str, planned: Artifact, steps: Any) -> None:
    """Of two layers; the gate and the up projection are the other product of each."""
    kv, answers = planned.manifest.kv, []
    for join in (False, True):
        model = ir.load(planned.graph("decoder"))
        quantize.apply(model, read_plan(planned, recipe), "decoder")
        group_query_attention.apply(model, kv)
        integer_matmul.apply(model)
        matmul_nbits.apply(model)
        if join:
            assert joined_products.apply(model) == 4
            attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
            assert [list(node.inputs[1:3]) for node in attentions] == [[None, None]] * 2
        decoder, random = steps(model, kv), np.random.default_rng(2)
        lengths = (9, 1, 1)
        embeds = [random.normal(size=(1, length, 64)).astype(np.float32) for length in lengths]
        answers.append([decoder(one, seqlens_k=np.array([end - 1]), total_sequence_length=np.array(end))["logits"]
                        for one, end in zip(embeds, np.cumsum(lengths), strict=True)])  # fmt: skip
    for one, other in zip(*answers, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=TOLERANCE * np.abs(one).max())
