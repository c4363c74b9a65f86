"""Goldens: what every later stage is checked against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import golden
from vlmc.exporter.family import Components
from vlmc.exporter.torch_runner import torch_session
from vlmc.runtime.images import open_image
from vlmc.runtime.session import Session


@pytest.fixture
def session(tiny: Artifact, components: Components) -> Session:
    return torch_session(tiny, components)


def test_cases_are_the_rows_of_the_set_and_their_pictures(tmp_path: Path, picture_set: Path) -> None:
    cases = golden.write_pictures(tmp_path, 2, picture_set)
    assert [case.image for case in cases] == ["golden/00.png", "golden/01.png"]
    assert cases[1].prompt == "How many red boats, 1 or 2?"
    for index, case in enumerate(cases):
        original = open_image(picture_set.parent / f"{index}.png")
        assert open_image(tmp_path / case.image).tobytes() == original.tobytes()


def test_without_a_set_the_demos_pictures_are_taken_every_task_in_turn(tmp_path: Path) -> None:
    cases = golden.write_pictures(tmp_path, 5, None)
    assert len({case.task for case in cases}) == 5
    assert len({(tmp_path / case.image).read_bytes() for case in cases}) == 5


def test_the_recorded_arrays_are_what_the_parts_give(tiny: Artifact, session: Session) -> None:
    cases, arrays = golden.read(tiny)
    inputs = session.prepare([open_image(tiny.root / cases[1]["image"])], cases[1]["prompt"])
    np.testing.assert_array_equal(arrays["1.pixel_values"], inputs.vision["pixel_values"])
    np.testing.assert_array_equal(arrays["1.input_ids"], inputs.input_ids)
    features = session.vision.run(inputs.vision)["image_features"]
    np.testing.assert_array_equal(arrays["1.image_features"], features)
    np.testing.assert_array_equal(arrays["1.inputs_embeds"], session.embed_prompt(inputs, features)["inputs_embeds"])
    assert arrays["1.step_tokens"].tolist() == cases[1]["tokens"][: golden.STEPS]
    assert arrays["1.step_logits"].argmax(axis=1).tolist() == cases[1]["tokens"][1 : golden.STEPS + 1]
    assert "2.pixel_values" not in arrays


def test_a_margin_is_by_how_much_the_token_won(tiny: Artifact) -> None:
    cases, arrays = golden.read(tiny)
    for index in range(golden.DETAILED):
        logits = np.sort(arrays[f"{index}.prefill_logits"])
        assert cases[index]["margins"][0] == pytest.approx(logits[-1] - logits[-2], abs=1e-6)
        assert len(cases[index]["margins"]) == len(cases[index]["tokens"])


def test_an_answer_that_ends_at_once_has_no_steps(tiny: Artifact, session: Session, monkeypatch: Any) -> None:
    case = golden.read(tiny)[0][0]
    found = golden.detail(session, tiny.root / case["image"], case["prompt"], [])
    assert found["step_logits"].shape == (0, 336)
    assert found["step_tokens"].shape == (0,)


def test_steps_end_where_the_cache_does(tiny: Artifact, session: Session) -> None:
    case = golden.read(tiny)[0][0]
    length = len(golden.read(tiny)[1]["0.input_ids"])
    for room in (0, 2):
        session.decoder.capacity = length + room
        found = golden.detail(session, tiny.root / case["image"], case["prompt"], case["tokens"])
        assert len(found["step_logits"]) == room


def test_logits_that_are_no_numbers_are_one_sentence(
    tiny: Artifact, session: Session, components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = components.decoder.forward
    monkeypatch.setattr(components.decoder, "forward", lambda *inputs: (forward(*inputs)[0] * np.nan, inputs[-1]))
    case = golden.Case("golden/00.png", "What?", "")
    with pytest.raises(VlmcError, match="logits are not finite"):
        list(golden.record(session, tiny.root, [case], {"max_new_tokens": 2}))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[]", "line 2 is no JSON object"),
        ('{"image": "0.png"}', "line 2 lacks 'prompt'"),
        ('{"image": "0.png", "prompt": null}', "line 2 has no text in 'prompt'"),
        ('{"image": "gone.png", "prompt": "?"}', r"a picture that is not there. Found: .*gone\.png"),
        ('{"image": "set.jsonl", "prompt": "?"}', "not a picture"),
        ("[" * 100_000, "line 2 is"),
    ],
)
def test_a_row_that_is_none_is_named(line: str, says: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"image": "0.png", "prompt": "?"}) + "\n" + line)
    (tmp_path / "out").mkdir()
    with pytest.raises(VlmcError, match=says):
        golden.write_pictures(tmp_path / "out", 2, path)


def test_a_set_that_is_too_short_or_unreadable_is_named(tmp_path: Path, picture_set: Path) -> None:
    with pytest.raises(VlmcError, match=r"too few pictures for the goldens. Found: 3. Expected: 4.*--cases"):
        golden.write_pictures(tmp_path, 4, picture_set)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, says in (
        ("binary.jsonl", r"binary\.jsonl is not UTF-8 text"),
        ("gone.jsonl", "There is no set of pictures"),
    ):
        (tmp_path / name.split(".")[0]).mkdir()
        with pytest.raises(VlmcError, match=says):
            golden.write_pictures(tmp_path / name.split(".")[0], 1, tmp_path / name)
