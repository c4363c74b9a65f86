"""An engine is kept by the hash of all that went into it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest
from vlmc.artifact import GRAPH_FILES, Artifact, EngineSpec
from vlmc.calibration.plan import read_plan, write_plan
from vlmc.engines import candidate as module
from vlmc.engines.candidate import Candidate, build, cached, key, record_trial
from vlmc.records import FileSpec

VISION = Candidate("cpu", "vision_encoder", "onnxruntime", "int8")


def change_graph(artifact: Artifact) -> None:
    artifact.manifest.files[f"{GRAPH_FILES['vision_encoder']}.data"] = FileSpec("0" * 64, 1)


def change_plan(artifact: Artifact) -> None:
    plan = read_plan(artifact, "int8")
    path, module_plan = next(iter(plan.modules.items()))
    write_plan(artifact, replace(plan, modules=plan.modules | {path: replace(module_plan, activation_scale=9.0)}))


def change_capacity(artifact: Artifact) -> None:
    artifact.manifest = replace(artifact.manifest, kv=replace(artifact.manifest.kv, capacity=64))


def change_golden(artifact: Artifact) -> None:
    artifact.manifest.files["golden/golden.npz"] = FileSpec("0" * 64, 1)  # whose sizes are those that profiles are for


def change_pictures(artifact: Artifact) -> None:
    artifact.manifest = replace(artifact.manifest, preprocessing=artifact.manifest.preprocessing | {"tile": 9})


def change_embeddings(artifact: Artifact) -> None:
    artifact.manifest.files[f"{GRAPH_FILES['embed_tokens']}.data"] = FileSpec("0" * 64, 1)


CHANGES = [change_graph, change_plan, change_capacity, change_golden, change_pictures]


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_changes_with_what_goes_in(change: Callable[[Artifact], None], artifact: Artifact) -> None:
    before = key(artifact, VISION)
    assert key(artifact, VISION) == before
    change(artifact)
    assert key(artifact, VISION) != before


def test_a_decoder_may_hold_the_embeddings_and_no_other_component(artifact: Artifact) -> None:
    decoder = replace(VISION, component="decoder")
    before = key(artifact, decoder), key(artifact, VISION)
    change_embeddings(artifact)
    assert key(artifact, decoder) != before[0]
    assert key(artifact, VISION) == before[1]


@pytest.mark.parametrize(
    "other", [{"device": "rpi5"}, {"component": "decoder"}, {"backend": "openvino"}, {"precision": "int8-minmax"}]
)
def test_the_key_changes_with_the_candidate(other: dict[str, str], artifact: Artifact) -> None:
    assert key(artifact, VISION) != key(artifact, replace(VISION, **other))


@pytest.mark.parametrize("other", [{"sm": 87}, {"tensorrt": "10.3"}, {"opset": 17}, {"typing": "weak"}])
def test_the_key_changes_with_what_the_device_takes(
    other: dict[str, Any], artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(artifact, VISION)
    device = module.load_device("cpu")
    monkeypatch.setattr(module, "load_device", lambda name: replace(device, **other))
    assert key(artifact, VISION) != before


def test_the_key_changes_with_the_backends_version(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(artifact, VISION)
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9" if name == "onnxruntime" else version(name))
    assert key(artifact, VISION) != before


def test_an_engine_of_a_backend_that_is_not_here_counts_as_none(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(artifact, VISION)
    version = metadata.version

    def none_of_it(name: str) -> str:
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(metadata, "version", none_of_it)
    assert cached(artifact, VISION) is None


def test_a_float_engine_does_not_depend_on_plans(artifact: Artifact) -> None:
    float32 = replace(VISION, precision="fp32")
    before = key(artifact, float32)
    change_plan(artifact)
    assert key(artifact, float32) == before


def test_an_engine_is_built_whole_with_its_record(artifact: Artifact) -> None:
    made = build(artifact, VISION)
    folder = artifact.root / "engines" / "cpu" / "vision_encoder" / "onnxruntime-int8"
    assert cached(artifact, VISION) == made
    assert sorted(path.name for path in folder.iterdir()) == ["engine.json", "model.onnx", "model.onnx.data"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert made.report.size_bytes == sum((folder / name).stat().st_size for name in made.files)
    assert made.report.seconds > 0
    assert made.report.peak_memory_bytes > 1e6
    assert made.report.latency_ms == {}
    assert made.report.agreement is None
    assert made.versions.keys() == {"vlmc", "onnx-ir", "onnxruntime"}
    float32 = build(artifact, replace(VISION, precision="fp32"))
    assert made.report.size_bytes < 0.5 * float32.report.size_bytes


@pytest.mark.parametrize("change", CHANGES)
def test_an_engine_of_other_inputs_counts_as_none(change: Callable[[Artifact], None], artifact: Artifact) -> None:
    build(artifact, VISION)
    change(artifact)
    assert cached(artifact, VISION) is None


@pytest.mark.parametrize("damage", ["truncated", "altered", "gone", "record", "schema"])
def test_a_damaged_engine_counts_as_none(damage: str, artifact: Artifact) -> None:
    build(artifact, VISION)
    folder = artifact.root / "engines" / "cpu" / "vision_encoder" / "onnxruntime-int8"
    model, record = folder / "model.onnx", folder / "engine.json"
    if damage == "truncated":
        model.write_bytes(model.read_bytes()[:-1])
    elif damage == "altered":
        model.write_bytes(model.read_bytes()[:-1] + b"\0")
    elif damage == "gone":
        (folder / "model.onnx.data").unlink()
    elif damage == "record":
        record.write_text("{")
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"schema": 0}))
    assert cached(artifact, VISION) is None


def test_what_a_trial_measured_is_added_to_the_record(artifact: Artifact) -> None:
    made = build(artifact, VISION)
    found = record_trial(artifact, VISION, {"latency_ms": {"run": 1.5}, "agreement": 0.9, "work": {"flops": 2.0}})
    assert found == replace(
        made, report=replace(made.report, latency_ms={"run": 1.5}, agreement=0.9, work={"flops": 2.0})
    )
    assert cached(artifact, VISION) == found
    assert isinstance(found, EngineSpec)
