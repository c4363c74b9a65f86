"""`vlmc calibrate`, as it is typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from vlmc.artifact import Artifact
from vlmc.calibration import calibrate as stage
from vlmc.calibration import recipes
from vlmc.calibration.command import calibrate
from vlmc.calibration.plan import read_plan
from vlmc.errors import VlmcError


@pytest.fixture
def folder(artifact: Artifact, tmp_path: Path, components: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stage, "load_components", lambda artifact: components)
    shutil.copytree(artifact.root, tmp_path / "tiny", ignore=shutil.ignore_patterns("plans"))
    return tmp_path / "tiny"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(calibrate, [str(argument) for argument in arguments])


def test_it_writes_the_plan_and_says_what_it_holds(folder: Path, set_file: Path) -> None:
    result = run(folder, "--set", set_file)
    assert result.exit_code == 0, result.output
    plan = read_plan(Artifact(folder), "int8")
    assert plan.calibrated_on is not None
    assert plan.calibrated_on.name == "three"
    assert "3 questions about 2 pictures of the set 'three'" in result.output
    assert "13 × w8a8" in result.output
    assert "vlmc build" in result.output


def test_json_and_the_options(folder: Path, set_file: Path) -> None:
    result = run(folder, "--recipe", "int8-minmax", "--set", set_file, "--observer", "mse", "--limit", 1, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["observer"] == "mse"
    assert said["set"]["rows"] == 1
    assert said["components"]["decoder"] == {"smoothed": 0, "w8a8": 15}
    assert Path(said["plan"]).is_file()


def test_the_demos_own_pictures_are_taken_where_no_set_is_given(folder: Path) -> None:
    result = run(folder, "--limit", 2, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["set"]["name"] == "demo"


def test_a_recipe_for_weights_alone_reads_no_set(folder: Path) -> None:
    assert "observes nothing" in run(folder, "--recipe", "w4", "--observer", "mse").output
    result = run(folder, "--recipe", "w4")
    assert result.exit_code == 0, result.output
    assert "no calibration set was needed" in result.output
    assert "14 × w4" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--recipe", "int9"], "no recipe 'int9'"),
        (["--set", "gone.jsonl"], "no calibration set gone.jsonl"),
    ],
)
def test_wrong_input_is_a_sentence_and_writes_nothing(folder: Path, arguments: list[str], says: str) -> None:
    result = run(folder, *arguments)
    assert isinstance(result.exception, VlmcError)
    assert says in str(result.exception)
    assert not (folder / "plans").exists()


def test_an_interruption_leaves_the_old_plan(folder: Path, set_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, "--set", set_file)
    before = (folder / "plans" / "int8.json").read_bytes()

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmc.calibration.observation.Observation.peaks", interrupted)
    assert run(folder, "--set", set_file).exit_code != 0
    assert [path.name for path in (folder / "plans").iterdir()] == ["int8.json"]
    assert (folder / "plans" / "int8.json").read_bytes() == before


def test_what_tensorrt_calibrates_itself_is_kept_and_said(folder: Path, set_file: Path) -> None:
    result = run(folder, "--recipe", "int8-implicit", "--set", set_file)
    assert result.exit_code == 0, result.output
    assert "Kept 3 inputs of vision_encoder for TensorRT, which calibrates by entropy itself" in result.output
    assert "Observed on" not in result.output
    assert len(list((folder / "plans").glob("int8-implicit.vision_encoder.*.npz"))) == 1
    result = run(folder, "--recipe", "int8-implicit-minmax", "--set", set_file, "--json")
    assert json.loads(result.stdout)["samples"] == ["vision_encoder"]


def test_a_recipe_that_names_nothing_of_the_model_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = recipes.Recipe("w4", "4-bit weights of a text encoder", {"text_encoder/*": recipes.Precision(4, 32)})
    monkeypatch.setattr(recipes, "load", lambda name: elsewhere)
    result = run(folder, "--recipe", "w4")
    assert isinstance(result.exception, VlmcError)
    assert "names nothing that is in" in str(result.exception) and "the components vision_encoder" in str(
        result.exception
    )
    assert not (folder / "plans").exists()
