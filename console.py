"""The terminal: one width, progress on stderr, results on stdout, so that `--json` output stays clean."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

WIDTH = 100  # tables fit it; a wider terminal does not change them, so that logs and screens agree
Report = Callable[[str, int, int], None]  # what is being done, how much of it, and of how much: 0 where nobody can tell


def completing(names: Callable[[], Iterable[str]]) -> Callable[..., list[str]]:
    """What an option wants as its `shell_complete`: those of the names that begin as typed."""
    return lambda context, parameter, begun: [name for name in names() if name.startswith(begun)]


def output() -> Console:
    """Where results go: stdout, at most WIDTH columns."""
    console = Console(highlight=False, soft_wrap=False)
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    return console


def progress() -> Progress:
    """A progress bar on stderr, used as a context manager; silent where stderr is no terminal."""
    console = Console(file=sys.stderr)  # the stream itself: libraries that talk too much are redirected meanwhile
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def reporting(first: str) -> Iterator[Report]:
    """A progress bar with one task, which the Report given says more of; `first` is what it is until then."""
    with progress() as bar:
        task = bar.add_task(first, total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)


def note(text: str) -> None:
    """One line for the person who waits, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))
