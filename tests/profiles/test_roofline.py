from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmc.profiles.roofline import limit, table

LIMITS = {"read_gb_per_s": 10.0, "float32_gflop_per_s": 100.0, "int8_gop_per_s": 400.0}
RATES = st.floats(0.1, 1e4)


def test_the_longer_of_the_two_times_is_the_limit() -> None:
    assert limit({"flops": 2e9, "bytes": 1e8}, "", "fp32", LIMITS) == {
        "limit_ms": 20.0,  # 2 GFLOP at 100 a second; reading takes 10 ms
        "bound": "compute",
        "flops": 2e9,
        "bytes": 1e8,
        "in_cache": False,
    }
    memory = limit({"decode_flops": 1e8, "decode_bytes": 1e8}, "decode_", "fp32", LIMITS)
    assert memory is not None
    assert (memory["limit_ms"], memory["bound"]) == (10.0, "memory")


def test_integer_products_count_at_the_integer_rate_and_the_rest_at_the_float_rate() -> None:
    mixed = limit({"flops": 3e9, "int8_flops": 2e9, "bytes": 0.0}, "", "int8", LIMITS)
    assert mixed is not None
    assert mixed["limit_ms"] == pytest.approx(2e9 / 400e9 * 1e3 + 1e9 / 100e9 * 1e3)


def test_where_nobody_counted_the_integer_products_the_limit_is_the_one_that_cannot_be_beaten() -> None:
    all_integer = limit({"flops": 4e9, "bytes": 0.0}, "", "int8", LIMITS)
    assert all_integer is not None
    assert all_integer["limit_ms"] == 10.0


def test_an_unknown_rate_bounds_nothing() -> None:
    unknown = LIMITS | {"int8_gop_per_s": "unavailable: no integer unit"}
    got = limit({"flops": 4e12, "bytes": 1e8}, "", "int8", unknown)
    assert got is not None
    assert (got["limit_ms"], got["bound"]) == (10.0, "memory")
    nothing = dict.fromkeys(LIMITS, "unavailable: x")
    assert limit({"flops": 1.0, "bytes": 1.0}, "", "fp32", nothing) is None


def test_weights_that_stay_in_the_cache_are_bounded_by_the_cache() -> None:
    caches = LIMITS | {"cache_bytes": 200_000_000, "cached_read_gb_per_s": 40.0}
    small = limit({"flops": 0.0, "bytes": 1e8}, "", "fp32", caches)
    large = limit({"flops": 0.0, "bytes": 1.01e8}, "", "fp32", caches)
    assert small is not None
    assert large is not None
    assert (small["limit_ms"], small["in_cache"]) == (2.5, True)
    assert (large["limit_ms"], large["in_cache"]) == (pytest.approx(10.1), False)


def test_work_that_was_not_counted_has_no_roofline() -> None:
    assert limit({}, "", "fp32", LIMITS) is None
    assert limit({"flops": 1.0}, "", "fp32", LIMITS) is None


def test_half_precision_has_a_rate_of_its_own() -> None:
    got = limit({"flops": 2e9, "bytes": 0.0}, "", "fp16", LIMITS | {"float16_gflop_per_s": 200.0})
    assert got is not None
    assert got["limit_ms"] == 10.0


def test_the_table_holds_each_phase_with_its_share() -> None:
    works = {
        "vision_encoder": {"flops": 2e9, "bytes": 1e8},
        "decoder": {"decode_flops": 1e8, "decode_bytes": 1e8, "prefill_flops": 1e9, "prefill_bytes": 1e8},
    }
    engines = {"vision_encoder": "onnxruntime-fp32", "decoder": "onnxruntime-int8", "embed_tokens": "onnxruntime-fp32"}
    latency = {"vision": {"median": 40.0}, "decode_per_token": {"median": 40.0}}
    got = table(works, engines, LIMITS, latency)
    assert set(got) == {"vision_encoder", "decoder_step"}  # prefill was not timed
    assert got["vision_encoder"]["share"] == 0.5
    assert (got["decoder_step"]["share"], got["decoder_step"]["bound"]) == (0.25, "memory")


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.floats(0, 1), RATES, RATES, RATES)
def test_a_faster_machine_never_has_a_higher_limit(
    flops: float, moved: float, part: float, read: float, single: float, integer: float
) -> None:
    work = {"flops": flops, "bytes": moved, "int8_flops": flops * part}
    slow = {"read_gb_per_s": read, "float32_gflop_per_s": single, "int8_gop_per_s": integer}
    fast = {key: 2 * rate for key, rate in slow.items()}
    one, other = limit(work, "", "int8", slow), limit(work, "", "int8", fast)
    if one is not None and other is not None:
        assert other["limit_ms"] == pytest.approx(one["limit_ms"] / 2)
