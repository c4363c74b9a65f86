"""PaliGemma: transformers' own model and processor are the judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaTokenizer,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import checkpoint, parity
from vlmc.exporter.family import config_of, family_for
from vlmc.exporter.processor import describe, save_tokenizer
from vlmc.runtime import preprocessing
from vlmc.runtime.prompt import Tokenizer, render

from .conftest import assert_published_names_are_read

TILE, PATCH = 28, 7
TOKENS = (TILE // PATCH) ** 2
QUESTION = "How many {red} boats are on the water? 42 €"
Whole = tuple[Path, PaliGemmaForConditionalGeneration, PaliGemmaProcessor]


class Reference:
    """transformers' model, which is told that all of the prompt is one block, and that an answer is not."""

    def __init__(self, model: PaliGemmaForConditionalGeneration) -> None:
        self.model, self.prompt = model.eval(), 0

    def features(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values).pooler_output

    def logits(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        kinds = (torch.arange(input_ids.shape[1]) >= self.prompt).long()[None]
        return self.model(input_ids=input_ids, pixel_values=pixel_values, token_type_ids=kinds).logits[0]


@pytest.fixture(scope="module")
def whole(vocabulary: Any, randomise: Any, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A checkpoint as Google publishes it: the picture's token is the last of the vocabulary."""
    folder = tmp_path_factory.mktemp("paligemma") / "checkpoint"
    vocab, merges = vocabulary(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", normalized=False)]})
    pictures = SiglipImageProcessorPil(size={"height": TILE, "width": TILE}, image_seq_length=TOKENS)
    processor = PaliGemmaProcessor(pictures, tokenizer)
    size = len(processor.tokenizer)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1}
    text |= {"num_hidden_layers": 2, "head_dim": 16, "vocab_size": size}
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**vision, image_size=TILE, patch_size=PATCH, vision_use_head=False),
        text_config=GemmaConfig(**text),
        projection_dim=32,
        hidden_size=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = PaliGemmaForConditionalGeneration(config)
    randomise(model, 3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32), processor


@pytest.fixture(scope="module")
def artifact(whole: Whole, export_tiny: Callable[[Path], Artifact]) -> Artifact:
    return export_tiny(whole[0])


@torch.inference_mode()
def test_the_onnx_graphs_compute_what_transformers_does(whole: Whole, artifact: Artifact, make_picture: Any) -> None:
    reference, session = Reference(whole[1]), parity.canonical_session(artifact)
    for pictures in ([], [make_picture(90, 31)], [make_picture(17, 60), make_picture(28, 28)]):
        inputs = session.prepare(pictures, QUESTION)
        ids, reference.prompt = torch.from_numpy(inputs.input_ids)[None], len(inputs.input_ids)
        pixels = None
        if pictures:
            pixels = torch.from_numpy(inputs.vision["pixel_values"])
            found = session.vision.run(inputs.vision)["image_features"]
            np.testing.assert_allclose(found, reference.features(pixels).numpy(), atol=2e-4, rtol=2e-4)
        next(session.generate(inputs, 1, ignore_eos=True))
        expected = reference.logits(ids, pixels)[-1]
        np.testing.assert_allclose(session.decoder.logits(), expected.numpy(), atol=5e-4, rtol=5e-4)
        tokens, wanted = list(session.generate(inputs, 5, ignore_eos=True)), []
        for _ in range(5):
            wanted.append(int(reference.logits(ids, pixels)[-1].argmax()))
            ids = torch.cat((ids, torch.tensor([wanted[-1:]])), dim=1)
        assert tokens == wanted


def test_the_published_names_of_weights_are_read(whole: Whole, tmp_path: Path) -> None:
    """Those of google/paligemma-3b-pt-224 (transformers' convert_paligemma_weights_to_hf.py), whose head is tied."""
    published = ("vision_tower.vision_model.", "multi_modal_projector.linear.", "language_model.model.")
    assert_published_names_are_read(whole[0], tmp_path / "published", *published)


def test_every_weight_is_in_a_component(whole: Whole, artifact: Artifact) -> None:
    """The table of embeddings, which is the head, too, in both of its components."""
    parameters = {name: spec.parameters for name, spec in artifact.manifest.components.items()}
    assert sum(parameters.values()) - parameters["embed_tokens"] == whole[1].num_parameters()


def test_norms_are_one_operator_each(artifact: Artifact) -> None:
    import onnx

    graph = onnx.load(artifact.path_of("onnx/decoder_model_merged.onnx"), load_external_data=False).graph
    assert sum(node.op_type == "RMSNormalization" for node in graph.node) == 2 * 2 + 1


def test_the_prompt_becomes_the_ids_of_transformers_processor(whole: Whole, tmp_path: Path, make_picture: Any) -> None:
    folder, _, processor = whole
    described, prompt = describe(folder)
    assert prompt.with_image == "{image}<bos>{text}\n"
    assert prompt.text_only == "<bos>{text}\n"
    assert prompt.eos_token_ids == (processor.tokenizer.eos_token_id,)
    save_tokenizer(folder, tmp_path / "tokenizer.json")
    pictures = [make_picture(90, 31), make_picture(17, 60)]
    texts = preprocessing.load(described)(pictures).image_texts
    found = Tokenizer(tmp_path / "tokenizer.json").encode(render(prompt, QUESTION, texts))
    expected = processor(images=[pictures], text=["<image><image>" + QUESTION], return_tensors="np")
    assert found.tolist() == expected["input_ids"][0].tolist()
    assert not expected["token_type_ids"].any()  # all of it is the block
    places = found == processor.tokenizer.convert_tokens_to_ids("<image>")
    loaded = preprocessing.load(described)
    assert isinstance(loaded, preprocessing.Prefix)
    assert loaded.prefix_length(places, loaded(pictures)) == len(found)


@pytest.mark.parametrize("size", [(1, 1), (90, 31), (7, 300), (28, 28), (29, 27)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pictures_are_squeezed_as_transformers_does(
    size: tuple[int, int], mode: str, whole: Whole, make_picture: Any
) -> None:
    described, _ = describe(whole[0])
    picture = make_picture(*size).convert(mode)
    expected = whole[2].image_processor([picture.convert("RGB")], return_tensors="np")["pixel_values"]
    prepared = preprocessing.load(described)([picture])
    assert np.array_equal(prepared.vision["pixel_values"], expected)
    assert prepared.image_texts == ("<image>" * TOKENS,)


def test_no_picture_is_prepared_to_no_tile(whole: Whole) -> None:
    prepared = preprocessing.load(describe(whole[0])[0])([])
    assert prepared.vision["pixel_values"].shape == (0, 3, TILE, TILE)


@pytest.mark.parametrize("change", [{"tile": 0}, {"tile": 5000}, {"resample": 9}, {"image_seq_len": 0}])
def test_values_out_of_range_are_refused(change: dict[str, int], whole: Whole) -> None:
    with pytest.raises(VlmcError, match=f"preprocessing.{next(iter(change))} is out of range"):
        preprocessing.load(describe(whole[0])[0] | change)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_seq_length": None}, "is not PaliGemma's"),
        ({"size": {"height": 28, "width": 14}}, "is not PaliGemma's"),
        ({"do_normalize": False}, "do_normalize off"),
    ],
)
def test_another_picture_processor_is_refused(changes: dict[str, Any], says: str, whole: Whole, tmp_path: Path) -> None:
    for path in whole[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["image_processor"] |= changes
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(VlmcError, match=says):
        describe(tmp_path)


def test_paligemma_2_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "gemma2", "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 99} | sizes
    vision = {"model_type": "siglip_vision_model", "image_size": TILE, "patch_size": PATCH} | sizes
    family = family_for("paligemma", "test")
    model = family.randomise({"model_type": "paligemma", "text_config": text, "vision_config": vision}, 0)
    with pytest.raises(VlmcError, match=r"not compared with.*gemma2.*Expected: gemma\."):
        family.kv(model, 8)


# config.json of google/paligemma-3b-pt-224 as published, from github.com/NishtiDoi/PaliGemma-Implementation (71817c3):
# the rest is as transformers' classes have it.
PUBLISHED: dict[str, Any] = {
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "ignore_index": -100,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "pad_token_id": 0,
    "projection_dim": 2048,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_image_tokens": 256,
        "num_key_value_heads": 1,
        "vocab_size": 257216,
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "patch_size": 14,
        "projection_dim": 2048,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    },
    "vocab_size": 257216,
}


def test_the_preset_is_the_published_model() -> None:
    found = checkpoint.resolve("paligemma-3b", random_weights=True)
    assert found.preset is not None
    ours, theirs = (config_of(config) for config in (found.config, PUBLISHED))
    assert ours.text_config.to_dict() == theirs.text_config.to_dict()
    unread = {"num_image_tokens", "projector_hidden_act"}  # of the vision encoder, which has no such part
    vision = theirs.vision_config.to_dict()
    assert ours.vision_config.to_dict() == {name: vision[name] for name in vision if name not in unread}
    names = ("image_token_index", "projection_dim", "tie_word_embeddings", "eos_token_id")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    with torch.device("meta"):
        model = found.family.randomise(PUBLISHED, 0)
    assert sum(weight.numel() for weight in model.parameters()) == found.preset["published_parameters"]


def test_a_step_on_a_gpu_needs_no_host(artifact: Artifact, assert_steps_need_no_host: Any) -> None:
    assert_steps_need_no_host(artifact)


def test_the_readme_says_what_it_can_be_made_into(artifact: Artifact, assert_supported: Any) -> None:
    assert_supported(artifact, "paligemma")
