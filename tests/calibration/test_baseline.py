"""The PyTorch baselines are sessions like any other: eager float, and fake-quant from a plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vlmc.artifact import Artifact
from vlmc.calibration import baseline, recipes
from vlmc.calibration.calibrate import plan_for
from vlmc.calibration.fake_quant import QuantisedLinear
from vlmc.calibration.plan import write_plan
from vlmc.calibration.sets import load_set
from vlmc.errors import VlmcError
from vlmc.runtime.images import open_image


@pytest.fixture(autouse=True)
def checkpoint(components: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "load_components", lambda artifact: components)


def answer(session: Any, set_file: Any) -> list[int]:
    row = load_set(set_file).rows[0]
    return list(session.generate(session.prepare([open_image(row.image)], row.prompt), 8, ignore_eos=True))


def test_fp32_answers_as_the_model_does_and_needs_no_plan(artifact: Artifact, session: Any, set_file: Any) -> None:
    assert answer(baseline.open_session(artifact, "fp32"), set_file) == answer(session, set_file)


def test_fake_quant_answers_with_quantised_layers(
    artifact: Artifact, session: Any, components: Any, set_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(session, components, recipes.load("int8"), load_set(set_file), lambda *_: None)
    write_plan(artifact, plan)
    used = []
    forward = QuantisedLinear.forward
    monkeypatch.setattr(QuantisedLinear, "forward", lambda self, x: used.append(self) or forward(self, x))
    opened = baseline.open_session(artifact, "int8")
    assert len(answer(opened, set_file)) == 8
    assert len(set(used)) == sum(module.weight_bits > 0 for module in plan.modules.values())
    row = load_set(set_file).rows[0]
    inputs = session.prepare([open_image(row.image)], row.prompt)
    next(opened.generate(inputs))
    next(session.generate(inputs))
    difference = abs(opened.decoder.logits() - session.decoder.logits()).max()
    assert 0 < difference < 0.2 * abs(session.decoder.logits()).max()


def test_without_a_plan_it_says_how_to_make_one(artifact: Artifact) -> None:
    artifact.plan_path("w8").unlink(missing_ok=True)
    with pytest.raises(VlmcError, match=r"vlmc calibrate .* --recipe w8"):
        baseline.open_session(artifact, "w8")


def test_threads_are_torchs(artifact: Artifact) -> None:
    before = torch.get_num_threads()
    try:
        baseline.open_session(artifact, "fp32", threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
