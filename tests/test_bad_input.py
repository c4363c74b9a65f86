"""Whatever goes wrong: one clear sentence, its exit code, nothing half-written, and the same command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from vlmc import cli
from vlmc.artifact import GRAPH_FILES, Artifact
from vlmc.calibration import calibrate as calibration
from vlmc.calibration import plan as plans
from vlmc.engines import build as engines
from vlmc.engines import child
from vlmc.exporter import checkpoint, golden, graph, parity

INTERRUPTED = "Interrupted. What was finished is kept; run the same command again to go on."
IN_A_PROCESS = child.run
Vlmc = Callable[..., tuple[int, str, str]]


@pytest.fixture
def vlmc(
    tiny: Artifact,
    step_here: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Vlmc:
    """vlmc(*arguments): the command as it is typed; its exit code, stdout and stderr. What is slow is done in this
    process: tracing gives the graphs of `tiny`, and a build's steps run here."""
    monkeypatch.setattr(graph, "export_component", lambda name, *_: ir.load(tiny.graph(name)))
    monkeypatch.setattr(child, "run", step_here)

    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["vlmc", *map(str, arguments)])
            try:
                cli.main()
                code: Any = 0
            except SystemExit as stop:
                code = stop.code
        output, errors = capsys.readouterr()
        assert "Traceback" not in errors
        return code, output, errors

    return run


def sentence(outcome: tuple[int, str, str]) -> str:
    """What the one line on stderr says, of a command that failed and printed nothing else."""
    code, output, errors = outcome
    assert (code, output) == (1, "")
    (line,) = (line for line in errors.splitlines() if not line.startswith("Calibrating"))
    assert line.startswith("Error: ")
    assert line.endswith(".")
    return line


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: how a full disk looks to a program, without the rights to make one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def export(tiny_checkpoint: Path, picture_set: Path, tmp_path: Path) -> list[Any]:
    """The command that makes `out/tiny`."""
    (tmp_path / "out").mkdir()
    options = ["--capacity", 128, "--cases", 2, "--pictures", picture_set]
    return ["export", tiny_checkpoint, "-o", tmp_path / "out" / "tiny", *options]


# Wrong files


def test_what_is_no_picture(vlmc: Vlmc, built: Artifact, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_text("a cat")
    command = ["run", built.root, tmp_path / "cat.png", "-p", "What is it?", "--max-tokens", 1]
    assert "cat.png is not a picture that vlmc reads. Expected: one of BMP" in sentence(vlmc(*command))
    shutil.copy(built.root / "golden" / "00.png", tmp_path / "cat.png")
    assert vlmc(*command)[0] == 0


def test_a_truncated_graph(vlmc: Vlmc, export: list[Any], tmp_path: Path) -> None:
    assert vlmc(*export)[0] == 0
    path = tmp_path / "out" / "tiny" / GRAPH_FILES["vision_encoder"]
    path.write_bytes(path.read_bytes()[:-10])
    build = ["build", tmp_path / "out" / "tiny", "--recipe", "fp32"]
    assert "vision_encoder.onnx is truncated or altered. Found:" in sentence(vlmc(*build))
    assert not [name for name in names(path.parents[1]) if name.endswith("engine.json")]
    assert "--force" in sentence(vlmc(*export))
    assert vlmc(*export, "--force")[0] == vlmc(*build)[0] == 0


def test_truncated_safetensors(vlmc: Vlmc, export: list[Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    command = ["export", folder, *export[2:]]
    assert "No model can be made of the weights in" in sentence(vlmc(*command))
    assert names(tmp_path / "out") == []
    shutil.copy(tiny_checkpoint / "model.safetensors", weights)
    assert vlmc(*command)[0] == 0


FLORENCE = {  # as microsoft/Florence-2-base's, in short
    "model_type": "florence2",
    "text_config": {"model_type": "florence2_language", "d_model": 768, "decoder_layers": 6, "vocab_size": 51289},
    "vision_config": {"model_type": "davit", "dim_embed": [128, 256], "depths": [1, 1], "patch_size": [7, 3]},
    "projection_dim": 768,
}
NO_FAMILY = "no family is near, so begin with the simplest, exporter/families/llava.py."


@pytest.mark.parametrize(
    ("config", "mended"),
    [
        ({"model_type": "smollvm"}, "did you mean smolvlm? Otherwise add a file to exporter/families/ (docs/"),
        (FLORENCE, f"add a file to exporter/families/ (docs/add-a-model.md); {NO_FAMILY}"),
        ({"model_type": "foo_bar"}, f"add a file to exporter/families/ (docs/add-a-model.md); {NO_FAMILY}"),
    ],
)
def test_an_unknown_model_type(
    config: dict[str, Any], mended: str, vlmc: Vlmc, export: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = sentence(vlmc("export", tmp_path, *export[2:]))
    assert f"{config['model_type']!r}, which no family knows" in said
    assert f". To mend it: {mended}" in said
    assert names(tmp_path / "out") == []


def test_a_prompt_that_is_longer_than_the_cache(vlmc: Vlmc, built: Artifact) -> None:
    command = ["run", built.root, built.root / "golden" / "00.png", "--max-tokens", 1, "-p"]
    said = sentence(vlmc(*command, "How many boats are there? " * 50))
    assert "The prompt is longer than the KV cache. Found: " in said
    assert "Expected: at most 128." in said
    assert vlmc(*command, "How many?")[0] == 0


@pytest.mark.parametrize("command", [["calibrate"], ["build", "--int8"]])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_calibration_set(
    command: list[str], content: str, vlmc: Vlmc, tiny_copy: Path, tmp_path: Path, picture_set: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(content)
    before = names(tiny_copy)
    said = sentence(vlmc(*command, tiny_copy, "--set", empty))
    assert f"The calibration set {empty} is empty" in said
    assert names(tiny_copy) == before
    assert vlmc(*command, tiny_copy, "--set", picture_set)[0] == 0


def test_a_folder_that_is_no_artefact(vlmc: Vlmc, tmp_path: Path) -> None:
    for command in (["calibrate"], ["build"], ["run", "-p", "?"]):
        assert f"{tmp_path} is no artefact" in sentence(vlmc(*command, tmp_path))


def test_wrong_usage_is_exit_code_2(vlmc: Vlmc) -> None:
    for arguments in (["exprot"], ["export"], ["build", "a", "b"], ["run", ".", "-p"], ["--recipe"]):
        code, output, errors = vlmc(*arguments)
        assert (code, output) == (2, "")
        assert "Error: " in errors
    assert vlmc("--help")[0] == vlmc("--version")[0] == vlmc("build", "--help")[0] == 0


# No space on the disk


def test_a_disk_that_fills_during_export(vlmc: Vlmc, export: list[Any], tmp_path: Path) -> None:
    for size in (100, 5_000, 50_000):  # the tokenizer, a graph, its weights
        with full_disk(size):
            said = sentence(vlmc(*export))
        assert f"No space is left on the disk for {tmp_path / 'out'}" in said
        assert names(tmp_path / "out") == []
    assert vlmc(*export)[0] == 0


def test_a_disk_that_fills_during_calibration(vlmc: Vlmc, tiny_copy: Path, picture_set: Path) -> None:
    command = ["calibrate", tiny_copy, "--set", picture_set]
    with full_disk(1_000):
        assert "No space is left on the disk for" in sentence(vlmc(*command))
    assert names(tiny_copy / "plans") == []
    assert vlmc(*command)[0] == 0


def test_a_disk_that_fills_during_a_build(vlmc: Vlmc, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the step in a process of its own, which inherits the limit and whose sentence is passed on."""
    command = ["build", tiny_copy, "--recipe", "fp32"]
    with monkeypatch.context() as patch, full_disk(50_000):
        patch.setattr(child, "run", IN_A_PROCESS)
        said = sentence(vlmc(*command))
    assert said.startswith("Error: No space is left on the disk for")
    assert said.count("To mend it") == 1
    assert [name for name in names(tiny_copy / "engines") if "onnxruntime" in name] == []
    assert vlmc(*command)[0] == 0


# Ctrl-C


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt  # as Python does on Ctrl-C; a real signal reaches whatever runs the tests as well


@pytest.mark.parametrize(
    ("place", "function"),
    [
        (checkpoint, "_read_config"),
        (checkpoint, "load_model"),
        (graph, "save"),
        (golden, "detail"),
        (parity, "climb"),
        (os, "fsync"),
    ],
)
def test_ctrl_c_during_export(
    place: Any, function: str, vlmc: Vlmc, export: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(place, function, interrupt)
        code, output, errors = vlmc(*export)
    assert (code, output, errors.strip()) == (130, "", INTERRUPTED)
    assert not (tmp_path / "out" / "tiny").exists()
    assert vlmc(*export)[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("place", "function"),
    [(calibration, "load_components"), (calibration.Observation, "peaks"), (plans, "write_record"), (os, "fsync")],
)
def test_ctrl_c_during_calibration(
    place: Any, function: str, vlmc: Vlmc, tiny_copy: Path, picture_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, before = ["calibrate", tiny_copy, "--set", picture_set], names(tiny_copy)
    with monkeypatch.context() as patch:
        patch.setattr(place, function, interrupt)
        code, output, errors = vlmc(*command)
    assert (code, output, errors.strip()) == (130, "", INTERRUPTED)
    assert [name for name in names(tiny_copy) if name != "plans"] == before
    assert vlmc(*command)[0] == 0


@pytest.mark.parametrize(
    ("place", "function"), [(engines, "cached"), (child, "run"), (engines, "record_trial"), (engines, "write_record")]
)
def test_ctrl_c_during_a_build(
    place: Any, function: str, vlmc: Vlmc, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a step works: tests/engines/test_child.py."""
    command = ["build", tiny_copy, "--recipe", "fp32"]
    with monkeypatch.context() as patch:
        patch.setattr(place, function, interrupt)
        code, output, errors = vlmc(*command)
    assert (code, output, errors.strip()) == (130, "", INTERRUPTED)
    assert not [name for name in names(tiny_copy) if "partial" in name or name.endswith("fp32.json")]
    assert vlmc(*command)[0] == 0


# kill -9, of a process of its own


def killed(command: list[Any], begun: Callable[[], bool]) -> None:
    """Starts the command and kills it as soon as it has begun."""
    arguments = [sys.executable, "-m", "vlmc", *map(str, command)]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not begun():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def test_kill_during_export(vlmc: Vlmc, export: list[Any], tmp_path: Path) -> None:
    killed(export, lambda: bool(list(tmp_path.glob("out/.tiny.*.partial-*/golden/01.png"))))
    assert not (tmp_path / "out" / "tiny").exists()
    assert vlmc(*export)[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"]


def test_kill_during_calibration(
    vlmc: Vlmc, tiny_copy: Path, picture_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, before = ["calibrate", tiny_copy, "--set", picture_set], names(tiny_copy)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    killed(command, lambda: any((tmp_path / "temporary").iterdir()))
    assert names(tiny_copy) == before
    assert vlmc(*command)[0] == 0
    assert set(names(tiny_copy)) - set(before) == {"plans", "plans/int8.json"}
