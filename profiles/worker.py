"""One variant in a process of its own: it opens the session, then does what it is asked on stdin, line by line.

    python -m vlmc.profiles.worker JOB.json

A request is one JSON object a line; the answer is one line for every finished item ({"item": kind}) and one at the end
({"done": true} or {"error": sentence}). What is measured goes to the samples file. Where stdin ends, the worker does.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

from PIL import Image

from ..artifact import Artifact
from ..errors import VlmcError
from ..files import read_json
from ..runtime.images import open_image
from ..runtime.session import Session
from . import machine, memory, power, samples


def main(job_file: Path) -> None:
    replies = _take_stdout()
    try:
        job = read_json(job_file)
        worker = Worker(job)
        _reply(replies, {"done": True})
        for line in sys.stdin:
            request = json.loads(line)
            for kind in getattr(worker, request.pop("do"))(**request):
                _reply(replies, {"item": kind})
            _reply(replies, {"done": True})
    except VlmcError as error:
        _reply(replies, {"error": str(error)})
        sys.exit(1)


class Worker:
    """A loaded variant. Its public methods are the requests; each yields once a finished item."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.log = Path(job["samples"])
        self.tokens, self.answer_tokens = int(job["tokens"]), int(job["answer_tokens"])
        self.device_memory = str(job["device_memory"])
        self.free_at_start = memory.available_bytes()
        start = perf_counter()
        artifact = Artifact(Path(job["artifact"]))
        module, _, function = job["opener"].partition(":")
        opener = getattr(importlib.import_module(module), function)
        self.session: Session = opener(artifact, **job["arguments"])
        self._write(kind="open", load_s=perf_counter() - start)
        self.cases = read_json(artifact.path_of("golden/golden.json"))["cases"]
        self.images = [_opened(artifact.path_of(case["image"])) for case in self.cases]
        self.meter = _meter(job["power_source"], tuple(job["power_rails"]))
        self.run(0)  # caches, lazy allocations and kernel choices happen once, unrecorded

    def time(self, indices: list[int], turn: int, seconds: float) -> Iterator[str]:
        """Runs with those numbers, the first unrecorded run aside (the caches were another variant's). With `seconds`
        the turn ends once that time has passed, though not before one run."""
        self.run(indices[0])
        end = perf_counter() + (seconds or float("inf"))
        for done, index in enumerate(indices):
            if done and perf_counter() > end:
                break
            self._write(kind="run", index=index, turn=turn, **self.run(index), **self._memory())
            yield "run"
        self._write(kind="turn", turn=turn)

    def agree(self, cases: list[int]) -> Iterator[str]:
        """Greedy tokens of golden cases, with the golden ones."""
        longest = max(len(case["tokens"]) for case in self.cases)
        for index in cases:
            inputs = self.session.prepare([self.images[index]], self.cases[index]["prompt"])
            tokens = list(self.session.generate(inputs, longest))
            self._write(kind="agreement", case=index, tokens=tokens, golden=self.cases[index]["tokens"])
            yield "agreement"

    def evaluate(self, rows: list[dict[str, Any]]) -> Iterator[str]:
        """Answers to questions of the evaluation set; scoring is done where the report is made."""
        for row in rows:
            answer = "".join(self.session.answer([open_image(Path(row["file"]))], row["prompt"], self.answer_tokens))
            self._write(kind="answer", **row, answer=answer, tokens=self.session.timings.tokens, **self._memory())
            yield "answer"

    def run(self, index: int) -> dict[str, Any]:
        """One picture and question to `tokens` tokens, the end of text ignored so that every variant does the same
        work: seconds of each part, wall clock, and joules up to the first token and after it (None: no meter)."""
        case = index % len(self.cases)
        paused = 0.0
        readings: list[float] = []

        def read_meter() -> None:
            nonlocal paused
            before = perf_counter()
            readings.extend(self._joules())
            paused += perf_counter() - before

        read_meter()
        waited = machine.waited_seconds()
        paused, start = 0.0, perf_counter()
        inputs = self.session.prepare([self.images[case]], self.cases[case]["prompt"])
        for produced, _ in enumerate(self.session.generate(inputs, self.tokens, ignore_eos=True), 1):
            if produced == 1:
                read_meter()
        wall = perf_counter() - start - paused
        read_meter()
        waited_after = machine.waited_seconds()
        timings = self.session.timings
        if not timings.decode:
            raise VlmcError(
                f"Golden case {case} leaves no room for further tokens in the KV cache",
                found=f"a prompt of {len(inputs.input_ids)} tokens",
                fix="export with a larger --capacity",
            )
        return {
            "case": case,
            "preprocess_s": timings.preprocess,
            "vision_s": timings.vision,
            "prefill_s": timings.prefill,
            "decode_s": timings.decode,
            "wall_s": wall,
            "waited_s": None if waited is None or waited_after is None else waited_after - waited,
            "tokens": timings.tokens,
            "prompt_tokens": len(inputs.input_ids),
            "joules": [readings[1] - readings[0], readings[2] - readings[1]] if len(readings) == 3 else None,
        }

    def _joules(self) -> list[float]:
        if self.meter is None:
            return []
        try:
            return [self.meter.joules()]
        except (OSError, ValueError) as error:
            self.meter = None
            self._write(kind="power", reason=f"the sensor stopped answering: {error}")
            return []

    def _memory(self) -> dict[str, Any]:
        free = memory.available_bytes()
        drop = self.free_at_start - free if free is not None and self.free_at_start is not None else None
        device: int | str | None = memory.device_bytes() if self.device_memory == "nvml" else None
        if self.device_memory == "unified":
            device = drop
        return {"peak_rss_bytes": memory.peak_rss_bytes(), "available_drop_bytes": drop, "device_bytes": device}

    def _write(self, **row: Any) -> None:
        samples.append(self.log, row)


def _meter(source: str, rails: tuple[str, ...]) -> power.Meter | None:
    return None if source.startswith("unavailable") else power.open_meter(source, power.Where(rails))


def _opened(path: Path) -> Image.Image:
    image = open_image(path)
    image.load()  # decoding the file is not what is measured
    return image


def _take_stdout() -> TextIO:
    """The stdout that we were started with, for replies alone: what libraries print goes to stderr from here on."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _reply(replies: TextIO, answer: dict[str, Any]) -> None:
    try:
        print(json.dumps(answer), file=replies, flush=True)
    except BrokenPipeError:
        sys.exit(1)  # nobody listens any more


if __name__ == "__main__":
    main(Path(sys.argv[1]))
