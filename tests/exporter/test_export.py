"""An export is whole or absent, is not made twice, and never takes the place of another unasked."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vlmc.artifact import COMPONENTS, GRAPH_FILES, Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import checkpoint, graph, inspection
from vlmc.exporter import export as module
from vlmc.exporter.checkpoint import resolve
from vlmc.exporter.export import Options, existing, export
from vlmc.exporter.parity import canonical_session
from vlmc.files import alone
from vlmc.runtime.images import open_image


@pytest.fixture
def options(picture_set: Path) -> Options:
    """Those that `tiny` was exported with."""
    return Options(capacity=128, cases=3, picture_set=picture_set, max_new_tokens=8)


def again(checkpoint_folder: Path, target: Path, options: Options) -> Artifact:
    return export(resolve(str(checkpoint_folder)), target, options, lambda *_: None)


def content(root: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


def test_the_artefact_holds_what_the_manifest_says_and_no_more(tiny: Artifact) -> None:
    files = {path.relative_to(tiny.root).as_posix() for path in tiny.root.rglob("*") if path.is_file()}
    assert files == {*tiny.manifest.files, "manifest.json"}
    graphs = [GRAPH_FILES[name] for name in tiny.components]
    assert tiny.components == COMPONENTS
    expected = {*graphs, *(f"{file}.data" for file in graphs), "tokenizer.json"}
    assert expected <= tiny.manifest.files.keys()
    for name in tiny.manifest.files:
        tiny.path_of(name)
    assert tiny.manifest.kv.capacity == 128
    assert (tiny.manifest.hidden_size, tiny.manifest.vocab_size) == (64, 336)
    assert tiny.manifest.versions["vlmc"]


def test_the_same_export_is_left_as_it_is(tiny_copy: Path, tiny_checkpoint: Path, options: Options) -> None:
    before = content(tiny_copy)
    assert again(tiny_checkpoint, tiny_copy, options).root == tiny_copy
    assert content(tiny_copy) == before


def test_a_folder_is_no_set_of_pictures(tmp_path: Path, tiny_checkpoint: Path, options: Options) -> None:
    with pytest.raises(VlmcError, match=rf"The set of pictures {tmp_path} cannot be read. Found: it is no file"):
        again(tiny_checkpoint, tmp_path / "out", replace(options, picture_set=tmp_path))


@pytest.mark.parametrize("change", [{"capacity": 64}, {"cases": 2}, {"max_new_tokens": 4}, {"picture_set": None}])
def test_other_options_are_refused_without_force(
    change: dict[str, Any], tiny_copy: Path, tiny_checkpoint: Path, options: Options
) -> None:
    before = content(tiny_copy)
    with pytest.raises(VlmcError, match=r"already holds an export of 'tiny', made from other weights.*--force"):
        again(tiny_checkpoint, tiny_copy, replace(options, **change))
    assert content(tiny_copy) == before


def test_other_pictures_under_the_same_names_are_another_export(
    tiny_copy: Path, tiny_checkpoint: Path, options: Options, tmp_path: Path
) -> None:
    assert options.picture_set is not None
    folder = Path(shutil.copytree(options.picture_set.parent, tmp_path / "pictures"))
    moved = replace(options, picture_set=folder / options.picture_set.name)
    assert again(tiny_checkpoint, tiny_copy, moved).root == tiny_copy  # where the pictures lie does not matter
    Image.new("RGB", (40, 40), "red").save(folder / "2.png")
    with pytest.raises(VlmcError, match=r"already holds an export of 'tiny', made from other weights.*--force"):
        again(tiny_checkpoint, tiny_copy, moved)
    assert again(tiny_checkpoint, tiny_copy, options).root == tiny_copy


def test_other_versions_and_weights_are_refused_without_force(
    tiny_copy: Path, tiny_checkpoint: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resolve(str(tiny_checkpoint))
    other = replace(model, source=replace(model.source, sha256="0" * 64))
    with pytest.raises(VlmcError, match="made from other weights"):
        existing(other, tiny_copy, options)
    monkeypatch.setattr(module, "tool_versions", lambda: {"vlmc": "9"})
    with pytest.raises(VlmcError, match="or versions"):
        existing(model, tiny_copy, options)


def test_a_damaged_artefact_is_not_taken_for_whole(tiny_copy: Path, tiny_checkpoint: Path, options: Options) -> None:
    graph_file = tiny_copy / GRAPH_FILES["decoder"]
    graph_file.write_bytes(graph_file.read_bytes()[:-1])
    with pytest.raises(VlmcError, match=r"decoder_model_merged\.onnx is truncated or altered.*--force"):
        again(tiny_checkpoint, tiny_copy, options)


def test_force_replaces_all_of_it(
    tiny_copy: Path, tiny_checkpoint: Path, options: Options, traced_before: None
) -> None:
    (tiny_copy / "plans").mkdir()
    (tiny_copy / GRAPH_FILES["decoder"]).write_text("damaged")
    made = again(tiny_checkpoint, tiny_copy, replace(options, cases=2, force=True))
    assert not (tiny_copy / "plans").exists()
    assert len(list((tiny_copy / "golden").glob("*.png"))) == 2
    assert made.graph("decoder")
    assert again(tiny_checkpoint, tiny_copy, replace(options, cases=2)).root == tiny_copy


def test_what_is_being_measured_is_not_replaced(tiny_copy: Path, tiny_checkpoint: Path, options: Options) -> None:
    """`vlmc profile` holds the folder meanwhile."""
    before = content(tiny_copy)
    with alone(tiny_copy), pytest.raises(VlmcError, match=rf"Another vlmc is at work in {tiny_copy}\. .*wait until"):
        again(tiny_checkpoint, tiny_copy, replace(options, cases=2, force=True))
    assert content(tiny_copy) == before


def test_something_else_in_the_way_is_never_replaced(tmp_path: Path, tiny_checkpoint: Path, options: Options) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more")
    for name in ("folder", "file"):
        with pytest.raises(VlmcError, match="exists and is no artefact"):
            again(tiny_checkpoint, tmp_path / name, replace(options, force=True))
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("content", ['{"name": "my web app"}', "[]", "{", '{"schema": 1}'])
def test_a_manifest_of_something_else_makes_no_artefact(
    content: str, tmp_path: Path, tiny_checkpoint: Path, options: Options
) -> None:
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(VlmcError, match="exists and is no artefact"):
            again(tiny_checkpoint, tmp_path, replace(options, force=force))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_force_replaces_an_artefact_of_an_older_schema(
    tiny_copy: Path, tiny_checkpoint: Path, options: Options
) -> None:
    manifest = json.loads((tiny_copy / "manifest.json").read_text())
    (tiny_copy / "manifest.json").write_text(json.dumps(manifest | {"schema": 0}))
    model = resolve(str(tiny_checkpoint))
    assert existing(model, tiny_copy, replace(options, force=True)) is None
    with pytest.raises(VlmcError, match="a schema that this version of vlmc does not read"):
        existing(model, tiny_copy, options)


def test_a_family_that_was_changed_makes_another_export(
    tiny_copy: Path, tiny_checkpoint: Path, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resolve(str(tiny_checkpoint))
    source = tmp_path / "family.py"
    source.write_bytes(Path(inspect.getfile(type(model.family))).read_bytes())
    monkeypatch.setattr(inspect, "getfile", lambda _: str(source))
    assert existing(model, tiny_copy, options) is not None
    source.write_bytes(source.read_bytes() + b"# changed")
    with pytest.raises(VlmcError, match=r"already holds an export of 'tiny', made from other weights.*--force"):
        existing(model, tiny_copy, options)


def test_a_cache_that_no_memory_holds_is_refused_before_anything_slow(
    tmp_path: Path, tiny_checkpoint: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "load_model", lambda _: pytest.fail("this takes a minute"))
    monkeypatch.setattr(inspection.memory, "obtainable_bytes", lambda: 4 * 2 * 2 * 2 * 16 * 1000)
    says = r"A KV cache of 1,001 positions would not fit into this machine's memory. Found: .*smaller --capacity"
    with pytest.raises(VlmcError, match=says):
        again(tiny_checkpoint, tmp_path / "out", replace(options, capacity=1001))
    with pytest.raises(pytest.fail.Exception):
        again(tiny_checkpoint, tmp_path / "out", replace(options, capacity=1000))


def test_an_empty_folder_is_filled(
    tmp_path: Path, tiny: Artifact, tiny_checkpoint: Path, options: Options, traced_before: None
) -> None:
    made = again(tiny_checkpoint, tmp_path, options)
    assert made.manifest.components == tiny.manifest.components
    assert made.path_of("golden/golden.json").read_bytes() == tiny.path_of("golden/golden.json").read_bytes()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
        (lambda folder: (folder / "processor_config.json").write_text("{"), "cannot be used"),
    ],
)
def test_a_bad_processor_is_refused_before_anything_slow(
    damage: Any, says: str, tmp_path: Path, tiny_checkpoint: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: Any) -> Any:
        raise AssertionError("this takes a minute")

    monkeypatch.setattr(checkpoint, "load_model", slow)
    monkeypatch.setattr(graph, "export_component", slow)
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    damage(folder)
    with pytest.raises(VlmcError, match=says):
        again(folder, tmp_path / "out", options)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.fixture
def longest(tiny: Artifact) -> int:
    """Tokens of the longest golden prompt, that of its picture included."""
    rows = json.loads(tiny.path_of("golden/golden.json").read_text())["cases"]
    session = canonical_session(tiny)
    return max(len(session.prepare([open_image(tiny.root / row["image"])], row["prompt"]).input_ids) for row in rows)


def test_a_prompt_that_surely_fills_more_than_the_cache_is_refused_before_anything_slow(
    tmp_path: Path, tiny_checkpoint: Path, options: Options, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "load_model", lambda _: pytest.fail("this takes a minute"))
    says = rf"longer than the KV cache\. Found: {longest} tokens\. Expected: at most {longest - 2}\..*larger --capacity"
    with pytest.raises(VlmcError, match=says):
        again(tiny_checkpoint, tmp_path / "out", replace(options, capacity=longest - 2))
    assert list(tmp_path.iterdir()) == []


def test_whether_a_prompts_last_token_fits_is_known_only_of_a_loaded_model(
    tmp_path: Path, tiny_checkpoint: Path, options: Options, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "load_model", lambda _: pytest.fail("it is asked for"))
    with pytest.raises(pytest.fail.Exception, match="it is asked for"):
        again(tiny_checkpoint, tmp_path / "out", replace(options, capacity=longest - 1))


def test_a_prompt_one_token_longer_than_the_cache_is_refused_in_the_end(
    tmp_path: Path, tiny_checkpoint: Path, options: Options, longest: int, traced_before: None
) -> None:
    with pytest.raises(VlmcError, match=r"longer than the KV cache.*larger --capacity"):
        again(tiny_checkpoint, tmp_path / "out", replace(options, capacity=longest - 1))
    assert list(tmp_path.iterdir()) == []
    again(tiny_checkpoint, tmp_path / "out", replace(options, capacity=longest))


def test_sizes_that_do_not_go_together_are_one_sentence(
    tmp_path: Path, tiny_checkpoint: Path, options: Options
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_size"] = 7  # less than a patch
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VlmcError, match=r"No model can be made of the config\.json in .*checkpoint"):
        export(resolve(str(folder), random_weights=True), tmp_path / "out", options, lambda *_: None)


def test_progress_is_told_from_start_to_end(
    tmp_path: Path, tiny_checkpoint: Path, options: Options, traced_before: None
) -> None:
    told: list[tuple[str, int, int]] = []
    made = export(resolve(str(tiny_checkpoint)), tmp_path / "out", options, lambda *step: told.append(step))
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    graphs = [f"graph {index} of 3, {name}" for index, name in enumerate(COMPONENTS, 1)]
    assert stages == [
        "loading the weights",
        *(f"{graph}: {what}" for graph in graphs for what in ("tracing", "writing MB")),
        "goldens from PyTorch",
        "parity ladder",
    ]
    by_stage = {stage: [(done, total) for said, done, total in told if said == stage] for stage in stages}
    weights = by_stage["loading the weights"]
    assert weights[0] == (0, 0)  # not known yet
    assert [done for done, _ in weights[1:]] == list(range(len(weights) - 1))
    assert {total for _, total in weights[1:]} == {len(weights) - 2}
    assert by_stage["goldens from PyTorch"] == [(done, 3) for done in range(4)]
    assert len(made.manifest.parity) == 9
    assert by_stage["parity ladder"] == [(done, 9) for done in range(10)]
