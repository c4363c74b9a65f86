"""What a worker does with a session, in this process; its own process is tried in test_harness."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.profiles import memory, power, samples
from vlmc.profiles import worker as worker_module
from vlmc.profiles.worker import Worker


class Meter:
    """Ten joules more at every reading, until it breaks."""

    def __init__(self, readings: int) -> None:
        self.readings, self.total, self.closed = readings, 0.0, False

    def joules(self) -> float:
        self.readings -= 1
        if self.readings < 0:
            raise OSError("gone")
        self.total += 10.0
        return self.total

    def close(self) -> None:
        self.closed = True


def opens(monkeypatch: pytest.MonkeyPatch, *meters: Meter) -> list[Meter]:
    """Meters that workers are given in their turn; the list holds those that none has opened."""
    left = list(meters)
    monkeypatch.setattr(power, "open_meter", lambda source, where: left.pop(0))
    return left


@pytest.fixture
def job(artifact: Artifact, sessions: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "artifact": str(artifact.root),
        "python": "",
        "opener": sessions,
        "arguments": {"step": 0.002},
        "samples": str(tmp_path / "samples.jsonl"),
        "tokens": 4,
        "answer_tokens": 8,
        "labels": [],
        "power_source": "unavailable: none",
        "power_rails": [],
        "device_memory": "none",
    }


def test_energy_is_that_of_many_runs_to_the_first_token_and_to_the_last(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "ENERGY_SECONDS", 0.05)
    worker = Worker(job)
    opens(monkeypatch, Meter(9))
    assert list(worker.energy()) == ["energy"]
    first, whole = samples.of_kind(samples.read(Path(job["samples"])), "energy")
    assert (first["tokens"], whole["tokens"]) == (1, 4)
    assert (first["joules"], whole["joules"]) == (10.0, 10.0)
    assert first["runs"] > 1 and first["seconds"] >= 0.05


def test_tokens_that_found_no_room_are_not_counted(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "ENERGY_SECONDS", 0.01)
    worker = Worker(job | {"tokens": 50})
    opens(monkeypatch, Meter(9))
    generate = worker.session.generate
    worker.session.generate = lambda inputs, tokens, ignore_eos: generate(inputs, min(tokens, 9), ignore_eos)
    list(worker.energy())
    rows = samples.of_kind(samples.read(Path(job["samples"])), "energy")
    assert [row["tokens"] for row in rows] == [1, 9]


def test_a_sensor_that_breaks_between_the_two_leaves_no_half(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "ENERGY_SECONDS", 0.01)
    worker = Worker(job)
    opens(monkeypatch, Meter(3))
    assert list(worker.energy()) == []
    assert samples.of_kind(samples.read(Path(job["samples"])), "energy") == []


def test_a_sensor_that_breaks_ends_energy_and_not_the_measurement(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(job)
    opens(monkeypatch, Meter(1))
    assert list(worker.energy()) == []
    assert worker.run(0)["tokens"] == 4
    (fault,) = samples.of_kind(samples.read(Path(job["samples"])), "power")
    assert fault["reason"] == "the sensor stopped answering: gone"


def test_a_sensor_that_is_gone_ends_energy_and_not_the_measurement(job: dict[str, Any]) -> None:
    worker = Worker(job | {"power_source": "nvml"})
    assert list(worker.energy()) == []
    (fault,) = samples.of_kind(samples.read(Path(job["samples"])), "power")
    assert fault["reason"].startswith("the sensor does not answer any more: The power source nvml is unavailable")


def test_a_meter_takes_no_time_from_what_is_timed(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Where it samples, it reads sensors or starts a command many times a second, as long as it is open.
    monkeypatch.setattr(worker_module, "ENERGY_SECONDS", 0.01)
    meter = Meter(9)
    unopened = opens(monkeypatch, meter)
    worker = Worker(job | {"power_source": "rpi_pmic"})
    list(worker.time([0, 1], turn=0, seconds=0))
    assert unopened == [meter]
    list(worker.energy())
    assert unopened == [] and meter.closed


def test_a_meter_that_is_late_counts_all_the_same(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # NVML's counter moves on every 20 to 100 ms. Nothing is drawn before the work begins, then 100 W.
    worker, now, begun = Worker(job), 10.0, 10.0

    def answer(index: int, tokens: int) -> int:
        nonlocal now
        now += 0.03
        worker.session.timings.tokens = tokens
        return 3

    late = Meter(0)
    monkeypatch.setattr(late, "joules", lambda: 100 * max(0.0, now - 0.1 - begun))
    monkeypatch.setattr(worker_module, "perf_counter", lambda: now)
    monkeypatch.setattr(worker, "_answer", answer)
    opens(monkeypatch, late)
    list(worker.energy())
    for row in samples.of_kind(samples.read(Path(job["samples"])), "energy"):
        assert row["joules"] / row["seconds"] == pytest.approx(100)


def test_cases_come_round_again(job: dict[str, Any]) -> None:
    worker = Worker(job)
    assert list(worker.time([0, 1, 2], turn=1, seconds=0)) == ["run"] * 3
    rows = samples.of_kind(samples.read(Path(job["samples"])), "run")
    assert [(row["index"], row["case"], row["turn"]) for row in rows] == [(0, 0, 1), (1, 1, 1), (2, 0, 1)]
    assert rows[0]["prompt_tokens"] == 3


def test_the_first_run_of_a_turn_is_not_recorded(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run, done = Worker.run, []
    monkeypatch.setattr(Worker, "run", lambda worker, index: done.append(index) or run(worker, index))
    worker = Worker(job)
    assert done == [0], "caches and lazy allocations, once"
    list(worker.time([3, 4], turn=1, seconds=0))
    assert done == [0, 3, 3, 4], "the caches were another variant's"
    assert len(samples.of_kind(samples.read(Path(job["samples"])), "run")) == 2


def test_a_turn_ends_with_its_time_and_not_before_one_run(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    worker, readings = Worker(job), itertools.count()
    monkeypatch.setattr(worker_module, "perf_counter", lambda: float(next(readings)))
    assert list(worker.time([0, 4, 8], turn=0, seconds=0.5)) == ["run"]
    rows = samples.read(Path(job["samples"]))
    assert [row["index"] for row in samples.of_kind(rows, "run")] == [0]
    assert len(samples.of_kind(rows, "turn")) == 1


def test_unified_memory_is_what_the_machine_lost(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([1000, 400, 700])
    monkeypatch.setattr(memory, "available_bytes", lambda: next(free))
    worker = Worker(job | {"device_memory": "unified"})
    found = [worker._memory() for _ in range(2)]
    assert [(row["device_bytes"], row["available_drop_bytes"]) for row in found] == [(600, 600), (300, 300)]


def test_memory_that_others_take_while_a_worker_waits_is_not_its_own(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 1000
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    worker = Worker(job | {"device_memory": "unified"})
    free -= 100  # the worker's own
    list(worker.do("time", indices=[0], turn=0, seconds=0))
    free -= 600  # another worker
    list(worker.do("time", indices=[4], turn=1, seconds=0))
    rows = samples.of_kind(samples.read(Path(job["samples"])), "run")
    assert [(row["available_drop_bytes"], row["device_bytes"]) for row in rows] == [(100, 100)] * 2


def test_a_prompt_that_fills_the_cache_is_a_sentence(job: dict[str, Any]) -> None:
    with pytest.raises(VlmcError, match="Golden case 0 leaves no room"):
        Worker(job | {"tokens": 1})
