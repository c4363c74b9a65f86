"""Jetson rails: INA3221 (three rails each) and INA238 (one rail each) monitors under /sys/class/hwmon.

Source: Linux, Documentation/hwmon/ina3221.rst (in*_input in mV, curr*_input in mA) and ina238.rst (power1_input in
microwatts). Which rails add up to the module's power is the device's to say (`power_rails` in its TOML file).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..integrate import Integrator
from . import Where

COUNTS = "the module"


def probe(where: Where) -> str:
    """ "" where every wanted rail is there and can be read."""
    rails = _rails(where)
    if not rails:
        return f"{where.root / 'sys/class/hwmon'} has no INA3221 or INA238 (not a Jetson, or JetPack older than 5)"
    if not where.rails:
        return f"the device names no rails to add up; there are {', '.join(rails)}"
    missing = [rail for rail in where.rails if rail not in rails]
    if missing:
        return f"no rail {', '.join(missing)}; there are {', '.join(rails)}"
    try:
        _watts(where)()
    except (OSError, ValueError) as error:
        return f"a rail cannot be read: {error}"
    return ""


def open_meter(where: Where) -> Integrator:
    return Integrator(_watts(where))


def _watts(where: Where) -> Callable[[], float]:
    rails = _rails(where)
    chosen = [rails[rail] for rail in where.rails]
    return lambda: sum(read() for read in chosen)


def _rails(where: Where) -> dict[str, Callable[[], float]]:
    """The reader of each rail in watts, by the rail's label."""
    rails: dict[str, Callable[[], float]] = {}
    for chip in sorted((where.root / "sys/class/hwmon").glob("hwmon*")):
        kind = _text(chip / "name").lower()
        if kind.startswith("ina3221"):
            for label in sorted(chip.glob("in[1-3]_label")):
                number = label.name[2]
                if (chip / f"curr{number}_input").exists():
                    rails[_text(label)] = _product(chip / f"in{number}_input", chip / f"curr{number}_input")
        elif kind == "ina238":
            rails[_text(chip / "label") or chip.name] = _scaled(chip / "power1_input")
    return rails


def _product(volts: Path, amps: Path) -> Callable[[], float]:
    return lambda: int(volts.read_text()) * int(amps.read_text()) / 1e6


def _scaled(power: Path) -> Callable[[], float]:
    return lambda: int(power.read_text()) / 1e6


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
