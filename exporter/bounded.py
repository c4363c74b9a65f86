"""A chat template is a program, and Jinja's sandbox bounds neither its time nor its memory: it runs in a process of its
own, and the system bounds both."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

from ..errors import reason

SECONDS = 10  # of the processor, and three times that by the clock
MEMORY = 1 << 30  # bytes beyond what this process has
LENGTH = 1 << 20  # bytes of what is rendered; a prompt of a million tokens fits no cache


def bounded(render: Callable[[], object]) -> str:
    """What `render` gives; a ValueError where it fails or takes more than is allowed."""
    receiving, sending = os.pipe()
    if (child := os.fork()) == 0:
        _render(render, sending)
    os.close(sending)
    with open(receiving, "rb") as pipe:
        answer = pipe.read(LENGTH + 2)
    _, status = os.waitpid(child, 0)
    if status or len(answer) > LENGTH + 1:
        raise ValueError("the chat template takes too much time, memory or text")
    text = answer[1:].decode("utf-8", "surrogatepass")
    if answer[:1] == b"!":
        raise ValueError(text)
    return text


def _render(render: Callable[[], object], sending: int) -> None:
    """The child's part, which never returns."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(3 * SECONDS)  # should it wait for a lock that a thread of the parent's holds
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        with contextlib.suppress(OSError, ValueError):  # only Linux tells how much there is
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            size = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        try:
            answer = f"={render()}"
        except Exception as error:  # of the template, of Jinja, of the limit on memory: all are told by the parent
            answer = f"!{reason(error)}"
        with open(sending, "wb") as pipe:
            pipe.write(answer.encode("utf-8", "surrogatepass")[: LENGTH + 2])  # all that is read, so that nobody waits
        code = 0
    finally:
        os._exit(code)
