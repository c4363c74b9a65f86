"""What was seen of a tensor, in bounded memory: its largest value per channel, and a histogram of its magnitudes.

The histogram's upper end is always a power of two above the largest value seen; when it grows, bins are merged in
pairs. Bin edges are then the same whatever came first, so values that stream in by chunks give exactly the histogram
of all at once. (torch.ao's HistogramObserver and ONNX Runtime's calibrator re-bin by interpolation instead.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import VlmcError

BINS = 2048
LEVELS = 127  # positive values of a symmetric 8-bit number
PERCENTILE = 0.9999
_POINTS = 4  # places in a bin at which mse() looks, as a quantisation step can be finer than a bin
_SMALLEST_EXPONENT = -64  # what is below 2^-64 is counted as zero


class ChannelPeaks:
    """The largest magnitude of every channel, float32 (channels,)."""

    def __init__(self, channels: int) -> None:
        self.peaks = np.zeros(channels, np.float32)

    def add(self, values: NDArray[np.float32]) -> None:
        """values (..., channels)"""
        rows = values.reshape(-1, len(self.peaks))
        if len(rows):
            # NaN passes through np.maximum, so that the check finds it
            self.peaks = np.maximum(self.peaks, np.maximum(rows.max(axis=0), -rows.min(axis=0)))
            check_finite(float(self.peaks.max()))


class Histogram:
    """How often each magnitude was seen: `counts` int64 (BINS,), bins of `width` from 0; the exact `peak`; and how
    many `zeros` are in the first bin, as no range loses anything of a zero."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.peak, self.zeros = 0.0, 0
        self._exponent = _SMALLEST_EXPONENT

    @property
    def width(self) -> float:
        return math.ldexp(1.0, self._exponent) / BINS

    def add(self, values: NDArray[np.float32]) -> None:
        """Counts |values|, of any shape. NaN or infinity is a VlmcError."""
        magnitudes = np.abs(values, dtype=np.float32).reshape(-1)
        peak = float(magnitudes.max(initial=0.0))
        check_finite(peak)
        self.peak = max(self.peak, peak)
        if peak:  # frexp(0) says 2^0
            self._grow(math.frexp(peak)[1])  # peak < 2^exponent
        # A power of two divides exactly, and truncation of a positive number is its floor.
        bins = (magnitudes * np.float32(1 / self.width)).astype(np.intp)
        self.counts += np.bincount(bins, minlength=BINS)
        self.zeros += magnitudes.size - int(np.count_nonzero(magnitudes))

    def nonzero(self) -> NDArray[np.float64]:
        """`counts` without the zeros."""
        counts = self.counts.astype(np.float64)
        counts[0] -= self.zeros
        return counts

    def _grow(self, exponent: int) -> None:
        if exponent <= self._exponent:
            return
        merged = self.counts.reshape(-1, 2 ** min(exponent - self._exponent, int(math.log2(BINS)))).sum(axis=1)
        self.counts = np.pad(merged, (0, BINS - len(merged)))
        self._exponent = exponent


def check_finite(peak: float) -> None:
    if not math.isfinite(peak):
        raise VlmcError(
            "An activation is NaN or infinite, so it has no range",
            fix="check the checkpoint and the calibration pictures; the float model itself fails on them",
        )


def minmax(seen: Histogram) -> float:
    """The largest magnitude."""
    return seen.peak


def percentile(seen: Histogram) -> float:
    """The magnitude that 99.99 % of all values do not exceed, to the upper edge of its bin (Wu et al. 2020,
    arXiv:2004.09602)."""
    total = int(seen.counts.sum())
    bin = int(np.searchsorted(np.cumsum(seen.counts), PERCENTILE * total))
    return min(seen.peak, (bin + 1) * seen.width)


def entropy(seen: Histogram) -> float:
    """The range whose 8-bit histogram loses the least information, by Kullback-Leibler divergence, of every sixteenth
    bin (Migacz, "8-bit inference with TensorRT", GTC 2017)."""
    counts = seen.nonzero()
    used = int(np.flatnonzero(counts).max(initial=0)) + 1
    if used <= LEVELS + 1:
        return seen.peak
    ends = [*range(LEVELS + 1, used, 16), used]
    best: int = min(ends, key=lambda end: _divergence(counts, end))
    return min(seen.peak, best * seen.width)


def _divergence(counts: NDArray[np.float64], end: int) -> float:
    """KL divergence from the histogram clipped at `end` to the same in LEVELS + 1 steps."""
    kept = counts[:end]
    reference = kept.copy()
    reference[-1] += counts[end:].sum()
    step = np.arange(end) * (LEVELS + 1) // end
    filled = kept > 0
    sums = np.bincount(step, weights=kept, minlength=LEVELS + 1)
    places = np.bincount(step, weights=filled, minlength=LEVELS + 1)
    coarse = np.where(filled, (sums / np.maximum(places, 1))[step], 0.0)
    p, q = reference / reference.sum(), coarse / max(coarse.sum(), 1e-30)
    known = p > 0
    return float((p[known] * np.log(p[known] / np.maximum(q[known], 1e-12))).sum())


def mse(seen: Histogram) -> float:
    """The range with the least squared error of rounding and clipping, of fiftieths of the peak."""
    points = (np.arange(BINS * _POINTS) + 0.5) * (seen.width / _POINTS)
    counts = seen.nonzero().repeat(_POINTS)

    def error(limit: float) -> float:
        step = limit / LEVELS
        rounded = np.minimum(np.rint(points / step), LEVELS) * step
        return float((counts * (points - rounded) ** 2).sum())

    return min((seen.peak * share / 50 for share in range(1, 51)), key=error) if seen.peak else 0.0


RANGES: dict[str, Callable[[Histogram], float]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
