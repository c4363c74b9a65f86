"""LLaVA-Mini in its own layout: a plain rendering of the published code's computation on the checkpoint's tensors
judges, from the picture and the question to the logits."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import checkpoint, parity
from vlmc.exporter.families.llava_mini import Compressor
from vlmc.exporter.processor import describe, save_tokenizer
from vlmc.runtime import preprocessing
from vlmc.runtime.prompt import Tokenizer as Saved
from vlmc.runtime.prompt import render

from .conftest import assert_answers, change
from .llava_mini import ENDS, IMAGE, PREFIX, SIDE, SPECIAL, SYSTEM, VISION, VISION_LAYERS, Published, config, tensors

QUESTION = "How many {red} boats are on the water! 42 €!"
CHAT = (  # Llama 3.1's for two messages
    "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the training saves it: Llama 3's tokenizer, in which token 0 is an exclamation mark."""
    target = tmp_path_factory.mktemp("llava_mini") / "checkpoint"
    target.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SYSTEM, QUESTION.replace("!", "")] * 9, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    begin = (SPECIAL[0], tokenizer.token_to_id(SPECIAL[0]))
    tokenizer.post_processor = processors.TemplateProcessing(f"{SPECIAL[0]} $A", special_tokens=[begin])
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {"bos_token": SPECIAL[0], "eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    size = tokenizer.get_vocab_size()
    (target / "config.json").write_text(json.dumps(config(size)))
    save_file(tensors(size), target / "model.safetensors")
    return target


@pytest.fixture(scope="module")
def artifact(folder: Path, export_tiny: Callable[[Path], Artifact]) -> Artifact:
    return export_tiny(folder)


@torch.inference_mode()
def test_pictures_and_a_question_become_the_published_logits_and_tokens(
    folder: Path, artifact: Artifact, make_picture: Any
) -> None:
    reference, session = Published(folder), parity.canonical_session(artifact)
    wide, tall = make_picture(90, 31), make_picture(17, 60)
    for pictures in ([], [wide], [tall], [wide, tall]):
        inputs = session.prepare(pictures, QUESTION)
        pixels = torch.from_numpy(inputs.vision["pixel_values"]) if pictures else None
        assert_answers(session, inputs, reference.prompt(pixels, QUESTION), reference.logits, reference.embed)


@torch.inference_mode()
def test_vision_and_fusion_give_the_published_values(folder: Path, artifact: Artifact, make_picture: Any) -> None:
    reference, session = Published(folder), parity.canonical_session(artifact)
    inputs = session.prepare([make_picture(90, 31)], QUESTION)
    assert QUESTION.count("!") == int((inputs.input_ids == 0).sum())  # token 0 is there, and not the last
    found = session.vision.run(inputs.vision)["image_features"]
    expected = reference.features(torch.from_numpy(inputs.vision["pixel_values"]))
    np.testing.assert_allclose(found, expected.numpy(), atol=5e-4, rtol=2e-4)  # of values up to 30, on any processor
    assert session.fusion is not None
    ids = reference.ids(1, QUESTION)
    text = reference.embed(ids[ids >= 0])[None].numpy()
    fused = session.fusion.run({"image_features": found, "text_embeds": text})
    image, words = reference.fused(expected[0], ids)
    np.testing.assert_allclose(fused["fused_image_features"][0], image.numpy(), atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(fused["fused_text_embeds"][0], words[ids >= 0].numpy(), atol=2e-4, rtol=2e-4)


@torch.inference_mode()
def test_of_several_pictures_the_text_that_leaves_the_fusion_is_the_mean(folder: Path, make_picture: Any) -> None:
    """As the reference does with the frames of a video."""
    reference, found = Published(folder), checkpoint.resolve(str(folder))
    components = found.family.split(checkpoint.load_model(found))
    described, prompt = describe(folder)
    prepared = preprocessing.load(described)([make_picture(90, 31), make_picture(17, 60)])
    pixels = torch.from_numpy(prepared.vision["pixel_values"])
    ids = reference.ids(2, QUESTION)
    assert components.fusion is not None
    image, text = components.fusion(components.vision_encoder(pixels), reference.embed(ids[ids >= 0])[None])
    place = ids.tolist().index(-200)
    found_prompt = torch.cat((text[0, :place], image.flatten(0, 1), text[0, place:]))
    torch.testing.assert_close(found_prompt, reference.prompt(pixels, QUESTION), atol=2e-4, rtol=2e-4)
    assert "".join(prepared.image_texts) == prompt.image_token * (2 * SIDE**2)  # and one line break behind all


def test_only_clips_last_layer_and_the_norm_behind_it_are_left_out(folder: Path, artifact: Artifact) -> None:
    weights = load_file(folder / "model.safetensors")
    unused = f"vision_model.encoder.layers.{VISION_LAYERS - 1}.", "vision_model.post_layernorm."
    used = sum(w.numel() for name, w in weights.items() if not any(part in name for part in unused))
    assert used == sum(spec.parameters for spec in artifact.manifest.components.values())


def test_one_query_sees_the_patches_without_their_places() -> None:
    """With one vision token, as published, all positions are the same."""
    patches = torch.randn(2, 36, VISION, generator=torch.Generator().manual_seed(0))
    for side in (1, 2):
        compressor = Compressor(VISION, side)
        found, turned = (compressor(x, compressor.positions(36)) for x in (patches, patches.flip(1)))
        assert found.shape == (2, side**2, VISION)
        assert torch.allclose(found, turned, atol=1e-6) == (side == 1)


def test_the_positions_are_sines_and_cosines_of_column_and_row() -> None:
    found = Compressor(8, 3).pos_embed
    for index in range(9):
        row, column = divmod(index, 3)
        expected = [f(place * speed) for place in (column, row) for f in (math.sin, math.cos) for speed in (1, 0.01)]
        torch.testing.assert_close(found[index], torch.tensor(expected))


def test_the_prompt_is_the_one_of_training(folder: Path) -> None:
    _, prompt = describe(folder)
    system = f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
    user, answer = "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert prompt.text_only == f"{system}{user}{{text}}<|eot_id|>{answer}"
    assert prompt.with_image == f"{system}{user}{{image}}\n{{text}}<|eot_id|>{answer}"
    assert prompt.image_token == "<|reserved_special_token_1|>"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert prompt.eos_token_ids == tuple(tokenizer.token_to_id(token) for token in ENDS)


PARTS = ["How", " many ", "boats", "   ", "\n", "\t", "!", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>"]
PARTS += ["42", " <|eom_id|> ", "<|reserved_special_token_0|>", "<image", "{image}", "{text}", "€", "é", "😀", "'s"]


def test_any_question_becomes_the_ids_of_training(folder: Path, tmp_path: Path) -> None:
    """One of white space alone is left out, with which the reference leaves out the line break behind a picture."""
    described, prompt = describe(folder)
    save_tokenizer(folder, tmp_path / "tokenizer.json")
    tokenizer, reference = Saved(tmp_path / "tokenizer.json"), Published(folder)
    place = tokenizer.token_id(prompt.image_token)
    picture = prompt.image_token * SIDE**2 + described["after_image"]

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=8).map("".join).filter(str.strip), st.integers(0, 2))
    def check(question: str, pictures: int) -> None:
        ids = reference.ids(pictures, question).tolist()
        expected = [found for id in ids for found in ([place] * SIDE**2 * pictures if id == -200 else [id])]
        assert tokenizer.encode(render(prompt, question, [picture] * pictures)).tolist() == expected

    check()


@pytest.mark.parametrize("ratio", ["square", "pad"])
def test_the_pictures_are_prepared_as_the_reference_does(
    ratio: str, folder: Path, tmp_path: Path, make_picture: Any
) -> None:
    clip = CLIPImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})
    described, _ = describe(change(folder, tmp_path, image_aspect_ratio=ratio))
    for size in ((90, 31), (17, 60), (24, 24)):
        whole = picture = make_picture(*size)
        if ratio == "pad":
            whole = Image.new("RGB", (max(size), max(size)), tuple(int(value * 255) for value in clip.image_mean))
            whole.paste(picture, tuple((max(size) - length) // 2 for length in size))
        expected = clip([whole], return_tensors="np")["pixel_values"]
        assert np.array_equal(preprocessing.load(described)([picture]).vision["pixel_values"], expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mm_projector_type": "linear"}, "another projector than the published.*linear"),
        ({"mm_vision_select_feature": "cls_patch"}, "another choice of features"),
        ({"resolution_ratio": 2}, "another number of parts of a picture.*2"),
        ({"mm_use_im_start_end": True}, "another use of marks"),
        ({"vision_config": None, "mm_vision_tower": "google/siglip"}, "unknown vision encoder.*siglip"),
    ],
)
def test_what_the_family_does_not_cover_is_refused(
    changes: dict[str, Any], reason: str, folder: Path, tmp_path: Path
) -> None:
    found = checkpoint.resolve(str(change(folder, tmp_path, **changes)), random_weights=True)
    with pytest.raises(VlmcError, match=reason):
        checkpoint.load_model(found)


def test_another_way_to_prepare_pictures_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match=r"prepares pictures in another way.*anyres"):
        describe(change(folder, tmp_path, image_aspect_ratio="anyres"))


def test_of_the_ends_those_count_that_the_tokenizer_has(folder: Path, tmp_path: Path) -> None:
    """Llama 3's tokenizer has no <|eom_id|>; one with no end at all is refused."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|eom_id|>", "<|other|>"))
    vocabulary = Tokenizer.from_file(str(file))
    assert describe(tmp_path)[1].eos_token_ids == tuple(vocabulary.token_to_id(ENDS[index]) for index in (0, 2))
    for end in ENDS:
        for changed in (file, tmp_path / "tokenizer_config.json"):
            changed.write_text(changed.read_text().replace(end, f"<|no{end[2:]}"))
    with pytest.raises(VlmcError, match=r"no token that ends an answer. Expected: <\|eot_id\|> or <\|eom_id\|> or"):
        describe(tmp_path)


def test_a_tokenizer_without_a_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    (change(folder, tmp_path) / "tokenizer_config.json").write_text('{"bos_token": "<|begin_of_text|>"}')
    with pytest.raises(VlmcError, match=r"not Llama 3\.1's.*no chat template"):
        describe(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.compressor.attn.in_proj_bias",
        "model.compressor.pos_embed",
        "model.prefusion_layers.1.mlp.up_proj.weight",
        "model.mm_projector.2.weight",
        "model.norm.weight",
    ],
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, change(folder, tmp_path) / "model.safetensors")
    with pytest.raises(VlmcError, match=r"lacks [13] weights"):
        checkpoint.load_model(checkpoint.resolve(str(tmp_path)))


def test_the_vision_encoder_may_lie_in_clips_own_file(folder: Path, tmp_path: Path) -> None:
    """The published code takes it from there, so a checkpoint of other hands may lack it."""
    weights = load_file(folder / "model.safetensors")
    vision = {name: weights.pop(name) for name in list(weights) if name.startswith(PREFIX)}
    save_file(weights, change(folder, tmp_path) / "model.safetensors")
    with pytest.raises(VlmcError, match=r"lacks its vision encoder.*openai/clip-vit-large-patch14-336"):
        checkpoint.load_model(checkpoint.resolve(str(tmp_path)))
    prefix = "model.vision_tower.vision_tower."
    save_file({name.removeprefix(prefix): weight for name, weight in vision.items()}, tmp_path / "clip.safetensors")
    found, expected = (checkpoint.load_model(checkpoint.resolve(str(path))) for path in (tmp_path, folder))
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in found.state_dict().items())


def test_weights_in_float16_are_computed_with_in_float32(folder: Path, tmp_path: Path) -> None:
    weights = {name: weight.half() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, change(folder, tmp_path) / "model.safetensors")
    model = checkpoint.load_model(checkpoint.resolve(str(tmp_path)))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(model.compressor.query, weights["model.compressor.query"].float())


def test_random_weights_depend_on_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    change(folder, tmp_path)
    first, again, other = (
        checkpoint.load_model(checkpoint.resolve(str(tmp_path), random_weights=True, seed=seed)).state_dict()
        for seed in (1, 1, 2)
    )
    for name in ("compressor.query", "prefusion_layers.0.mlp.up_proj.weight"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_the_preset_has_as_many_parameters_as_published() -> None:
    found = checkpoint.resolve("llava_mini-8b", random_weights=True)
    assert found.preset is not None
    with torch.device("meta"):
        model = found.family.randomise(found.config, 0)
    count = sum(weight.numel() for weight in model.parameters())
    assert count == pytest.approx(found.preset["published_parameters"], rel=0.01)


def test_the_readme_says_what_it_can_be_made_into(artifact: Artifact, assert_supported: Any) -> None:
    assert_supported(artifact, "llava_mini")


def test_the_fusion_as_tensorrt_gets_it_computes_what_pytorch_does(artifact: Artifact, as_tensorrt: Any) -> None:
    as_tensorrt(artifact, "fusion")
