"""RAPL: the energy counters of x86 packages (and their DRAM), through Linux's powercap.

Source: Linux, Documentation/power/powercap/powercap.rst. `energy_uj` counts microjoules and starts again at zero after
`max_energy_range_uj`; since 2020 (CVE-2020-8694) only root may read it unless the administrator allows it.
"""

from __future__ import annotations

from pathlib import Path

from . import Where

COUNTS = "the processor and, where that has a counter, its memory"


def probe(where: Where) -> str:
    """ "" where every counter can be read."""
    folder = where.root / "sys/class/powercap"
    if not folder.is_dir():
        return f"{folder} does not exist (no RAPL in this kernel or virtual machine)"
    zones = _zones(where)
    if not zones:
        return f"{folder} has no intel-rapl package"
    try:
        for zone in zones:
            _number(zone / "energy_uj")
            _number(zone / "max_energy_range_uj")
    except PermissionError as error:
        return f"{error.filename} may be read by root only (`sudo chmod a+r` on it allows it)"
    except (OSError, ValueError) as error:
        return f"a counter cannot be read: {error}"
    return ""


def open_meter(where: Where) -> Counter:
    return Counter(_zones(where))


class Counter:
    """The sum of the zones' counters, carried over their wrap-around.

    It has to be read at least once a wrap, which is tens of minutes at the power of a server.
    """

    def __init__(self, zones: list[Path]) -> None:
        self._ranges = {zone: _number(zone / "max_energy_range_uj") for zone in zones}
        self._last = {zone: _number(zone / "energy_uj") for zone in zones}
        self._total = 0

    def joules(self) -> float:
        for zone, before in self._last.items():
            now = _number(zone / "energy_uj")
            self._total += now - before if now >= before else now - before + self._ranges[zone]
            self._last[zone] = now
        return self._total / 1e6

    def close(self) -> None:
        """Nothing was started."""


def _zones(where: Where) -> list[Path]:
    """Packages and their DRAM; cores and graphics are parts of the package, psys would count it twice."""
    found = []
    for zone in sorted((where.root / "sys/class/powercap").glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
        except OSError:
            continue
        if name.startswith("package") or name == "dram":
            found.append(zone)
    return found


def _number(path: Path) -> int:
    return int(path.read_text())
