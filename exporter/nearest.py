"""Which family is nearest to a checkpoint that none knows: for somebody who is about to add one.

Models whose parts are connected alike name the fields of config.json alike, whoever they are by, while names of models
say little: Aya Vision is built as LLaVA is. Families are known by their presets.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

PRESETS = Path(__file__).parent / "presets"
DEEPEST = 3  # parts within parts that are looked at
ALIKE = 0.4  # below it config.json has little of what any family's has


def nearest(config: Mapping[str, Any]) -> str:
    """The name of the family (its file's) whose presets have the most fields in common with this config.json, a field
    counting more the fewer families have it; empty where that is little."""
    found, known = set(_fields(config)), _known()
    families = Counter(field for fields in known.values() for field in fields)
    weight = {field: math.log((1 + len(known)) / count) for field, count in families.items()}

    def shared(family: str) -> float:
        own = known[family]
        return math.fsum(weight[field] for field in own & found) / math.fsum(weight[field] for field in own)

    best = max(sorted(known), key=shared)
    return best if shared(best) >= ALIKE else ""


@cache
def _known() -> dict[str, set[str]]:
    """The fields of each family's presets."""
    known: dict[str, set[str]] = {}
    for path in sorted(PRESETS.glob("*.json")):
        fields = _fields(json.loads(path.read_text(encoding="utf-8"))["config"])
        known.setdefault(path.stem.partition("-")[0], set()).update(fields)
    return known


def _fields(config: Mapping[str, Any]) -> Iterator[str]:
    """Names of fields; what kind a part is of is one too, the checkpoint's own is not, for no family knows it."""
    parts = [("", config)]
    for where, part in parts:  # grows
        for name, value in part.items():
            if isinstance(value, Mapping) and where.count(".") < DEEPEST:
                parts.append((f"{where}{name}.", value))
            if name != "model_type":
                yield where + name
            elif where:
                yield f"{where}{name}={value}"
