"""What quantising a weight promises, and that ONNX Runtime understands the result as we do."""

from __future__ import annotations

from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper
from vlmc.calibration import weights
from vlmc.calibration.weights import LIMITS, dequantize_weight, quantize_weight
from vlmc.errors import VlmcError

Matrix = NDArray[np.float32]

FORMS = st.sampled_from([(8, 0), (8, 32), (8, 5), (4, 32), (4, 5), (4, 0)])
WEIGHTS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 70)),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=True),
)


def spread(scales: Matrix, columns: int, block: int) -> Matrix:
    """The scale of every weight."""
    return scales.repeat(block or columns, axis=1)[:, :columns]


@given(WEIGHTS, FORMS)
def test_no_weight_is_off_by_more_than_half_a_step(weight: Matrix, form: tuple[int, int]) -> None:
    bits, block = form
    values, scales = quantize_weight(weight, bits, block)
    error = np.abs(dequantize_weight(values, scales, block) - weight)
    # The quotient and the product are each rounded to float32 once.
    rounding = 4 * np.finfo(np.float32).eps * np.abs(weight)
    assert (error <= spread(scales, weight.shape[1], block) / 2 + rounding).all()


@given(WEIGHTS, FORMS)
def test_integers_stay_in_range_and_scales_are_positive(weight: Matrix, form: tuple[int, int]) -> None:
    bits, block = form
    values, scales = quantize_weight(weight, bits, block)
    low, high = LIMITS[bits]
    assert values.dtype == np.int8
    assert scales.dtype == np.float32
    assert values.shape == weight.shape
    assert scales.shape == (len(weight), -(-weight.shape[1] // (block or weight.shape[1])))
    assert values.min() >= low
    assert values.max() <= high
    assert (scales > 0).all()


@given(WEIGHTS, FORMS)
def test_zero_maps_to_zero(weight: Matrix, form: tuple[int, int]) -> None:
    weight[:, ::2] = 0
    values, scales = quantize_weight(weight, *form)
    assert not values[:, ::2].any()
    assert not dequantize_weight(values, scales, form[1])[:, ::2].any()


@given(WEIGHTS, FORMS)
def test_quantising_again_changes_nothing(weight: Matrix, form: tuple[int, int]) -> None:
    values, scales = quantize_weight(weight, *form)
    again, scales_again = quantize_weight(dequantize_weight(values, scales, form[1]), *form)
    assert (again == values).all()
    nonzero = np.abs(dequantize_weight(values, scales, form[1])).max() > 1e-30
    if nonzero:
        used = spread(np.ones_like(scales), weight.shape[1], form[1]) * (values != 0)
        some = np.add.reduceat(used, np.arange(0, weight.shape[1], form[1] or weight.shape[1]), axis=1) > 0
        np.testing.assert_allclose(scales_again[some], scales[some], rtol=1e-6)


@given(WEIGHTS, FORMS, st.data())
def test_channels_do_not_touch_each_other(weight: Matrix, form: tuple[int, int], data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(weight) - 1))
    values, scales = quantize_weight(weight, *form)
    alone, scales_alone = quantize_weight(weight[row : row + 1], *form)
    assert (values[row] == alone[0]).all()
    assert (scales[row] == scales_alone[0]).all()


@given(WEIGHTS, FORMS, st.integers(1, 20))
def test_a_weight_may_be_worked_on_in_parts(weight: Matrix, form: tuple[int, int], part: int) -> None:
    values, scales = quantize_weight(weight, *form)
    with mock.patch.object(weights, "_PART", part):
        in_parts, scales_in_parts = quantize_weight(weight.T.copy().T, *form)  # whichever way it lies in memory
    assert (values == in_parts).all()
    assert (scales == scales_in_parts).all()


@given(WEIGHTS, FORMS, st.integers(-20, 20))
def test_a_power_of_two_moves_into_the_scales(weight: Matrix, form: tuple[int, int], power: int) -> None:
    weight[np.abs(weight) < 1e-20] = 0  # so that nothing becomes subnormal
    values, scales = quantize_weight(weight, *form)
    scaled, scales_scaled = quantize_weight(np.ldexp(weight, power), *form)
    assert (values == scaled).all()
    live = np.abs(scales - 1) > 0
    assert (np.ldexp(scales, power)[live & (scales_scaled != 1)] == scales_scaled[live & (scales_scaled != 1)]).all()


def test_four_bits_use_all_sixteen_values() -> None:
    weight = np.linspace(-8, 7, 16, dtype=np.float32)[None]
    values, scales = quantize_weight(weight, 4, 16)
    assert values.tolist() == [list(range(-8, 8))]
    assert scales.tolist() == [[1.0]]


def test_eight_bits_are_symmetric() -> None:
    values, _ = quantize_weight(np.array([[-1, 0.5, 1]], np.float32), 8)
    assert values.tolist() == [[-127, 64, 127]]  # 63.5 rounds to even


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(VlmcError, match="NaN or infinity"):
        quantize_weight(np.array([[1, bad]], np.float32), 8)


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (8, 32), (4, 32)])
def test_onnx_runtime_reads_the_same_weight(bits: int, block: int) -> None:
    """A MatMul behind a DequantizeLinear, which ONNX Runtime fuses to MatMulNBits where the weight is in blocks."""
    weight = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
    values, scales = quantize_weight(weight, bits, block)
    kind = TensorProto.INT8 if bits == 8 else TensorProto.INT4
    attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["q", "s"], ["w"], **attributes),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 48])],
        [
            helper.make_tensor("q", kind, [64, 48], values.T.flatten()),
            onnx.numpy_helper.from_array(np.ascontiguousarray(scales.T if block else scales[:, 0]), "s"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (seen,) = session.run(None, {"x": np.eye(64, dtype=np.float32)})
    # Up to the last bits: MatMulNBits multiplies by q + 128 (or 8) and takes the offset off again.
    np.testing.assert_allclose(seen.T, dequantize_weight(values, scales, block), atol=scales.max() * 1e-4)


def test_halves_are_rounded_to_the_even_integer() -> None:
    """As ONNX's QuantizeLinear does, so that TensorRT, which makes the integers itself, makes the same."""
    values, scales = quantize_weight(np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32), 8)
    assert (scales.item(), values.tolist()) == (1.0, [[127, 0, 2, 2, 0, -2]])


def test_a_channel_too_small_for_a_scale_is_zero() -> None:
    values, scales = quantize_weight(np.array([[1e-38, -1e-39]], np.float32), 8)
    assert (scales.item(), values.tolist()) == (1.0, [[0, 0]])
