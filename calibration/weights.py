"""What quantising a weight means, in numpy: the one definition that the fake-quant model and the ONNX graphs share.

Symmetric, zero point 0, so that zero stays zero and every backend can hold it (ONNX DequantizeLinear-21: values ×
scale). A scale belongs to a whole output channel (`block` 0) or to `block` consecutive input channels of it.

- 8 bits: integers of [-127, 127]. -128 is left out, as TensorRT and oneDNN do: the grid is then symmetric.
- 4 bits: integers of [-8, 7], all that ONNX's INT4 holds. The scale is the smallest *positive* one that reaches both
  ends, max(largest / 7, -smallest / 8), so nothing is clipped and the grid is up to an eighth finer than with [-7, 7].
  ONNX Runtime's MatMulNBits keeps q + 8 as UINT4 with zero point 8, OpenVINO and TensorRT the INT4 as it is: all
  three represent it exactly. (llama.cpp's Q4_0 uses a negative scale to get there, which TensorRT refuses.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import VlmcError

LIMITS = {8: (-127, 127), 4: (-8, 7)}
_PART = 1 << 22  # weights that are worked on at once: a head of 100 million would otherwise take gigabytes
_TINY = np.finfo(np.float32).tiny  # below it a quotient loses bits, and in float16 it would be 0


def quantize_weight(
    weight: NDArray[np.float32], bits: int, block: int = 0
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A weight (out, in) as integers, int8 (out, in), and scales, float32 (out, groups).

    `bits` is 8 or 4. `groups` is 1 for `block` 0 and otherwise ceil(in / block); the last block may be shorter.
    No value is off by more than half a scale. A weight with NaN or infinity is a VlmcError.
    """
    rows, columns = weight.shape
    groups = -(-columns // block) if block else 1
    values, scales = np.empty((rows, columns), np.int8), np.empty((rows, groups), np.float32)
    step = max(1, _PART // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values[part], scales[part] = _quantized(weight[part], bits, block)
    return values, scales


def _quantized(weight: NDArray[np.float32], bits: int, block: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    low, high = LIMITS[bits]
    blocks = _blocks(np.asarray(weight, np.float32), block)
    scales = np.maximum(blocks.max(axis=2) / np.float32(high), blocks.min(axis=2) / np.float32(low))
    if not np.isfinite(scales).all():
        raise VlmcError("A weight holds NaN or infinity and cannot be quantised", fix="check the checkpoint")
    scales = np.where(scales < _TINY, np.float32(1), scales)
    values = np.clip(np.rint(blocks / scales[:, :, None]), low, high)
    return _flat(values, weight.shape[1]), scales


def dequantize_weight(values: NDArray[np.int8], scales: NDArray[np.float32], block: int = 0) -> NDArray[np.float32]:
    """The float32 weight (out, in) that the integers stand for: value × scale, rounded once."""
    blocks = _blocks(values.astype(np.float32), block)
    return np.ascontiguousarray(_flat(blocks * scales[:, :, None], values.shape[1]))


def _blocks(matrix: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """(out, in) as (out, groups, block), the last block filled up with zeros."""
    rows, columns = matrix.shape
    size = block or columns
    padded = np.pad(matrix, ((0, 0), (0, -columns % size)))
    return padded.reshape(rows, -1, size)


def _flat(blocks: NDArray[np.float32], columns: int) -> NDArray[np.float32]:
    return blocks.reshape(blocks.shape[0], -1)[:, :columns]
