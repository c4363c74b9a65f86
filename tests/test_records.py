"""Dataclasses come back from JSON as they were, or are refused by the field that does not fit."""

from __future__ import annotations

import json
import math

import pytest
from vlmc.artifact import BuildReport, KvSpec, TensorSpec
from vlmc.errors import VlmcError
from vlmc.records import from_json, to_json


def test_an_integer_is_taken_for_a_float_and_nothing_else_is_bent() -> None:
    good = json.loads(json.dumps(to_json(BuildReport(1.5, 10, 5, {"int8": 3}))))
    assert from_json(BuildReport, good | {"seconds": 2}, "r").seconds == 2.0
    bad = {"seconds": [True, "1", None, [], math.nan, math.inf, 10**400], "size_bytes": [1.0, True, "5"]}
    bad |= {"products": [[], {"int8": 1.5}], "latency_ms": [{"run": "1"}, 1.5], "agreement": ["0.9", {}]}
    for name, values in bad.items():
        for value in values:
            with pytest.raises(VlmcError, match=rf"r\.{name}"):
                from_json(BuildReport, good | {name: value}, "r")
    for shape in ("text", [1.5], [[]]):
        with pytest.raises(VlmcError, match=r"t\.shape"):
            from_json(TensorSpec, {"name": "x", "dtype": "int64", "shape": shape}, "t")


def test_a_missing_field_is_named_and_an_unknown_one_passed_over() -> None:
    assert from_json(KvSpec, {"layers": 1, "kv_heads": 1, "head_dim": 1, "capacity": 1, "later": 0}, "kv").layers == 1
    with pytest.raises(VlmcError, match="kv lacks the field 'capacity'"):
        from_json(KvSpec, {"layers": 1, "kv_heads": 1, "head_dim": 1}, "kv")
    with pytest.raises(VlmcError, match="kv is no JSON object"):
        from_json(KvSpec, [1, 1, 1, 1], "kv")
