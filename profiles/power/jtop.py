"""jetson-stats, where it is installed: the module's total power, as its own program prints it.

jetson-stats is AGPL-3.0, so it is kept at arm's length: it runs in a process of its own and a pipe carries numbers. It
is the second choice after hwmon, which needs no service and refreshes faster.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading

from ..integrate import Integrator
from . import Where

COUNTS = "the module"

_PROGRAM = (
    "from jtop import jtop\n"
    "with jtop(interval=0.1) as board:\n"
    "    while board.ok():\n"
    "        print(board.power['tot']['power'], flush=True)\n"  # milliwatts
)


def probe(where: Where) -> str:
    """ "" where the service answers."""
    if importlib.util.find_spec("jtop") is None:
        return "jetson-stats is not installed (`pip install jetson-stats`)"
    try:
        open_meter(where).close()
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def open_meter(where: Where) -> Meter:
    del where
    return Meter([sys.executable, "-c", _PROGRAM])


class Meter:
    """Integrates the last number that the program printed."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._milliwatts = self._next()
        self._reader = threading.Thread(target=self._read, name="vlmc-jtop", daemon=True)
        self._reader.start()
        self._integrator = Integrator(self._watts, period=0.05)

    def joules(self) -> float:
        return self._integrator.joules()

    def close(self) -> None:
        self._integrator.close()
        self._process.kill()
        self._reader.join()
        self._process.wait()

    def _watts(self) -> float:
        if self._process.poll() is not None:
            raise OSError("jtop ended")
        return self._milliwatts / 1e3

    def _next(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise OSError(f"jtop does not answer: {(errors.strip().splitlines() or ['no message'])[-1]}")
        return float(line)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._milliwatts = float(line)
