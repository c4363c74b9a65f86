"""Pictures and texts become cosines and probabilities, whatever runs the encoders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from vlmc.artifact import Artifact, MatchSpec
from vlmc.errors import VlmcError
from vlmc.runtime.matching import TEXTS, Matcher, Matches, rows

SPEC = {"logit_scale": 10.0, "text_length": 12, "begin_token_ids": [7], "end_token_ids": [8, 9], "pad_token_id": 3}
COSINES = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.floats(-1, 1, width=32)
)


class Encoder:
    """Features from the first number of each row; keeps what it was given."""

    def __init__(self, output: str) -> None:
        self.output, self.seen = output, list[np.ndarray]()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        (value,) = inputs.values()
        self.seen.append(value)
        angle = value.reshape(len(value), -1)[:, 1:2].astype(np.float32)
        return {self.output: np.hstack([np.cos(angle), np.sin(angle)])}


@pytest.fixture
def artifact(tiny: Artifact, tmp_path: Path) -> Artifact:
    """`tiny`'s tokenizer with a manifest that matches."""
    manifest = json.loads((tiny.root / "manifest.json").read_text())
    manifest["matching"] = SPEC
    vision = manifest["components"]["vision_encoder"]
    vision["inputs"][0]["shape"] = ["pictures", 3, 4, 4]
    manifest["components"] = {"vision_encoder": vision, "text_encoder": vision}
    manifest["preprocessing"] = {"kind": "clip", "shortest_edge": 4, "tile": 4, "pad": False, "resample": 3}
    manifest["preprocessing"] |= {"rescale_factor": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3}
    manifest["preprocessing"] |= {"image_seq_len": 1, "image_token": ""}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(tiny.root / "tokenizer.json", tmp_path)
    return Artifact(tmp_path)


@pytest.fixture
def matcher(artifact: Artifact) -> Matcher:
    return Matcher(artifact, Encoder("image_features"), Encoder("text_features"))


def grey(value: int) -> Image.Image:
    return Image.new("RGB", (6, 5), (value,) * 3)


def test_every_picture_meets_every_text(matcher: Matcher) -> None:
    texts = ["red boats", "How many", "water"]
    found = matcher.match([grey(1), grey(2)], texts)
    ids = matcher.encode(texts)
    expected = np.cos(np.array([[1.0], [2.0]]) - ids[None, :, 1])
    np.testing.assert_allclose(found.cosines, expected, atol=1e-4)
    assert found.logit_scale == 10.0


def test_pictures_run_one_by_one_and_texts_in_batches(matcher: Matcher) -> None:
    """Engines may hold no more than one picture; a thousand labels must not fill the memory."""
    matcher.match([grey(1), grey(2), grey(3)], [f"{n} boats" for n in range(2 * TEXTS + 5)])
    vision, text = matcher.vision, matcher.text
    assert isinstance(vision, Encoder) and isinstance(text, Encoder)
    assert [value.shape for value in vision.seen] == [(1, 3, 4, 4)] * 3
    assert [len(value) for value in text.seen] == [TEXTS, TEXTS, 5]


def test_texts_are_wrapped_cut_and_filled_up(matcher: Matcher) -> None:
    short, long = matcher.encode(["red", "red boats on the water " * 9])
    plain = matcher.tokenizer.encode("red").tolist()
    assert short.tolist() == [7, *plain, 8, 9] + [3] * (12 - 3 - len(plain))
    assert long[0] == 7 and long[-2:].tolist() == [8, 9]
    assert matcher.encode(["red"]).shape == (1, 3 + len(plain))


def test_parts_are_timed(matcher: Matcher) -> None:
    matcher.match([grey(1)], ["red"])
    times = matcher.timings
    assert min(times.preprocess, times.vision, times.text) > 0


@pytest.mark.parametrize(("pictures", "texts"), [(0, 1), (1, 0)])
def test_nothing_to_match_is_one_sentence(pictures: int, texts: int, matcher: Matcher) -> None:
    with pytest.raises(VlmcError, match=rf"{pictures} pictures, {texts} texts.*--prompt"):
        matcher.match([grey(1)] * pictures, ["red"] * texts)


def test_a_model_that_answers_is_not_taken_for_one_that_matches(tiny: Artifact) -> None:
    assert tiny.manifest.matching is None
    with pytest.raises(VlmcError, match="matches nothing"):
        Matcher(tiny, Encoder("image_features"), Encoder("text_features"))


def test_the_manifests_matching_is_checked(artifact: Artifact) -> None:
    assert artifact.manifest.matching == MatchSpec(10.0, 12, (7,), (8, 9), 3)
    manifest = json.loads((artifact.root / "manifest.json").read_text())
    manifest["matching"]["logit_scale"] = "large"
    (artifact.root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VlmcError, match=r"matching\.logit_scale has the wrong type"):
        Artifact(artifact.root)


@pytest.mark.parametrize(
    "change",
    [
        {"logit_scale": 0.0},
        {"logit_scale": -10.0},  # the likeliest would be the farthest
        {"text_length": 3},  # all of them around the text
        {"begin_token_ids": [-1]},
        {"end_token_ids": [10**30]},
        {"pad_token_id": 336},  # of 336 tokens
    ],
)
def test_a_matching_that_no_model_can_have_is_refused(change: dict[str, Any], artifact: Artifact) -> None:
    manifest = json.loads((artifact.root / "manifest.json").read_text())
    manifest["matching"] |= change
    (artifact.root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VlmcError, match=r"manifest\.json has numbers under `matching` that no model can have"):
        Artifact(artifact.root)


def test_a_tokenizer_of_another_model_is_refused(matcher: Matcher) -> None:
    matcher.artifact.manifest = replace(matcher.artifact.manifest, vocab_size=20)
    with pytest.raises(VlmcError, match=r"The tokenizer is another model's. Found: token .* Expected: ids below 20"):
        matcher.encode(["red boats"])


@settings(deadline=None, derandomize=True)
@given(COSINES, st.floats(0.1, 100))
def test_probabilities_are_a_softmax_over_the_texts(cosines: Any, scale: float) -> None:
    found = Matches(cosines, scale).probabilities
    np.testing.assert_allclose(found.sum(axis=1), 1)
    powers = np.exp(scale * (cosines.astype(np.float64) - 1))
    np.testing.assert_allclose(found, powers / powers.sum(axis=1, keepdims=True))


@settings(deadline=None, derandomize=True)
@given(COSINES)
def test_a_ranking_names_every_picture_once_and_falls(cosines: Any) -> None:
    ranking = Matches(cosines, 1.0).ranking(0)
    assert sorted(ranking) == list(range(len(cosines)))
    assert (np.diff(cosines[ranking, 0]) <= 0).all()


def test_rows_give_each_picture_its_likeliest_text_first() -> None:
    found = list(
        rows(["a.png", "b.png"], ["cat", "dog"], Matches(np.array([[0.1, 0.3], [0.2, 0.0]], np.float32), 10.0))
    )
    assert [(row["picture"], row["text"]) for row in found] == [
        ("a.png", "dog"),
        ("a.png", "cat"),
        ("b.png", "cat"),
        ("b.png", "dog"),
    ]
    assert found[0]["probability"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert found[0]["cosine"] == pytest.approx(0.3)


def test_a_single_text_ranks_the_pictures_and_has_no_probability() -> None:
    found = list(rows(["a.png", "b.png"], ["cat"], Matches(np.array([[0.1], [0.2]], np.float32), 10.0)))
    assert [row["picture"] for row in found] == ["b.png", "a.png"]
    assert all("probability" not in row for row in found)
