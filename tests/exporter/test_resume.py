"""An export that was killed goes on from what it had finished, takes nothing half-written, and ends the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vlmc.artifact import COMPONENTS, GRAPH_FILES, Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import checkpoint, graph, parity
from vlmc.exporter.checkpoint import resolve
from vlmc.exporter.export import Options, export

# Where an export is killed (by killed_exports.py), and the graphs that are traced when the same command is run again.
KILLED = {
    "loading the weights": list(COMPONENTS),
    "graph 1 of 3, vision_encoder: tracing": list(COMPONENTS),
    "graph 3 of 3, decoder: tracing": ["decoder"],
    "half a graph": ["decoder"],
    "a graph without its record": ["decoder"],
    "goldens from PyTorch": [],
    "goldens that are not in the manifest": [],
    "parity ladder": [],
    "the last step": [],
}


@pytest.fixture(scope="module")
def killed(tiny: Artifact, tiny_checkpoint: Path, picture_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each place of KILLED, by number, in which an export to `out` was killed there."""
    folder = tmp_path_factory.mktemp("killed")
    for index in range(len(KILLED)):
        (folder / str(index)).mkdir()
    graphs = json.dumps({name: str(tiny.graph(name)) for name in COMPONENTS})
    given = [str(tiny_checkpoint), graphs, str(picture_set), str(folder), json.dumps(list(KILLED))]
    command = [sys.executable, str(Path(__file__).with_name("killed_exports.py")), *given]
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})
    return folder


@pytest.fixture
def traced(traced_before: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that were traced, by name."""
    names: list[str] = []
    trace = graph.export_component

    def note(name: str, *arguments: Any) -> Any:
        names.append(name)
        return trace(name, *arguments)

    monkeypatch.setattr(graph, "export_component", note)
    return names


@pytest.fixture
def again(tiny_checkpoint: Path, picture_set: Path) -> Callable[..., Artifact]:
    """again(target, **changes): the command that was killed, with its options changed."""

    def run(target: Path, report: Any = lambda *_: None, **changes: Any) -> Artifact:
        options = Options(capacity=128, cases=2, picture_set=picture_set, max_new_tokens=2)
        return export(resolve(str(tiny_checkpoint)), target, replace(options, **changes), report)

    return run


def check_whole(artifact: Artifact) -> None:
    files = {path.relative_to(artifact.root).as_posix() for path in artifact.root.rglob("*") if path.is_file()}
    assert files == {*artifact.manifest.files, "manifest.json"}
    for name in artifact.manifest.files:
        artifact.path_of(name)
    assert all(level.passed for level in artifact.manifest.parity)
    assert artifact.manifest.parity[-1].level == "greedy tokens"
    assert [path.name for path in artifact.root.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("place", KILLED)
def test_the_same_command_goes_on_and_ends_as_if_it_had_never_been_killed(
    place: str, killed: Path, again: Callable[..., Artifact], traced: list[str], tiny: Artifact
) -> None:
    folder = killed / str(list(KILLED).index(place))
    (left,) = folder.iterdir()
    assert left.name.startswith(".out.")
    made = again(folder / "out")
    check_whole(made)
    assert traced == KILLED[place]
    assert {name: made.manifest.files[name] for name in made.manifest.files if name.startswith("onnx/")} == {
        name: spec for name, spec in tiny.manifest.files.items() if name.startswith("onnx/")
    }
    assert replace(made.manifest, parity=(), files={}, created="", peak_memory_bytes=0) == replace(
        tiny.manifest, parity=(), files={}, created="", peak_memory_bytes=0
    )


@pytest.fixture
def interrupted(again: Callable[..., Artifact], traced: list[str], tmp_path: Path) -> Callable[[str], Path]:
    """interrupted(stage): the folder that is left of an export to `out` when Ctrl-C was pressed there."""

    def run(stage: str) -> Path:
        def stop(said: str, *_: int) -> None:
            if said == stage:
                raise KeyboardInterrupt  # as Python does on Ctrl-C, unless what started it ignores SIGINT

        with pytest.raises(KeyboardInterrupt):
            again(tmp_path / "out", stop)
        traced.clear()
        (left,) = tmp_path.iterdir()
        return left

    return run


def test_ctrl_c_keeps_what_is_finished_too(
    interrupted: Callable[[str], Path], again: Callable[..., Artifact], traced: list[str], tmp_path: Path
) -> None:
    interrupted("graph 2 of 3, embed_tokens: tracing")
    check_whole(again(tmp_path / "out"))
    assert traced == ["embed_tokens", "decoder"]


def test_with_the_goldens_there_pytorch_is_not_asked_again(
    interrupted: Callable[[str], Path],
    again: Callable[..., Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted("parity ladder")
    monkeypatch.delattr(checkpoint, "load_model")
    check_whole(again(tmp_path / "out"))


@pytest.mark.parametrize("stage", ["goldens from PyTorch", "parity ladder"])
@pytest.mark.parametrize("name", [f"{GRAPH_FILES['embed_tokens']}.data", "finished/embed_tokens.json"])
def test_a_graph_that_is_not_what_was_recorded_is_traced_again(
    name: str,
    stage: str,
    interrupted: Callable[[str], Path],
    again: Callable[..., Artifact],
    traced: list[str],
    tmp_path: Path,
) -> None:
    file = interrupted(stage) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    check_whole(again(tmp_path / "out"))
    assert traced in (["embed_tokens"], []) if "finished" in name else traced == ["embed_tokens"]


def test_what_is_in_no_record_does_not_get_into_the_artefact(
    interrupted: Callable[[str], Path], again: Callable[..., Artifact], tmp_path: Path
) -> None:
    stage = interrupted("goldens from PyTorch")
    for name in ("onnx/.decoder.onnx.data.x7f.tmp", "golden/99.png", "golden/golden.json", "notes"):
        (stage / name).write_text("half")
    check_whole(again(tmp_path / "out"))
    assert not (tmp_path / "out" / "golden" / "99.png").exists()


@pytest.mark.parametrize("change", [{"capacity": 127}, {"cases": 1}, {"max_new_tokens": 1}])
def test_what_was_made_with_other_options_is_not_taken(
    change: dict[str, int],
    interrupted: Callable[[str], Path],
    again: Callable[..., Artifact],
    traced: list[str],
    tmp_path: Path,
) -> None:
    interrupted("parity ladder")
    check_whole(again(tmp_path / "out", **change))
    assert traced == list(COMPONENTS)


def test_a_graph_that_failed_the_ladder_is_not_kept(
    again: Callable[..., Artifact], tmp_path: Path, traced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "COSINE", 2.0)
    with pytest.raises(VlmcError, match="does not compute what PyTorch does"):
        again(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
