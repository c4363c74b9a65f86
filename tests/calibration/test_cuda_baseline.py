"""The GPU baselines' own loop, run on the CPU: what stays on the device there gives the tokens of plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
from vlmc.artifact import Artifact
from vlmc.calibration import baseline, cuda_baseline
from vlmc.exporter import golden, onnx_ops


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


def test_fake_quant_there_is_fake_quant_here(planned: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = golden.read(planned)[1]
    there = cuda_baseline.open_session(planned, "int8", "eager", where="cpu")
    there.decoder.prefill(arrays["0.inputs_embeds"])
    monkeypatch.setattr(onnx_ops, "fixed_shapes", lambda past: False)
    here = baseline.open_session(planned, "int8")
    here.decoder.prefill(arrays["0.inputs_embeds"])
    assert np.corrcoef(there.decoder.logits(), here.decoder.logits())[0, 1] > 0.999
