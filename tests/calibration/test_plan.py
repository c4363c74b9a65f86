"""The plan is one file that says everything, and is refused where it belongs to other weights."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vlmc.artifact import Artifact
from vlmc.calibration import recipes
from vlmc.calibration.plan import ModulePlan, Plan, SetRecord, read_plan, write_plan
from vlmc.errors import VlmcError
from vlmc.records import SCHEMA

PLAN = Plan(
    schema=SCHEMA,
    recipe=recipes.load("int8"),
    source_sha256="1" * 64,
    calibrated_on=SetRecord("set", "2" * 64, 3, ("3" * 64,)),
    modules={
        "decoder/a": ModulePlan(
            8, 0, 0.1, {"prefill": 12.0, "decode": 3.0}, {"prefill": 12.7}, (1.5, 2.0), "decoder/n", 0.2
        ),
        "decoder/b": ModulePlan(4, 32),
    },
    absorbers={"decoder/n": (1.5, 2.0)},
    notes=("a note",),
)


@pytest.fixture
def here(artifact: Artifact, tmp_path: Path) -> Artifact:
    (tmp_path / "manifest.json").write_bytes((artifact.root / "manifest.json").read_bytes())
    return Artifact(tmp_path)


def test_what_is_read_is_what_was_written(here: Artifact) -> None:
    assert write_plan(here, PLAN) == here.root / "plans" / "int8.json"
    assert read_plan(here, "int8") == PLAN
    assert [path.name for path in (here.root / "plans").iterdir()] == ["int8.json"]


def test_the_recipe_is_spelled_out_in_the_file(here: Artifact) -> None:
    written = json.loads(write_plan(here, PLAN).read_text())
    assert written["schema"] == 1
    assert written["recipe"]["rules"]["decoder/*"] == {
        "weight_bits": 8,
        "block": 0,
        "activation_bits": 8,
        "smooth": 0.65,
        "output_bits": 0,
    }


def test_a_plan_from_before_outputs_were_rounded_still_reads_and_rounds_none(here: Artifact) -> None:
    path = write_plan(here, PLAN)
    old = json.loads(path.read_text())
    for rule in old["recipe"]["rules"].values():
        del rule["output_bits"]
    for module in old["modules"].values():
        del module["output_scale"]
    path.write_text(json.dumps(old))
    assert {module.output_scale for module in read_plan(here, "int8").modules.values()} == {None}


def test_a_missing_plan_says_how_to_make_it(here: Artifact) -> None:
    with pytest.raises(VlmcError, match=r"no plan for the recipe 'w4'.*run `vlmc calibrate .* --recipe w4`"):
        read_plan(here, "w4")


def test_a_plan_for_other_weights_is_refused(here: Artifact) -> None:
    write_plan(here, replace(PLAN, source_sha256="f" * 64))
    with pytest.raises(
        VlmcError, match=r"made for other weights. Found: sha256 ffffffffffff…. Expected: 111111111111…"
    ):
        read_plan(here, "int8")


def test_a_newer_schema_is_refused(here: Artifact) -> None:
    write_plan(here, replace(PLAN, schema=2))
    with pytest.raises(VlmcError, match="schema"):
        read_plan(here, "int8")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(st.data())
def test_a_damaged_plan_is_a_sentence(here: Artifact, data: st.DataObject) -> None:
    text = write_plan(here, PLAN).read_bytes()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    here.plan_path("int8").write_bytes(text[:start] + data.draw(st.binary(max_size=8)) + text[end:])
    with contextlib.suppress(VlmcError):
        assert read_plan(here, "int8").modules is not None


IMPOSSIBLE = {
    "a scale of 0": {"activation_scale": 0.0},
    "one below": {"output_scale": -0.1},
    "one that float32 does not hold": {"activation_scale": 1e300},
    "a factor of 0": {"smoothing": (0.0, 2.0)},
    "bits": {"weight_bits": 5},
    "a block below 0": {"block": -1},
    "a huge block": {"block": 10**9},
    "smoothing that nothing absorbs": {"absorbed_by": "decoder/o"},
}


@pytest.mark.parametrize("changes", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_numbers_that_no_calibration_finds_are_refused(changes: dict[str, Any], here: Artifact) -> None:
    modules = PLAN.modules | {"decoder/a": replace(PLAN.modules["decoder/a"], **changes)}
    write_plan(here, replace(PLAN, modules=modules))
    with pytest.raises(VlmcError, match=r"holds what no calibration finds.*run `vlmc calibrate .* --recipe int8`"):
        read_plan(here, "int8")


def test_divisors_that_no_layer_multiplies_with_are_refused(here: Artifact) -> None:
    write_plan(here, replace(PLAN, absorbers=PLAN.absorbers | {"decoder/o": (1.5, 2.0)}))
    with pytest.raises(VlmcError, match="smoothed without the module that absorbs it, or the other way round"):
        read_plan(here, "int8")


def test_divisors_of_0_and_another_recipes_plan_are_refused(here: Artifact) -> None:
    write_plan(here, replace(PLAN, absorbers={"decoder/n": (1.5, 0.0)}))
    with pytest.raises(VlmcError, match="a divisor of decoder/n"):
        read_plan(here, "int8")
    here.plan_path("w4").write_bytes(write_plan(here, PLAN).read_bytes())
    with pytest.raises(VlmcError, match=r"another recipe's. Found: int8.*--recipe w4"):
        read_plan(here, "w4")
