"""InternVL in OpenGVLab's layout: a plain rendering of the published equations on the checkpoint's tensors judges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Tokenizer
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import checkpoint
from vlmc.exporter.family import family_for
from vlmc.exporter.processor import describe, save_tokenizer
from vlmc.runtime import preprocessing
from vlmc.runtime.prompt import Tokenizer, render

from .conftest import change
from .internvl_chat import HEADS, KV_HEADS, TILE, VIT_6B, Published, config, tensors
from .reference import SlowTokenizer

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
ADDED = ["<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]


@pytest.fixture(scope="module")
def folder(vocabulary: Any, sentence_piece: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as OpenGVLab saves it: two files of weights, a SentencePiece model, no tokenizer.json."""
    target = tmp_path_factory.mktemp("internvl_chat") / "checkpoint"
    target.mkdir()
    vocab, _ = vocabulary(["<unk>", "<s>", "</s>"], SYSTEM)
    kinds = {0: 2, 1: 3, 2: 3} | dict.fromkeys(range(3, 259), 6)
    pieces = [(text, kinds.get(id, 1)) for text, id in sorted(vocab.items(), key=lambda item: item[1])]
    pieces.append(("——", 4))
    first = len(pieces)
    pieces += [("[UNUSED_TOKEN_145]", 4), ("[UNUSED_TOKEN_146]", 4)]
    (target / "tokenizer.model").write_bytes(sentence_piece(pieces, False))
    added = {str(first + index): {"content": token, "special": True} for index, token in enumerate(ADDED)}
    settings = {"added_tokens_decoder": added, "tokenizer_class": "InternLM2Tokenizer"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    whole = config(first + len(ADDED))
    (target / "config.json").write_text(json.dumps(whole))
    (target / "generation_config.json").write_text('{"eos_token_id": [2]}')
    (target / "preprocessor_config.json").write_text('{"feature_extractor_type": "CLIPFeatureExtractor"}')
    weights = tensors(whole)
    names = sorted(weights)
    for index, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: weights[name] for name in part}, target / f"model-0000{index}-of-00002.safetensors")
    return target


@pytest.fixture(scope="module")
def artifact(folder: Path, export_tiny: Callable[[Path], Artifact]) -> Artifact:
    return export_tiny(folder)


def original(folder: Path) -> dict[str, Tensor]:
    return {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}


def test_the_onnx_graphs_compute_the_published_equations(
    folder: Path, artifact: Artifact, assert_parity: Any, make_picture: Any
) -> None:
    context_id = Tokenizer(artifact.path_of("tokenizer.json")).token_id("<IMG_CONTEXT>")
    published = Published(original(folder), json.loads((folder / "config.json").read_text()), context_id)
    one, wide, tall = make_picture(28, 28), make_picture(90, 31), make_picture(17, 60)
    assert_parity(artifact, published, [[], [one], [wide], [tall, one]])


def test_the_vision_encoder_is_that_of_the_config(tmp_path: Path) -> None:
    """InternViT-6B, with other features and larger blocks of patches than the checkpoint above has."""
    found = config(64, VIT_6B, select_layer=-2, downsample_ratio=0.25)
    weights, family = tensors(found), family_for("internvl_chat", "here")
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(found))
    pixels = torch.randn((2, 3, TILE, TILE), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = family.split(family.load(tmp_path)).vision_encoder(pixels)
        torch.testing.assert_close(features, Published(weights, found, 0).features(pixels), atol=2e-4, rtol=2e-4)


def test_every_tensor_of_the_checkpoint_is_used_once(folder: Path) -> None:
    model = checkpoint.load_model(checkpoint.resolve(str(folder)))
    count = sum(weight.numel() for weight in original(folder).values())
    assert count == sum(weight.numel() for weight in model.parameters())


def test_the_prompt_is_that_of_the_checkpoints_own_chat(folder: Path) -> None:
    described, prompt = describe(folder)
    assert prompt.eos_token_ids == (added(folder)["<|im_end|>"],)
    begin, end = "<|im_start|>user\n", "<|im_end|><|im_start|>assistant\n"
    system = f"<s><|im_start|>system\n{SYSTEM}<|im_end|>"
    assert render(prompt, "Why {image}?", ()) == f"{system}{begin}Why {{image}}?{end}"
    text = f"<img>{'<IMG_CONTEXT>' * 4}</img>{described['after_image']}"
    assert render(prompt, "Why?", [text]) == f"{system}{begin}<img>{'<IMG_CONTEXT>' * 4}</img>\nWhy?{end}"


def added(folder: Path) -> dict[str, int]:
    found = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    return {token["content"]: int(id) for id, token in found.items()}


PARTS = [
    "How",
    " many ",
    "boats",
    "   ",
    "\n",
    "书生",
    "——",
    "，",
    "<|im_end|>",
    "<|im_start|>user\n",
    "<img>",
    "</s>",
    "<s>",
]
PARTS += ["<unk>", "<image>", "<image", "{text}", "{image}", "42", "€", "😀", "▁", "<0x0A>"]


@pytest.mark.parametrize(
    ("template", "end"), [("internlm2-chat", "<|im_end|>"), ("Hermes-2", "<|im_end|>"), ("internvl2_5", "<|im_end|>\n")]
)
def test_any_question_becomes_the_ids_of_the_published_chat(
    template: str, end: str, folder: Path, make_picture: Any, tmp_path: Path
) -> None:
    """`chat` in modeling_internvl_chat.py of a question as the model's card writes it, with a line "<image>" for each
    picture, by conversation.py's template and the checkpoint's own tokenizer. An empty question without a picture
    is left out, whose turn the reference does not end."""
    described, prompt = describe(change(folder, tmp_path, template=template, system_message="Look: 书生。"))
    save_tokenizer(tmp_path, tmp_path / "tokenizer.json")
    tokenizer, prepare = Tokenizer(tmp_path / "tokenizer.json"), preprocessing.load(described)
    special = {"<unk>": 0, "<s>": 1, "</s>": 2} | added(folder)
    slow = SlowTokenizer((folder / "tokenizer.model").read_bytes(), special)
    pictures = {(): [], (1,): [make_picture(28, 28)], (4, 1): [make_picture(90, 31), make_picture(28, 28)]}
    texts = {tiles: prepare(images).image_texts for tiles, images in pictures.items()}

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=8).map("".join), st.sampled_from(list(pictures)))
    def check(question: str, tiles: tuple[int, ...]) -> None:
        message = "<image>\n" * len(tiles) + question
        query = f"<|im_start|>system\nLook: 书生。{end}<|im_start|>user\n{message}{end}<|im_start|>assistant\n"
        for count in tiles:
            query = query.replace("<image>", f"<img>{'<IMG_CONTEXT>' * 4 * count}</img>", 1)
        assert tokenizer.encode(render(prompt, question, texts[tiles])).tolist() == [1, *slow(query)]

    check()


def published_tiles(picture: Image.Image, most: int) -> NDArray[np.float32]:
    """`dynamic_preprocess` and `build_transform` of dataset.py: torchvision's arithmetic is in float32."""
    ratio, size = picture.width / picture.height, picture.width * picture.height
    sides = range(1, most + 1)
    grids = sorted(((c, r) for c in sides for r in sides if c * r <= most), key=lambda grid: grid[0] * grid[1])
    nearest = min(abs(ratio - c / r) for c, r in grids)
    first, *tied = [(c, r) for c, r in grids if abs(ratio - c / r) == nearest]
    columns, rows = [first, *((c, r) for c, r in tied if size > 0.5 * TILE * TILE * c * r)][-1]
    large = picture.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC)
    corners = [(x * TILE, y * TILE) for y in range(rows) for x in range(columns)]
    tiles = [large.crop((x, y, x + TILE, y + TILE)) for x, y in corners]
    if len(tiles) > 1:
        tiles.append(picture.resize((TILE, TILE), Image.Resampling.BICUBIC))
    values = np.stack([np.asarray(tile) for tile in tiles]).astype(np.float32) / np.float32(255)
    values = (values - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return values.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(28, 28), (90, 31), (17, 60), (30, 20), (100, 100), (20, 20), (3, 200), (63, 42)])
def test_the_pixels_are_those_of_the_published_code(size: tuple[int, int], folder: Path, make_picture: Any) -> None:
    found = preprocessing.load(describe(folder)[0])([make_picture(*size)]).vision["pixel_values"]
    assert np.array_equal(found, published_tiles(make_picture(*size), 4))


def test_the_template_of_2_5_ends_its_turns_with_a_line(folder: Path, tmp_path: Path) -> None:
    described, prompt = describe(change(folder, tmp_path, template="internvl2_5", dynamic_image_size=False))
    assert prompt.text_only.endswith("<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
    assert "书生·万象" in prompt.text_only
    assert prompt.eos_token_ids == (added(folder)["<|im_end|>"],)
    assert described["max_tiles"] == 1


def test_a_system_message_that_is_null_is_the_templates(folder: Path, tmp_path: Path) -> None:
    """As OpenGVLab/InternVL3-1B has it (printed in shivangjhalani/multicoco, InternVL3-1B_data.md): its code takes
    the template's, whatever config.json says."""
    found = json.loads((change(folder, tmp_path, template="internvl2_5") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(found | {"system_message": None}))
    _, prompt = describe(tmp_path)
    assert prompt.text_only.startswith("<s><|im_start|>system\n你是书生·万象，")


def test_what_config_json_leaves_out_is_as_in_the_reference(folder: Path, tmp_path: Path) -> None:
    """InternVLChatConfig's defaults."""
    described, _ = describe(change(folder, tmp_path, dynamic_image_size=None, use_thumbnail=None))
    assert (described["max_tiles"], described["thumbnail"]) == (1, False)
    described, _ = describe(change(folder, tmp_path, max_dynamic_patch=None, min_dynamic_patch=None))
    assert (described["min_tiles"], described["max_tiles"]) == (1, 6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"llm_config": {"architectures": ["Phi3ForCausalLM"]}}, "decoder that vlmc does not know.*Phi3ForCausalLM"),
        ({"llm_config": {"bias": True}}, "bias in the decoder"),
        ({"force_image_size": 56}, "size of tiles"),
        ({"ps_version": "v1"}, "ps_version"),
        ({"ps_version": None}, "ps_version"),  # then the reference takes v1
        ({"vision_config": VIT_6B | {"layer_norm_eps": 1e-5}}, "layer_norm_eps beside qk_normalization.*1e-05"),
        ({"use_llm_lora": 16}, r"apart from those of an adapter.*use_llm_lora 16.*merge_lora\.py"),
        ({"use_backbone_lora": 8}, "apart from those of an adapter.*use_backbone_lora 8"),
    ],
)
def test_what_the_family_does_not_cover_is_refused(
    changes: dict[str, Any], reason: str, folder: Path, tmp_path: Path
) -> None:
    found = checkpoint.resolve(str(change(folder, tmp_path, **changes)), random_weights=True)
    with pytest.raises(VlmcError, match=reason):
        checkpoint.load_model(found)


def test_an_unknown_template_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match=r"unknown chat template.*phi3-chat"):
        describe(change(folder, tmp_path, template="phi3-chat"))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    weights = original(folder)
    del weights["language_model.model.layers.1.attention.wqkv.weight"]
    save_file(weights, change(folder, tmp_path) / "model.safetensors")
    with pytest.raises(VlmcError, match=r"lacks 3 weights.*k_proj"):
        checkpoint.load_model(checkpoint.resolve(str(tmp_path)))


def test_weights_in_bfloat16_are_computed_with_in_float32(folder: Path, tmp_path: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in original(folder).items()}
    save_file(weights, change(folder, tmp_path) / "model.safetensors")
    model = checkpoint.load_model(checkpoint.resolve(str(tmp_path)))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, weights["language_model.output.weight"].float())


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_other_decoders_keep_their_names(kind: str, randomise: Any, tmp_path: Path) -> None:
    """InternVL 2.5, 3 (Qwen2) and 3.5 (Qwen3), whose decoders have transformers' names already."""
    architecture = kind.capitalize() + "ForCausalLM"
    found = config(64)
    found["llm_config"] |= {"architectures": [architecture], "model_type": kind, "head_dim": 16}
    sizes = {name: found["llm_config"][name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    own = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            kind, **sizes, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=64, head_dim=16
        )
    )
    randomise(own, 0)
    weights = {name: weight for name, weight in tensors(found).items() if not name.startswith("language_model")}
    weights |= {f"language_model.{name}": weight for name, weight in own.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(found))
    loaded: Any = family_for("internvl_chat", "here").load(tmp_path)
    assert type(loaded.model.language_model).__name__.lower() == f"{kind}model"
    decoder = loaded.model.language_model.state_dict() | {"lm_head.weight": loaded.lm_head.weight}
    for name, weight in own.state_dict().items():
        assert torch.equal(decoder[name.removeprefix("model.")], weight)


def test_qwens_tokenizer_is_transformers_own(folder: Path, tmp_path: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["llm_config"] | {"architectures": ["Qwen2ForCausalLM"]}
    change(folder, tmp_path, llm_config=text, template="internvl2_5")
    (tmp_path / "tokenizer.model").unlink()
    vocab = {token: id for id, token in enumerate([*ADDED, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    tokenizer.save_pretrained(tmp_path)
    _, prompt = describe(tmp_path)
    assert prompt.text_only.startswith("<|im_start|>system\n")
    assert prompt.eos_token_ids == (vocab["<|im_end|>"],)


def test_llamas_tokenizer_is_what_its_file_says(folder: Path, tmp_path: Path) -> None:
    """InternVL2-Llama3-76B's splits a text otherwise than Qwen's, and begins it with a token."""
    text = json.loads((folder / "config.json").read_text())["llm_config"] | {"architectures": ["LlamaForCausalLM"]}
    change(folder, tmp_path, llm_config=text)
    (tmp_path / "tokenizer.model").unlink()
    vocab = {token: id for id, token in enumerate(["<s>", *ADDED, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("1", "2")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", *ADDED])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}'
    )
    _, prompt = describe(tmp_path)
    assert prompt.text_only.startswith("<s><|im_start|>system\n")
    save_tokenizer(tmp_path, tmp_path / "saved.json")
    assert Tokenizer(tmp_path / "saved.json").encode("12").tolist() == [vocab["12"]]


def test_the_readme_says_what_it_can_be_made_into(artifact: Any, assert_supported: Any) -> None:
    assert_supported(artifact, "internvl_chat")
