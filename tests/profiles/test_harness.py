"""The protocol with real worker processes and fake sessions. Processes cost half a second each, so tests share runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.profiles import harness, memory, samples
from vlmc.profiles.harness import Measurement, Settings
from vlmc.profiles.process import Died
from vlmc.profiles.questions import read_set
from vlmc.profiles.variants import Variant

RUNS = 5


@pytest.fixture
def measurement(artifact: Artifact, sessions: str, question_set: Path) -> Measurement:
    return Measurement(
        artifact=artifact.root,
        variants=[Variant("Slow one", "baseline", sessions, {"step": 0.004}, {}, "fp32")],
        settings=Settings(runs=RUNS, seconds=0, tokens=6, answer_tokens=8, threads=1),
        questions=read_set(question_set, 2),
        cases=2,
        power_source="unavailable: no sensor",
        power_rails=(),
        device_memory="none",
    )


def another(sessions: str, name: str, fault: str = "") -> Variant:
    return Variant(name, "engine", sessions, {"fault": fault}, {}, "int8")


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return samples.read(folder / "unfinished" / f"{harness.slug(name)}.jsonl")


def runs(folder: Path, name: str) -> list[int]:
    return [row["index"] for row in samples.of_kind(rows(folder, name), "run")]


class Watch:
    """Keeps what progress said, and interrupts after so many items."""

    def __init__(self, interrupt_at: int = 10**9) -> None:
        self.said: list[tuple[str, int, int]] = []
        self.interrupt_at = interrupt_at

    def __call__(self, what: str, done: int, total: int) -> None:
        self.said.append((what, done, total))
        if done >= self.interrupt_at:
            raise KeyboardInterrupt


def test_all_variants_do_the_same_work_in_turns_and_a_dying_one_does_not_stop_the_others(
    measurement: Measurement, sessions: str, tmp_path: Path
) -> None:
    dying = [another(sessions, f"It {fault}", fault) for fault in ("killed", "raises", "refuses")]
    other = another(sessions, "Other one")
    todo = replace(measurement, variants=[*measurement.variants, *dying, other])
    watch = Watch()
    harness.fresh(tmp_path / "cpu")
    failures = harness.measure(tmp_path / "cpu", todo, watch)

    assert list(failures) == ["It killed", "It raises", "It refuses"]
    assert "was killed by SIGKILL (most often because memory ran out)" in failures["It killed"]
    assert "RuntimeError: the engine fell over" in failures["It raises"]
    assert failures["It refuses"] == "The engine was altered."

    for name in ("Slow one", "Other one"):
        assert sorted(runs(tmp_path / "cpu", name)) == list(range(RUNS))
        found = rows(tmp_path / "cpu", name)
        assert [row["turn"] for row in samples.of_kind(found, "turn")] == [0, 1, 2, 3]
        assert [row["tokens"] for row in samples.of_kind(found, "agreement")] == [[7, 8], [7, 8]]
        assert [row["answer"] for row in samples.of_kind(found, "answer")] == ["two dogs"] * 4
        assert len(samples.of_kind(found, "open")) == 1  # it stayed alive between its turns
    run = samples.of_kind(rows(tmp_path / "cpu", "Slow one"), "run")[0]
    assert (run["decode_s"], run["tokens"]) == ([0.004] * 5, 6)
    assert run["peak_rss_bytes"] > 1_000_000

    measured = [what for what, _, _ in watch.said if what in ("Slow one", "Other one")]
    changes = [now for before, now in zip(["", *measured], measured, strict=False) if before != now]
    assert changes[:4] == ["Slow one", "Other one", "Slow one", "Other one"]
    assert watch.said[-1][1:] == (5 * (RUNS + 2 + 4),) * 2


@pytest.mark.parametrize("dies", ["while it loads", "at work"])
def test_a_variant_that_died_is_not_started_again(
    dies: str, measurement: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying:
        def __init__(self, *_: Any) -> None:
            if dies == "while it loads":
                raise Died("it fell over")

        def ask(self, *_: Any, **request: Any) -> None:
            raise Died("it fell over")

        def close(self) -> None: ...

    monkeypatch.setattr(harness, "Process", Dying)
    harness.fresh(tmp_path)
    watch = Watch()
    assert harness.measure(tmp_path, measurement, watch) == {"Slow one": "it fell over"}
    assert [what for what, _, _ in watch.said].count("loading Slow one") == 1


def test_an_interrupted_measurement_goes_on_where_it_stopped(
    measurement: Measurement, sessions: str, tmp_path: Path
) -> None:
    folder = tmp_path / "cpu"
    todo = replace(measurement, variants=[*measurement.variants, another(sessions, "Other one")])
    harness.fresh(folder)
    with pytest.raises(KeyboardInterrupt):
        harness.measure(folder, todo, Watch(interrupt_at=4))
    file = folder / "unfinished" / "slow-one.jsonl"
    opened, first, *_ = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(opened + first + b'{"kind": "run", "ind')  # as a kill in the middle of the first turn leaves it
    before = {name: runs(folder, name) for name in ("Slow one", "Other one")}
    assert before["Slow one"] == [0]

    assert harness.measure(folder, todo, Watch()) == {}
    for name, done in before.items():
        assert sorted(runs(folder, name)) == list(range(RUNS))
        assert runs(folder, name)[: len(done)] == done
        assert len(samples.of_kind(rows(folder, name), "answer")) == 4

    whole = {name: rows(folder, name) for name in before}
    assert harness.measure(folder, todo, Watch()) == {}  # all is done: no process is even started
    assert {name: rows(folder, name) for name in before} == whole


def test_a_time_bound_ends_every_turn_after_at_least_one_run(measurement: Measurement, tmp_path: Path) -> None:
    bounded = replace(measurement.settings, seconds=1e-9, runs=40)
    harness.fresh(tmp_path / "cpu")
    harness.measure(tmp_path / "cpu", replace(measurement, settings=bounded, questions=[]), Watch())
    assert runs(tmp_path / "cpu", "Slow one") == [0, 1, 2, 3]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What workers are asked, who are no processes and do nothing."""
    requests: list[dict[str, Any]] = []

    class Idle:
        def __init__(self, *_: Any) -> None:
            pass

        def ask(self, do: str, item: Any, **request: Any) -> None:
            requests.append({"do": do} | request)

        def close(self) -> None:
            pass

    monkeypatch.setattr(harness, "Process", Idle)
    return requests


def test_the_time_bound_is_shared_by_the_turns(
    measurement: Measurement, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    harness.fresh(tmp_path)
    harness.measure(tmp_path, replace(measurement, settings=replace(measurement.settings, seconds=8)), Watch())
    assert [request["seconds"] for request in asked if request["do"] == "time"] == [2.0] * 4


def test_a_turn_that_ran_out_of_time_is_not_gone_on_with(
    measurement: Measurement, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    log = harness.fresh(tmp_path) / "slow-one.jsonl"
    for turn in (0, 1):  # of the two runs of turn 0 one was done, of turn 1 all
        samples.append(log, {"kind": "run", "index": turn, "turn": turn}, {"kind": "turn", "turn": turn})
    harness.measure(tmp_path, measurement, Watch())
    assert [request["indices"] for request in asked if request["do"] == "time"] == [[2], [3]]


def test_where_memory_is_short_variants_are_not_kept_waiting(
    measurement: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "total_bytes", lambda: 10**18)
    harness.fresh(tmp_path / "cpu")
    harness.measure(tmp_path / "cpu", replace(measurement, questions=[]), Watch())
    assert len(samples.of_kind(rows(tmp_path / "cpu", "Slow one"), "open")) == 5  # one a turn, one for agreement


def test_only_the_same_measurement_is_gone_on_with(measurement: Measurement, tmp_path: Path) -> None:
    here = {"name": "a", "cpu": "b", "threads": 2, "load_average": 3.0}
    key = measurement.key(here)
    harness.fresh(tmp_path)
    run = {"key": key, "limits": {}, "machine": here}
    harness.begin(tmp_path, run)
    assert harness.unfinished(tmp_path, measurement.key(here | {"load_average": 0.0})) == run
    first, *rest = measurement.questions
    changed = [
        replace(first, prompt="How many?"),
        replace(first, gold="a cat"),
        replace(first, task="scene_context"),
        replace(first, facts=("a cat",)),
    ]
    others = [
        measurement.key(here | {"cpu": "another"}),
        measurement.key(here | {"versions": {"onnxruntime": "another"}}),
        replace(measurement, settings=replace(measurement.settings, tokens=7)).key(here),
        replace(measurement, variants=[replace(measurement.variants[0], identity="rebuilt")]).key(here),
        replace(measurement, questions=measurement.questions[:1]).key(here),
        *(replace(measurement, questions=[question, *rest]).key(here) for question in changed),
    ]
    assert len({key, *others}) == 1 + len(others)
    assert harness.unfinished(tmp_path, others[0]) is None
    assert (harness.fresh(tmp_path) / "run.json").exists() is False


@pytest.mark.parametrize(
    "content", ["", "[]", "3", '{"key": "k"', '{"key": "k"}', '{"key": "k", "limits": {}, "machine": 5}']
)
def test_from_a_damaged_record_nothing_is_gone_on_with(content: str, tmp_path: Path) -> None:
    (harness.fresh(tmp_path) / "run.json").write_text(content)
    assert harness.unfinished(tmp_path, "k") is None


def test_finished_samples_replace_only_finished_samples(tmp_path: Path) -> None:
    for number in (1, 2):
        harness.fresh(tmp_path)
        harness.begin(tmp_path, {"number": number})
        (tmp_path / "unfinished" / f"{number}.jsonl").touch()
        if number == 2:
            assert (tmp_path / "samples" / "1.jsonl").exists()
        harness.finish(tmp_path, {"number": number})
    assert sorted(os.listdir(tmp_path)) == ["samples"]
    assert sorted(os.listdir(tmp_path / "samples")) == ["2.jsonl", "run.json"]


def test_the_samples_before_are_deleted_only_once_the_new_ones_are_in_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "old.jsonl").touch()
    harness.fresh(tmp_path)
    move = os.replace

    def fails(source: Path, target: Path) -> None:
        if target == tmp_path / "samples":
            raise OSError("the disk is gone")
        move(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(VlmcError, match="cannot be written"):
        harness.finish(tmp_path, {})
    assert list(tmp_path.rglob("old.jsonl"))
    monkeypatch.undo()
    harness.finish(tmp_path, {})  # as the same command does
    assert os.listdir(tmp_path / "samples") == ["run.json"]
    assert os.listdir(tmp_path) == ["samples"]


def test_a_run_that_was_killed_between_the_renames_leaves_nothing_behind(tmp_path: Path) -> None:
    harness.fresh(tmp_path)
    nobody = 2**22 + 1  # above the kernel's largest process number
    (tmp_path / f".samples.{nobody}.old").mkdir()
    harness.finish(tmp_path, {})
    assert os.listdir(tmp_path) == ["samples"]


@pytest.mark.parametrize(
    ("name", "file"), [("ONNX Runtime int8", "onnx-runtime-int8"), ("../../etc", "etc"), ("...", "variant")]
)
def test_a_variants_name_is_a_harmless_file_name(name: str, file: str) -> None:
    assert harness.slug(name) == file


@pytest.mark.parametrize(
    ("kind", "host", "gpu", "fits"),
    [
        ("none", (80, 78), (80, 0), True),
        ("none", (80, 60), (80, 0), True),
        ("none", (80, 53), (80, 0), False),  # it took 27, and may take that again
        ("none", (80, 90), (80, 0), True),  # others went meanwhile
        ("none", (12, 12), (80, 0), False),  # an eighth stays for others
        ("nvml", (80, 78), (80, 60), True),
        ("nvml", (80, 78), (80, 40), False),
        ("nvml", (80, 53), (80, 60), False),
        ("nvml", (80, 78), (None, None), True),
        ("none", (None, None), (80, 0), True),
    ],
)
def test_workers_wait_in_memory_where_there_is_room_for_one_more(
    kind: str, host: tuple[Any, Any], gpu: tuple[Any, Any], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = [0]
    monkeypatch.setattr(memory, "total_bytes", lambda: None if host[0] is None else 100)
    monkeypatch.setattr(memory, "available_bytes", lambda: host[at[0]])
    monkeypatch.setattr(memory, "device_free_and_total", lambda: (gpu[at[0]], gpu[0] and 100))
    room = harness._Room(kind)
    room.before_start()
    at[0] = 1
    assert room.fits_another() is fits


def test_room_is_for_the_largest_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [90]
    monkeypatch.setattr(memory, "total_bytes", lambda: 100)
    monkeypatch.setattr(memory, "available_bytes", lambda: free[0])
    room, answers = harness._Room("none"), []
    for taken in (25, 5, 5, 5, 5):
        room.before_start()
        free[0] -= taken
        answers.append(room.fits_another())
    assert answers == [True, True, True, True, False]
