"""`vlmc build`, as it is typed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from vlmc import console
from vlmc.artifact import ASKED_MEANS, Artifact
from vlmc.calibration import command, recipes, sets
from vlmc.calibration.plan import Plan, read_plan
from vlmc.engines import build as engines_build
from vlmc.engines.command import _ensure_plan, build
from vlmc.engines.trial import ANSWER
from vlmc.errors import VlmcError
from vlmc.profiles import device as profiles_device
from vlmc.profiles.device import Device, load_device


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(build, [str(argument) for argument in arguments])


def test_it_prints_what_was_built_and_why_it_was_kept(built_copy: Path, in_process: list[Any]) -> None:
    result = run(built_copy, "--int8")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "Engines for cpu" in said
    assert "13 int8" in said
    assert "vision_encoder: " in said
    assert "ms" in said
    assert "Unchanged since an earlier build: vision_encoder onnxruntime-fp32" in said


def test_a_narrow_terminal_gets_fewer_columns_but_whole_names_and_numbers(
    built_copy: Path, in_process: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = run(built_copy, "--int8").output
    monkeypatch.setattr(console, "output", lambda: Console(width=80))
    narrow = run(built_copy, "--int8").output
    assert "build s  peak MB" in wide
    assert "too narrow for build s and peak MB; --json has them" in narrow
    assert "too narrow" not in wide
    for output in (wide, narrow):
        assert re.search(r"^  onnxruntime-int8 .* \d\.\d{4}  1 float32 +\d", output, re.MULTILINE)
        assert "…" not in output


def test_a_very_narrow_terminal_folds_what_it_cannot_show_at_once(
    built_copy: Path, in_process: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = engines_build.results

    def results(*given: Any) -> list[dict[str, Any]]:
        return [row | {"products": {"float32 attention": 9}} for row in usual(*given)]

    monkeypatch.setattr(engines_build, "results", results)
    monkeypatch.setattr(console, "output", lambda: Console(width=56))
    assert "…" not in run(built_copy, "--int8").output


def test_products_that_were_only_asked_for_are_explained_once(
    built_copy: Path, in_process: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = engines_build.results

    def results(*given: Any) -> list[dict[str, Any]]:
        return [row | {"products": {"int8 (asked)": 9}} for row in usual(*given)]

    monkeypatch.setattr(engines_build, "results", results)
    said = " ".join(run(built_copy, "--int8").output.split())
    assert "9 int8 (asked)" in said
    assert said.count(f"(asked): {ASKED_MEANS}.") == 1


def test_json_is_clean_even_where_it_has_to_calibrate_first(
    tiny_copy: Path, picture_set: Path, in_process: list[Any]
) -> None:
    result = run(tiny_copy, "--recipe", "int8-minmax", "--set", picture_set, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["cached"] == []
    assert [row["kept"] for row in said["engines"]].count(True) == 3
    assert Artifact(tiny_copy).build("cpu", "int8-minmax")
    assert "Calibrating int8-minmax first" in result.stderr
    assert json.loads((tiny_copy / "plans" / "int8-minmax.json").read_text())["calibrated_on"]["rows"] == 3


def test_a_device_with_a_calibration_set_of_its_own_is_calibrated_on_it_once(
    planned: Artifact, tmp_path: Path, picture_set: Path, in_process: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(planned.root, tmp_path / "tiny")
    one = picture_set.with_name("ours.jsonl")
    one.write_text(picture_set.read_text().splitlines()[0])
    own = replace(load_device("cpu"), calibration_set=str(one.absolute()))
    monkeypatch.setattr(profiles_device, "load_device", lambda name: own)
    assert "Calibrating int8 first" in run(folder, "--int8", "--json").stderr
    assert json.loads((folder / "plans" / "int8.json").read_text())["calibrated_on"]["name"] == "ours"
    assert "Calibrating" not in run(folder, "--int8", "--json").stderr


def test_another_devices_own_set_and_another_recipe_are_no_plan_for_this_one(
    planned: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = shutil.copytree(planned.root, tmp_path / "tiny"), list[Any]()
    artifact, int8, usual = Artifact(folder), recipes.load("int8"), read_plan(planned, "int8")

    def make(artifact: Artifact, recipe: Any, given: Path | None) -> Plan:
        made.append(given)
        return usual

    def calibrated_on(device: Device, recipe: recipes.Recipe = int8) -> list[Any]:
        made.clear()
        _ensure_plan(artifact, recipe, None, device)
        return made

    monkeypatch.setattr(command, "make_plan", make)
    cpu, pi = load_device("cpu"), load_device("rpi5")
    theirs = replace(pi, calibration_set=str(tmp_path / "theirs.jsonl"))
    assert calibrated_on(cpu) == []
    assert calibrated_on(cpu, replace(int8, rules=recipes.load("w8").rules)) == [None]
    assert calibrated_on(theirs) == [tmp_path / "theirs.jsonl"]
    assert calibrated_on(theirs) == []
    assert calibrated_on(replace(cpu, calibration_set=theirs.calibration_set)) == []
    assert calibrated_on(cpu) == [None]
    assert calibrated_on(pi) == []
    calibrated_on(theirs)
    (tmp_path / "theirs.jsonl").touch()
    monkeypatch.setattr(sets, "load_set", lambda path: SimpleNamespace(sha256="another"))
    assert calibrated_on(theirs) == [tmp_path / "theirs.jsonl"]


def test_whole_answers_are_told_where_they_were_tried(
    planned: Artifact, tmp_path: Path, recorded: Callable[..., None]
) -> None:
    folder = shutil.copytree(planned.root, tmp_path / "tiny")
    recorded(mix=66.04, single=62.0)
    printed = run(folder, "--int8").output
    assert max(map(len, printed.splitlines())) <= 100
    said = " ".join(printed.split())
    assert "vision_encoder: onnxruntime-int8, ONNX Runtime for all parts answers in 62.0 ms, the mix in 66.0" in said
    assert f"Whole answers of {ANSWER} tokens: OpenVINO + ONNX Runtime 66.0 ms, ONNX Runtime 62.0 ms." in said
    answers = json.loads(run(folder, "--int8", "--json").stdout)["answers"]
    assert [answer["milliseconds"] for answer in answers] == [66.04, 62.0]
    assert answers[1]["engines"]["vision_encoder"] == "onnxruntime-int8"
    assert "Whole answers" not in run(folder, "--int8", "--device", "orin").output  # not this machine


def test_a_recipe_for_weights_needs_no_set(tiny_copy: Path, in_process: list[Any]) -> None:
    assert run(tiny_copy, "--recipe", "w4").exit_code == 0
    assert (tiny_copy / "plans" / "w4.json").is_file()


def test_a_precision_that_the_device_does_not_take_is_refused_before_anything_is_calibrated(tiny_copy: Path) -> None:
    result = run(tiny_copy, "--device", "orin", "--recipe", "w8")
    assert isinstance(result.exception, VlmcError)
    assert "'w8' gives no engine on Jetson AGX Orin 64 GB" in str(result.exception)
    assert not (tiny_copy / "plans" / "w8.json").exists()


def test_a_device_elsewhere_gets_one_sentence_on_what_remains(
    planned: Artifact, tmp_path: Path, in_process: Any
) -> None:
    folder = shutil.copytree(planned.root, tmp_path / "tiny")
    result = run(folder, "--device", "orin", "--int8")
    assert "Copy the artefact to the Jetson" in " ".join(result.output.split())
    assert json.loads(run(folder, "--device", "orin", "--int8", "--json").stdout)["device"] == "orin"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "orrin"], "There is no device 'orrin'. Found: nearest: orin"),
        (["--int8", "--backend", "tensorrt"], "'cpu' has no backend tensorrt. Expected: some of onnxruntime, openvino"),
        (["--recipe", "int9"], "There is no recipe 'int9'.*did you mean int8"),
        (["--recipe", "../manifest"], "There is no recipe"),
        (["--int8", "--set", "gone.jsonl"], r"no calibration set gone\.jsonl"),
    ],
)
def test_wrong_input_is_a_sentence_and_builds_nothing(arguments: list[str], says: str, tiny_copy: Path) -> None:
    result = run(tiny_copy, *arguments)
    assert isinstance(result.exception, VlmcError)
    with pytest.raises(VlmcError, match=says):
        raise result.exception
    assert sorted(path.name for path in tiny_copy.iterdir()) == ["golden", "manifest.json", "onnx", "tokenizer.json"]


def test_contradicting_options_are_wrong_usage(tiny_copy: Path) -> None:
    assert run(tiny_copy, "--int8", "--recipe", "w4").exit_code == 2
    assert "observes nothing" in run(tiny_copy, "--recipe", "w4", "--set", "pictures.jsonl").output
    assert run(tiny_copy, "--int8", "--recipe", "int8", "--device", "no").exit_code == 1
