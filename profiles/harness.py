"""The measuring protocol: every variant in a process of its own, all doing the same work in turns, resumable.

Turns alternate between the variants (A B C, A B C, …), so that a machine that slows down for a while slows all of them,
and ratios within a turn hold although the times drift. Only one variant works at a time; the others wait for a line on
stdin, without using the processor, for as long as more than half of the machine's memory is free.

    DEVICE/samples/run.json       what was measured, on what machine, with what settings
    DEVICE/samples/NAME.jsonl     the raw samples of a variant
    DEVICE/samples/examples/…     the pictures of the answers that the report shows

A measurement that is not finished lies in DEVICE/unfinished/; the same command goes on with it, another one begins
again. Finished samples are replaced only by finished samples.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..console import Report
from ..errors import VlmcError
from ..files import read_json, remove_leftovers, write_json, writing
from . import memory, samples
from .process import Died, Process
from .questions import Question
from .variants import Variant

TURNS = 4


@dataclass(frozen=True)
class Settings:
    """How much is measured. `runs` of each variant, fewer where they take longer than `seconds` (0: no bound); `tokens`
    of each run; `answer_tokens` at most of each answer to the evaluation set."""

    runs: int
    seconds: float
    tokens: int
    answer_tokens: int
    threads: int


@dataclass(frozen=True)
class Measurement:
    """All that the workers are told. `power_source` may be an "unavailable: reason"; `device_memory` is "nvml",
    "unified" or "none"; `cases` is the number of golden cases; `labels` are what a model that matches chooses from."""

    artifact: Path
    variants: Sequence[Variant]
    settings: Settings
    questions: Sequence[Question]
    cases: int
    power_source: str
    power_rails: tuple[str, ...]
    device_memory: str
    labels: tuple[str, ...] = ()

    def key(self, machine: dict[str, Any]) -> str:
        """Changes with whatever would make samples incomparable."""
        parts = [
            asdict(self.settings),
            [asdict(variant) for variant in self.variants],
            [(str(one.image), one.prompt, one.gold, one.task, one.facts) for one in self.questions],
            {name: machine.get(name) for name in ("name", "cpu", "gpu", "threads", "versions")},
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def unfinished(folder: Path, key: str) -> dict[str, Any] | None:
    """run.json of the interrupted measurement with this key, or None, also where it is damaged: nothing can go on from
    it, and the same command has to be able to begin again."""
    run: Any = None
    with suppress(VlmcError):
        run = read_json(folder / "unfinished" / "run.json")
    whole = isinstance(run, dict) and all(isinstance(run.get(name), dict) for name in ("limits", "machine"))
    return run if whole and run.get("key") == key else None


def fresh(folder: Path) -> Path:
    """An empty folder for a new measurement; an interrupted one of another kind is thrown away."""
    with writing(folder):
        shutil.rmtree(folder / "unfinished", ignore_errors=True)
        (folder / "unfinished").mkdir(parents=True)
    return folder / "unfinished"


def begin(folder: Path, run: dict[str, Any]) -> None:
    """From here on the measurement can be gone on with."""
    write_json(folder / "unfinished" / "run.json", run)


def finish(folder: Path, run: dict[str, Any]) -> None:
    """Puts the samples in the place of those of the measurement before."""
    write_json(folder / "unfinished" / "run.json", run)
    with writing(folder):
        shutil.rmtree(folder / "unfinished" / "jobs", ignore_errors=True)
        remove_leftovers(folder / "samples")  # of a run that was killed between the two renames
        retired = folder / f".samples.{os.getpid()}.old"
        if (folder / "samples").exists():
            os.replace(folder / "samples", retired)
        os.replace(folder / "unfinished", folder / "samples")
        shutil.rmtree(retired, ignore_errors=True)


def slug(name: str) -> str:
    """The variant's name as a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "variant"


def measure(folder: Path, measurement: Measurement, progress: Report) -> dict[str, str]:
    """Runs all that is not done yet. Returns by name why a variant failed; the others are measured all the same."""
    with closing(_Crew(folder / "unfinished", measurement, progress)) as crew:
        for turn in range(TURNS):
            for variant in measurement.variants:
                crew.time(variant, turn)
        for variant in measurement.variants:
            crew.measure_energy(variant)
            crew.ask_questions(variant)
        return crew.failures


class _Crew:
    """The workers, started when they are needed."""

    def __init__(self, folder: Path, measurement: Measurement, progress: Report) -> None:
        self._folder, self._todo, self._progress = folder, measurement, progress
        self._workers: dict[str, Process] = {}
        self._room = _Room(measurement.device_memory)
        self.failures: dict[str, str] = {}
        with writing(folder):
            (folder / "jobs").mkdir(parents=True, exist_ok=True)
        self._metered = not measurement.power_source.startswith("unavailable")
        each = measurement.settings.runs + measurement.cases + len(measurement.questions) + self._metered
        self._done, self._all = 0, each * len(measurement.variants)

    def time(self, variant: Variant, turn: int) -> None:
        """The turn's share of the runs, those left out that were done before an interruption."""
        settings = self._todo.settings
        share = [index for index in range(settings.runs) if index % TURNS == turn]
        rows = samples.read(self._samples(variant))
        finished = {row["index"] for row in samples.of_kind(rows, "run")}
        ended = turn in {row["turn"] for row in samples.of_kind(rows, "turn")}
        left = [] if ended else [index for index in share if index not in finished]
        before = self._done
        if left:
            self._ask(variant, "time", indices=left, turn=turn, seconds=settings.seconds / TURNS)
        self._advance(variant, before + len(share) - self._done)

    def measure_energy(self, variant: Variant) -> None:
        """What the meter counts over many runs, where there is a meter."""
        if not self._metered:
            return
        rows = samples.read(self._samples(variant))
        before = self._done
        if not samples.of_kind(rows, "energy") and not samples.of_kind(rows, "power"):
            self._ask(variant, "energy")
        self._advance(variant, before + 1 - self._done)

    def ask_questions(self, variant: Variant) -> None:
        """The golden cases, for agreement, and the evaluation set, for accuracy."""
        rows = samples.read(self._samples(variant))
        agreed = {row["case"] for row in samples.of_kind(rows, "agreement")}
        answered = {row["row"] for row in samples.of_kind(rows, "answer")}
        cases = [case for case in range(self._todo.cases) if case not in agreed]
        questions = [_request(i, q) for i, q in enumerate(self._todo.questions) if i not in answered]
        before = self._done
        if cases:
            self._ask(variant, "agree", cases=cases)
        if questions:
            self._ask(variant, "evaluate", rows=questions)
        self._advance(variant, before + self._todo.cases + len(self._todo.questions) - self._done)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def _ask(self, variant: Variant, do: str, **request: Any) -> None:
        if variant.name in self.failures:
            return
        try:
            worker = self._workers.get(variant.name) or self._start(variant)
            worker.ask(do, lambda _: self._advance(variant, 1), **request)
        except Died as death:
            self.failures[variant.name] = str(death)
        if variant.name in self._workers and (variant.name in self.failures or not self._room.fits_another()):
            self._workers.pop(variant.name).close()

    def _start(self, variant: Variant) -> Process:
        self._progress(f"loading {variant.name}", self._done, self._all)
        self._room.before_start()
        todo, name = self._todo, slug(variant.name)
        job = {
            "artifact": str(todo.artifact),
            "python": variant.python,
            "opener": variant.opener,
            "arguments": dict(variant.arguments),
            "samples": str(self._samples(variant)),
            "tokens": todo.settings.tokens,
            "answer_tokens": todo.settings.answer_tokens,
            "labels": list(todo.labels),
            "power_source": todo.power_source,
            "power_rails": list(todo.power_rails),
            "device_memory": todo.device_memory,
        }
        worker = Process(job, self._folder / "jobs" / f"{name}.json", self._folder / f"{name}.log")
        self._workers[variant.name] = worker
        return worker

    def _samples(self, variant: Variant) -> Path:
        return self._folder / f"{slug(variant.name)}.jsonl"

    def _advance(self, variant: Variant, items: int) -> None:
        self._done += items
        self._progress(variant.name, self._done, self._all)


def _request(index: int, question: Question) -> dict[str, Any]:
    return {
        "row": index,
        "file": str(question.image),
        "task": question.task,
        "prompt": question.prompt,
        "gold": question.gold,
        "facts": list(question.facts),
    }


class _Room:
    """The memory of the machine, and of a GPU that has one of its own: how much is free, and what workers took."""

    def __init__(self, device_memory: str) -> None:
        self._own = device_memory == "nvml"
        self._before = self._most = [0, 0]

    def before_start(self) -> None:
        """To be called before a worker starts."""
        self._before = [free for free, _ in self._known()]

    def fits_another(self) -> bool:
        """Whether one more worker fits beside those that wait: where twice what the largest took is free, for it may
        have more to do yet, and an eighth of all, for there are other programs."""
        known = self._known()
        taken = [before - free for before, (free, _) in zip(self._before, known, strict=True)]
        self._most = [max(pair) for pair in zip(self._most, taken, strict=True)]
        return all(free >= max(2 * most, total / 8) for most, (free, total) in zip(self._most, known, strict=True))

    def _known(self) -> list[tuple[int, int]]:
        """Free bytes and all, of either memory; nothing of nothing where it is not told."""
        host = memory.available_bytes(), memory.total_bytes()
        own = memory.device_free_and_total() if self._own else (None, None)
        return [(free, total or 0) if free is not None else (0, 0) for free, total in (host, own)]
