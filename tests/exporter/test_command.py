"""`vlmc export` and `vlmc models`, as they are typed."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from rich.progress import Progress
from vlmc import console
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import export as stage
from vlmc.exporter.checkpoint import Checkpoint
from vlmc.exporter.command import export, follow, models
from vlmc.exporter.export import Options


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(export, [str(argument) for argument in arguments])


def test_it_prints_the_ladder_and_what_comes_next(
    tiny_checkpoint: Path, picture_set: Path, tmp_path: Path, traced_before: None
) -> None:
    command = (tiny_checkpoint, "-o", tmp_path / "out", "--capacity", 128, "--cases", 2, "--pictures", picture_set)
    result = run(*command)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "Parity of tiny with PyTorch float32" in said
    assert "2 of 2 cases equal" in said
    assert "0.2 M parameters" in said
    peak = Artifact(tmp_path / "out").manifest.peak_memory_bytes
    assert peak and f"Peak memory of the export: {peak / 1e6:,.0f} MB; its float32 weights are 1 MB." in said
    assert f"Next: vlmc build {tmp_path / 'out'}" in said
    assert "failed" not in said
    levels = json.loads(run(*command, "--json").stdout)
    assert [level["passed"] for level in levels] == [True] * 9


def test_a_peak_that_is_not_known_is_said_to_be_so(
    tiny_copy: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Artifact(tiny_copy)
    made.manifest = replace(made.manifest, peak_memory_bytes=None)
    monkeypatch.setattr(stage, "export", lambda *_: made)
    assert "Peak memory of the export: unavailable: " in run(tiny_checkpoint, "-o", "out").output


def test_the_bar_names_the_stage_and_moves_within() -> None:
    bar = Progress(console=Console(file=io.StringIO(), force_terminal=True), auto_refresh=False)
    show = follow(bar)
    shown = []
    for step in [("weights", 0, 0), ("weights", 0, 5), ("weights", 5, 5), ("tracing", 0, 0), ("writing", 1, 4)]:
        show(*step)
        (task,) = bar.tasks
        shown.append((task.description, task.completed, task.total))
    assert shown == [
        ("weights", 0, None),
        ("weights", 0, 5),
        ("weights", 5, 5),
        ("tracing", 0, None),
        ("writing", 1, 4),
    ]


def test_random_weights_are_said_to_be_random_and_get_fewer_goldens(
    tiny: Artifact, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def exported(model: Checkpoint, target: Path, options: Options, report: Any) -> Artifact:
        asked.append((model.source.kind, model.source.seed, options.cases))
        made = Artifact(tiny.root)
        made.manifest = replace(made.manifest, source=model.source)
        return made

    monkeypatch.setattr(stage, "export", exported)
    result = run(tiny_checkpoint, "--random-weights", "--seed", 5, "-o", "out")
    assert "Random weights: its answers mean nothing" in result.output
    assert "Random weights" not in run(tiny_checkpoint, "-o", "out").output
    assert asked == [("random", 5, 2), ("folder", 0, 16)]


def test_what_a_family_leaves_out_is_said(
    tiny: Artifact, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "export", lambda *_: tiny)
    assert "Left out" not in run(tiny_checkpoint, "-o", "out").output
    said = run("gemma3n-e2b", "--random-weights", "-o", "out").output
    assert "Left out: Gemma 3n's audio tower." in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["--capacity", 0],
        ["--capacity", 2**20 + 1],
        ["--cases", 0],
        ["--cases", 1001],
        ["--pictures", "gone.jsonl"],
        ["--pictures", "."],
        ["--random-weights", "--seed", "x"],
        ["--random-weights", "--seed", 2**63],
        ["--random-weights", "--seed", -1],
        ["--seed", 0],  # of nothing
    ],
)
def test_wrong_usage_is_clicks(arguments: list[Any], tmp_path: Path) -> None:
    assert run("demo", "-o", tmp_path / "out", *arguments).exit_code == 2
    assert run("demo").exit_code == 2


def test_a_wrong_model_is_a_sentence(tmp_path: Path) -> None:
    result = run("dmeo", "-o", tmp_path / "out")
    assert isinstance(result.exception, VlmcError)
    assert list(tmp_path.iterdir()) == []


def test_a_narrow_terminal_shows_every_preset_by_its_whole_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "output", lambda: Console(width=60))
    assert "…" not in CliRunner().invoke(models).output


def test_models_lists_families_and_presets() -> None:
    said = json.loads(CliRunner().invoke(models, ["--json"]).stdout)
    assert said["families"]["smolvlm"] == ["smolvlm", "idefics3"]
    assert "smolvlm-256m" in said["presets"]
    table = CliRunner().invoke(models, []).output
    assert "smolvlm-500m" in table
