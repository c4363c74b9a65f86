"""What a run of many programs on a host with several GPUs needs: queues, memory to share, a clock and a log of steps.

Standard library only, for the Python of a host where nothing is installed.
"""

from __future__ import annotations

import heapq
import itertools
import os
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

GIB = 1 << 30
DEVICE = os.environ.get("GPU_DEVICE", "h100")  # the GPU host's, by its name in profiles/devices
Call = Callable[[int], None]  # with the number of the GPU that it has


class Queue:
    """Calls in the order of their priority, the smallest first."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, int, Call]] = []
        self._changed, self._number, self._writers = threading.Condition(), itertools.count(), 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While this is open, more may come."""
        with self._changed:
            self._writers += 1
        try:
            yield
        finally:
            with self._changed:
                self._writers -= 1
                self._changed.notify_all()

    def put(self, priority: int, call: Call) -> None:
        with self._changed:
            heapq.heappush(self._calls, (priority, next(self._number), call))
            self._changed.notify()

    def serve(self, gpu: int) -> None:
        """Calls them until none is left and none can come."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or not self._writers)
                if not self._calls:
                    return
                _, _, call = heapq.heappop(self._calls)
            try:
                call(gpu)
            except Exception:  # one step's mistake must not end the rest
                traceback.print_exc()


class Room:
    """Memory that steps share, in the order in which they ask, for else small ones would keep large ones waiting."""

    def __init__(self, size: float) -> None:
        self._free, self._size, self._changed = size, size, threading.Condition()
        self._waiting: list[object] = []

    @contextmanager
    def taken(self, size: float) -> Iterator[None]:
        size, ticket = min(size, self._size), object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(lambda: self._waiting[0] is ticket and self._free >= size)
            self._waiting.pop(0)
            self._free -= size
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


class Run:
    """The clock, the folder of logs, the engines to build and what to time. `memory` is in GiB."""

    def __init__(self, logs: Path, seconds: float, memory: float) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        self.begin, self.end = time.monotonic(), time.monotonic() + seconds
        self.room, self.filling, self.loading = Room(memory * GIB), threading.Semaphore(12), threading.Semaphore(2)
        self.builds, self.timings = Queue(), Queue()
        self.later: list[Callable[[], None]] = []  # asks for what can wait until every model is there

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self.builds.writing(), self.timings.writing():
            yield

    def start(self, name: str, gpu: int | None, python: str, *arguments: str, early: float = 0) -> Step:
        environment = os.environ | {"OMP_NUM_THREADS": "8", "COLUMNS": "100"}
        environment["CUDA_VISIBLE_DEVICES"] = "" if gpu is None else str(gpu)
        with (self.logs / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [python, *arguments], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        return Step(self, name, process, self.end - early)

    def step(self, name: str, gpu: int | None, python: str, *arguments: str, early: float = 0) -> bool:
        """Runs it to its end or to `early` seconds before the end of the time; whether it went well. Its output is
        logs/NAME.log."""
        if self.end - early - time.monotonic() < 5:
            return False
        return self.start(name, gpu, python, *arguments, early=early).wait(gpu)

    def note(self, line: str) -> None:
        """Writes it into the log of steps, behind the seconds since the beginning."""
        with (self.logs / "steps.txt").open("a") as steps:
            print(f"{time.monotonic() - self.begin:6.0f} s  {line}", file=steps)


class Step:
    """A program that runs."""

    def __init__(self, run: Run, name: str, process: subprocess.Popen[bytes], end: float) -> None:
        self.run, self.name, self.process, self.begin, self.end = run, name, process, time.monotonic(), end

    def wait(self, gpu: int | None) -> bool:
        try:
            code: int | str = self.process.wait(max(self.end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            code = "out of time"
        self.run.note(f"{self.name:60s} {time.monotonic() - self.begin:6.1f} s  GPU {gpu}  {code or 'ok'}")
        return code == 0
