"""BLIP that writes captions and answers: transformers' own models, picture processor and tokenizer are the judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from vlmc.artifact import Artifact
from vlmc.calibration import recipes
from vlmc.calibration.calibrate import calibrate
from vlmc.calibration.plan import read_plan, write_plan
from vlmc.calibration.sets import load_set
from vlmc.engines import child
from vlmc.engines.build import build
from vlmc.errors import VlmcError
from vlmc.exporter import golden
from vlmc.exporter.checkpoint import load_components, resolve
from vlmc.exporter.export import Options, export
from vlmc.exporter.family import family_for
from vlmc.exporter.parity import canonical_session
from vlmc.exporter.processor import describe
from vlmc.profiles.device import load_device
from vlmc.runtime import preprocessing
from vlmc.runtime.images import open_image
from vlmc.runtime.session import Session, open_session

PROMPTS = ["", "a photo of", "A  photo of two {red} boats, 42?"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
QUESTIONS = ["two?", "How many {red} boats, 42?"]
Whole = tuple[Path, Artifact, Any, BlipProcessor]


def bert_tokenizer() -> BertTokenizer:
    """BERT's own kind of vocabulary, small: a few words, and every letter at a word's beginning and within one."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "two", "red", "boats"]
    pieces = dict.fromkeys([*words, *letters, *"{}?!,.'", *(f"##{letter}" for letter in letters)])
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})


@pytest.fixture(scope="module")
def whole(randomise: Any, export_tiny: Callable[[Path], Artifact], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    # Wider pictures than words, as the large model has.
    return save(BlipForConditionalGeneration, 48, randomise, export_tiny, tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def answering(
    randomise: Any, export_tiny: Callable[[Path], Artifact], tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    return save(BlipForQuestionAnswering, 32, randomise, export_tiny, tmp_path_factory.mktemp("vqa"))


def save(kind: Any, width: int, randomise: Any, export_tiny: Callable[[Path], Artifact], root: Path) -> Whole:
    """A small random checkpoint of the class `kind`, exported; `width`: of the picture's features."""
    folder = root / "checkpoint"
    tokenizer, pictures = bert_tokenizer(), BlipImageProcessorPil(size={"height": 28, "width": 28})
    text = {"vocab_size": len(tokenizer) + 2, "bos_token_id": len(tokenizer), "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config=SIZES | text | {"encoder_hidden_size": width},
        vision_config=SIZES | {"hidden_size": width, "image_size": 28, "patch_size": 7},
    )
    model = kind(config).eval()
    randomise(model, 5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("word_embeddings.weight"):
                weight.mul_(5)
            elif name.endswith("LayerNorm.weight"):
                weight.add_(1)
        model.text_decoder.cls.predictions.decoder.bias[3] = -50  # else captions end before they begin
    model.save_pretrained(folder)
    processor = BlipProcessor(pictures, tokenizer)
    processor.save_pretrained(folder)
    return folder, export_tiny(folder), model, processor


@pytest.fixture(scope="module")
def session(whole: Whole) -> Session:
    """The exported graphs in ONNX Runtime."""
    return canonical_session(whole[1])


@pytest.mark.parametrize("size", [(28, 28), (90, 31), (17, 60)])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_captions_are_transformers(
    prompt: str, size: tuple[int, int], whole: Whole, session: Session, make_picture: Any
) -> None:
    _, _, model, processor = whole
    picture = make_picture(*size)
    given = processor(images=picture, text=prompt, return_tensors="pt")
    with torch.inference_mode():
        expected = model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=1)[0].tolist()
        states = model.vision_model(given["pixel_values"]).last_hidden_state
        ids = torch.tensor([expected])
        logits = model.text_decoder(ids, encoder_hidden_states=states).logits[0]

    inputs = session.prepare([picture], prompt)
    found = list(session.generate(inputs, 6))
    assert [*inputs.input_ids.tolist(), *found] == expected
    assert len(found) == 6
    np.testing.assert_allclose(session.decoder.logits(), logits[-2].numpy(), atol=5e-4, rtol=5e-4)


@pytest.fixture(scope="module")
def answers(answering: Whole) -> Session:
    return canonical_session(answering[1])


@pytest.mark.parametrize("size", [(28, 28), (90, 31)])
@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_transformers(
    question: str, size: tuple[int, int], answering: Whole, answers: Session, make_picture: Any
) -> None:
    _, _, model, processor = answering
    picture = make_picture(*size)
    given = processor(images=picture, text=question, return_tensors="pt")
    with torch.inference_mode():
        expected = model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=1)[0].tolist()
        states = model.vision_model(given["pixel_values"]).last_hidden_state
        read = model.text_encoder(given["input_ids"], encoder_hidden_states=states).last_hidden_state
        logits = model.text_decoder(torch.tensor([expected]), encoder_hidden_states=read).logits[0]

    inputs = answers.prepare([picture], question)
    assert inputs.question is not None and inputs.question.tolist() == given["input_ids"].tolist()
    found = list(answers.generate(inputs, 6))
    assert [*inputs.input_ids.tolist(), *found] == expected
    assert len(found) == 6
    np.testing.assert_allclose(answers.decoder.logits(), logits[-2].numpy(), atol=5e-4, rtol=5e-4)


def test_picture_and_question_both_count(answers: Session, make_picture: Any) -> None:
    """Otherwise the comparison above would say nothing about one of them."""
    logits = []
    for size, question in (((28, 28), "two?"), ((90, 31), "two?"), ((28, 28), "red?")):
        next(answers.generate(answers.prepare([make_picture(*size)], question), 1))
        logits.append(answers.decoder.logits())
    assert np.abs(logits[0] - logits[1]).max() > 0.1
    assert np.abs(logits[0] - logits[2]).max() > 0.1


def test_the_question_is_read_once(answering: Whole) -> None:
    components = answering[1].manifest.components
    assert components["decoder"].further_inputs() == ("fused_image_features",)
    assert [tensor.name for tensor in components["fusion"].inputs] == ["image_features", "question_ids"]
    assert components["fusion"].outputs[0].shape == (2, 2, 2, "question_length", 16)


def test_a_question_beyond_berts_positions_is_one_sentence(answers: Session, make_picture: Any) -> None:
    with pytest.raises(VlmcError, match="longer than the KV cache"):
        list(answers.generate(answers.prepare([make_picture(28, 28)], "red " * 600), 2))


def test_another_picture_gives_other_words(session: Session, make_picture: Any) -> None:
    """Otherwise the comparison above would say nothing about cross-attention."""
    logits = []
    for size in ((28, 28), (90, 31)):
        next(session.generate(session.prepare([make_picture(*size)], "a photo of"), 1))
        logits.append(session.decoder.logits())
    assert np.abs(logits[0] - logits[1]).max() > 0.1


def test_the_picture_is_looked_at_once(whole: Whole, session: Session) -> None:
    spec = whole[1].manifest.components["decoder"]
    assert spec.further_inputs() == ("image_features",)
    assert {tensor.name: tensor.shape for tensor in spec.inputs}["image_features"] == (2, 2, 2, 17, 16)
    names = [path for path, _ in load_components(whole[1]).decoder.named_modules()]
    assert not [name for name in names if "crossattention" in name]


@pytest.mark.parametrize("which", ["whole", "answering"])
def test_every_weight_is_in_one_component(which: str, request: pytest.FixtureRequest) -> None:
    _, artifact, model, _ = request.getfixturevalue(which)
    components = load_components(artifact)
    weights = {id(weight): weight for _, part in components.items() for weight in part.parameters()}
    assert sum(weight.numel() for weight in weights.values()) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("size", [(28, 28), (90, 31), (17, 60), (1, 1), (300, 2)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_pictures_become_transformers_pixels(size: tuple[int, int], mode: str, whole: Whole, make_picture: Any) -> None:
    picture = make_picture(*size).convert(mode)
    prepared = preprocessing.load(describe(whole[0])[0])([picture])
    expected = whole[3].image_processor([picture], return_tensors="np")["pixel_values"]
    assert np.array_equal(prepared.vision["pixel_values"], expected)
    assert prepared.image_texts == ("",)


@pytest.mark.parametrize("count", [0, 2])
def test_no_picture_and_two_are_one_sentence(count: int, session: Session) -> None:
    with pytest.raises(VlmcError, match=r"one picture|speaks of a picture"):
        list(session.generate(session.prepare([Image.new("RGB", (28, 28))] * count, "a photo of"), 2))


@pytest.mark.parametrize("recipe", ["int8", "w4"])
@pytest.mark.parametrize("which", ["whole", "answering"])
def test_it_is_calibrated_built_and_writes(
    which: str,
    recipe: str,
    request: pytest.FixtureRequest,
    picture_set: Path,
    step_here: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported: Artifact = request.getfixturevalue(which)[1]
    artifact = Artifact(Path(shutil.copytree(exported.root, tmp_path / "copy")))
    write_plan(artifact, calibrate(artifact, recipes.load(recipe), load_set(picture_set), lambda *_: None))
    monkeypatch.setattr(child, "run", step_here)
    build(artifact, load_device("cpu"), recipe, lambda *_: None)
    modules = read_plan(artifact, recipe).modules
    assert ("vision_encoder/head.keys.1" in modules) == (recipe == "int8")
    reads = which == "answering" and recipe == "int8"
    assert ("fusion/reader.layers.1.intermediate.dense" in modules) == reads
    spec, _ = artifact.engine("cpu", "decoder", f"onnxruntime-{recipe}")
    head = ["decoder/lm_head.decoder", "decoder/lm_head.transform.dense"] if recipe == "w4" else []
    assert all(modules[path].weight_bits == 8 for path in head)
    assert spec.report.products[recipe] == sum(path.startswith("decoder/") for path in modules) - len(head)
    assert (spec.report.agreement or 0) > 0.9  # of random weights
    case = golden.read(artifact)[0][0]
    opened = open_session(artifact, "cpu", dict.fromkeys(artifact.components, "onnxruntime-fp32"))
    inputs = opened.prepare([open_image(artifact.root / case["image"])], case["prompt"])
    assert list(opened.generate(inputs, 4)) == case["tokens"]


@pytest.mark.parametrize("preset", ["blip-large", "blip-vqa-base"])
def test_the_preset_fits_together(preset: str) -> None:
    """On the meta device: the picture's keys and values are as many and as wide as the queries of what reads them."""
    found = resolve(preset, random_weights=True)
    assert found.preset is not None
    prepared = preprocessing.load(found.preset["preprocessing"])([Image.new("RGB", (640, 480))])
    with torch.device("meta"):
        model = found.family.randomise(found.config, 0).eval()
        parts = found.family.split(model)
        features = parts.vision_encoder(torch.empty(prepared.vision["pixel_values"].shape))
        read = features if parts.fusion is None else parts.fusion(features, torch.zeros(1, 7, dtype=torch.long))
    kv = found.family.kv(model, 512)
    assert features.shape == (kv.layers, 2, kv.kv_heads, 24 * 24 + 1, kv.head_dim)
    assert read.shape[:3] == (kv.layers, 2, kv.kv_heads)


def test_a_head_that_vlmc_does_not_know_is_refused(whole: Whole, tmp_path: Path) -> None:
    config = json.loads((whole[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BlipModel"]}))
    with pytest.raises(VlmcError, match=r"neither writes captions nor answers questions nor matches.*BlipModel"):
        family_for("blip", "here").load(tmp_path)


def test_a_cache_beyond_berts_positions_is_refused(whole: Whole, tmp_path: Path, picture_set: Path) -> None:
    with pytest.raises(VlmcError, match="--capacity 512"):
        export(resolve(str(whole[0])), tmp_path / "out", Options(1024, 1, picture_set), lambda *_: None)


@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize"])
def test_a_picture_processor_that_leaves_out_a_step_is_refused(step: str, whole: Whole, tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["image_processor"][step] = False
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(VlmcError, match=f"{step} off"):
        describe(tmp_path)


def test_a_tokenizer_of_another_size_is_refused(whole: Whole, tmp_path: Path) -> None:
    for path in whole[0].glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["bos_token_id"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VlmcError, match="another id than config"):
        describe(tmp_path)


@pytest.mark.parametrize("which", ["whole", "answering"])
def test_a_step_on_a_gpu_needs_no_host(
    which: str, request: pytest.FixtureRequest, assert_steps_need_no_host: Any
) -> None:
    assert_steps_need_no_host(request.getfixturevalue(which)[1])


@pytest.mark.parametrize("which", ["whole", "answering"])
def test_the_readme_says_what_it_can_be_made_into(
    which: str, request: pytest.FixtureRequest, assert_supported: Any
) -> None:
    assert_supported(request.getfixturevalue(which)[1], "blip")
