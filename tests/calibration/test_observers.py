"""Observers see a stream as they would see it all at once, in memory that does not grow."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from vlmc.calibration.observers import BINS, PERCENTILE, RANGES, ChannelPeaks, Histogram
from vlmc.errors import VlmcError

Values = NDArray[np.float32]
CHUNKS = st.lists(
    arrays.arrays(np.float32, st.integers(0, 60), elements=st.floats(-1e8, 1e8, width=32)), min_size=1, max_size=6
)
OBSERVERS = st.sampled_from(sorted(RANGES))


def seen(*chunks: Values) -> Histogram:
    histogram = Histogram()
    for chunk in chunks:
        histogram.add(chunk)
    return histogram


@given(CHUNKS, st.randoms())
@example([np.zeros(0, np.float32), np.full(1, 0.25, np.float32)], Random(0))
def test_chunks_in_any_order_give_the_histogram_of_all_at_once(chunks: list[Values], random: Random) -> None:
    whole, streamed = seen(np.concatenate(chunks)), seen(*chunks)
    random.shuffle(chunks)
    for histogram in (streamed, seen(*chunks)):
        assert (histogram.counts == whole.counts).all()
        assert (histogram.width, histogram.peak, histogram.zeros) == (whole.width, whole.peak, whole.zeros)


@given(CHUNKS)
def test_every_value_is_counted_once_in_the_bin_it_lies_in(chunks: list[Values]) -> None:
    histogram, values = seen(*chunks), np.abs(np.concatenate(chunks)).astype(np.float64)
    assert histogram.counts.shape == (BINS,)
    edges = np.arange(BINS + 1) * histogram.width
    assert (histogram.counts == np.histogram(values, edges)[0]).all()
    assert histogram.peak == values.max(initial=0)


@given(CHUNKS, OBSERVERS)
def test_a_range_lies_between_nothing_and_the_peak(chunks: list[Values], observer: str) -> None:
    histogram = seen(*chunks)
    limit = RANGES[observer](histogram)
    assert 0 <= limit <= histogram.peak
    assert (limit > 0) == (histogram.peak > 0)


@given(CHUNKS, OBSERVERS, st.integers(-8, 8))
def test_ranges_scale_with_the_values(chunks: list[Values], observer: str, power: int) -> None:
    assume(max(np.abs(chunk).max(initial=0) for chunk in chunks) > 1e-3)
    scaled = seen(*(np.ldexp(chunk, power) for chunk in chunks))
    before = RANGES[observer](seen(*chunks))
    assert RANGES[observer](scaled) == pytest.approx(before * 2.0**power)


@given(CHUNKS, arrays.arrays(np.float32, 5, elements=st.floats(-1e8, 1e8, width=32)))
def test_more_values_never_shrink_the_peak(chunks: list[Values], more: Values) -> None:
    assert RANGES["minmax"](seen(*chunks, more)) >= RANGES["minmax"](seen(*chunks))


def normal_with_outliers() -> Values:
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    values[:4] = (60, -70, 80, -100)
    return values


def test_minmax_keeps_outliers_and_the_others_cut_them() -> None:
    histogram = seen(normal_with_outliers())
    limits = {name: choose(histogram) for name, choose in RANGES.items()}
    assert limits["minmax"] == 100
    assert limits["percentile"] == pytest.approx(np.quantile(np.abs(normal_with_outliers()), 0.9999), abs=0.1)
    assert 3 < limits["entropy"] < 20
    assert limits["mse"] < 90


def test_mse_has_the_least_squared_error_on_the_values_themselves() -> None:
    values = normal_with_outliers()

    def error(limit: float) -> float:
        step = limit / 127
        return float(((np.clip(np.rint(values / step), -127, 127) * step - values) ** 2).mean())

    errors = {limit: error(limit) for limit in np.arange(2, 102, 2)}
    assert RANGES["mse"](seen(values)) == min(errors, key=errors.__getitem__)


def test_zeros_do_not_outweigh_the_rest() -> None:
    """As behind a ReLU or around a gate: no range loses anything of a zero."""
    values = normal_with_outliers()[:2_000]
    many = np.concatenate((values, np.zeros(1000 * len(values), np.float32)))
    for name in ("minmax", "entropy", "mse"):
        assert RANGES[name](seen(many)) == RANGES[name](seen(values)), name


def test_without_outliers_nothing_much_is_cut() -> None:
    histogram = seen(np.random.default_rng(0).uniform(-1, 1, 50_000).astype(np.float32))
    for name, choose in RANGES.items():
        assert choose(histogram) > 0.95, name


@given(CHUNKS)
def test_a_percentile_is_exceeded_by_no_more_than_it_says(chunks: list[Values]) -> None:
    histogram, values = seen(*chunks), np.abs(np.concatenate(chunks))
    assert (values > RANGES["percentile"](histogram)).sum() <= (1 - PERCENTILE) * values.size


def test_what_has_one_magnitude_is_not_clipped() -> None:
    """For that costs more than its rounding."""
    histogram = seen(np.full(1000, 3.0, np.float32))
    assert RANGES["mse"](histogram) == histogram.peak == 3.0


@given(st.lists(arrays.arrays(np.float32, (3, 4), elements=st.floats(-1e8, 1e8, width=32)), min_size=1, max_size=5))
def test_channel_peaks_are_those_of_all_at_once(chunks: list[Values]) -> None:
    streamed = ChannelPeaks(4)
    for chunk in chunks:
        streamed.add(chunk)
    assert (streamed.peaks == np.abs(np.concatenate(chunks)).max(axis=0)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    values = np.array([[1, bad, 3]], np.float32)
    for observer in (Histogram(), ChannelPeaks(3)):
        with pytest.raises(VlmcError, match="NaN or infinite"):
            observer.add(values)
