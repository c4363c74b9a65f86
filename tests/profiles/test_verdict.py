from __future__ import annotations

from typing import Any

import pytest
from vlmc.profiles import power
from vlmc.profiles.verdict import kept_name, sentences


def stats(value: float, std: float = 0.0) -> dict[str, float]:
    return {"median": value, "mean": value, "std": std}


def variant(name: str, kind: str = "engine", engine: str = "onnxruntime-int8", **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "engines": {"decoder": engine} if kind == "engine" else {},
        "latency_ms": {"end_to_end": stats(100.0), "time_to_first_token": stats(40.0)},
        "tokens_per_s": stats(50.0),
        "tokens": stats(8),
        "accuracy": "unavailable: random weights",
        "memory": {"peak_rss_bytes": 3e9, "peak_device_bytes": "unavailable: no accelerator"},
        "energy": {"joules_per_image": "unavailable: no sensor"},
        "roofline": "unavailable: not counted",
        "waited_share": 0.0,
    } | changes


def report(*variants: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "variants": list(variants),
        "speedups": [],
        "power": {"source": "unavailable: no sensor", "idle_watts": "unavailable: no sensor"},
        "device": {},
        "machine": {},
        "not_measured": {},
    } | changes


CHOICES = {"decoder": {"engine": "onnxruntime-int8"}}


def speedup(over: str, of: str = "Int8", **ratios: float) -> dict[str, Any]:
    """In one turn."""
    ratios = {"vision": 1.0, "prefill": 1.0, "decode": 1.0, "end_to_end": 1.0} | ratios
    return {"of": of, "over": over, "ranges": {}, "turns": 1} | ratios


def over_turns(entry: dict[str, Any], **ranges: tuple[float, float]) -> dict[str, Any]:
    """The same in four turns, with these ratios lowest and highest."""
    found = {part: {"low": low, "high": high} for part, (low, high) in ranges.items()}
    return entry | {"ranges": found, "turns": 4}


def test_the_kept_variant_is_the_one_that_runs_what_was_chosen() -> None:
    single, integer = variant("Float", engine="onnxruntime-fp32"), variant("Int8")
    eager = variant("Eager", kind="baseline")
    assert kept_name([integer, single, eager], CHOICES) == "Int8"
    assert kept_name([integer, single, eager], {"decoder": {"engine": "onnxruntime-fp32"}}) == "Float"
    assert kept_name([integer, single, eager], {"decoder": {"engine": "gone-w4"}}) == "Float"  # the last engine
    assert kept_name([eager], CHOICES) == "Eager"


def test_turns_that_disagree_are_no_difference() -> None:
    entry = over_turns(
        speedup("Float", end_to_end=1.05), end_to_end=(0.9, 1.2), vision=(1, 1), prefill=(1, 1), decode=(1, 1)
    )
    (first, *_) = sentences(report(variant("Int8"), speedups=[entry]), CHOICES)
    assert first.endswith("no clear difference to Float (0.90 to 1.20 times over 4 turns).")


def test_a_part_that_got_slower_is_said_plainly() -> None:
    entry = speedup("Float", vision=0.75, prefill=0.9, decode=2.0, end_to_end=1.1)
    said = sentences(report(variant("Int8"), variant("Float"), speedups=[entry]), CHOICES)
    assert any(line.endswith("decode 2.00; its vision and prefill got slower.") for line in said)
    turns = over_turns(entry, vision=(0.7, 0.8), prefill=(0.7, 1.1), decode=(1.9, 2.1), end_to_end=(1.0, 1.2))
    said = sentences(report(variant("Int8"), variant("Float"), speedups=[turns]), CHOICES)
    assert any(line.endswith("vision 0.75, prefill 0.90, decode 2.00; its vision got slower.") for line in said)


def test_an_engine_that_was_faster_than_what_was_kept_in_every_turn_is_told() -> None:
    faster = over_turns(speedup("Int8", of="Other", end_to_end=1.1), end_to_end=(1.02, 1.2))
    unsure = over_turns(speedup("Int8", of="Unsure", end_to_end=1.1), end_to_end=(0.97, 1.2))
    others = [unsure, faster | {"of": "Once", "turns": 1}]
    said = sentences(report(variant("Int8"), speedups=[faster, *others], device={"name": "orin"}), CHOICES)
    (told,) = [line for line in said if "faster here than what was kept" in line]
    assert told.startswith("Other was faster here than what was kept, 1.10 times (1.02 to 1.20 over 4 turns)")
    assert "remove engines/orin from the artefact" in told
    gone = {"decoder": {"engine": "gone-w4"}}
    assert "than what was kept" not in " ".join(sentences(report(variant("Int8"), speedups=[faster]), gone))


def test_an_engine_that_turns_do_not_tell_from_what_was_kept_is_named_once() -> None:
    unsure = over_turns(speedup("Int8", of="Unsure", end_to_end=0.96), end_to_end=(0.9, 1.04))
    slower = over_turns(speedup("Int8", of="Slower", end_to_end=0.5), end_to_end=(0.4, 0.6))
    there, back = (over_turns(speedup(*pair), end_to_end=(0.9, 1.1)) for pair in (("Int8", "Float"), ("Float", "Int8")))
    said = sentences(report(variant("Int8"), speedups=[unsure, slower, there, back]), CHOICES)
    assert "Unsure was as fast as Int8, as far as turns tell (0.90 to 1.04 times over 4 turns)." in said
    assert len([line for line in said if "as far as turns tell" in line]) == 1


def test_intervals_say_what_they_count() -> None:
    accuracy = {"overall": {"value": 1.0, "low": 0.806, "high": 1.0, "total": 80}}
    (told,) = [line for line in sentences(report(variant("Int8", accuracy=accuracy)), CHOICES) if "scores" in line]
    assert "95 % intervals; questions about one picture count as one where they go right or wrong together" in told


def test_where_the_gpu_has_a_memory_of_its_own_that_is_told_and_judged() -> None:
    kept = variant("Int8", memory={"peak_rss_bytes": 9e9, "peak_device_bytes": 1e9})
    said = sentences(report(kept, device={"memory_budget_gb": 2}), CHOICES)
    assert "Peak memory of the GPU: 1000 MB." in said
    assert "Peak memory of the GPU is within the device's budget: 1 of 2 GB." in said


@pytest.mark.parametrize(("allowed", "word"), [(30, "over"), (40, "within")])
def test_budgets_are_judged(allowed: float, word: str) -> None:
    said = sentences(report(variant("Int8"), device={"latency_budget_ms": allowed}), CHOICES)
    assert f"The first token is {word} the device's budget: 40 of {allowed} ms." in said


def test_the_memory_budget_is_judged_in_gigabytes() -> None:
    said = sentences(report(variant("Int8"), device={"memory_budget_gb": 2}), CHOICES)
    assert "Peak resident memory is over the device's budget: 3 of 2 GB." in said


def test_what_is_unavailable_is_said_with_its_reason() -> None:
    said = sentences(report(variant("Int8")), CHOICES)
    assert "Accuracy: unavailable: random weights." in said
    assert "Energy: unavailable: no sensor." in said


def test_noise_other_programs_and_throttling_are_told() -> None:
    noisy = {"end_to_end": stats(100.0, 25.0), "time_to_first_token": stats(40.0)}
    machine = {"throttled": "no", "after": {"throttled": "3 thermal events since the machine started"}}
    said = sentences(report(variant("Int8", latency_ms=noisy, waited_share=0.4), machine=machine), CHOICES)
    assert any(line.startswith("The runs vary (standard deviation): Int8 by 25 %;") for line in said)
    assert any("waited for a processor 40 to 40 % of the time" in line for line in said)
    assert any(
        "throttled while it measured, or was short of power (before: no; after: 3 thermal" in line for line in said
    )


def test_other_programs_are_told_where_they_delayed_only_some_variants() -> None:
    said = sentences(report(variant("Int8", waited_share=0.0), variant("Float", waited_share=0.4)), CHOICES)
    assert any("waited for a processor 0 to 40 % of the time" in line for line in said)


def test_threads_that_share_processors_are_not_blamed_on_other_programs() -> None:
    said = sentences(report(variant("Int8", waited_share=0.9), machine={"threads": 8, "cores": 2}), CHOICES)
    assert any(line.startswith("8 threads shared 2 processors: the variants waited") for line in said)
    assert not any("Other programs" in line for line in said)


def test_energy_is_told_with_what_its_meter_counts() -> None:
    energy = {
        "joules_per_image": 2.0,
        "joules_per_token": "unavailable: less than the meter resolves",
        "joules_per_image_above_idle": 1.7,
        "joules_per_token_above_idle": "unavailable: less than the meter resolves",
        "watts": 25.0,
    }
    (said,) = [
        line
        for line in sentences(
            report(variant("Int8", energy=energy), power={"source": "nvml", "idle_watts": 3.0}), CHOICES
        )
        if line.startswith("A picture to its first token costs")
    ]
    assert said == (
        "A picture to its first token costs 2 J and each further token less than the meter resolves, at 25 W "
        "(1.7 J and less than the meter resolves without 3 W of idle power; nvml counts only the GPU)."
    )


def test_what_every_meter_counts_is_known() -> None:
    assert all(power.counts(name) for name in power.names())
    assert power.counts("a source of an older version") == ""


def test_throttling_of_before_the_measurement_is_no_doubt() -> None:
    throttled = "3 thermal events since the machine started"
    said = sentences(
        report(variant("Int8"), machine={"throttled": throttled, "after": {"throttled": throttled}}), CHOICES
    )
    assert not any("throttled" in line for line in said)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("throttled=0x50005", "throttled=0x50005", True),  # a Raspberry Pi: all the while
        ("throttled=0x50000", "throttled=0x50000", False),  # before, and no more
        ("no", "throttled=0x10000", True),
        ("no", "unavailable: vcgencmd does not answer", False),
    ],
)
def test_a_raspberry_pi_that_is_held_back_all_the_while_is_a_doubt(before: str, after: str, told: bool) -> None:
    said = sentences(report(variant("Int8"), machine={"throttled": before, "after": {"throttled": after}}), CHOICES)
    assert any("throttled while it measured" in line for line in said) == told


def test_a_quiet_machine_raises_no_doubts() -> None:
    machine = {"throttled": "no", "after": {"throttled": "no"}}
    said = sentences(report(variant("Int8"), machine=machine), CHOICES)
    assert not any("vary" in line or "Other programs" in line or "throttled" in line for line in said)


def test_the_distance_to_the_limits_names_what_bounds() -> None:
    lines = {
        "vision_encoder": {"share": 0.41, "bound": "compute", "in_cache": False},
        "decoder_step": {"share": 0.6, "bound": "memory", "in_cache": False},
        "decoder_prefill": {"share": 0.023, "bound": "memory", "in_cache": True},
    }
    said = sentences(report(variant("Int8", roofline=lines)), CHOICES)
    assert (
        "Distance to this machine's limits: vision 41 % of its limit (arithmetic), a decode step 60 % of its limit "
        "(memory bandwidth), prefill 2.3 % of its limit (cache bandwidth)."
    ) in said
    lines["vision_encoder"]["share"] = 1.44
    said = sentences(report(variant("Int8", roofline=lines)), CHOICES)
    assert any("vision 144 % of" in line and "No engine passes its limit" in line for line in said)
