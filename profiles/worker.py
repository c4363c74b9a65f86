"""One variant in a process of its own: it opens the session, then does what it is asked on stdin, line by line.

    python -m vlmc.profiles.worker JOB.json

A request is one JSON object a line; the answer is one line for every finished item ({"item": kind}) and one at the end
({"done": true} or {"error": sentence}). What is measured goes to the samples file. Where stdin ends, the worker does.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

from PIL import Image

from ..artifact import Artifact
from ..errors import VlmcError
from ..evaluation import goldens
from ..files import read_json
from ..runtime.images import open_image
from . import machine, memory, power, samples
from .process import replies

ENERGY_SECONDS = 2.0  # of either measurement of energy: 20 times what the slowest meter needs to move on
LEAD_SECONDS = 0.2  # of the same work before: a meter that is late at the end has to be as late at the beginning


def main(job_file: Path) -> None:
    answers = replies()
    try:
        job = read_json(job_file)
        worker = open_worker(job)
        _reply(answers, {"done": True})
        for line in sys.stdin:
            request = json.loads(line)
            for kind in worker.do(request.pop("do"), **request):
                _reply(answers, {"item": kind})
            _reply(answers, {"done": True})
    except VlmcError as error:
        _reply(answers, {"error": str(error)})
        sys.exit(1)


def open_worker(job: dict[str, Any]) -> Worker:
    """For a model that answers, or one that matches."""
    matches = Artifact(Path(job["artifact"])).manifest.matching is not None
    return (MatchWorker if matches else Worker)(job)


class Worker:
    """A loaded variant. `do` takes the requests, which are the methods that yield once a finished item."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.log = Path(job["samples"])
        self.tokens, self.answer_tokens = int(job["tokens"]), int(job["answer_tokens"])
        self.labels: list[str] = job["labels"]
        self.device_memory = str(job["device_memory"])
        self.free_at_start = memory.available_bytes()
        self.free_at_end: int | None = None  # of the request before
        start = perf_counter()
        artifact = Artifact(Path(job["artifact"]))
        module, _, function = job["opener"].partition(":")
        opener = getattr(importlib.import_module(module), function)
        self.session: Any = opener(artifact, **job["arguments"])  # a Session; for a MatchWorker a Matcher
        self._write(kind="open", load_s=perf_counter() - start)
        self.cases = goldens.cases(artifact)
        self.images = [_opened(artifact.path_of(case["image"])) for case in self.cases]
        self.source, self.rails = str(job["power_source"]), tuple(job["power_rails"])
        self.run(0)  # caches, lazy allocations and kernel choices happen once, unrecorded

    def do(self, what: str, **request: Any) -> Iterator[str]:
        """The request of that name. What others took of the machine's memory, or gave back, while this worker waited
        is not counted to it."""
        free = memory.available_bytes()
        if self.free_at_start is not None and self.free_at_end is not None and free is not None:
            self.free_at_start += free - self.free_at_end
        yield from getattr(self, what)(**request)
        self.free_at_end = memory.available_bytes()

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

    def energy(self) -> Iterator[str]:
        """Joules of golden runs, one after the other for ENERGY_SECONDS: to the first token alone, and to the last. One
        run can be shorter than the time between two readings of a meter."""
        return self._spend(*(functools.partial(self._written, tokens=tokens) for tokens in (1, self.tokens)))

    def run(self, index: int) -> dict[str, Any]:
        """One picture and question to `tokens` tokens, the end of text ignored so that every variant does the same
        work: seconds of each part, and wall clock."""
        case = index % len(self.cases)
        length = 0

        def work() -> None:
            nonlocal length
            length = self._answer(index, self.tokens)

        cost = self._cost(work)
        timings = self.session.timings
        if not timings.decode:
            raise VlmcError(
                f"Golden case {case} leaves no room for further tokens in the KV cache",
                found=f"a prompt of {length} tokens",
                fix="export with a larger --capacity",
            )
        return {
            "case": case,
            "preprocess_s": timings.preprocess,
            "vision_s": timings.vision,
            "prefill_s": timings.prefill,
            "decode_s": timings.decode,
            "tokens": timings.tokens,
            "prompt_tokens": length,
            **cost,
        }

    def _answer(self, index: int, tokens: int) -> int:
        """Golden case `index`, the cases coming round again, to that many tokens; returns the length of its prompt."""
        case = index % len(self.cases)
        inputs = self.session.prepare([self.images[case]], self.cases[case]["prompt"])
        for _ in self.session.generate(inputs, tokens, ignore_eos=True):
            pass
        return len(inputs.input_ids)

    def _written(self, index: int, tokens: int) -> int:
        """The same; returns how many tokens were made, fewer where the KV cache is full before."""
        self._answer(index, tokens)
        made: int = self.session.timings.tokens
        return made

    def _cost(self, work: Callable[[], object]) -> dict[str, Any]:
        """Seconds of the wall clock and of waiting for a processor."""
        waited, start = machine.waited_seconds(), perf_counter()
        work()
        wall, waited_after = perf_counter() - start, machine.waited_seconds()
        return {
            "wall_s": wall,
            "waited_s": None if waited is None or waited_after is None else waited_after - waited,
        }

    def _spend(self, *kinds: Callable[[int], int]) -> Iterator[str]:
        """Writes what runs of each kind take of the meter, all or nothing; a run returns how many tokens it made. The
        meter is open only here: one that samples would take time from what is timed, and from other workers."""
        rows = []
        try:
            meter = power.open_meter(self.source, power.Where(self.rails))
        except (OSError, ValueError, VlmcError) as error:
            self._write(kind="power", reason=f"the sensor does not answer any more: {error}")
            return
        try:
            for run in kinds:
                _repeat(run, LEAD_SECONDS)
                before = meter.joules()
                runs, tokens, seconds = _repeat(run, ENERGY_SECONDS)
                joules = meter.joules() - before
                rows.append(
                    {"kind": "energy", "tokens": tokens / runs, "runs": runs, "seconds": seconds, "joules": joules}
                )
        except (OSError, ValueError) as error:
            self._write(kind="power", reason=f"the sensor stopped answering: {error}")
            return
        finally:
            meter.close()
        samples.append(self.log, *rows)
        yield "energy"

    def _memory(self) -> dict[str, Any]:
        free = memory.available_bytes()
        drop = self.free_at_start - free if free is not None and self.free_at_start is not None else None
        device: int | str | None = memory.device_bytes() if self.device_memory == "nvml" else None
        if self.device_memory == "unified":
            device = drop
        return {"peak_rss_bytes": memory.peak_rss_bytes(), "available_drop_bytes": drop, "device_bytes": device}

    def _write(self, **row: Any) -> None:
        samples.append(self.log, row)


class MatchWorker(Worker):
    """The same of a model that matches."""

    def agree(self, cases: list[int]) -> Iterator[str]:
        """Which of the golden prompts is nearest to each picture, and which is by PyTorch."""
        artifact: Artifact = self.session.artifact
        golden = goldens.arrays(artifact)["cosines"].argmax(axis=1)
        prompts = [case["prompt"] for case in self.cases]
        for index in cases:
            nearest = self.session.match([self.images[index]], prompts).cosines.argmax()
            self._write(kind="agreement", case=index, tokens=[int(nearest)], golden=[int(golden[index])])
            yield "agreement"

    def evaluate(self, rows: list[dict[str, Any]]) -> Iterator[str]:
        """Every picture's cosines with all labels; `answer` is the nearest."""
        texts = self.session.text_features(self.labels)
        for row in rows:
            cosines = (self.session.image_features([open_image(Path(row["file"]))]) @ texts.T)[0]
            answer = self.labels[int(cosines.argmax())]
            self._write(kind="answer", **row, answer=answer, cosines=cosines.tolist(), **self._memory())
            yield "answer"

    def energy(self) -> Iterator[str]:
        return self._spend(self._match)

    def run(self, index: int) -> dict[str, Any]:
        """One golden picture matched with its prompt: seconds of each part, and wall clock."""
        case = index % len(self.cases)
        cost = self._cost(lambda: self._match(index))
        timings = self.session.timings
        parts = {f"{part}_s": getattr(timings, part) for part in ("preprocess", "vision", "text")}
        return {"case": case, **parts, **cost}

    def _match(self, index: int) -> int:
        case = index % len(self.cases)
        self.session.match([self.images[case]], [self.cases[case]["prompt"]])
        return 0


def _repeat(run: Callable[[int], int], seconds: float) -> tuple[int, int, float]:
    """Runs, one after the other, until that time has passed: how many, their tokens together, and their seconds."""
    start, runs, tokens = perf_counter(), 0, 0
    while (passed := perf_counter() - start) < seconds:
        tokens += run(runs)
        runs += 1
    return runs, tokens, passed


def _opened(path: Path) -> Image.Image:
    image = open_image(path)
    image.load()  # decoding the file is not what is measured
    return image


def _reply(answers: TextIO, answer: dict[str, Any]) -> None:
    try:
        print(json.dumps(answer), file=answers, flush=True)
    except BrokenPipeError:
        sys.exit(1)  # nobody listens any more


if __name__ == "__main__":
    main(Path(sys.argv[1]))
