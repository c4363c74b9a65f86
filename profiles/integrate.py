"""Energy from a sensor that only tells watts: a thread samples it, trapezoids add up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress


class Integrator:
    """A meter over `watts()`, sampled every `period` seconds and once more at every reading.

    The reading at both ends makes short intervals exact to the sensor's own refresh. A sample that is an OSError or
    ValueError of `watts` is left out; `joules` raises it, where it lasts.
    """

    def __init__(
        self,
        watts: Callable[[], float],
        period: float = 0.02,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._watts, self._period, self._clock = watts, period, clock
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._total = 0.0
        self._last = (clock(), watts())
        self._thread = threading.Thread(target=self._run, name="vlmc-power", daemon=True)
        self._thread.start()

    def joules(self) -> float:
        """The integral of power since the start."""
        with self._lock:
            watts = self._watts()
            now = self._clock()
            self._total += (now - self._last[0]) * (watts + self._last[1]) / 2
            self._last = (now, watts)
            return self._total

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            with suppress(OSError, ValueError):  # once is a bus that was busy; where it lasts, who reads is told
                self.joules()
