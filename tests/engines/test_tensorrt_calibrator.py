"""TensorRT's own INT8 calibration, as TensorRT would go through it: batch after batch, then its cache.

TensorRT is a stand-in here that reads what it is given from the addresses; what the scales are worth shows on a GPU.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vlmc.artifact import Artifact
from vlmc.calibration import samples
from vlmc.calibration.plan import read_plan, write_plan
from vlmc.engines import build as stage
from vlmc.engines import builders, candidate, tensorrt_network, tensorrt_piece
from vlmc.engines.build import candidates, quantises
from vlmc.engines.builders import tensorrt as builder
from vlmc.engines.candidate import Candidate
from vlmc.errors import VlmcError
from vlmc.profiles.device import load_device

H100 = load_device("h100")
VISION = Candidate("h100", "vision_encoder", "tensorrt", "int8-implicit")


class Gpu:
    """Device memory by address; an upload counts once it was waited for."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.queued: dict[int, Any] = {}

    def allocate(self, size: int) -> int:
        self.memory[1000 + len(self.memory)] = None
        return 999 + len(self.memory)

    def upload(self, address: int, array: Any) -> None:
        self.queued[address] = array.copy()

    def wait(self) -> None:
        self.memory |= self.queued


class TensorRT:
    """What TensorRT was asked to do in the builds so far."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.flags: list[str] = []
        self.shapes: dict[str, Sequence[tuple[int, ...]]] = {}
        self.calibrators: list[Any] = []
        self.batches: list[Any] = []

    def serialise(self, parsed: Any, profiles: Any, configure: Callable[[Any], None]) -> bytes:
        def profile_of(profile: Any) -> None:
            self.shapes = profile.shapes

        config = SimpleNamespace(set_flag=self.flags.append, set_calibration_profile=profile_of, int8_calibrator=None)
        configure(config)
        if (calibrator := config.int8_calibrator) is None:
            return b"an engine without calibration"
        self.calibrators.append(calibrator)
        assert calibrator.get_batch_size() == 1
        if calibrator.read_calibration_cache() is None:
            while (addresses := calibrator.get_batch(["pixel_values"])) is not None:
                self.batches += [self.gpu.memory[address] for address in addresses]
            calibrator.write_calibration_cache(memoryview(b"scales"))
        return b"an engine with " + calibrator.read_calibration_cache()


def profile() -> Any:
    shapes: dict[str, Any] = {}
    return SimpleNamespace(shapes=shapes, set_shape=lambda name, *sizes: shapes.update({name: sizes}))


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    """TensorRT 8.6 and a GPU that are not there."""
    module, gpu = ModuleType("tensorrt"), Gpu()
    module.__dict__.update(
        {name: type(name, (), {}) for name in ("IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator")}
        | {"__version__": "8.6.0", "ProfilingVerbosity": SimpleNamespace(DETAILED=0), "float32": 0, "float16": 1}
        | {"BuilderFlag": SimpleNamespace(FP16="FP16", INT8="INT8", PREFER_PRECISION_CONSTRAINTS="PREFER")}
    )
    made = TensorRT(gpu)
    network = SimpleNamespace(num_layers=0, num_inputs=0, num_outputs=0)
    made_by = SimpleNamespace(create_optimization_profile=profile)
    parsed = SimpleNamespace(network=network, builder=made_by, errors=[])
    cache = SimpleNamespace(use=lambda config: None, keep=lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(tensorrt_network, "parse", lambda *_: parsed)
    monkeypatch.setattr(tensorrt_network, "serialise", made.serialise)
    monkeypatch.setattr(tensorrt_piece, "_TimingCache", lambda *_: cache)
    monkeypatch.setattr(tensorrt_piece, "_inspected", lambda *_: {"products": {}, "scratch_bytes": 0, "layers": 1})
    monkeypatch.setattr(builder.cuda, "Gpu", lambda: gpu)
    monkeypatch.setattr(builder.cuda, "architecture", lambda: 90)
    return made


@pytest.fixture
def artifact(planned: Artifact, tmp_path: Path) -> Artifact:
    return Artifact(Path(shutil.copytree(planned.root, tmp_path / "tiny")))


def engine(artifact: Artifact, one: Candidate = VISION) -> bytes:
    candidate.build(artifact, one)
    return (one.folder(artifact) / "engine.trt").read_bytes()


def test_tensorrt_gets_the_plans_samples_one_by_one_in_one_shape(artifact: Artifact, trt: TensorRT) -> None:
    assert engine(artifact) == b"an engine with scales"
    kept = samples.read(artifact, read_plan(artifact, "int8-implicit"), "vision_encoder")
    assert len(trt.batches) == len(kept) == 3
    for batch, sample in zip(trt.batches, kept, strict=True):
        assert batch.dtype == np.float32
        np.testing.assert_array_equal(batch, sample["pixel_values"])
    assert trt.shapes == {"pixel_values": ((1, 3, 32, 32),) * 3}
    assert trt.flags == ["FP16", "PREFER", "INT8"]
    assert type(trt.calibrators[0]).__base__.__name__ == "IInt8EntropyCalibrator2"


def test_the_graph_has_no_scales_of_ours(artifact: Artifact, trt: TensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(builder.ir, "save", lambda model, *_, **__: seen.extend(node.op_type for node in model.graph))
    engine(artifact)
    assert "MatMul" in seen
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(seen)


def test_the_cache_is_in_the_artefact_and_used_a_second_time(artifact: Artifact, trt: TensorRT) -> None:
    engine(artifact)
    (cache,) = (artifact.root / "engines" / "h100").glob("calibration-vision_encoder-*.cache")
    assert cache.read_bytes() == b"scales"
    cache.write_bytes(b"the same scales")
    shutil.rmtree(VISION.folder(artifact))
    assert engine(artifact) == b"an engine with the same scales"
    assert len(trt.batches) == 3


def test_another_plan_is_calibrated_anew(artifact: Artifact, trt: TensorRT) -> None:
    engine(artifact)
    plan = read_plan(artifact, "int8-implicit")
    write_plan(artifact, replace(plan, notes=("another plan",)))
    engine(artifact)
    assert len(trt.batches) == 6


def test_the_observer_chooses_the_calibrator(artifact: Artifact, trt: TensorRT) -> None:
    engine(artifact, replace(VISION, precision="int8-implicit-minmax"))
    assert type(trt.calibrators[0]).__base__.__name__ == "IInt8MinMaxCalibrator"


def test_other_recipes_are_not_calibrated_by_tensorrt(artifact: Artifact, trt: TensorRT) -> None:
    for precision in ("fp16", "int8"):
        assert engine(artifact, replace(VISION, precision=precision)) == b"an engine without calibration"


def test_altered_samples_end_the_build(artifact: Artifact, trt: TensorRT) -> None:
    (path,) = (artifact.root / "plans").glob("int8-implicit.vision_encoder.*.npz")
    path.write_bytes(b"")
    with pytest.raises(VlmcError, match="truncated or altered"):
        engine(artifact)


# Who is offered it


def test_it_is_offered_where_tensorrt_has_it_and_refused_in_a_sentence_elsewhere(artifact: Artifact) -> None:
    tensorrt = builders.load("tensorrt")

    def refusal(module: ModuleType, component: str = "vision_encoder", version: str = "8.6") -> str:
        return stage.refuses(module, component, "int8-implicit", replace(H100, tensorrt=version))

    assert refusal(tensorrt) == refusal(tensorrt, version="10.3") == ""
    assert "needs weak typing, up to 10.11, and H100 SXM 80 GB has 11.0" in refusal(tensorrt, version="11.0")
    assert "caches" in refusal(tensorrt, "decoder")
    for name in ("handover", "onnxruntime", "onnxruntime_gpu", "openvino", "tensorrt_rtx"):
        assert "found by TensorRT (up to 10.11) while it builds on the device" in refusal(builders.load(name))
    assert quantises(artifact, "vision_encoder", "int8-implicit")
    assert not quantises(artifact, "decoder", "int8-implicit")


def test_on_the_device_it_is_a_candidate(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders.load("tensorrt"), "unavailable", lambda: "")
    found = [c.engine for c in candidates(artifact, H100, "int8-implicit") if c.component != "embed_tokens"]
    both = ["tensorrt-fp16", "onnxruntime_gpu-fp16"]
    assert found == [*both, "tensorrt-int8-implicit", *both]


@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_elsewhere_the_float_engine_is_built_and_the_sentence_said(
    device: str, artifact: Artifact, in_process: list[tuple[str, ...]]
) -> None:
    record, _ = stage.build(artifact, load_device(device), "int8-implicit", lambda *_: None)
    reason = record.choices["vision_encoder"].reason
    assert (  # what a mix of backends took may follow
        "; int8-implicit is not offered: its INT8 scales are found by TensorRT (up to 10.11) while it "
        "builds on the device"
    ) in reason
    assert "int8-implicit" not in record.choices["decoder"].reason


# What the same stand-in shows of a build


@pytest.mark.parametrize("bad", [1, 2])
def test_an_engine_that_cannot_run_is_built_once_more(
    bad: int, artifact: Artifact, trt: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT 8.6 builds CLIP's text encoder so at times: then the next engine may run, of the same network."""
    built = iter(range(9))
    monkeypatch.setattr(tensorrt_network, "serialise", lambda *_: f"engine {next(built)}".encode())

    def inspected(trt: Any, parsed: Any, engine: bytes, weak: bool) -> dict[str, Any]:
        if int(engine.split()[1]) < bad:
            raise VlmcError(f"{engine.decode()} cannot run")
        return {"products": {}, "scratch_bytes": 0, "layers": 1}

    monkeypatch.setattr(tensorrt_piece, "_inspected", inspected)
    one = replace(VISION, precision="fp16")
    if bad == 1:
        assert engine(artifact, one) == b"engine 1"
    else:
        with pytest.raises(VlmcError, match="engine 1 cannot run"):
            engine(artifact, one)


@pytest.mark.parametrize(("precision", "scales"), [("fp16", False), ("int8", True), ("int8", False)])
def test_int8_is_allowed_where_the_network_has_scales(
    precision: str, scales: bool, artifact: Artifact, trt: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece of an int8 decoder that only looks embeddings up has none, and 8.6 ends a build in INT8 without."""
    monkeypatch.setattr(tensorrt_piece, "_quantised", lambda parsed: scales)
    engine(artifact, replace(VISION, precision=precision))
    assert trt.flags == ["FP16", "PREFER"] + ["INT8"] * scales


def test_the_network_is_off_the_disk_once_it_is_read(
    artifact: Artifact, trt: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serialise(*_: Any) -> bytes:
        assert not list(artifact.root.rglob("lowered.onnx*"))
        return b"made"

    monkeypatch.setattr(tensorrt_network, "serialise", serialise)
    assert engine(artifact, replace(VISION, precision="fp16")) == b"made"


def test_memory_of_other_processes_of_the_builder_counts(
    artifact: Artifact, trt: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, usual = replace(VISION, precision="fp16"), builder.build
    monkeypatch.setattr(builder, "build", lambda *given: replace(usual(*given), others_bytes=10**15))
    spec = candidate.build(artifact, one)
    assert spec.report.peak_memory_bytes > 10**15


def test_only_a_decoder_is_cut(artifact: Artifact, trt: TensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "piece_bytes", lambda size, precision: 1)
    engine(artifact, replace(VISION, precision="fp16"))
    spec, _ = artifact.engine("h100", "vision_encoder", "tensorrt-fp16")
    assert "pieces" not in spec.settings


class Exact:
    """A layer of a norm that the graph spells out, typed float32."""

    typed = True

    def reset_precision(self) -> None:
        self.typed = False

    def reset_output_type(self, index: int) -> None:
        assert index == 0 and not self.typed


REGION = "10: Could not find any implementation for node {ForeignNode[a...b]}"


@pytest.mark.parametrize(
    ("refusals", "layers", "left"),
    [([], 2, 0), ([REGION], 2, 2), ([REGION, REGION], 2, None), ([REGION], 0, None), (["out of memory"], 2, None)],
    ids=["built at once", "then in FP16", "refused again", "without such norms", "for another reason"],
)
def test_norms_that_a_graph_spells_out_are_left_to_fp16_where_there_is_no_kernel(
    refusals: list[str],
    layers: int,
    left: int | None,
    artifact: Artifact,
    trt: TensorRT,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gemma 3n's decoder by 8.6 (docs/experiments.md)."""
    exact, waiting = [Exact() for _ in range(layers)], list(refusals)

    def serialise(parsed: Any, *_: Any) -> bytes:
        if waiting:
            raise VlmcError("TensorRT does not build the decoder", found=waiting.pop(0))
        return b"made"

    monkeypatch.setattr(tensorrt_piece, "_type_weakly", lambda *_: exact)
    monkeypatch.setattr(tensorrt_network, "serialise", serialise)
    one = replace(VISION, precision="fp16")
    if left is None:
        with pytest.raises(VlmcError, match=refusals[-1][:9]):
            engine(artifact, one)
    else:
        assert engine(artifact, one) == b"made"
        assert artifact.engine("h100", "vision_encoder", "tensorrt-fp16")[0].settings["half_norms"] == left
        assert [layer.typed for layer in exact] == [left == 0] * layers
