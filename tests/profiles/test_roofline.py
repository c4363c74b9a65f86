from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmc.profiles.roofline import PHASES, limit, table

LIMITS = {"read_gb_per_s": 10.0, "float32_gflop_per_s": 100.0, "int8_gop_per_s": 400.0}
VISION, STEP = PHASES["vision_encoder"], PHASES["decoder_step"]
RATES = st.floats(0.1, 1e4)


def work(flops: float, moved: float, **more: float) -> dict[str, float]:
    """The counts of a vision encoder."""
    return {"flops": flops, "weight_bytes": moved, "io_bytes": 0.0, **more}


def test_the_longer_of_the_two_times_is_the_limit() -> None:
    assert limit(work(2e9, 1e8), VISION, "fp32", LIMITS) == {
        "limit_ms": 20.0,  # 2 GFLOP at 100 a second; reading takes 10 ms
        "bound": "compute",
        "flops": 2e9,
        "bytes": 1e8,
        "in_cache": False,
    }
    step = limit({"decode_flops": 1e8, "weight_bytes": 6e7, "decode_kv_bytes": 4e7}, STEP, "fp32", LIMITS)
    assert step is not None
    assert (step["limit_ms"], step["bound"]) == (10.0, "memory")


def test_integer_products_count_at_the_integer_rate_and_the_rest_at_the_float_rate() -> None:
    mixed = limit(work(3e9, 0.0, int8_flops=2e9), VISION, "int8", LIMITS)
    assert mixed is not None
    assert mixed["limit_ms"] == pytest.approx(2e9 / 400e9 * 1e3 + 1e9 / 100e9 * 1e3)


def test_where_nobody_counted_the_integer_products_the_limit_is_the_one_that_cannot_be_beaten() -> None:
    all_integer = limit(work(4e9, 0.0), VISION, "int8", LIMITS)
    assert all_integer is not None
    assert all_integer["limit_ms"] == 10.0


def test_an_unknown_rate_bounds_nothing() -> None:
    unknown = LIMITS | {"int8_gop_per_s": "unavailable: no integer unit"}
    got = limit(work(4e12, 1e8), VISION, "int8", unknown)
    assert got is not None
    assert (got["limit_ms"], got["bound"]) == (10.0, "memory")
    nothing = dict.fromkeys(LIMITS, "unavailable: x")
    assert limit(work(1.0, 1.0), VISION, "fp32", nothing) is None


def test_what_the_cache_can_keep_is_bounded_by_the_cache_and_the_rest_by_memory() -> None:
    caches = LIMITS | {"cache_bytes": 200_000_000, "cached_read_gb_per_s": 40.0}
    small, large = (limit(work(0.0, moved), VISION, "fp32", caches) for moved in (2e8, 3e8))
    assert small is not None
    assert large is not None
    assert (small["limit_ms"], small["in_cache"]) == (5.0, True)
    assert (large["limit_ms"], large["in_cache"]) == (5.0 + 10.0, False)  # 200 MB at 40 GB/s, 100 at 10


def test_work_that_was_not_counted_has_no_roofline() -> None:
    assert limit({}, VISION, "fp32", LIMITS) is None
    assert limit({"flops": 1.0, "weight_bytes": 1.0}, VISION, "fp32", LIMITS) is None


def test_half_precision_has_a_rate_of_its_own() -> None:
    got = limit(work(2e9, 0.0), VISION, "fp16", LIMITS | {"float16_gflop_per_s": 200.0})
    assert got is not None
    assert got["limit_ms"] == 10.0


def test_the_table_holds_each_phase_with_its_share() -> None:
    decoder = {"decode_flops": 1e8, "prefill_flops": 1e9, "weight_bytes": 1e8, "decode_kv_bytes": 0.0}
    works = {"vision_encoder": work(2e9, 1e8), "decoder": decoder}
    engines = {"vision_encoder": "onnxruntime-fp32", "decoder": "onnxruntime-int8", "embed_tokens": "onnxruntime-fp32"}
    latency = {"vision": {"median": 40.0}, "decode_per_token": {"median": 40.0}}
    got = table(works, engines, LIMITS, latency)
    assert set(got) == {"vision_encoder", "decoder_step"}  # prefill was not timed
    assert got["vision_encoder"]["share"] == 0.5
    assert (got["decoder_step"]["share"], got["decoder_step"]["bound"]) == (0.25, "memory")


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.floats(0, 1), RATES, RATES, RATES)
def test_a_machine_twice_as_fast_has_half_the_limit(
    flops: float, moved: float, part: float, read: float, single: float, integer: float
) -> None:
    counts = work(flops, moved, int8_flops=flops * part)
    slow = {"read_gb_per_s": read, "float32_gflop_per_s": single, "int8_gop_per_s": integer}
    fast = {key: 2 * rate for key, rate in slow.items()}
    one, other = limit(counts, VISION, "int8", slow), limit(counts, VISION, "int8", fast)
    if one is not None and other is not None:
        assert other["limit_ms"] == pytest.approx(one["limit_ms"] / 2)


def test_what_a_recipe_leaves_float_counts_at_the_narrowest_rate_that_is_known() -> None:
    gpu = LIMITS | {"float16_gflop_per_s": 200.0}
    mixed = limit(work(3e9, 0.0, int8_flops=2e9), VISION, "int8", gpu)
    half = limit(work(3e9, 0.0), VISION, "fp16", gpu)
    assert mixed is not None
    assert half is not None
    assert mixed["limit_ms"] == pytest.approx(2e9 / 400e9 * 1e3 + 1e9 / 200e9 * 1e3)
    assert half["limit_ms"] == pytest.approx(15.0)
