"""What a family's small checkpoint can be made into, found by doing it; the README's table is held against this.

Every engine is built by the real builders; on the CPU it is also run on the golden inputs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from vlmc.artifact import Artifact
from vlmc.calibration import recipes
from vlmc.calibration.command import make_plan
from vlmc.calibration.plan import write_plan
from vlmc.engines import build, builders, candidate, trial
from vlmc.errors import VlmcError
from vlmc.profiles.device import load_device

README = Path(__file__).parents[3] / "README.md"
COLUMNS = (
    ("cpu", "onnxruntime", "int8"),
    ("cpu", "onnxruntime", "w4"),
    ("gb10", "tensorrt_rtx", "int8"),
    ("gb10", "tensorrt_rtx", "w4"),
)
NEAR = 0.9  # cosine with the golden outputs of random weights in INT8; w4 of such small layers is farther away


def row(artifact: Artifact, pictures: Path) -> list[str]:
    """For each of COLUMNS `yes`, or `no: ` and the reason that vlmc gives."""
    for recipe in ("int8", "w4"):
        write_plan(artifact, make_plan(artifact, recipes.load(recipe), pictures))
    return [_outcome(artifact, *column) for column in COLUMNS]


def _outcome(artifact: Artifact, device: str, backend: str, recipe: str) -> str:
    target, builder = load_device(device), builders.load(backend)
    made: dict[str, list[str]] = {}
    quantised = [component for component in artifact.components if build.quantises(artifact, component, recipe)]
    assert quantised, f"{recipe} names nothing"
    for component in artifact.components:
        for precision in (builder.FLOAT, recipe) if component in quantised else (builder.FLOAT,):
            if why := build.refuses(builder, component, precision, target):
                return f"no: {component}: {why}"
            one = candidate.Candidate(device, component, backend, precision)
            try:
                products = candidate.build(artifact, one).report.products
            except VlmcError as error:
                return f"no: {component}: {error.found or error.what}"
            assert precision != recipe or products.get(recipe), f"{component} {one.engine} has none of {recipe}"
            made.setdefault(component, []).append(one.engine)
    if device == "cpu":
        for component in artifact.components:
            if component != "embed_tokens":
                _run(
                    artifact,
                    component,
                    made[component],
                    made.get("embed_tokens", [""])[0],
                    NEAR if recipe == "int8" else 0.5,
                )
    return "yes"


def _run(artifact: Artifact, component: str, engines: list[str], embed: str, near: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "ROUNDS", 1)
        patch.setattr(trial, "SECONDS", 0.0)
        outcome = trial.try_component(artifact, "cpu", component, engines, embed)
    for engine, found in outcome.items():
        assert found["agreement"] > (0.9999 if engine.endswith("-fp32") else near), f"{component} {engine}: {found}"


def promised(family: str) -> list[str]:
    """The README's row of the family, without the first three columns; empty where it has none."""
    found = re.search(rf"^\| `{family}` \|.*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    return [cell.strip() for cell in found.group().strip("|").split("|")][3:] if found else []
