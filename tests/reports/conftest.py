"""A report as `vlmc profile` writes it. Its numbers are made up for these tests; none was measured."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

SAMPLE = json.loads((Path(__file__).parent / "sample.json").read_text(encoding="utf-8"))


@pytest.fixture
def sample() -> dict[str, Any]:
    return copy.deepcopy(SAMPLE)


@pytest.fixture
def bare() -> dict[str, Any]:
    """The least that is a report: everything that can be missing is."""
    return {"schema": 1, "artifact": {"name": "bare"}, "variants": [{"name": "only", "kind": "engine"}]}


@pytest.fixture
def reasons(sample: dict[str, Any]) -> list[str]:
    """Every "unavailable: …" in the sample."""

    def walk(value: Any) -> list[str]:
        if isinstance(value, (dict, list)):
            items = value.values() if isinstance(value, dict) else value
            return [reason for item in items for reason in walk(item)]
        return [value] if isinstance(value, str) and value.startswith("unavailable") else []

    found = walk(sample)
    assert len(set(found)) == 9
    return found
