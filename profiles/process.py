"""Processes of our own: how one is started and answers, and the parent's end of a worker, which starts it, asks it, and
says in words how it died."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ..files import write_json


class Died(Exception):
    """A worker ended before it had done what it was asked; the text says how and repeats its last words."""


# `-m` would put the working folder before all others, and who stands in an artefact would run a numpy.py in it. Where
# there is Linux, the kernel kills the process once the one that started it is gone (prctl(2); 1 is PR_SET_PDEATHSIG).
_START = """import sys
sys.path[:] = [folder for folder in sys.path if folder]
import runpy
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)"""


def command(python: str, module: str, *arguments: str) -> list[str]:
    """How to start the module in a process of its own, which takes no modules from the working folder, and on Linux
    outlives neither this process nor the thread that starts it."""
    return [python, "-c", _START, module, *arguments]


def replies() -> TextIO:
    """The stdout that this process was started with, for its answer alone: what libraries print goes to stderr from
    here on."""
    kept = os.fdopen(os.dup(1), "w", errors="backslashreplace")  # whatever the terminal's encoding
    os.dup2(2, 1)
    return kept


class Process:
    """One worker. Everything that it prints besides its replies is kept in `log`."""

    def __init__(self, job: dict[str, Any], job_file: Path, log: Path) -> None:
        write_json(job_file, job)
        self._log = log
        environment = dict(os.environ)
        if threads := job["arguments"].get("threads"):
            environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("ab") as errors:
            python = job["python"] or sys.executable
            try:
                self._process = subprocess.Popen(
                    command(python, "vlmc.profiles.worker", str(job_file)),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the parent, which then ends its workers
                )
            except OSError as error:
                raise Died(f"{python} does not start: {error.strerror or error}") from None
        try:
            self._wait(lambda _: None)
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, item: Callable[[str], None], **request: Any) -> None:
        """Has the worker do something and calls `item` with the kind of every finished item; Died where it dies."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._died() from None
        self._wait(item)

    def close(self) -> None:
        """Ends the worker, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _wait(self, item: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            if "item" in answer:
                item(answer["item"])
            elif "error" in answer:
                raise Died(answer["error"])
            else:
                return
        raise self._died()

    def _died(self) -> Died:
        code = self._process.wait()
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (most often because memory ran out)"
        words = self._log.read_text(errors="replace").strip().splitlines()
        return Died(f"its process {how}" + (f"; its last words: {' | '.join(words[-3:])[:500]}" if words else ""))
