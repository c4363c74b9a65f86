from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from vlmc import console
from vlmc.artifact import Artifact, BuildSpec
from vlmc.errors import VlmcError
from vlmc.profiles import doctor as doctor_room
from vlmc.profiles import experiment, harness, limits
from vlmc.profiles.command import devices, doctor, profile
from vlmc.profiles.device import device_names, load_device
from vlmc.profiles.variants import Variant, Variants
from vlmc.records import write_record
from vlmc.reports import document
from vlmc.runtime import backends, cuda

from .conftest import add_build

RATES: dict[str, Any] = {
    "read_gb_per_s": 10.0,
    "float32_gflop_per_s": 100.0,
    "int8_gop_per_s": "unavailable: no unit",
    "how": "not at all",
}


@pytest.fixture
def measurable(artifact: Artifact, build: BuildSpec, sessions: str, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """The artefact on a machine of its build's kind, its engines being fake sessions; limits need no measuring."""
    engines = {name: choice.engine for name, choice in build.choices.items()}
    plain = dict.fromkeys(engines, "onnxruntime-fp32")
    found = [
        Variant("Float", "engine", sessions, {"step": 0.004}, plain, "fp32"),
        Variant("Int8", "engine", sessions, {"step": 0.002}, engines, "int8"),
    ]
    monkeypatch.setattr(experiment, "variants", lambda *_: Variants(found, {"PyTorch eager": "no torch"}))
    monkeypatch.setattr(limits, "measure", lambda threads: RATES)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return artifact


def test_profile_measures_reports_and_judges(measurable: Artifact, question_set: Path) -> None:
    options = ["--runs", "2", "--tokens", "4", "--samples", "1", "--set", str(question_set)]
    done = CliRunner().invoke(profile, [str(measurable.root), *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 100 + len(str(measurable.root))
    assert "Int8" in done.stdout
    assert "PyTorch eager was not measured: no torch." in done.stdout.replace("\n", " ")
    folder = measurable.root / "profile" / "cpu"
    report = document.read(folder)
    assert [variant.name for variant in report.variants] == ["Float", "Int8"]
    assert report.kept is not None
    assert report.kept.name == "Int8"
    assert report.variants[1].agreement == document.Agreement(2, 1, (None, 1))
    assert [answer.right for answer in report.variants[1].answers] == [True]
    assert (folder / "samples" / "int8.jsonl").is_file()
    assert (folder / "report.csv").is_file()
    assert not (folder / "unfinished").exists()


def run_json(artifact: Artifact, build: BuildSpec, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is known of a measurement in which no variant was run."""
    monkeypatch.setattr(harness, "measure", lambda *_: {})
    monkeypatch.setattr(experiment, "_idle", lambda _: 1.0)
    settings = harness.Settings(1, 0, 2, 2, 0)
    folder = experiment.profile(artifact, build, load_device("cpu"), settings, "unavailable: -", lambda *_: None)
    record: dict[str, Any] = json.loads((folder / "samples" / "run.json").read_text())
    return record


def test_limits_are_measured_before_and_after_and_the_higher_counts(
    measurable: Artifact, build: BuildSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = iter([RATES, RATES | {"read_gb_per_s": 12.0, "float32_gflop_per_s": 90.0}])
    monkeypatch.setattr(limits, "measure", lambda threads: next(tries))
    assert run_json(measurable, build, monkeypatch)["limits"] == RATES | {"read_gb_per_s": 12.0}


def test_engines_are_stored_together_and_built_one_after_the_other(
    measurable: Artifact, build: BuildSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variant in run_json(measurable, build, monkeypatch)["variants"]:
        assert (variant["disk_bytes"], variant["build_peak_bytes"]) == (3 * 1_000_000, 5_000_000)


def test_ctrl_c_leaves_a_measurement_that_the_same_command_finishes(
    measurable: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(measurable.root), "--runs", "2", "--tokens", "4", "--samples", "0", "--json"]

    def interrupted(*_: object) -> dict[str, str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(harness, "measure", interrupted)
        stopped = CliRunner().invoke(profile, command, standalone_mode=False)
    assert stopped.exit_code != 0
    folder = measurable.root / "profile" / "cpu"
    begun = json.loads((folder / "unfinished" / "run.json").read_text())["machine"]["date"]
    done = CliRunner().invoke(profile, command, catch_exceptions=False)
    report = json.loads(done.stdout)
    assert report["machine"]["date"] == begun
    assert report["variants"][0]["accuracy"] == "unavailable: not asked for (--samples 0)"


def test_what_is_not_this_machine_is_refused_with_what_to_do(artifact: Artifact, build: BuildSpec) -> None:
    add_build(artifact, {}, device="orin")
    with pytest.raises(VlmcError, match=r"orin.*is not this machine.*this machine is x86_64.*Copy the artefact"):
        experiment.choose_build(artifact, "orin", "")


def test_the_newest_build_for_this_machine_is_measured(
    artifact: Artifact, build: BuildSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_build(artifact, {}, device="orin")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert experiment.choose_build(artifact, "", "")[0].device == "cpu"
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert experiment.choose_build(artifact, "", "")[0].device == "orin"
    with pytest.raises(VlmcError, match="holds no build for recipe w4"):
        experiment.choose_build(artifact, "", "w4")


def test_a_build_that_was_only_handed_over_comes_after_one_that_is_ready_as_in_run(
    artifact: Artifact, build: BuildSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = {"vision_encoder": ("handover-int8", [])}
    handed_over = replace(add_build(artifact, choices, device="h100"), remaining="Build it there.")
    write_record(artifact.root / "engines" / "h100" / "int8.json", handed_over)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert experiment.choose_build(artifact, "", "")[0] == artifact.build(preferred=backends.can_run) == build
    assert experiment.choose_build(artifact, "h100", "")[0] == handed_over


def test_an_interpreter_that_is_none_is_refused_before_anything_is_measured(
    measurable: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "python").write_text("not executable")
    for python in (tmp_path / "nowhere", tmp_path / "python", tmp_path):
        command = [str(measurable.root), "--samples", "0", "--torch-python", str(python)]
        with pytest.raises(VlmcError, match=rf"--torch-python.*Found: {python}\. "):
            CliRunner().invoke(profile, command, catch_exceptions=False, standalone_mode=False)
    assert not (measurable.root / "profile").exists()


def test_where_no_engine_can_run_every_reason_is_told(
    measurable: Artifact, build: BuildSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "variants", lambda *_: Variants([], {"X float": "X is not installed"}))
    settings = harness.Settings(1, 0, 2, 2, 0)
    with pytest.raises(VlmcError, match="X float: X is not installed"):
        experiment.profile(measurable, build, load_device("cpu"), settings, "unavailable: -", lambda *_: None)


def test_more_threads_than_any_machine_has_are_refused(artifact: Artifact) -> None:
    assert CliRunner().invoke(profile, [str(artifact.root), "--threads", "100000"]).exit_code == 2


def test_no_artefact_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match="is no artefact"):
        CliRunner().invoke(profile, [str(tmp_path)], catch_exceptions=False, standalone_mode=False)


@pytest.mark.parametrize("command", [profile, devices, doctor])
def test_every_command_helps_with_an_example(command: Any) -> None:
    assert "Example: vlmc " in CliRunner().invoke(command, ["--help"]).stdout


def test_devices_lists_all_within_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    text = CliRunner().invoke(devices).stdout
    assert all(name in text for name in device_names())
    table = text.partition("\n\n")[0].splitlines()
    assert len(table) == 1 + len(device_names())  # no name is folded
    assert max(map(len, text.splitlines())) <= 100
    as_json = json.loads(CliRunner().invoke(devices, ["--json"]).stdout)
    assert [device["name"] for device in as_json] == device_names()
    assert next(device for device in as_json if device["name"] == "gb10")["peak_int8_tops"] is None


def test_a_narrow_terminal_shows_every_device_by_its_whole_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "output", lambda: Console(width=60))
    text = CliRunner().invoke(devices).stdout
    assert "…" not in text
    assert {line.partition(" ")[0] for line in text.splitlines()} >= set(device_names())
    assert "too narrow for first backend, GB/s, INT8, budget; --json has them" in " ".join(text.split())


def test_doctor_gives_every_thing_an_answer() -> None:
    found = json.loads(CliRunner().invoke(doctor, ["--json"]).stdout)
    assert set(found) == {"machine", "backends", "power", "packages", "devices"}
    assert "onnxruntime" in found["backends"]
    assert all(text[0].isdigit() or text.startswith("unavailable: ") for text in found["packages"].values())


def test_doctor_prints_reasons_with_brackets_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "not installed (`pip install vlm-compile[cpu]`)"
    monkeypatch.setattr(doctor_room, "examine", lambda: {"backends": {"onnxruntime": reason, "openvino": ""}})
    text = CliRunner().invoke(doctor).stdout
    assert reason in text
    assert "ready" in text


def test_what_can_be_built_here_depends_on_the_device_and_on_what_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor_room.importlib.util, "find_spec", lambda name: None)
    assert "onnxruntime is not installed" in doctor_room.built_here(load_device("rpi5"))
    monkeypatch.setattr(doctor_room.importlib.util, "find_spec", lambda name: object())
    assert doctor_room.built_here(load_device("rpi5")) == ""
    assert doctor_room.built_here(load_device("gb10")) == ""
    assert "cross-compile" in doctor_room.built_here(load_device("orin"))


def test_on_the_device_itself_its_engines_can_be_built_where_the_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"tensorrt": ""}
    monkeypatch.setattr(cuda, "architecture", lambda: 87)
    monkeypatch.setattr(backends, "unavailable", lambda name: reasons[name])
    assert doctor_room.built_here(load_device("orin")) == ""
    assert "TensorRT-RTX knows no Hopper" in doctor_room.built_here(load_device("h100"))
    reasons["tensorrt"] = "tensorrt is not installed"
    assert doctor_room.built_here(load_device("orin")) == "tensorrt is not installed"
