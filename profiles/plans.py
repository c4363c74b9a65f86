"""What a measurement has to know of `plans/RECIPE.json`, whose reader (`calibration/plan.py`) is not on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..artifact import Artifact
from ..errors import mended_by
from ..files import read_json
from ..records import from_json


@dataclass(frozen=True)
class Calibrated:
    """`pictures`: the hashes of those that were calibrated on."""

    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """`samples`: of the components that TensorRT calibrated itself."""

    calibrated_on: Calibrated | None = None
    samples: dict[str, Any] = field(default_factory=dict)


def read(artifact: Artifact, recipe: str) -> Plan | None:
    """The recipe's plan; None where there is none."""
    path = artifact.plan_path(recipe)
    if not path.is_file():
        return None
    with mended_by(f"run `vlmc calibrate {artifact.root} --recipe {recipe}`"):
        return from_json(Plan, read_json(path), path.name)
