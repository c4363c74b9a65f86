"""A template that would take all time or memory is ended."""

from __future__ import annotations

import resource
import time

import pytest
from vlmc.exporter import bounded as module
from vlmc.exporter.bounded import LENGTH, SECONDS, bounded


def test_what_is_rendered_comes_back_and_what_fails_says_why() -> None:
    assert bounded(lambda: "a \u00e9 \ud800") == "a \u00e9 \ud800"
    assert bounded(lambda: "x" * LENGTH) == "x" * LENGTH
    with pytest.raises(ValueError, match=r"^no such turn$"):
        bounded(lambda: (_ for _ in ()).throw(RuntimeError("no such turn")))


def test_the_system_bounds_the_processors_time_too() -> None:
    assert bounded(lambda: resource.getrlimit(resource.RLIMIT_CPU)) == str((SECONDS, SECONDS))


def test_too_much_time_memory_or_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 1)

    def forever() -> str:
        while True:
            pass

    start = time.perf_counter()
    for render in (forever, lambda: "x" * (LENGTH + 1), lambda: "x" * (3 * LENGTH)):
        with pytest.raises(ValueError, match="too much time, memory or text"):
            bounded(render)
    with pytest.raises(ValueError, match="MemoryError"):
        bounded(lambda: "x" * (4 << 30))
    assert time.perf_counter() - start < 60
