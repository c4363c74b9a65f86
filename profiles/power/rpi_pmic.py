"""Raspberry Pi 5: volts and amperes of the power chip's rails, from `vcgencmd pmic_read_adc`.

The sum of volts times amperes leaves out what the chip itself and the USB ports take, so it is below what a meter at
the plug shows (no correction is applied: none is published by the maker). The Pi 4's chip has no current sensors.
"""

from __future__ import annotations

import re
import shutil
import subprocess

from ..integrate import Integrator
from . import Where

COUNTS = "the rails of the power chip"

PATIENCE = 5.0  # seconds: it answers in milliseconds
_LINE = re.compile(r"^\s*(\S+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9.]+)[AV]\s*$", re.MULTILINE)


def probe(where: Where) -> str:
    """ "" where the command answers with at least one rail."""
    del where
    if not shutil.which("vcgencmd"):
        return "no command vcgencmd (not a Raspberry Pi)"
    try:
        read_watts()
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def open_meter(where: Where) -> Integrator:
    del where
    return Integrator(read_watts, period=0.1)  # starting the command costs some milliseconds


def read_watts() -> float:
    """The power of all rails now; ValueError where there is none, OSError where the command fails."""
    command = ["vcgencmd", "pmic_read_adc"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise OSError(f"vcgencmd pmic_read_adc does not answer within {PATIENCE} s") from None
    if answer.returncode:
        raise OSError(f"vcgencmd pmic_read_adc failed: {(answer.stderr or answer.stdout).strip()[:200]}")
    return parse_watts(answer.stdout)


def parse_watts(text: str) -> float:
    """The sum over the rails that tell both; the supply's voltage alone (EXT5V_V) and the battery's are no rails."""
    values = {(rail, unit): float(number) for rail, unit, number in _LINE.findall(text)}
    rails = [rail for rail, unit in values if unit == "A" and (rail, "V") in values]
    if not rails:
        raise ValueError("vcgencmd pmic_read_adc tells no currents (only the Raspberry Pi 5 has them)")
    return sum(values[rail, "A"] * values[rail, "V"] for rail in rails)
