"""CLIP: transformers' own model, picture processor and tokenizer are the judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vlmc.artifact import Artifact
from vlmc.calibration import recipes
from vlmc.calibration.calibrate import calibrate
from vlmc.calibration.plan import read_plan, write_plan
from vlmc.calibration.sets import load_set
from vlmc.engines import child
from vlmc.engines.build import build
from vlmc.errors import VlmcError
from vlmc.exporter.checkpoint import preset_names, resolve
from vlmc.exporter.export import Options
from vlmc.exporter.family import family_for
from vlmc.exporter.matching import (
    MatchingFamily,
    canonical_matcher,
    describe_pictures,
    describe_texts,
    export,
    torch_matcher,
)
from vlmc.exporter.onnx_ops import IMPLEMENTATION
from vlmc.profiles import samples
from vlmc.profiles.device import load_device
from vlmc.profiles.worker import open_worker
from vlmc.runtime import preprocessing
from vlmc.runtime.command import run
from vlmc.runtime.matching import Matcher, open_matcher
from vlmc.runtime.session import open_session

TEXTS = [
    "a photo of two red boats",
    "A cat's  dog",
    "",
    "émile 42 €\n{text} <|startoftext|>",
    "many boats, " * 60,  # more than 77 tokens
]
Whole = tuple[Path, Artifact, CLIPModel, CLIPProcessor]


def clip_tokenizer(**special: str) -> CLIPTokenizer:
    """CLIP's own kind of vocabulary, small: every byte, every byte at a word's end, and some merges."""
    like = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = like.normalizer, like.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(TEXTS * 9, trainer)
    model = json.loads(bpe.to_str())["model"]
    # Sorted, for their ids differ from one training to the next.
    pieces = [*sorted(model["vocab"]), *(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], **special)


@pytest.fixture(scope="module")
def whole(randomise: Any, picture_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("clip") / "checkpoint"
    tokenizer = clip_tokenizer()
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPConfig(
        # OpenAI's configs say so, although the end is the vocabulary's last token.
        text_config=sizes | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2},
        vision_config=sizes | {"image_size": 28, "patch_size": 7},
        projection_dim=24,
    )
    model = CLIPModel(config).eval()
    randomise(model, 4)
    with torch.no_grad():
        model.logit_scale.fill_(2.6592)
    model.save_pretrained(folder)
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    options = Options(cases=2, picture_set=picture_set)
    artifact = export(resolve(str(folder)), folder.parent / "artefact", options, lambda *_: None)
    return folder, artifact, model, CLIPProcessor(pictures, tokenizer)


@pytest.fixture(scope="module")
def matcher(whole: Whole) -> Matcher:
    """The exported graphs in ONNX Runtime."""
    return canonical_matcher(whole[1])


def reference(whole: Whole, pictures: list[Image.Image], texts: list[str]) -> Any:
    _, _, model, processor = whole
    inputs = processor(text=texts, images=pictures, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs)


@pytest.mark.parametrize("sizes", [[(28, 28)], [(90, 31), (17, 60), (28, 28)]])
@pytest.mark.parametrize("count", [1, 5])
def test_the_onnx_graphs_match_pictures_with_texts_as_transformers_does(
    sizes: list[tuple[int, int]], count: int, whole: Whole, matcher: Matcher, make_picture: Any
) -> None:
    pictures, texts = [make_picture(*size) for size in sizes], TEXTS[:count]
    expected = reference(whole, pictures, texts)
    near = {"atol": 1e-5, "rtol": 1e-4}  # float32 sums in another order
    np.testing.assert_allclose(matcher.image_features(pictures), expected.image_embeds.numpy(), **near)
    np.testing.assert_allclose(matcher.text_features(texts), expected.text_embeds.numpy(), **near)
    found = matcher.match(pictures, texts)
    np.testing.assert_allclose(found.logit_scale * found.cosines, expected.logits_per_image.numpy(), atol=1e-4)
    np.testing.assert_allclose(found.probabilities, expected.logits_per_image.softmax(dim=1).numpy(), **near)


def test_no_two_pictures_and_no_two_texts_are_alike(whole: Whole, matcher: Matcher, make_picture: Any) -> None:
    """Otherwise the comparison above would say nothing."""
    cosines = matcher.match([make_picture(90, 31), make_picture(17, 60)], TEXTS).cosines
    assert (np.diff(np.sort(cosines, axis=1), axis=1) > 1e-4).all()
    assert np.abs(cosines[0] - cosines[1]).max() > 1e-3


def test_where_the_config_names_the_end_token_it_is_the_first_one_that_counts(whole: Whole, matcher: Matcher) -> None:
    """And the padding, which is the same token, is not seen."""
    _, artifact, model, processor = whole
    text = model.config.text_config
    assert text.eos_token_id == 2
    try:
        # Not the largest id of the text, so that it makes a difference.
        text.eos_token_id = model.text_model.eos_token_id = processor.tokenizer.bos_token_id
        family = family_for("clip", "here")
        assert isinstance(family, MatchingFamily)
        attention = model.config._attn_implementation
        expected = reference(whole, [Image.new("RGB", (28, 28))], TEXTS[:3]).text_embeds
        model.set_attn_implementation(IMPLEMENTATION)
        found = torch_matcher(artifact, family.encoders(model)).text_features(TEXTS[:3])
    finally:
        text.eos_token_id = model.text_model.eos_token_id = 2
        model.set_attn_implementation(attention)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert np.abs(found - matcher.text_features(TEXTS[:3])).max() > 1e-2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=120), min_size=1, max_size=4))
def test_texts_become_cliptokenizers_ids(texts: list[str], whole: Whole, matcher: Matcher) -> None:
    reference = whole[3].tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="np")
    assert np.array_equal(matcher.encode(texts), reference["input_ids"])


def test_a_long_text_is_cut_and_still_ends(whole: Whole, matcher: Matcher) -> None:
    ids = matcher.encode(TEXTS)
    assert ids.shape == (len(TEXTS), 77)
    assert ids[-1, -1] == whole[3].tokenizer.eos_token_id
    padded = whole[3].tokenizer(TEXTS, padding="max_length", truncation=True, max_length=77, return_tensors="np")
    assert np.array_equal(ids, padded["input_ids"])


def test_padding_is_what_the_tokenizer_says(tmp_path: Path, whole: Whole) -> None:
    from vlmc.exporter.matching import describe_texts

    tokenizer = clip_tokenizer(pad_token="!")  # laion's checkpoints
    tokenizer.save_pretrained(tmp_path)
    assert describe_texts(tmp_path) == {
        "begin_token_ids": (tokenizer.bos_token_id,),
        "end_token_ids": (tokenizer.eos_token_id,),
        "pad_token_id": tokenizer.convert_tokens_to_ids("!"),
    }


@pytest.mark.parametrize("size", [(28, 28), (90, 31), (17, 60), (1, 1), (200, 3)])
def test_pictures_become_transformers_pixels(size: tuple[int, int], whole: Whole, make_picture: Callable) -> None:
    picture, prepare = make_picture(*size), preprocessing.load(describe_pictures(whole[0]))
    reference = whole[3].image_processor([picture], return_tensors="np")["pixel_values"]
    assert np.array_equal(prepare([picture]).vision["pixel_values"], reference)


def test_openais_own_description_of_pictures_is_understood(whole: Whole, tmp_path: Path, make_picture: Any) -> None:
    """preprocessor_config.json of openai/clip-vit-base-patch32: sizes as numbers, the class by its old name."""
    old = {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
    old |= {"size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}
    old |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    (tmp_path / "config.json").write_text((whole[0] / "config.json").read_text())
    described = describe_pictures(tmp_path)
    preset = resolve("clip-vit-base-patch32", random_weights=True).preset
    assert preset is not None
    assert described.items() >= {key: preset["preprocessing"][key] for key in ("shortest_edge", "tile", "mean")}.items()
    pixels = preprocessing.load(described)([make_picture(300, 260)]).vision["pixel_values"]
    expected = CLIPImageProcessorPil()([make_picture(300, 260)], return_tensors="np")["pixel_values"]
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize(
    "change", [{"do_center_crop": False}, {"do_rescale": False}, {"size": {"height": 9, "width": 9}}]
)
def test_a_picture_processor_that_does_otherwise_is_refused(change: dict, whole: Whole, tmp_path: Path) -> None:
    CLIPImageProcessorPil(crop_size={"height": 28, "width": 28}, **change).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((whole[0] / "config.json").read_text())
    with pytest.raises(VlmcError, match=r"does not cut a square|do_rescale off"):
        describe_pictures(tmp_path)


def test_a_tokenizer_without_its_vocabulary_is_refused(whole: Whole, tmp_path: Path) -> None:
    """transformers makes one of the special tokens then, and every text would be the same."""
    for name in ("tokenizer_config.json", "processor_config.json"):
        shutil.copy(whole[0] / name, tmp_path)
    with pytest.raises(VlmcError, match=r"special tokens alone.*tokenizer\.json"):
        describe_texts(tmp_path)


def test_random_weights_are_float32_whatever_the_parts_say(whole: Whole) -> None:
    config = whole[2].config.to_dict()
    config["text_config"]["dtype"] = "float16"
    assert {weight.dtype for weight in family_for("clip", "here").randomise(config, 0).parameters()} == {torch.float32}


def test_every_weight_is_in_one_of_the_two_graphs(whole: Whole) -> None:
    _, artifact, model, _ = whole
    count = sum(spec.parameters for spec in artifact.manifest.components.values())
    assert count == sum(weight.numel() for weight in model.parameters()) - 1  # the scale is in the manifest
    assert artifact.manifest.vocab_size == model.config.text_config.vocab_size
    assert artifact.manifest.hidden_size == 24


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("clip-")])
def test_a_preset_fits_together(name: str) -> None:
    """On the meta device: the pictures are what the vision encoder takes, and both features are as wide."""
    found = resolve(name, random_weights=True)
    family, preset = found.family, found.preset
    assert isinstance(family, MatchingFamily)
    assert preset is not None
    prepared = preprocessing.load(preset["preprocessing"])([Image.new("RGB", (640, 480))])
    with torch.device("meta"):
        model = family.randomise(found.config, 0).eval()
        model.set_attn_implementation(IMPLEMENTATION)
        encoders = family.encoders(model)
        images = encoders.vision_encoder(torch.empty(prepared.vision["pixel_values"].shape))
        texts = encoders.text_encoder(torch.zeros(3, encoders.text_length, dtype=torch.long))
    assert images.shape == (1, found.config["projection_dim"])
    assert texts.shape == (3, found.config["projection_dim"])
    count = sum(weight.numel() for weight in model.parameters())
    assert count == pytest.approx(preset["published_parameters"], rel=0.01)


@pytest.fixture(scope="module")
def built(whole: Whole, picture_set: Path, step_here: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Calibrated and built for `cpu` with the recipe int8."""
    artifact = Artifact(Path(shutil.copytree(whole[1].root, tmp_path_factory.mktemp("built") / "clip")))
    write_plan(artifact, calibrate(artifact, recipes.load("int8"), load_set(picture_set), lambda *_: None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "run", step_here)
        build(artifact, load_device("cpu"), "int8", lambda *_: None)
    return artifact


def test_the_vision_encoder_runs_in_integers_and_sees_nearly_the_same(
    built: Artifact, matcher: Matcher, make_picture: Any
) -> None:
    modules = read_plan(built, "int8").modules
    by_component = {name: [m for path, m in modules.items() if path.startswith(name)] for name in built.components}
    assert {name: len(some) for name, some in by_component.items()} == dict.fromkeys(built.components, 2 * 6 + 1)
    for name, phase in (("vision_encoder", "vision"), ("text_encoder", "text")):
        assert all(set(module.peaks) == {phase} for module in by_component[name])
    assert modules["vision_encoder/layers.1.mlp.fc1"].absorbed_by == "vision_encoder/layers.1.layer_norm2"
    spec, _ = built.engine("cpu", "vision_encoder", "onnxruntime-int8")
    assert spec.report.products["int8"] == len(by_component["vision_encoder"])
    engines = {"vision_encoder": "onnxruntime-int8", "text_encoder": "onnxruntime-fp32"}
    pictures = [make_picture(90, 31), make_picture(17, 60)]
    found = open_matcher(built, "cpu", engines).image_features(pictures)
    assert (np.sum(found * matcher.image_features(pictures), axis=1) > 0.9).all()  # of random weights


def test_vlmc_run_prints_what_fits_best(built: Artifact, matcher: Matcher) -> None:
    pictures, texts = [str(built.root / f"golden/0{index}.png") for index in (0, 1)], ["two red boats", "a cat", "dog"]
    arguments = [str(built.root), *pictures, *(part for text in texts for part in ("-p", text))]
    shown = CliRunner().invoke(run, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    assert {row["text"] for row in found["matches"]} == set(texts)
    assert [row["picture"] for row in found["matches"]] == [pictures[0]] * 3 + [pictures[1]] * 3
    assert min(found["vision_ms"], found["text_ms"]) > 0
    assert "two red boats" in CliRunner().invoke(run, arguments).output


def test_it_is_measured_with_the_engines_that_were_built(built: Artifact, tmp_path: Path) -> None:
    labels = ["two red boats", "a cat"]
    job = {"artifact": str(built.root), "opener": "vlmc.runtime.matching:open_matcher", "labels": labels}
    job["arguments"] = {"device": "cpu", "engines": dict.fromkeys(built.components, "onnxruntime-fp32")}
    job |= {"samples": str(tmp_path / "samples.jsonl"), "tokens": 2, "answer_tokens": 2, "device_memory": "none"}
    worker = open_worker(job | {"power_source": "unavailable: none", "power_rails": []})
    (tmp_path / "picture.png").write_bytes((built.root / "golden/00.png").read_bytes())
    row = {"row": 0, "file": str(tmp_path / "picture.png"), "task": "", "prompt": "", "gold": "", "facts": labels[:1]}
    assert [*worker.time([0], 0, 0), *worker.agree([0, 1]), *worker.evaluate([row])] == [
        "run",
        "agreement",
        "agreement",
        "answer",
    ]
    rows = samples.read(tmp_path / "samples.jsonl")
    (run_row,) = samples.of_kind(rows, "run")
    assert min(run_row["vision_s"], run_row["text_s"]) > 0
    assert run_row["vision_s"] + run_row["text_s"] < run_row["wall_s"]
    assert all(row["tokens"] == row["golden"] for row in samples.of_kind(rows, "agreement"))
    (answer,) = samples.of_kind(rows, "answer")
    assert answer["answer"] == labels[int(np.argmax(answer["cosines"]))]


def test_a_model_that_matches_answers_no_question(built: Artifact) -> None:
    with pytest.raises(VlmcError, match="answers nothing"):
        open_session(built, "cpu", {})


def test_the_readme_says_what_it_can_be_made_into(whole: Any, assert_supported: Any) -> None:
    assert_supported(whole[1], "clip")
