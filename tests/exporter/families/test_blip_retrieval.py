"""BLIP that matches pictures with texts: transformers' own model and processor are the judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from vlmc.artifact import Artifact
from vlmc.calibration import recipes
from vlmc.calibration.calibrate import calibrate
from vlmc.calibration.plan import read_plan, write_plan
from vlmc.calibration.sets import load_set
from vlmc.engines import child
from vlmc.engines.build import build
from vlmc.errors import VlmcError
from vlmc.exporter.checkpoint import load_components, load_model, resolve
from vlmc.exporter.export import Options
from vlmc.exporter.matching import MatchingFamily, canonical_matcher, export
from vlmc.profiles.device import load_device
from vlmc.runtime.matching import Matcher, open_matcher

from .test_blip import SIZES, bert_tokenizer

TEXTS = ["two red boats", "A  photo of {a} cat, 42?", "", "boats " * 30]
Whole = tuple[Path, Artifact, BlipForImageTextRetrieval, BlipProcessor]


@pytest.fixture(scope="module")
def whole(randomise: Any, picture_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("retrieval") / "checkpoint"
    tokenizer, pictures = bert_tokenizer(), BlipImageProcessorPil(size={"height": 28, "width": 28})
    text = {"vocab_size": len(tokenizer), "bos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config=SIZES | text | {"encoder_hidden_size": 32},
        vision_config=SIZES | {"image_size": 28, "patch_size": 7},
        image_text_hidden_size=24,
    )
    model = BlipForImageTextRetrieval(config).eval()
    randomise(model, 6)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                weight.add_(1)
    model.save_pretrained(folder)
    processor = BlipProcessor(pictures, tokenizer)
    processor.save_pretrained(folder)
    options = Options(cases=2, picture_set=picture_set)
    artifact = export(resolve(str(folder)), folder.parent / "artefact", options, lambda *_: None)
    return folder, artifact, model, processor


@pytest.fixture(scope="module")
def matcher(whole: Whole) -> Matcher:
    """The exported graphs in ONNX Runtime."""
    return canonical_matcher(whole[1])


@pytest.mark.parametrize("count", [1, len(TEXTS)])
def test_cosines_are_transformers(count: int, whole: Whole, matcher: Matcher, make_picture: Any) -> None:
    _, _, model, processor = whole
    pictures, texts = [make_picture(*size) for size in ((28, 28), (90, 31), (17, 60))], TEXTS[:count]
    given = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**given, use_itm_head=False).itm_score.numpy()
    found = matcher.match(pictures, texts)
    np.testing.assert_allclose(found.cosines, expected, atol=1e-5)
    np.testing.assert_allclose(found.logit_scale, 1 / 0.07)
    assert matcher.encode(texts).tolist() == given["input_ids"].tolist()


def test_what_fills_texts_up_is_the_tokenizers_to_say(whole: Whole, matcher: Matcher, tmp_path: Path) -> None:
    """As in transformers, whose mask comes with the ids: config.json's pad_token_id does not decide."""
    folder = shutil.copytree(whole[0], tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["pad_token_id"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    found = resolve(str(folder))
    parts: Any = found.family.split(load_model(found))
    with torch.inference_mode():
        features = parts.text_encoder(torch.from_numpy(matcher.encode(TEXTS)))
    np.testing.assert_allclose(features.numpy(), matcher.text_features(TEXTS), atol=1e-5)


def test_no_two_pictures_and_no_two_texts_are_alike(matcher: Matcher, make_picture: Any) -> None:
    """Otherwise the comparison above would say nothing."""
    cosines = matcher.match([make_picture(90, 31), make_picture(17, 60)], TEXTS).cosines
    assert (np.diff(np.sort(cosines, axis=1), axis=1) > 1e-3).all()
    assert np.abs(cosines[0] - cosines[1]).max() > 1e-3


def test_only_what_matching_needs_is_exported(whole: Whole) -> None:
    _, artifact, model, _ = whole
    weights = {id(weight) for _, part in load_components(artifact).items() for weight in part.parameters()}
    left = [name for name, weight in model.named_parameters() if "crossattention" in name or "itm_head" in name]
    assert len(weights) == len(list(model.parameters())) - len(left)
    assert list(artifact.manifest.components) == ["vision_encoder", "text_encoder"]
    assert artifact.manifest.matching is not None and artifact.manifest.matching.begin_token_ids == (2,)


@pytest.mark.parametrize("recipe", ["int8", "w4"])
def test_it_is_calibrated_built_and_matches(
    recipe: str,
    whole: Whole,
    matcher: Matcher,
    picture_set: Path,
    step_here: Any,
    make_picture: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact = Artifact(Path(shutil.copytree(whole[1].root, tmp_path / "copy")))
    write_plan(artifact, calibrate(artifact, recipes.load(recipe), load_set(picture_set), lambda *_: None))
    monkeypatch.setattr(child, "run", step_here)
    build(artifact, load_device("cpu"), recipe, lambda *_: None)
    plain, pictures = (
        dict.fromkeys(artifact.components, "onnxruntime-fp32"),
        [make_picture(28, 28), make_picture(90, 31)],
    )
    quantised = {path.partition("/")[0]: f"onnxruntime-{recipe}" for path in read_plan(artifact, recipe).modules}
    assert "vision_encoder" in quantised or recipe == "w4"
    for engines, near in ((plain, 1e-5), (plain | quantised, 0.1)):
        found = open_matcher(artifact, "cpu", engines).match(pictures, TEXTS[:2])
        np.testing.assert_allclose(found.cosines, matcher.match(pictures, TEXTS[:2]).cosines, atol=near)


def test_what_the_checkpoint_is_for_decides(whole: Whole, tmp_path: Path) -> None:
    family = resolve(str(whole[0])).family
    assert isinstance(family, MatchingFamily)
    config = json.loads((whole[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BlipModel"]}))
    shutil.copy(whole[0] / "model.safetensors", tmp_path)
    other = resolve(str(tmp_path)).family
    assert not isinstance(other, MatchingFamily)
    with pytest.raises(VlmcError, match=r"neither writes captions nor answers questions nor matches.*BlipModel"):
        other.load(tmp_path)


def test_the_readme_says_what_it_can_be_made_into(whole: Whole, assert_supported: Any) -> None:
    assert_supported(whole[1], "blip")
