"""Where the numbers come from: model, machine, limits, power source and device, as named facts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import words
from .document import ABSENT, Report

Facts = list[tuple[str, str]]


def facts(report: Report) -> dict[str, Facts]:
    """Facts by heading, everything that the report says about how it was made."""
    model = report.artifact
    weights = "random" if model.random_weights else "trained"
    described: dict[str, Any] = {"name": model.name, "family": model.family, "weights": weights}
    described["parameters"] = {words.component(name): count for name, count in model.parameters.items()}
    variants = {v.name: {"kind": v.kind, "recipe": v.recipe, "engines": v.engines} for v in report.variants}
    headings: dict[str, Any] = {
        "Model": described,
        "Machine": report.machine or ABSENT,
        "The machine's limits": report.limits,
        "Settings": report.settings,
        "Not measured": report.not_measured,
        "Power": report.power,
        "Variants": variants,
        "Device profile": report.device or ABSENT,
    }
    return {heading: list(_flatten(value)) for heading, value in headings.items() if value}


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as lines: {"versions": {"numpy": "2.4"}} → ("versions, numpy", "2.4")."""
    if isinstance(value, dict):
        for key, item in value.items():
            title = str(key).replace("_", " ")
            yield from _flatten(item, f"{name}, {title}" if name else title)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for i, item in enumerate(value):
            yield from _flatten(item, f"{name} {i + 1}")
    elif isinstance(value, list):
        yield name, ", ".join(map(_text, value)) or "none"
    else:
        yield name or "all", _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return words.number(value) if isinstance(value, float) else str(value)
