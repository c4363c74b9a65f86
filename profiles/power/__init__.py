"""Where energy is read: one file a power source, found by its file's name; one that cannot answer says why.

Each file offers `COUNTS` (of what the energy is, in words: none counts the whole machine), `probe(where) -> str` (""
where it can answer, else the reason) and `open_meter(where) -> Meter`. A meter is a running total of joules, so that
the energy of anything is the difference of two readings: counters of the hardware where there are some, else watts that
a thread samples and integrates.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from ...errors import VlmcError


@dataclass(frozen=True)
class Where:
    """What to read: the rails whose power is added up (where a source has rails), and the root of /sys (for tests)."""

    rails: tuple[str, ...] = ()
    root: Path = Path("/")


class Meter(Protocol):
    """An opened source."""

    def joules(self) -> float:
        """The energy since the meter was opened; OSError or ValueError where the source stops answering."""

    def close(self) -> None:
        """Ends what the meter started."""


def names() -> list[str]:
    """Every source there is a file for."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def counts(name: str) -> str:
    """Of what the source's energy is; empty where there is no such source, as in an older report."""
    return str(_source(name).COUNTS) if name in names() else ""


def probe(name: str, where: Where = Where()) -> str:
    """ "" where the source can answer, else the reason in words."""
    return cast(str, _source(name).probe(where))


def open_meter(name: str, where: Where = Where()) -> Meter:
    """The source, opened; a VlmcError with the reason where it cannot answer."""
    reason = probe(name, where)
    if reason:
        raise VlmcError(f"The power source {name} is unavailable", found=reason)
    return cast(Meter, _source(name).open_meter(where))


def choose(sources: Sequence[str], where: Where = Where()) -> str:
    """The first of the sources that answers, or "unavailable: " and each one's reason."""
    reasons = []
    for name in sources:
        reason = probe(name, where)
        if not reason:
            return name
        reasons.append(f"{name}: {reason}")
    return "unavailable: " + ("; ".join(reasons) or "the device has no power sensor that vlmc can read")


def idle_watts(meter: Meter, seconds: float = 2.0) -> float:
    """Mean power while nothing of ours runs, watched for that long; ValueError where the meter does not move."""
    start, before = time.perf_counter(), meter.joules()
    time.sleep(seconds)
    if (spent := meter.joules() - before) <= 0:
        raise ValueError("the meter did not move")
    return spent / (time.perf_counter() - start)


def _source(name: str) -> ModuleType:
    if name not in names():
        raise VlmcError(f"There is no power source {name!r}", expected=f"one of {', '.join(names())}")
    return importlib.import_module(f".{name}", __name__)
