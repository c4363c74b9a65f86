"""A report from hand-written samples, every expectation computed by hand."""

from __future__ import annotations

import base64
import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from vlmc.errors import VlmcError
from vlmc.files import write_json
from vlmc.profiles import samples, summarize
from vlmc.profiles.summary import spread
from vlmc.reports import document

GOLD = "two dogs"


def run(index: int, turn: int, vision: float, step: float) -> dict[str, Any]:
    """preprocess 1 ms, prefill 9 ms, three further tokens; half of the time of two threads spent waiting."""
    wall = 0.001 + vision + 0.009 + 3 * step
    return {
        "kind": "run",
        "index": index,
        "turn": turn,
        "case": 0,
        "preprocess_s": 0.001,
        "vision_s": vision,
        "prefill_s": 0.009,
        "decode_s": [step] * 3,
        "wall_s": wall,
        "waited_s": wall,
        "tokens": 4,
        "prompt_tokens": 10,
        "peak_rss_bytes": 1_000_000 * (index + 1),
        "available_drop_bytes": 500,
        "device_bytes": None,
    }


def answer(row: int, text: str) -> dict[str, Any]:
    asked = {"file": f"/set/{row}.png", "task": "attributes", "prompt": "What?", "gold": GOLD, "facts": []}
    return {"kind": "answer", "row": row, **asked, "answer": text, "tokens": 2, "peak_rss_bytes": 9_000_000}


def info(name: str, kind: str, recipe: str, engines: dict[str, str]) -> dict[str, Any]:
    none = "unavailable: nothing is built"
    work = {"vision_encoder": {"flops": 2e9, "weight_bytes": 1e6, "io_bytes": 0.0}}
    return {
        "name": name,
        "kind": kind,
        "recipe": recipe,
        "engines": engines,
        "disk_bytes": 7 if engines else none,
        "build_peak_bytes": 8 if engines else none,
        "products": {"vision_encoder": {"int8": 4}} if engines else none,
        "component_bytes": {"vision_encoder": 7} if engines else none,
        "work": work if engines else {},
    }


INT8 = {"vision_encoder": "onnxruntime-int8"}
FLOAT = {"vision_encoder": "onnxruntime-fp32"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """int8 sees in 10 ms and steps in 10; float in 40 and 20; eager in 90 and 100. Turn 1 is twice as slow for all."""
    at = tmp_path / "samples"
    (at / "examples").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(at / "examples/00.png")
    write_json(
        at / "run.json",
        {
            "schema": 1,
            "artifact": {"name": "fake", "family": "f", "random_weights": False, "parameters": {"decoder": 5}},
            "device": {"name": "cpu", "latency_budget_ms": 25, "memory_budget_gb": 1},
            "machine": {"name": "m", "cores": 2, "threads": 2, "throttled": "no", "after": {"throttled": "no"}},
            "limits": {"read_gb_per_s": 10.0, "float32_gflop_per_s": 100.0, "int8_gop_per_s": 400.0, "how": "by hand"},
            "power": {"source": "rapl", "idle_watts": 3.0},
            "settings": {"tokens": 4, "turns": 2},
            "variants": [
                info("Float", "engine", "fp32", FLOAT),
                info("Int8", "engine", "int8", INT8),
                info("Eager", "baseline", "fp32", {}),
                info("Broken", "engine", "w4", {}),
            ],
            "skipped": {"Fake-quant": "no plan"},
            "failures": {"Broken": "its process was killed by SIGKILL."},
            "choices": {"vision_encoder": {"engine": "onnxruntime-int8", "reason": "it won", "candidates": {}}},
            "no_accuracy": "unavailable: random weights",
            "examples": [{"row": 1, "image": "examples/00.png"}],
        },
    )
    for name, vision, step in (("float", 0.04, 0.02), ("int8", 0.01, 0.01), ("eager", 0.09, 0.1)):
        rows = [{"kind": "open", "load_s": 0.5}, run(0, 0, vision, step), run(1, 1, 2 * vision, step)]
        if name == "int8":  # 20 W to the first token, 25 W to the fourth
            rows += [{"kind": "energy", "tokens": 1, "runs": 10, "seconds": 1.0, "joules": 20.0}]
            rows += [{"kind": "energy", "tokens": 4, "runs": 10, "seconds": 2.0, "joules": 50.0}]
        rows += [{"kind": "agreement", "case": 0, "tokens": [1, 2], "golden": [1, 2]}]
        rows += [{"kind": "agreement", "case": 1, "tokens": [1, 3], "golden": [1, 2]}]
        rows += [answer(0, GOLD), answer(1, "The Two dogs." if name != "int8" else "a cat")]
        for row in rows:
            samples.append(at / f"{name}.jsonl", row)
    return tmp_path


def variant(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in report["variants"] if entry["name"] == name)


def test_the_parts_of_a_run_in_milliseconds(folder: Path) -> None:
    latency = variant(summarize(folder), "Int8")["latency_ms"]
    assert {part: entry["median"] for part, entry in latency.items()} == pytest.approx(
        {
            "preprocess": 1.0,
            "vision": 15.0,  # of 10 and 20
            "prefill": 9.0,
            "time_to_first_token": 25.0,
            "decode_per_token": 10.0,
            "end_to_end": 55.0,  # of 50 and 60
            "load": 500.0,
        }
    )
    assert latency["decode_per_token"]["count"] == 6
    assert latency["vision"]["count"] == 2


def test_tokens_per_second_memory_and_energy(folder: Path) -> None:
    found = variant(summarize(folder), "Int8")
    assert found["tokens_per_s"]["median"] == pytest.approx(100.0)
    assert found["memory"] == {
        "peak_rss_bytes": 9_000_000,
        "peak_device_bytes": "unavailable: no accelerator with a memory of its own",
        "available_drop_bytes": 500,
        "disk_bytes": 7,
        "build_peak_bytes": 8,
    }
    assert found["energy"] == pytest.approx(
        {
            "joules_per_image": 2.0,
            "joules_per_token": 1.0,
            "joules_per_image_above_idle": 1.7,
            "joules_per_token_above_idle": 0.9,
            "tokens_per_s_per_watt": 1.0,
            "watts": 25.0,
        }
    )
    assert found["waited_share"] == pytest.approx(0.5)


def spends(folder: Path, *joules: float) -> dict[str, Any]:
    """The energy of what spent so much in 1 s of 10 runs to the first token, and in 1 s of 10 runs to the fourth."""
    for tokens, amount in zip((1, 4), joules, strict=True):
        row = {"kind": "energy", "tokens": tokens, "runs": 10, "seconds": 1.0, "joules": amount}
        samples.append(folder / "samples" / "float.jsonl", row)
    energy: dict[str, Any] = variant(summarize(folder), "Float")["energy"]
    return energy


def test_no_energy_is_below_zero(folder: Path) -> None:
    # A meter that is read at its own pace may count less for more tokens, and less than the idle power.
    energy = spends(folder, 2.9, 2.8)
    unresolved = "unavailable: less than the meter resolves"
    assert energy == {
        "joules_per_image": pytest.approx(0.29),
        "joules_per_token": unresolved,
        "joules_per_image_above_idle": unresolved,
        "joules_per_token_above_idle": unresolved,
        "tokens_per_s_per_watt": unresolved,
        "watts": 2.8,
    }


@pytest.mark.parametrize("joules", [(-5.0, 20.0), (20.0, 0.0)])
def test_a_counter_that_stood_still_or_began_again_gave_no_energy(folder: Path, joules: tuple[float, float]) -> None:
    assert set(spends(folder, *joules).values()) == {"unavailable: the meter did not move"}


def test_no_variant_waits_on_more_processors_than_the_machine_has(folder: Path) -> None:
    record = folder / "samples" / "run.json"
    record.write_text(record.read_text().replace('"threads": 2', '"threads": 8'))
    assert variant(summarize(folder), "Int8")["waited_share"] == pytest.approx(0.5)


def test_a_number_that_was_not_measured_says_why(folder: Path) -> None:
    eager = variant(summarize(folder), "Eager")
    assert eager["energy"]["watts"] == "unavailable: rapl gave no reading"
    assert eager["memory"]["disk_bytes"].startswith("unavailable: ")
    assert eager["roofline"].startswith("unavailable: ")


def test_a_sensor_that_broke_is_the_reason_for_no_energy(folder: Path) -> None:
    samples.append(folder / "samples" / "eager.jsonl", {"kind": "power", "reason": "the sensor stopped answering"})
    energy = variant(summarize(folder), "Eager")["energy"]
    assert energy["joules_per_token"] == "unavailable: the sensor stopped answering"


def test_speedups_are_ratios_of_medians_with_their_ranges_over_turns(folder: Path) -> None:
    entries = {(entry["of"], entry["over"]): entry for entry in summarize(folder)["speedups"]}
    assert set(entries) == {("Int8", "Float"), ("Int8", "Eager"), ("Float", "Eager"), ("Float", "Int8")}
    entry = entries["Int8", "Float"]
    ranges = {part: (found["low"], found["high"]) for part, found in entry["ranges"].items()}
    assert ranges == {
        "vision": pytest.approx((4.0, 4.0)),
        "prefill": pytest.approx((1.0, 1.0)),
        "decode": pytest.approx((2.0, 2.0)),
        "end_to_end": pytest.approx((110 / 50, 150 / 60)),
    }
    ratios = {part: entry[part] for part in ranges}
    assert ratios == pytest.approx(
        {"vision": 4.0, "prefill": 1.0, "decode": 2.0, "end_to_end": 130 / 55}  # medians of (110, 150) and of (50, 60)
    )
    assert entry["turns"] == 2


def test_only_turns_that_both_had_are_compared(folder: Path) -> None:
    path = folder / "samples" / "float.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"turn": 1' not in line))
    (entry,) = [one for one in summarize(folder)["speedups"] if (one["of"], one["over"]) == ("Int8", "Float")]
    assert entry["turns"] == 1


def test_a_ratio_lies_within_its_own_range_whatever_the_machine_does() -> None:
    assert spread([9.0, 500.0], 5.7) == {"low": 5.7, "high": 500.0}
    assert spread([1.0, 2.0], 1.5) == {"low": 1.0, "high": 2.0}


def test_roofline_shares_are_limit_over_measured(folder: Path) -> None:
    line = variant(summarize(folder), "Int8")["roofline"]["vision_encoder"]
    assert (line["limit_ms"], line["bound"], line["share"]) == (5.0, "compute", pytest.approx(5 / 15))


def test_accuracy_agreement_and_comparison(folder: Path) -> None:
    report = summarize(folder)
    overall = variant(report, "Int8")["accuracy"]["overall"]
    assert (overall["score"], overall["total"]) == (1.0, 2)
    assert overall["low"] < 0.5 < overall["high"]
    assert variant(report, "Int8")["agreement"] == {"cases": 2, "equal": 1, "first_divergence": [None, 1]}
    compared = {entry["over"]: entry for entry in report["comparisons"]}
    assert set(compared) == {"Float", "Eager"}
    assert (compared["Float"]["of"], compared["Float"]["lost"], compared["Float"]["won"]) == ("Int8", 1, 0)
    assert not compared["Float"]["significant"]


def test_the_length_of_answers_is_told(folder: Path) -> None:
    found = variant(summarize(folder), "Int8")
    assert (found["answer_tokens"]["mean"], found["answer_tokens"]["count"]) == (2.0, 2)


def test_answers_are_shown_with_their_pictures(folder: Path) -> None:
    (shown,) = variant(summarize(folder), "Int8")["answers"]
    assert (shown["answer"], shown["gold"], shown["right"]) == ("a cat", GOLD, False)
    prefix, _, data = shown["image_data"].partition(",")
    assert prefix == "data:image/png;base64"
    assert base64.b64decode(data) == (folder / "samples/examples/00.png").read_bytes()
    assert (folder / shown["image"]).is_file()


def test_the_verdict_is_on_the_kept_variant_in_plain_words(folder: Path) -> None:
    report = summarize(folder)
    said = report["verdict"]["sentences"]
    assert said[0] == (
        "Int8 takes 55 ms from the picture to 4 tokens, 25 ms of them to the first, then 100 tokens/s: 2.36 times as "
        "fast as Float (2.20 to 2.50 over 2 turns), 8.09 times as fast as Eager (8.00 to 8.17 over 2 turns)."
    )
    assert "Part by part against Float, times as fast: vision 4.00, prefill 1.00, decode 2.00." in said
    assert any(line.startswith("It scores 50.0 %") and "Float 100.0 %" in line for line in said)
    assert any(
        "costs 2 J and each further token 1 J" in line and "1.7 J and 0.9 J without 3 W of idle power" in line
        for line in said
    )
    assert "The first token is within the device's budget: 25 of 25 ms." in said
    assert "Peak resident memory is within the device's budget: 0.009 of 1 GB." in said
    assert "Fake-quant was not measured: no plan." in said
    assert "Broken was not measured: its process was killed by SIGKILL." in said
    assert any("waited for a processor 50 to 50 % of the time" in line for line in said)
    assert report["verdict"]["choices"]["vision_encoder"]["reason"] == "it won"


def test_the_room_above_reads_the_report(folder: Path) -> None:
    report = document.parse(summarize(folder))
    assert report.kept is not None
    assert report.kept.name == "Int8"


def test_without_finished_samples_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match="no samples"):
        summarize(tmp_path)
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(VlmcError, match="goes on where it stopped"):
        summarize(tmp_path)


def test_where_every_variant_failed_the_reasons_are_told(folder: Path) -> None:
    for path in (folder / "samples").glob("*.jsonl"):
        path.unlink()
    with pytest.raises(VlmcError, match=r"Broken: its process was killed"):
        summarize(folder)


def test_a_variant_that_failed_before_the_last_question_has_no_accuracy_and_says_why(folder: Path) -> None:
    """Of the rest of its answers there would be one, of other questions than the others' are."""
    record = folder / "samples" / "run.json"
    run = json.loads(record.read_text())
    run["failures"]["Int8"] = "its process was killed by SIGKILL."
    run["settings"]["questions"] = 2
    write_json(record, run)
    report = summarize(folder)
    assert variant(report, "Int8")["accuracy"] == "unavailable: its process was killed by SIGKILL."
    assert report["comparisons"] == []
    assert variant(report, "Float")["accuracy"]["overall"]["total"] == 2
    run["settings"]["questions"] = 0
    write_json(record, run)
    assert variant(summarize(folder), "Int8")["accuracy"] == "unavailable: random weights"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("int8.jsonl", '"tokens": 4, "prompt_tokens"', '"tokens": "%s%n", "prompt_tokens"'),
        ("int8.jsonl", '"tokens": 4, "prompt_tokens"', f'"tokens": 1{"0" * 400}, "prompt_tokens"'),
        ("int8.jsonl", '"load_s": 0.5', '"load_s": []'),
        ("run.json", '"int8": 4', '"int8": NaN'),
        ("run.json", '"int8": 4', '"int8": 1e999'),
        ("int8.jsonl", "", "a folder"),
        ("int8.jsonl", "", "a link to itself"),
        ("int8.jsonl", "", "a pipe"),
    ],
    ids=lambda text: text[:20],
)
def test_damage_is_told_in_one_sentence(folder: Path, file: str, old: str, new: str) -> None:
    path = folder / "samples" / file
    if old:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    else:
        path.unlink()
        {"a folder": path.mkdir, "a pipe": lambda: os.mkfifo(path)}.get(new, lambda: path.symlink_to(path))()
    with pytest.raises(VlmcError, match=r"/samples is damaged or of another version. Found: \w+Error "):
        summarize(folder)


@pytest.mark.parametrize("image", ["../../secret.txt", "{folder}/secret.txt", "examples/link"])
def test_no_file_from_elsewhere_gets_into_the_report(folder: Path, image: str) -> None:
    at = folder / "samples"
    (folder.parent / "secret.txt").write_text("secret")
    (at / "examples/link").symlink_to(folder.parent / "secret.txt")
    image = image.format(folder=folder.parent)
    assert (at / image).is_file()
    (at / "run.json").write_text((at / "run.json").read_text().replace("examples/00.png", image))
    with pytest.raises(VlmcError, match="leaves the folder"):
        summarize(folder)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_of_a_record_with_an_odd_field_there_is_a_report_or_a_sentence(folder: Path, data: st.DataObject) -> None:
    record = folder / "samples" / "run.json"
    whole = record.read_text()
    run = json.loads(whole)
    key = data.draw(st.sampled_from(sorted(run)))
    run[key] = data.draw(st.none() | st.integers(-1, 1) | st.just([]) | st.just({}) | st.just("x"))
    try:
        write_json(record, run)
        with contextlib.suppress(VlmcError):
            summarize(folder)
    finally:
        record.write_text(whole)


def test_samples_of_another_version_are_refused(folder: Path) -> None:
    record = folder / "samples" / "run.json"
    record.write_text(record.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(VlmcError, match=r"another schema.*99"):
        summarize(folder)
    record.write_text("{}")
    with pytest.raises(VlmcError, match=r"damaged or of another version.*'schema'"):
        summarize(folder)
