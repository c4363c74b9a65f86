"""The GPU baselines' own loop, run on the CPU: what stays on the device there gives the tokens of plain PyTorch."""

from __future__ import annotations

import functools
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from vlmc.artifact import Artifact, ComponentSpec, MatchSpec, TensorSpec
from vlmc.calibration import baseline, cuda_baseline
from vlmc.exporter import golden, onnx_ops
from vlmc.exporter.family import Components
from vlmc.exporter.matching import Encoders
from vlmc.runtime.matching import Matcher


@pytest.fixture(autouse=True)
def fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_ops, "fixed_shapes", lambda past: True)


def test_a_decoder_over_the_whole_capacity_chooses_the_golden_tokens(planned: Artifact) -> None:
    session = cuda_baseline.open_session(planned, "fp32", "eager", where="cpu")
    cases, arrays = golden.read(planned)
    for index, case in enumerate(cases[:2]):  # those whose inputs are kept
        first = session.decoder.prefill(arrays[f"{index}.inputs_embeds"])
        assert [first, *session.decoder.decode(len(case["tokens"]) - 1)] == case["tokens"]


def test_half_precision_stays_near_the_golden_outputs(planned: Artifact) -> None:
    session = cuda_baseline.open_session(planned, "fp32", "eager", where="cpu")
    arrays = golden.read(planned)[1]
    features = session.vision.run({"pixel_values": arrays["0.pixel_values"]})["image_features"]
    assert features.dtype == np.float32
    assert features == pytest.approx(arrays["0.image_features"], abs=0.05)
    session.decoder.prefill(arrays["0.inputs_embeds"])
    for token, logits in zip(arrays["0.step_tokens"], arrays["0.step_logits"], strict=True):
        session.decoder.feed(int(token))
        assert session.decoder.logits() == pytest.approx(logits, abs=0.1)


def test_angles_far_on_are_those_of_float32(tiny_components: Components) -> None:
    """Frequencies in float16 put cosines off by 0.24 within 1,024 places of a decoder of Llama's sizes."""
    exact = deepcopy(tiny_components.decoder)
    decoder: Any = cuda_baseline.halved(deepcopy(tiny_components.decoder))
    places, hidden = torch.arange(1000, 1024)[None], torch.zeros(1, 24, 1)
    for found, wanted in zip(
        decoder.model.rotary_emb(hidden.half(), places), exact.model.rotary_emb(hidden, places), strict=True
    ):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), wanted, atol=1e-3, rtol=0)
    assert {weight.dtype for weight in decoder.parameters()} == {torch.float16}


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(3, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return nn.functional.normalize(self.projection(pixel_values.mean(dim=(2, 3))), dim=-1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2000, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.normalize(self.table(input_ids).mean(dim=1), dim=-1)


@pytest.fixture
def matching(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """Of two encoders, which are as small as can be."""
    torch.manual_seed(0)
    encoders = Encoders(Pixels(), Words(), torch.tensor(20.0), text_length=16, vocabulary=2000)
    specs = {
        "vision_encoder": artifact.manifest.components["vision_encoder"],
        "text_encoder": ComponentSpec(
            "none", (TensorSpec("input_ids", "", ()),), (TensorSpec("text_features", "", ()),), 0
        ),
    }
    opened = Artifact(artifact.root)
    opened.manifest = replace(artifact.manifest, components=specs, matching=MatchSpec(20.0, 16, (), (), 0))
    for room in (baseline, cuda_baseline):
        monkeypatch.setattr(room, "load_components", lambda _: deepcopy(encoders))
    return opened


def test_a_model_without_a_decoder_is_a_matcher_in_half_precision(matching: Artifact) -> None:
    there = cuda_baseline.open_session(matching, "fp32", "eager", where="cpu")
    here = baseline.open_session(matching, "fp32")
    assert isinstance(there, Matcher) and isinstance(here, Matcher)
    assert {p.dtype for runner in (there.vision, there.text) for p in runner._component.parameters()} == {torch.float16}
    images, texts = [Image.new("RGB", (40, 40), "red")], ["two red cats", "yes"]
    found, expected = there.match(images, texts).cosines, here.match(images, texts).cosines
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=0.01)


def test_golden_texts_of_every_length_are_captured_before_they_are_timed(
    matching: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = []

    def capture(run: Any) -> Any:
        captured.append(run())
        return captured[-1], lambda: captured[-1].copy_(run())

    monkeypatch.setattr(cuda_baseline, "_captured", capture)
    prompts = ["yes", "two red cats", "no"]
    monkeypatch.setattr(golden, "read", lambda _: ([{"prompt": prompt} for prompt in prompts], {}))
    matcher = cuda_baseline.open_session(matching, "fp32", "graph", where="cpu")
    assert isinstance(matcher, Matcher)
    lengths = len({matcher.encode([prompt]).shape for prompt in prompts})
    assert len(captured) == lengths > 1
    matcher.text_features(prompts[:1])
    assert len(captured) == lengths


def test_texts_of_more_lengths_than_torch_compiles_for_run_compiled(
    matching: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def backend(module: Any, _: Any) -> Any:
        return lambda *inputs: runs.append(module) or module(*inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(cuda_baseline, "_captured", lambda run: (run(), lambda: None))
    prompts = ["a" * count for count in range(1, 40)]
    monkeypatch.setattr(golden, "read", lambda _: ([{"prompt": prompt} for prompt in prompts], {}))
    matcher = cuda_baseline.open_session(matching, "fp32", "compile", where="cpu")
    assert isinstance(matcher, Matcher)
    assert len(runs) == len({matcher.encode([prompt]).shape for prompt in prompts}) > 8


def test_fake_quant_there_is_fake_quant_here(planned: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = golden.read(planned)[1]
    there = cuda_baseline.open_session(planned, "int8", "eager", where="cpu")
    there.decoder.prefill(arrays["0.inputs_embeds"])
    monkeypatch.setattr(onnx_ops, "fixed_shapes", lambda past: False)
    here = baseline.open_session(planned, "int8")
    here.decoder.prefill(arrays["0.inputs_embeds"])
    assert np.corrcoef(there.decoder.logits(), here.decoder.logits())[0, 1] > 0.999
