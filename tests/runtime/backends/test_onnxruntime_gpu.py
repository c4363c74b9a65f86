"""ONNX Runtime's CUDA provider: the float16 engines as built for it, run by the CPU provider against PyTorch's outputs,
and what it says where there is no CUDA. What only a GPU shows is in benchmarks/.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from vlmc.artifact import Artifact
from vlmc.calibration.plan import read_plan
from vlmc.engines import builders
from vlmc.engines.builders import onnxruntime_gpu as builder
from vlmc.engines.passes import quantize
from vlmc.engines.trial import cosine
from vlmc.errors import VlmcError
from vlmc.exporter import golden
from vlmc.profiles.device import load_device
from vlmc.runtime import backends
from vlmc.runtime.backends import onnxruntime_gpu as backend
from vlmc.runtime.backends.onnxruntime import OnnxDecoder, OnnxRunner
from vlmc.runtime.images import open_image
from vlmc.runtime.session import Session

CPU = "CPUExecutionProvider"
H100 = load_device("h100")


def build(artifact: Artifact, component: str, precision: str, folder: Path) -> tuple[builders.Built, Path]:
    model = ir.load(artifact.graph(component))
    if precision != "fp16":
        quantize.apply(model, read_plan(artifact, precision), component)
    folder.mkdir()
    kv, cache = artifact.manifest.kv, folder / "timing.cache"
    job = builders.Job(component, precision, H100, kv, folder, lambda: pytest.fail("not needed"), {}, cache)
    built = builder.build(model, job)
    return built, folder / built.file


def decoder(artifact: Artifact, precision: str, folder: Path) -> OnnxDecoder:
    built, path = build(artifact, "decoder", precision, folder)
    embed = OnnxRunner(backend.started(artifact.graph("embed_tokens"), 1, CPU))
    assert built.kv is not None
    return OnnxDecoder(backend.started(path, 1, CPU), built.kv, embed, where="cpu")


@pytest.fixture(scope="module")
def session(planned: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The float16 engines, on the CPU provider."""
    folder = tmp_path_factory.mktemp("gpu")
    _, vision = build(planned, "vision_encoder", "fp16", folder / "vision")
    made = decoder(planned, "fp16", folder / "decoder")
    return Session(planned, OnnxRunner(backend.started(vision, 1, CPU)), made._embed, made)


def test_the_float16_engines_give_pytorchs_features_and_tokens(session: Session, planned: Artifact) -> None:
    cases, arrays = golden.read(planned)
    for index in (0, 1):
        found = session.vision.run({"pixel_values": arrays[f"{index}.pixel_values"]})["image_features"]
        assert found.dtype == np.float32
        assert cosine(found, arrays[f"{index}.image_features"]) > 0.9999
    for case in cases:
        inputs = session.prepare([open_image(planned.root / case["image"])], case["prompt"])
        assert list(session.generate(inputs, len(case["tokens"]))) == case["tokens"]


def test_every_step_has_pytorchs_logits(session: Session, planned: Artifact) -> None:
    arrays = golden.read(planned)[1]
    session.decoder.prefill(arrays["0.inputs_embeds"])
    assert cosine(session.decoder.logits(), arrays["0.prefill_logits"]) > 0.999
    for token, logits in zip(arrays["0.step_tokens"], arrays["0.step_logits"], strict=True):
        session.decoder.feed(int(token))
        assert cosine(session.decoder.logits(), logits) > 0.999


def test_the_cache_is_float16_and_written_in_place(session: Session, planned: Artifact) -> None:
    made: Any = session.decoder
    before = [state.data_ptr() for state in made._states]
    prompt = golden.read(planned)[1]["0.inputs_embeds"]
    made.prefill(prompt)
    made.decode(2)
    filled = prompt.shape[1] + 2
    for state in made._states:
        assert state.numpy().dtype == np.float16
        assert np.abs(state.numpy()[0, :, :filled].astype(np.float32)).max(axis=(0, 2)).min() > 0
    assert [state.data_ptr() for state in made._states] == before


@pytest.mark.parametrize("precision", ["w4", "w8"])
def test_packed_weights_compute_what_the_plan_says(precision: str, planned: Artifact, tmp_path: Path) -> None:
    """Against the same blocks on the CPU's backend, in float32 there."""
    made = decoder(planned, precision, tmp_path / "gpu")
    model = ir.load(planned.graph("decoder"))
    quantize.apply(model, read_plan(planned, precision), "decoder")
    (tmp_path / "cpu").mkdir()
    job = builders.Job(
        "decoder", precision, load_device("cpu"), planned.manifest.kv, tmp_path / "cpu", ir.Model, {}, tmp_path / "t"
    )
    built = builders.load("onnxruntime").build(model, job)
    spec: Any = SimpleNamespace(kv=built.kv, settings=built.settings)
    other = backends.onnxruntime.load_decoder(spec, tmp_path / "cpu" / built.file, made._embed, 1)
    prompt = golden.read(planned)[1]["0.inputs_embeds"]
    for one in (made, other):
        one.prefill(prompt)
        one.feed(40)
    assert cosine(made.logits(), other.logits()) > 0.999


# Without CUDA


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no CUDA provider; install onnxruntime-gpu" in backend.unavailable()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [backend.PROVIDER, CPU])
    monkeypatch.setattr(backend, "DRIVER", "libno-such-driver.so.1")
    assert backend.unavailable() == "no NVIDIA driver is installed"
    for answer, says in ((100, "the NVIDIA driver shows no usable GPU"), (0, "")):
        driver = SimpleNamespace(cuInit=lambda flags, answer=answer: answer)
        monkeypatch.setattr(ctypes, "CDLL", lambda name, driver=driver: driver)
        assert backend.unavailable() == says
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime-gpu" in backend.unavailable()


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_fell_back_to_the_cpu_is_refused(
    planned: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    with pytest.raises(VlmcError, match=r"on the GPU\. Found: CPUExecutionProvider\. Expected: CUDAExecutionProvider"):
        backend.started(planned.graph("embed_tokens"), 1)
