"""A build tries every candidate, keeps what wins, makes nothing twice and mends what is damaged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from vlmc.artifact import COMPONENTS, FLOATS, Artifact, BuildSpec, KvContract
from vlmc.calibration.plan import read_plan
from vlmc.engines import build as module
from vlmc.engines import builders, trial, work
from vlmc.engines.build import _work, build, candidates, reason_not_here, results
from vlmc.engines.candidate import Candidate
from vlmc.errors import VlmcError
from vlmc.files import read_json
from vlmc.profiles import machine
from vlmc.profiles.device import device_names, load_device
from vlmc.records import read_record


def run(artifact: Artifact, device: str, recipe: str) -> tuple[BuildSpec, list[str]]:
    return build(artifact, load_device(device), recipe, lambda *_: None)


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.parent != folder / "cpu"  # the build's own record has a new date
    }


# On this machine


def test_a_build_measures_every_candidate_and_keeps_one(built: Artifact) -> None:
    record = built.build("cpu", "int8")
    assert record.remaining == ""
    assert record.choices.keys() == set(COMPONENTS)
    vision = record.choices["vision_encoder"]
    engines = [f"{backend}-{precision}" for precision in ("fp32", "int8") for backend in ("onnxruntime", "openvino")]
    assert list(vision.candidates) == engines
    assert vision.engine in engines
    assert list(record.choices["decoder"].candidates) == ["onnxruntime-fp32", "onnxruntime-int8"]
    assert record.choices["embed_tokens"].engine == "onnxruntime-fp32"
    for component in ("vision_encoder", "decoder"):
        for engine in record.choices[component].candidates:
            report = built.engine("cpu", component, engine)[0].report
            assert all(ms > 0 for ms in report.latency_ms.values())
            assert 0 < report.work["weight_bytes"] < report.size_bytes
            parts = {"run"} if component == "vision_encoder" else {"prefill", "decode"}
            assert report.latency_ms.keys() == parts
            total = "flops" if component == "vision_encoder" else "prefill_flops"
            assert (report.work[f"int8_{total}"] > 0) == engine.endswith("int8")
            assert 0 <= report.work[f"int8_{total}"] < report.work[total]


def test_what_was_timed_on_another_machine_is_not_said_to_be_timed_here(
    built_copy: Path, in_process: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Artifact(built_copy).build().choices["decoder"].reason
    assert machine.title(gpu=False) in before
    monkeypatch.setattr(machine, "title", lambda gpu: "another machine")
    record, _ = run(Artifact(built_copy), "cpu", "int8")
    assert record.choices["decoder"].reason == before
    (Artifact(built_copy).engine_folder("cpu", "decoder", "onnxruntime-int8") / "model.onnx").unlink()
    record, _ = run(Artifact(built_copy), "cpu", "int8")
    assert "timed on another machine" in record.choices["decoder"].reason


def test_a_second_build_is_all_hits_and_leaves_the_files_as_they_are(
    built_copy: Path, in_process: list[tuple[str, ...]]
) -> None:
    artifact = Artifact(built_copy)
    before, first = content(built_copy / "engines"), artifact.build()
    record, hits = run(artifact, "cpu", "int8")
    assert len(hits) == 7
    assert in_process == []
    assert content(built_copy / "engines") == before
    assert record.choices == first.choices


def test_another_recipe_shares_the_float_engines(built_copy: Path, in_process: list[tuple[str, ...]]) -> None:
    record, hits = run(Artifact(built_copy), "cpu", "w4")
    assert sorted(hits) == [
        "decoder onnxruntime-fp32",
        "embed_tokens onnxruntime-fp32",
        "vision_encoder onnxruntime-fp32",
        "vision_encoder openvino-fp32",
    ]
    assert [step[0] for step in in_process if step[2] != trial.WHOLE] == ["candidate", "trial"]
    assert record.choices["vision_encoder"].engine.endswith("fp32")  # the recipe leaves vision as it is
    assert read_record(BuildSpec, built_copy / "engines" / "cpu" / "w4.json") == record


def test_a_damaged_engine_is_built_again_and_no_other(built_copy: Path, in_process: list[tuple[str, ...]]) -> None:
    damaged = built_copy / "engines" / "cpu" / "decoder" / "onnxruntime-int8" / "model.onnx.data"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-100])
    _, hits = run(Artifact(built_copy), "cpu", "int8")
    assert len(hits) == 6
    steps = [step[:3] for step in in_process if step[2] != trial.WHOLE]
    assert steps == [("candidate", "cpu", "decoder"), ("trial", "cpu", "decoder")]
    assert damaged.read_bytes() == whole


@pytest.mark.parametrize(
    ("recipe", "precisions"),
    [
        ("w8", {"vision_encoder": {"fp32"}, "decoder": {"fp32", "w8"}}),
        ("int8-minmax", {"vision_encoder": {"fp32", "int8-minmax"}, "decoder": {"fp32", "int8-minmax"}}),
        ("fp32", {"vision_encoder": {"fp32"}, "decoder": {"fp32"}}),
    ],
)
def test_every_recipe_builds(
    recipe: str, precisions: dict[str, set[str]], artifact: Artifact, in_process: list[tuple[str, ...]]
) -> None:
    record, hits = run(artifact, "cpu", recipe)
    assert hits == []
    for component, expected in precisions.items():
        found = record.choices[component].candidates or {record.choices[component].engine: {}}
        assert {engine.partition("-")[2] for engine in found} == expected
    for row in results(artifact, record):
        assert (artifact.root / row["folder"] / "engine.json").is_file()
        assert row["kept"] == bool(row["reason"])


def test_what_computes_something_else_is_not_kept(
    artifact: Artifact, in_process: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = trial.try_component

    def int8_is_fast_and_wrong(*arguments: Any) -> dict[str, Any]:
        outcome = tried(*arguments)
        for engine, found in outcome.items():
            found["latency_ms"] = dict.fromkeys(found["latency_ms"], 1.0 if "int8" in engine else 5.0)
            found["agreement"] = 0.5 if "int8" in engine else 1.0
        return outcome

    monkeypatch.setattr(trial, "try_component", int8_is_fast_and_wrong)
    record, _ = run(artifact, "cpu", "int8")
    for component in ("vision_encoder", "decoder"):
        assert record.choices[component].engine == "onnxruntime-fp32"
        assert "onnxruntime-int8 was left out: cosine 0.500" in record.choices[component].reason


def test_what_killed_builds_left_is_neither_used_nor_kept(
    artifact: Artifact, in_process: list[tuple[str, ...]]
) -> None:
    run(artifact, "cpu", "fp32")
    folder = artifact.root / "engines" / "cpu" / "embed_tokens"
    for kind in ("old", "partial"):
        shutil.copytree(folder / "onnxruntime-fp32", folder / f".onnxruntime-fp32.{2**22 + 1}.{kind}")
    (folder / "onnxruntime-fp32" / "model.onnx").write_text("damaged")
    run(Artifact(artifact.root), "cpu", "fp32")
    assert [path.name for path in folder.iterdir()] == ["onnxruntime-fp32"]


def test_progress_is_told(artifact: Artifact, recorded: Callable[..., None]) -> None:
    recorded(mix=40.0, single=60.0)
    told: list[tuple[str, int, int]] = []
    build(artifact, load_device("cpu"), "fp32", lambda *step: told.append(step))
    assert told[0] == ("building vision_encoder onnxruntime-fp32", 0, 4)
    assert [what for what, done, total in told[4:]] == [
        "trying vision_encoder",
        "trying decoder",
        "trying whole answers",
    ]


def test_an_engine_for_another_interpreter_is_built_and_named_and_not_tried(
    artifact: Artifact, in_process: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = replace(load_device("cpu"), backends=("onnxruntime", "onnxruntime_gpu"))
    record, _ = build(artifact, both, "fp32", lambda *_: None)
    vision = record.choices["vision_encoder"]
    assert vision.engine == "onnxruntime-fp32"
    assert vision.candidates["onnxruntime_gpu-fp16"] == {}
    assert vision.candidates["onnxruntime-fp32"]["agreement"] > 0.999  # an engine alone is held against the goldens too
    says = r"^nothing else is offered for it: .* ms.*; onnxruntime_gpu-fp16 was not tried here: this onnxruntime [\d.]+"
    assert re.search(says, vision.reason)
    report = artifact.engine("cpu", "decoder", "onnxruntime_gpu-fp16")[0].report
    assert report.latency_ms == {}
    assert report.work["weight_bytes"] == work.weight_bytes(ir.load(artifact.graph("decoder")), {}, 2)
    assert record.choices["embed_tokens"].candidates == {}

    monkeypatch.setattr(builders.load("onnxruntime_gpu"), "unavailable", lambda: "not installed")
    _, hits = build(artifact, both, "fp32", lambda *_: None)  # what was built elsewhere counts
    assert "decoder onnxruntime_gpu-fp16" in hits
    shutil.rmtree(artifact.engine_folder("cpu", "decoder", "onnxruntime_gpu-fp16"))
    left = [candidate.component for candidate in candidates(artifact, both, "fp32") if "gpu" in candidate.backend]
    assert left == ["vision_encoder"]


# What a run has to do at least


def test_a_step_reads_the_cache_up_to_the_prompt_at_the_width_that_it_has(built: Artifact) -> None:
    candidate = Candidate("cpu", "decoder", "onnxruntime", "fp32")
    spec, _ = built.engine("cpu", "decoder", "onnxruntime-fp32")
    kv, model = built.manifest.kv, ir.load(built.graph("decoder"))
    found = _work(built, candidate, spec)
    length, capacity = int(found["length"]), kv.capacity
    assert 1 < length < capacity
    seen = sum(range(1, length + 1)) / length  # by each position of a prompt: itself and those before it
    assert found["prefill_flops"] == work.flops(model, {"length": length, "capacity": capacity}, seen)
    assert found["decode_flops"] == work.flops(model, {"length": 1, "capacity": capacity}, length)
    assert found["decode_kv_bytes"] == work.kv_bytes(kv, length, 4)
    half = KvContract("append", kv.layers, kv.kv_heads, kv.head_dim, capacity, "float16")
    assert _work(built, candidate, replace(spec, kv=half))["decode_kv_bytes"] == work.kv_bytes(kv, length, 2)


def test_where_tensorrt_chooses_all_may_be_int8(built: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = Candidate("cpu", "vision_encoder", "onnxruntime", "int8")
    spec, _ = built.engine("cpu", "vision_encoder", "onnxruntime-int8")
    planned = _work(built, candidate, spec)
    assert 0 < planned["int8_flops"] < planned["flops"]
    plan = replace(read_plan(built, "int8"), modules={}, samples={"vision_encoder": "samples.npz"})
    monkeypatch.setattr(module, "read_plan", lambda *_: plan)
    implicit = _work(built, candidate, spec)
    assert implicit["int8_flops"] == implicit["flops"] == planned["flops"]
    assert implicit["weight_bytes"] == work.weight_bytes(ir.load(built.graph("vision_encoder")), {}, 1)


# For other machines


def test_what_is_built_ahead_of_time_needs_its_package_here(planned: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders.load("tensorrt_rtx"), "unavailable", lambda: "not installed")
    with pytest.raises(
        VlmcError, match=r"Engines for Dell Pro Max with GB10 cannot be built here\. Found: not install"
    ):
        list(candidates(planned, load_device("gb10"), "int8"))


def test_a_device_of_another_architecture_is_built_for_and_not_measured(
    artifact: Artifact, in_process: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    record, _ = run(artifact, "rpi5", "int8")
    assert {step[0] for step in in_process} == {"candidate"}
    assert record.remaining == load_device("rpi5").handover
    for component in COMPONENTS:
        choice = record.choices[component]
        title = load_device("rpi5").title
        assert choice.reason == f"not measured here: this machine is x86_64, and {title} is aarch64"
        assert artifact.engine("rpi5", component, choice.engine)[0].report.latency_ms == {}
    assert record.choices["decoder"].engine == "onnxruntime-int8"


def test_a_jetson_gets_the_quantised_graph_and_the_sentence(
    artifact: Artifact, in_process: list[tuple[str, ...]]
) -> None:
    record, _ = run(artifact, "orin", "int8")
    assert record.choices["decoder"].engine == "handover-int8"
    assert record.choices["decoder"].reason.startswith(
        f"not measured here: this machine shows no GPU of {load_device('orin').title}: "
    )
    assert record.remaining == load_device("orin").handover
    spec, path = artifact.engine("orin", "vision_encoder", record.choices["vision_encoder"].engine)
    assert (spec.backend, path.name) == ("handover", "model.onnx")


@pytest.mark.parametrize("name", device_names())
def test_every_device_has_candidates_for_every_component(name: str, planned: Artifact) -> None:
    found = list(candidates(planned, load_device(name), "int8"))
    assert {candidate.component for candidate in found} == set(COMPONENTS)
    for component in COMPONENTS:
        own = [candidate for candidate in found if candidate.component == component]
        assert own[0].precision in FLOATS
        assert (own[-1].precision == "int8") == (component != "embed_tokens")


@pytest.mark.parametrize(
    ("only", "vision", "decoder"),
    [
        (["onnxruntime"], {"onnxruntime"}, {"onnxruntime"}),
        (["openvino"], {"openvino"}, {"onnxruntime"}),  # which offers no decoder
        (["openvino", "onnxruntime"], {"onnxruntime", "openvino"}, {"onnxruntime"}),
    ],
)
def test_backends_can_be_chosen_and_count_where_they_offer_the_component(
    only: list[str], vision: set[str], decoder: set[str], planned: Artifact
) -> None:
    found = list(candidates(planned, load_device("cpu"), "int8", only))
    by_component = {name: {c.backend for c in found if c.component == name} for name in COMPONENTS}
    assert by_component == {"vision_encoder": vision, "embed_tokens": {"onnxruntime"}, "decoder": decoder}


def test_a_graph_waits_for_the_backend_that_was_chosen_and_no_other_engine_is_made(planned: Artifact) -> None:
    found = list(candidates(planned, load_device("h100"), "int8", ["tensorrt"]))
    assert {(c.component, c.backend) for c in found} == {
        ("vision_encoder", "handover"),
        ("decoder", "handover"),
        ("embed_tokens", "numpy"),
    }


def test_this_machine_is_known_by_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = load_device("cpu")
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    assert reason_not_here(cpu) == ""
    assert "x86_64" in reason_not_here(load_device("rpi5"))
    assert "Jetson" in reason_not_here(load_device("orin"))
    assert reason_not_here(replace(cpu, sm=90))


@pytest.mark.parametrize(
    ("missing", "component"), [(["onnxruntime"], "embed_tokens"), (["onnxruntime", "openvino"], "vision_encoder")]
)
def test_a_component_that_no_backend_can_build_is_named_with_the_reasons(
    missing: list[str], component: str, planned: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.setattr(builders.load(name), "unavailable", lambda: "not installed")
    says = (
        rf"No backend of the device 'cpu' can build the {component} here. Found: onnxruntime: not installed; openvino: "
    )
    with pytest.raises(VlmcError, match=says):
        list(candidates(planned, load_device("cpu"), "int8"))


def test_without_a_plan_nothing_is_built(artifact: Artifact, in_process: list[tuple[str, ...]]) -> None:
    artifact.plan_path("int8").unlink()
    with pytest.raises(VlmcError, match=r"no plan for the recipe 'int8'.*vlmc calibrate"):
        run(artifact, "cpu", "int8")
    assert not (artifact.root / "engines").exists()


def test_a_recipe_that_the_device_cannot_do_is_said_where_it_matters(
    artifact: Artifact, in_process: list[tuple[str, ...]]
) -> None:
    record, _ = run(artifact, "orin", "w8")
    assert record.choices["decoder"].engine == "handover-fp16"
    assert "; w8 is not offered: its weights in blocks need TensorRT 10.15" in record.choices["decoder"].reason
    assert "w8" not in record.choices["vision_encoder"].reason  # the recipe leaves it alone anyway


def test_an_engine_for_a_gb10_is_made_on_a_machine_without_a_gpu(
    artifact: Artifact, in_process: list[tuple[str, ...]]
) -> None:
    record, _ = run(artifact, "gb10", "int8")
    spec, path = artifact.engine("gb10", "decoder", "tensorrt_rtx-int8")
    assert record.choices["decoder"].engine == "tensorrt_rtx-int8"
    assert (spec.settings["sm"], path.name) == (121, "engine.trt")
    assert spec.report.products["int8"] > 0


@pytest.mark.parametrize("times", [{"later": 1.0}, {"run": 0.0}])
def test_times_that_no_trial_finds_are_found_again(
    times: dict[str, float], built_copy: Path, in_process: list[tuple[str, ...]]
) -> None:
    path = built_copy / "engines/cpu/vision_encoder/openvino-int8/engine.json"
    record = read_json(path)
    path.write_text(json.dumps(record | {"report": record["report"] | {"latency_ms": times}}))
    run(Artifact(built_copy), "cpu", "int8")
    assert in_process[0][:3] == ("trial", "cpu", "vision_encoder")
