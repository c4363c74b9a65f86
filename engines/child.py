"""A step of the build in a process of its own, so that its memory is its own and nothing of it outlives the build."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from ..errors import VlmcError

REFUSED = 3  # the exit code with which the step's VlmcError is on stdout
PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


def run(module: str, what: str, *arguments: str) -> str:
    """Runs the module of this room with these arguments and returns its stdout; `what` says in an error what failed.

    The step ends with this process, however that ends: an exception here, Ctrl-C included, kills it, and so does the
    kernel once this process is gone.
    """
    command = [sys.executable, "-m", f"{__package__}.{module}", str(os.getpid()), *arguments]
    # In a session of its own it gets no Ctrl-C: that is for the parent.
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode == 0:
        return done.stdout
    if done.returncode == REFUSED:
        raise VlmcError(done.stdout.strip())
    found = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        found = f"the process was killed by {name}" + (
            "; it may have run out of memory" if -done.returncode == signal.SIGKILL else ""
        )
    raise VlmcError(f"{what} failed", found=found, fix="see the message; the artefact is unchanged")


def main(step: Callable[..., None]) -> None:
    """The step's end: calls it with the arguments that `run` was given, and ends the process."""
    parent, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    code = 0
    if os.getppid() == int(parent):  # else it died before the kernel was asked
        try:
            step(*arguments)
        except VlmcError as error:
            print(error)
            code = REFUSED
    sys.stdout.flush()
    os._exit(code)  # backends' threads need not be waited for
