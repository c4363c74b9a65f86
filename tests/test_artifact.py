"""The artefact's records: what is written is read back, and what does not fit is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vlmc import records
from vlmc.artifact import (
    COMPONENTS,
    DECODER_INPUTS,
    GRAPH_FILES,
    Artifact,
    BuildReport,
    BuildSpec,
    Choice,
    ComponentSpec,
    EngineSpec,
    KvSpec,
    Manifest,
    PromptSpec,
    Source,
    TensorSpec,
)
from vlmc.errors import VlmcError
from vlmc.files import sha256_of
from vlmc.records import SCHEMA, FileSpec, check_file, describe_files, from_json, read_record, to_json, write_record

PIXELS = TensorSpec("pixel_values", "float32", ("tiles", 3, 32, 32))


def manifest(root: Path) -> Manifest:
    return Manifest(
        schema=SCHEMA,
        name="tiny",
        family="smolvlm",
        source=Source("folder", "/somewhere", "0" * 64),
        components={name: ComponentSpec(file, (PIXELS,), (), 7) for name, file in GRAPH_FILES.items()},
        kv=KvSpec(2, 2, 16, 64),
        hidden_size=64,
        vocab_size=300,
        preprocessing={"kind": "idefics3", "mean": [0.5, None]},
        prompt=PromptSpec("{image}{text}", "{text}", "<image>", (2,)),
        parity=(),
        files=describe_files(root),
        versions={"vlmc": "0"},
        created="2026-11-21T00:00:00+00:00",
    )


def engine(folder: Path, device: str = "cpu") -> EngineSpec:
    report = BuildReport(1.5, 10, 5, {"int8": 3}, {"run": 1.0}, 0.99)
    return EngineSpec(
        schema=SCHEMA,
        component="vision_encoder",
        backend="onnxruntime",
        precision="int8",
        device=device,
        file="model.onnx",
        key="0",
        source_sha256="0" * 64,
        inputs=(PIXELS,),
        outputs=(),
        files=describe_files(folder),
        report=report,
        versions={},
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An artefact with graphs that are no graphs, and one engine."""
    root = tmp_path / "artefact"
    (root / "onnx").mkdir(parents=True)
    for file in GRAPH_FILES.values():
        (root / file).write_text(file)
        (root / (file + ".data")).write_text("weights")
    write_record(root / "manifest.json", manifest(root))
    folder = root / "engines" / "cpu" / "vision_encoder" / "onnxruntime-int8"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_text("graph")
    write_record(folder / "engine.json", engine(folder))
    return root


def build(root: Path, device: str, recipe: str, minute: int, remaining: str = "") -> None:
    choices = {name: Choice(f"onnxruntime-{recipe}", "", {}) for name in COMPONENTS}
    record = BuildSpec(SCHEMA, device, recipe, choices, 1.0, f"2026-11-21T00:{minute:02}:00", remaining)
    write_record(root / "engines" / device / f"{recipe}.json", record)


# Records

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
DATA = {"preprocessing": st.dictionaries(st.text(max_size=5), ANY_JSON, max_size=2)}
ENGINE_DATA = {"settings": st.dictionaries(st.text(max_size=5), ANY_JSON, max_size=2)}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(record=st.builds(Manifest, **DATA) | st.builds(EngineSpec, **ENGINE_DATA) | st.builds(BuildSpec))
def test_a_record_comes_back_as_it_was_written(record: Any) -> None:
    assert from_json(type(record), json.loads(json.dumps(to_json(record))), "here") == record


def test_another_schema_is_refused_by_number(root: Path) -> None:
    for data in ({"schema": 99}, {}, [], 1, {"schema": None}):
        (root / "manifest.json").write_text(json.dumps(data))
        with pytest.raises(VlmcError, match=r"manifest\.json has a schema that this version of vlmc does not read"):
            Artifact(root)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


PATHS = st.sampled_from(["../x", "/etc/passwd", "\0", "\ud800", "x" * 300, "", "onnx", "manifest.json"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_fuzzed_manifest_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "fuzzed"
    (root / "onnx").mkdir(parents=True, exist_ok=True)
    for file in GRAPH_FILES.values():
        (root / file).write_text(file)
    (root / "manifest.json").unlink(missing_ok=True)
    whole = to_json(manifest(root))
    value = copy.deepcopy(whole)
    *path, last = data.draw(st.sampled_from([path for path in places(value) if path]))
    inner = value
    for key in path:
        inner = inner[key]
    new = data.draw(ANY_JSON | PATHS | st.sampled_from([-1, 0, 2**70, 1e308]))
    if isinstance(inner, dict) and data.draw(st.booleans()):
        inner[data.draw(PATHS)] = inner.pop(last)
    else:
        inner[last] = new
    (root / "manifest.json").write_text(json.dumps(value))
    try:
        opened = Artifact(root)
        for name in opened.manifest.components:
            opened.graph(name)
        for name in opened.manifest.files:
            opened.path_of(name)
    except VlmcError:
        assume(value != whole)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cut=st.floats(0, 1), junk=st.binary(max_size=3))
def test_a_damaged_manifest_is_refused(cut: float, junk: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "damaged"
    root.mkdir(exist_ok=True)
    text = json.dumps(to_json(manifest(root / "absent"))).encode()
    damaged = text[: int(cut * len(text))] + junk
    assume(damaged.rstrip() != text)  # JSON may end in white space
    (root / "manifest.json").write_bytes(damaged)
    with pytest.raises(VlmcError, match="To mend it: copy the artefact again from where it is whole, or make it again"):
        Artifact(root)


# The folder


def test_a_folder_that_is_no_artefact_says_how_to_make_one(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(VlmcError, match=r"is no artefact.*vlmc export MODEL -o"):
            Artifact(path)


def test_a_file_is_checked_before_it_is_given_out(root: Path) -> None:
    assert Artifact(root).path_of("onnx/vision_encoder.onnx") == root / "onnx" / "vision_encoder.onnx"
    with pytest.raises(VlmcError, match="not listed"):
        Artifact(root).path_of("engines/cpu/vision_encoder/onnxruntime-int8/x")
    with pytest.raises(VlmcError, match="leaves the folder"):
        Artifact(root).path_of("../artefact/manifest.json/../../x")
    (root / "onnx" / "vision_encoder.onnx").write_text("onnx/vision_encoder.onnY")
    with pytest.raises(VlmcError, match="altered: its sha256"):
        Artifact(root).path_of("onnx/vision_encoder.onnx")
    (root / "onnx" / "vision_encoder.onnx").write_text("onnx")
    with pytest.raises(VlmcError, match=r"truncated or altered. Found: 4 bytes"):
        Artifact(root).path_of("onnx/vision_encoder.onnx")
    (root / "onnx" / "vision_encoder.onnx").unlink()
    with pytest.raises(VlmcError, match="is missing"):
        Artifact(root).path_of("onnx/vision_encoder.onnx")


def test_a_file_is_hashed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(records, "sha256_of", lambda path: seen.append(path) or "")
    opened = Artifact(root)
    opened.manifest.files["onnx/decoder_model_merged.onnx"] = FileSpec("", 30)
    assert opened.path_of("onnx/decoder_model_merged.onnx") == opened.path_of("onnx/decoder_model_merged.onnx")
    assert len(seen) == 1
    monkeypatch.setattr(records, "sha256_of", lambda path: seen.append(path) or sha256_of(path))
    for _ in range(2):
        opened.engine("cpu", "vision_encoder", "onnxruntime-int8")
    assert len(seen) == 2


def test_a_graph_is_checked_together_with_its_weights(root: Path) -> None:
    assert Artifact(root).graph("decoder") == root / "onnx" / "decoder_model_merged.onnx"
    (root / "onnx" / "decoder_model_merged.onnx.data").write_text("Weights")
    with pytest.raises(VlmcError, match=r"onnx\.data was altered"):
        Artifact(root).graph("decoder")
    with pytest.raises(VlmcError, match=r"no component 'audio'. Found: vision_encoder, embed_tokens, fusion, decoder"):
        Artifact(root).graph("audio")


def test_components_are_those_of_the_manifest_in_the_order_of_a_question(root: Path) -> None:
    opened = Artifact(root)
    assert opened.components == ("vision_encoder", "embed_tokens", "fusion", "decoder")
    backwards = {name: opened.manifest.components[name] for name in reversed(COMPONENTS)}
    opened.manifest = replace(opened.manifest, components=backwards)
    assert opened.components == COMPONENTS


def test_what_few_decoders_take_is_named() -> None:
    plain = [TensorSpec(name, "int64", (1, "length")) for name in DECODER_INPUTS]
    cache = TensorSpec("past_key_values.0.key", "float32", (1, 2, "capacity", 16))
    assert ComponentSpec("x", (*plain, cache), (), 0).further_inputs() == ()
    positions = TensorSpec("position_ids", "int64", (3, 1, "length"))
    prefix = TensorSpec("prefix_length", "int64", (1,))
    assert ComponentSpec("x", (plain[0], positions, cache, prefix), (), 0).further_inputs() == (
        "position_ids",
        "prefix_length",
    )


def test_descriptions_leave_records_out(root: Path) -> None:
    folder = root / "engines" / "cpu" / "vision_encoder" / "onnxruntime-int8"
    assert list(describe_files(folder)) == ["model.onnx"]
    assert "manifest.json" not in describe_files(root)
    for name, known in describe_files(root).items():
        check_file(root / name, known)


# Engines and builds


def test_an_engine_is_checked_before_it_is_given_out(root: Path) -> None:
    spec, path = Artifact(root).engine("cpu", "vision_encoder", "onnxruntime-int8")
    assert (spec.precision, path.read_text()) == ("int8", "graph")
    path.write_text("Graph")
    with pytest.raises(VlmcError, match="altered"):
        Artifact(root).engine("cpu", "vision_encoder", "onnxruntime-int8")


def test_an_engine_that_is_not_there_says_how_to_build_it(root: Path) -> None:
    with pytest.raises(VlmcError, match=r"no engine onnxruntime-int4 of decoder for device 'cpu'.*vlmc build"):
        Artifact(root).engine("cpu", "decoder", "onnxruntime-int4")
    with pytest.raises(VlmcError, match="leaves the folder"):
        Artifact(root).engine("../../..", "decoder", "onnxruntime-int8")


def test_an_engine_for_another_device_is_refused_by_name(root: Path) -> None:
    (root / "engines" / "cpu").rename(root / "engines" / "rpi5")
    with pytest.raises(VlmcError, match=r"for another device. Found: cpu. Expected: rpi5"):
        Artifact(root).engine("rpi5", "vision_encoder", "onnxruntime-int8")


def test_an_engine_whose_file_is_not_listed_is_refused(root: Path) -> None:
    folder = root / "engines" / "cpu" / "vision_encoder" / "onnxruntime-int8"
    (folder / "other.onnx").write_text("unchecked")
    record = read_record(EngineSpec, folder / "engine.json")
    write_record(folder / "engine.json", replace(record, file="other.onnx"))
    with pytest.raises(VlmcError, match="not listed"):
        Artifact(root).engine("cpu", "vision_encoder", "onnxruntime-int8")


def test_the_newest_build_that_is_preferred_comes_first(root: Path) -> None:
    build(root, "cpu", "fp32", 1)
    build(root, "cpu", "int8", 2)
    build(root, "orin", "int8", 3, remaining="Copy it to the Jetson.")
    opened = Artifact(root)
    assert [(one.device, one.recipe) for one in opened.builds()] == [("orin", "int8"), ("cpu", "int8"), ("cpu", "fp32")]
    assert opened.build().device == "orin"
    assert opened.build(recipe="fp32").recipe == "fp32"
    on_cpu = opened.build(preferred=lambda one: one.device == "cpu")
    assert (on_cpu.device, on_cpu.recipe) == ("cpu", "int8")
    assert opened.build("orin", preferred=lambda one: one.device == "cpu").device == "orin"


def test_a_build_that_is_not_there_says_what_is(root: Path) -> None:
    with pytest.raises(VlmcError, match=r"no build. Found: none. To mend it: run `vlmc build .* --int8`"):
        Artifact(root).build()
    build(root, "cpu", "fp32", 1)
    with pytest.raises(VlmcError, match=r"no build for device nope recipe w4. Found: cpu/fp32. .*choose") as raised:
        Artifact(root).build("nope", "w4")
    assert "--device nope" not in str(raised.value)  # which there may not be


def test_what_a_build_wrote_is_mended_by_building_again(root: Path) -> None:
    build(root, "cpu", "int8", 1)
    folder = root / "engines" / "cpu" / "vision_encoder" / "onnxruntime-int8"
    again = f"To mend it: run `vlmc build {root} --device cpu --recipe int8`."
    for path, said in ((folder / "model.onnx", "altered"), (folder / "engine.json", "not valid JSON")):
        path.write_text("other")
        with pytest.raises(VlmcError, match=said) as raised:
            Artifact(root).engine("cpu", "vision_encoder", "onnxruntime-int8")
        assert str(raised.value).endswith(again)
    with pytest.raises(VlmcError, match="no engine") as raised:
        Artifact(root).engine("cpu", "decoder", "onnxruntime-fp32")
    assert str(raised.value).endswith(again)
    (root / "engines" / "cpu" / "int8.json").write_text("{")
    with pytest.raises(VlmcError, match="not valid JSON") as raised:
        Artifact(root).builds()
    assert str(raised.value).endswith(again)


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "plans", "profile", "engines/cpu/int8.json"]
    + [f"engines/cpu/vision_encoder/onnxruntime-int8{part}" for part in ("", "/engine.json")],
)
def test_a_link_out_of_the_artefact_is_refused_before_anything_is_read_or_written(name: str, root: Path) -> None:
    build(root, "cpu", "int8", 1)
    inner, outside = root / name, root.parent / "outside"
    if inner.exists():
        inner.rename(outside)
    inner.symlink_to(outside)
    with pytest.raises(VlmcError, match=rf"'{name}' leaves the folder .*Found: {outside}"):
        Artifact(root)
    inner.unlink()
    if outside.exists():
        outside.rename(root / "here")
        inner.symlink_to(root / "here")
        Artifact(root)


def test_a_manifest_without_a_graph_or_with_a_cache_below_nothing_is_refused(root: Path) -> None:
    whole = json.loads((root / "manifest.json").read_text())
    short = {**whole, "components": {name: whole["components"][name] for name in ("vision_encoder", "decoder")}}
    for changed, says in (
        (short, "no graph of the embed_tokens"),
        (whole | {"kv": whole["kv"] | {"layers": -1}}, "negative"),
    ):
        (root / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(VlmcError, match=f"{says}.*vlmc export"):
            Artifact(root)
