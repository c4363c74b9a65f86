"""A step of the build in a process of its own, so that its memory is its own and nothing of it outlives the build."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable
from threading import Thread

from ..errors import VlmcError
from ..profiles.process import command, replies

MEMORY = (  # docs/experiments.md has the measurements
    "end other programs or add swap, and run the command again, which keeps what is built; TensorRT 8.6 took up to 4 "
    "times a decoder's float32 weights in FP16 and 8 in int8, and gets it in pieces where less is free at the start; "
    "ONNX Runtime and TensorRT-RTX took less than twice"
)
REFUSED = 3  # the exit code with which the step's VlmcError is its answer
SAYS = "vlmc says: "  # begins a line of a step's stderr that is for `listen`


def run(module: str, what: str, *arguments: str, listen: Callable[[str], object] = lambda text: None) -> str:
    """Runs the module of this room with these arguments and returns its answer; `what` says in an error what failed.
    `listen` gets what the step says meanwhile, in a thread of its own.

    The step ends with this process, however that ends: an exception here, Ctrl-C included, kills it, and so does the
    kernel once this process is gone.
    """
    step = command(sys.executable, f"{__package__}.{module}", str(os.getpid()), *arguments)
    pipe = subprocess.PIPE
    # In a session of its own it gets no Ctrl-C, which is for the parent; what a library prints may be no UTF-8.
    with subprocess.Popen(
        step, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        lines = deque[str](maxlen=1)  # the last one that says something
        hearing = Thread(target=_hear, args=(process.stderr, lines, listen))
        try:
            hearing.start()
            output = process.stdout.read()
            hearing.join()
            process.wait()
        except BaseException:
            process.kill()
            process.wait()  # so that it is known to be gone when its leftovers are cleared away
            raise
    if process.returncode == 0:
        return output
    if process.returncode == REFUSED:
        raise VlmcError(output.strip())
    found, fix = lines[-1] if lines else "no message", "see the message; the artefact is unchanged"
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        found = f"the process was killed by {name}"
        if name == "SIGKILL":
            found, fix = f"{found}; it may have run out of memory", MEMORY
    raise VlmcError(f"{what} failed", found=found, fix=fix)


def _hear(stderr: Iterable[str], lines: deque[str], listen: Callable[[str], object]) -> None:
    for line in stderr:
        if line.startswith(SAYS):
            listen(line.removeprefix(SAYS).strip())
        elif line.strip():
            lines.append(line.strip())


def say(text: str) -> None:
    """One line from within a step to who waits for it."""
    print(f"{SAYS}{text}", file=sys.stderr, flush=True)


def main(step: Callable[..., str]) -> None:
    """The step's end: calls it with the arguments that `run` was given, answers with what it returns, and ends the
    process."""
    parent, *arguments = sys.argv[1:]
    code = 0
    with replies() as answer:
        if os.getppid() == int(parent):  # else it died before the kernel was asked
            try:
                answer.write(step(*arguments))
            except VlmcError as error:
                answer.write(str(error))
                code = REFUSED
    os._exit(code)  # backends' threads need not be waited for
