from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmc.profiles.statistics import summarize

SAMPLES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=200)


def test_the_numbers_are_those_of_the_textbook() -> None:
    got = summarize([4.0, 1.0, 3.0, 2.0])
    assert got["mean"] == 2.5
    assert got["median"] == 2.5
    assert got["std"] == pytest.approx((5 / 3) ** 0.5)
    assert (got["min"], got["max"], got["count"]) == (1.0, 4.0, 4)


def test_percentiles_interpolate_between_ranks() -> None:
    got = summarize([float(value) for value in range(101)])
    assert (got["p90"], got["p99"]) == (90.0, 99.0)
    assert summarize([0.0, 10.0])["p90"] == 9.0


def test_one_sample_has_no_spread() -> None:
    assert summarize([7.0])["std"] == 0.0


def test_no_samples_are_refused_rather_than_zero() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


@given(SAMPLES)
def test_every_number_lies_within_the_samples_and_in_order(samples: list[float]) -> None:
    got = summarize(samples)
    assert got["min"] <= got["median"] <= got["p90"] <= got["p99"] <= got["max"]
    assert got["min"] <= got["mean"] <= got["max"]
    assert 0 <= got["std"] <= got["max"] - got["min"] + 1e-9 * got["max"]


@given(SAMPLES, st.floats(1e-3, 1e3))
def test_a_change_of_unit_changes_every_number_alike(samples: list[float], factor: float) -> None:
    one, other = summarize(samples), summarize([sample * factor for sample in samples])
    for key in ("mean", "std", "min", "max", "median", "p90", "p99"):
        assert other[key] == pytest.approx(one[key] * factor, rel=1e-6, abs=1e-9 * one["max"] * factor)


@given(SAMPLES)
def test_the_order_of_the_samples_does_not_matter(samples: list[float]) -> None:
    assert summarize(sorted(samples))["p99"] == summarize(samples[::-1])["p99"]
