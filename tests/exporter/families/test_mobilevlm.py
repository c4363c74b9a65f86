"""MobileVLM V2 in its own layout: a plain rendering of the published equations on the checkpoint's tensors judges."""

from __future__ import annotations

import json
import math
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
from torch import Tensor
from torch.nn import functional
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import checkpoint
from vlmc.exporter.processor import describe, save_tokenizer
from vlmc.runtime import preprocessing
from vlmc.runtime.prompt import Tokenizer, render

from .conftest import change
from .reference import Equations, SlowTokenizer, Weights, turned

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
WIDTH, HEADS, INNER, TEXT_LAYERS, VISION_LAYERS, IMAGE, PATCH = 32, 2, 48, 2, 3, 48, 2
TOWER = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": VISION_LAYERS}
TOWER |= {"num_attention_heads": HEADS, "image_size": IMAGE, "patch_size": PATCH}
PREFIX = "model.vision_tower.vision_tower.vision_model"


def config(vocabulary_size: int) -> dict[str, Any]:
    """config.json as mtgv/MobileVLM_V2-1.7B has it, and besides the sizes of a smaller vision encoder."""
    return {
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "image_aspect_ratio": "pad",
        "intermediate_size": INNER,
        "max_position_embeddings": 2048,
        "mm_hidden_size": WIDTH,
        "mm_projector_type": "ldpnetv2",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "num_attention_heads": HEADS,
        "num_hidden_layers": TEXT_LAYERS,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "vision_config": TOWER,
        "vision_tower_type": "clip",
        "vocab_size": vocabulary_size,
    }


def tensors(vocabulary_size: int) -> dict[str, Tensor]:
    """Random weights under the original names."""
    random = Weights(5)
    add, linear = random.add, random.linear

    random.clip(PREFIX, WIDTH, INNER, VISION_LAYERS, 1 + (IMAGE // PATCH) ** 2, PATCH)
    linear("model.mm_projector.mlp.mlp.0", WIDTH, WIDTH)
    linear("model.mm_projector.mlp.mlp.2", WIDTH, WIDTH)
    add("model.mm_projector.peg.peg.0.weight", WIDTH, 1, 3, 3)
    add("model.mm_projector.peg.peg.0.bias", WIDTH)
    add("model.embed_tokens.weight", vocabulary_size, WIDTH, scale=1.0)
    for index in range(TEXT_LAYERS):
        layer = f"model.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear(f"{layer}.self_attn.{name}", WIDTH, WIDTH, bias=False)
        for name, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
            linear(f"{layer}.mlp.{name}_proj", *shape, bias=False)
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"{layer}.{name}.weight", WIDTH, around=1.0)
    add("model.norm.weight", WIDTH, around=1.0)
    linear("lm_head", vocabulary_size, WIDTH, bias=False)
    return random.found


class Published(Equations):
    """The equations of CLIP (arXiv:2103.00020), LDPv2 (arXiv:2402.03766) and Llama (arXiv:2302.13971)."""

    def features(self, pixel_values: Tensor) -> Tensor:
        x = self.clip(PREFIX, pixel_values, HEADS, VISION_LAYERS - 1)  # all but the last
        hidden = self.linear("model.mm_projector.mlp.mlp.0", x)
        hidden = self.linear("model.mm_projector.mlp.mlp.2", functional.gelu(hidden))
        pooled = functional.adaptive_avg_pool2d(hidden.mT.unflatten(2, (IMAGE // PATCH, -1)), (12, 12))
        kernel, bias = (self.weights[f"model.mm_projector.peg.peg.0.{name}"] for name in ("weight", "bias"))
        return (pooled + functional.conv2d(pooled, kernel, bias, padding=1, groups=WIDTH)).flatten(2).mT

    def rotated(self, x: Tensor) -> Tensor:
        """(length, heads, dim): the pairs (i, i + dim/2) turned by position · 10000^(−2i/dim)."""
        half = x.shape[-1] // 2
        angle = torch.arange(len(x))[:, None, None] * 1e4 ** -(torch.arange(half) / half)
        return turned(x, angle)

    def logits(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        x = self.weights["model.embed_tokens.weight"][input_ids[0]].clone()
        if pixel_values is not None:
            x[input_ids[0] == 0] = self.features(pixel_values).flatten(0, 1)
        for index in range(TEXT_LAYERS):
            layer = f"model.layers.{index}"
            normed = self.rms_norm(f"{layer}.input_layernorm", x, 1e-6)
            q, k, v = (
                self.linear(f"{layer}.self_attn.{name}_proj", normed).unflatten(-1, (HEADS, -1)) for name in "qkv"
            )
            q, k, v = (part.transpose(0, 1) for part in (self.rotated(q), self.rotated(k), v))
            unseen = torch.full((len(x), len(x)), -math.inf).triu(1)
            attention = (q @ k.mT / math.sqrt(q.shape[-1]) + unseen).softmax(-1) @ v
            x = x + self.linear(f"{layer}.self_attn.o_proj", attention.transpose(0, 1).flatten(1))
            normed = self.rms_norm(f"{layer}.post_attention_layernorm", x, 1e-6)
            gate = functional.silu(self.linear(f"{layer}.mlp.gate_proj", normed))
            x = x + self.linear(f"{layer}.mlp.down_proj", gate * self.linear(f"{layer}.mlp.up_proj", normed))
        return self.linear("lm_head", self.rms_norm("model.norm", x, 1e-6))


@pytest.fixture(scope="module")
def pieces(vocabulary: Any) -> list[tuple[Any, ...]]:
    """Of the SentencePiece model, as Llama's are: its runs of spaces have the worst score."""
    vocab, _ = vocabulary(["<unk>", "<s>", "</s>"], SYSTEM)
    kinds = {0: 2, 1: 3, 2: 3} | dict.fromkeys(range(3, 259), 6)
    found: list[tuple[Any, ...]] = [(text, kinds.get(id, 1)) for text, id in sorted(vocab.items(), key=lambda x: x[1])]
    found[259:259] = [("▁" * length, 1, -1e9) for length in (2, 4, 8, 3)]
    return found


@pytest.fixture(scope="module")
def folder(pieces: Any, sentence_piece: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as Meituan saves it, in safetensors: a SentencePiece model, no tokenizer.json, no processor."""
    target = tmp_path_factory.mktemp("mobilevlm") / "checkpoint"
    target.mkdir()
    (target / "tokenizer.model").write_bytes(sentence_piece(pieces, True))
    (target / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    (target / "config.json").write_text(json.dumps(config(len(pieces))))
    save_file(tensors(len(pieces)), target / "model.safetensors")
    return target


@pytest.fixture(scope="module")
def artifact(folder: Path, export_tiny: Callable[[Path], Artifact]) -> Artifact:
    return export_tiny(folder)


def test_the_onnx_graphs_compute_the_published_equations(
    folder: Path, artifact: Artifact, assert_parity: Any, make_picture: Any
) -> None:
    reference = Published(load_file(folder / "model.safetensors"))
    wide, tall = make_picture(90, 31), make_picture(17, 60)
    assert_parity(artifact, reference, [[], [wide], [tall, wide]])


def test_only_clips_last_layer_and_the_norm_behind_it_are_left_out(folder: Path, artifact: Artifact) -> None:
    weights = load_file(folder / "model.safetensors")
    unused = f"vision_model.encoder.layers.{VISION_LAYERS - 1}.", "vision_model.post_layernorm."
    used = sum(w.numel() for name, w in weights.items() if not any(part in name for part in unused))
    assert used == sum(spec.parameters for spec in artifact.manifest.components.values())


def test_the_prompt_is_that_of_the_reference(folder: Path) -> None:
    _, prompt = describe(folder)
    assert prompt.text_only == f"<s> {SYSTEM} USER: {{text}} ASSISTANT:"
    assert prompt.with_image == f"<s> {SYSTEM} USER: {{image}}{{text}} ASSISTANT:"
    assert prompt.eos_token_ids == (2,)


# "<image>" is left out, where the reference looks for a picture, and "<unk>", which vlmc refuses.
PARTS = [
    "How",
    " many ",
    "boats",
    "  ",
    "     ",
    "\n",
    "</s>",
    "<s>",
    " </s> ",
    "ASSISTANT:",
    "<0x0A>",
    "42",
    "ö",
    "€",
    "😀",
    "▁",
]


@pytest.mark.parametrize("legacy", [False, True])
def test_any_question_becomes_the_ids_of_the_reference(
    legacy: bool, folder: Path, pieces: Any, sentence_piece: Any, tmp_path: Path
) -> None:
    """Its `tokenizer_image_token` encodes what stands before, between and behind the pictures apart, each as a text
    with a space before it, and leaves out the token that begins each but once. Where the tokenizer is not `legacy`,
    what follows a special token gets no space."""
    settings_path = change(folder, tmp_path) / "tokenizer_config.json"
    settings_path.write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy}))
    described, prompt = describe(tmp_path)
    save_tokenizer(tmp_path, tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    slow = SlowTokenizer(sentence_piece(pieces, legacy), special)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=8).map("".join), st.integers(0, 2))
    def check(question: str, pictures: int) -> None:
        text = f"{SYSTEM} USER: " + "<image>\n" * pictures + f"{question} ASSISTANT:"
        first, *others = [slow(chunk if legacy else " " + chunk) for chunk in text.split("<image>")]
        expected = [1, *first]
        for chunk in others:
            expected += [0] * 144 + chunk
        rendered = render(prompt, question, ["<unk>" * 144 + described["after_image"]] * pictures)
        assert tokenizer.encode(rendered).tolist() == expected

    check()


def test_the_pictures_are_padded_and_prepared_as_the_reference_does(folder: Path, make_picture: Any) -> None:
    clip = CLIPImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})
    described, _ = describe(folder)
    for size in ((90, 31), (17, 60), (48, 48)):
        picture = make_picture(*size)
        square = Image.new("RGB", (max(size), max(size)), tuple(int(value * 255) for value in clip.image_mean))
        square.paste(picture, tuple((max(size) - length) // 2 for length in size))
        expected = clip([square], return_tensors="np")["pixel_values"]
        prepared = preprocessing.load(described)([picture])
        assert np.array_equal(prepared.vision["pixel_values"], expected)
        assert prepared.image_texts == ("<unk>" * 144 + " \n",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mm_projector_type": "ldpnet"}, "another projector than V2.*ldpnet"),
        ({"mm_vision_select_feature": "cls_patch"}, "another choice of features"),
        ({"mm_use_im_start_end": True}, "another use of marks around pictures"),
        ({"vision_config": TOWER | {"patch_size": 3}}, "another number of patches a side than V2"),
        ({"vision_config": None, "mm_vision_tower": "google/siglip"}, "unknown vision encoder.*siglip"),
    ],
)
def test_what_the_family_does_not_cover_is_refused(
    changes: dict[str, Any], reason: str, folder: Path, tmp_path: Path
) -> None:
    found = checkpoint.resolve(str(change(folder, tmp_path, **changes)), random_weights=True)
    with pytest.raises(VlmcError, match=reason):
        checkpoint.load_model(found)


def test_the_published_vision_encoder_is_known_by_its_name(folder: Path, tmp_path: Path) -> None:
    described, _ = describe(change(folder, tmp_path, vision_config=None))
    assert (described["tile"], described["shortest_edge"], described["pad"]) == (336, 336, True)


@pytest.mark.parametrize(
    "name", ["model.mm_projector.peg.peg.0.bias", "model.mm_projector.mlp.mlp.2.weight", "model.norm.weight"]
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, change(folder, tmp_path) / "model.safetensors")
    with pytest.raises(VlmcError, match="lacks 1 weights"):
        checkpoint.load_model(checkpoint.resolve(str(tmp_path)))


def test_weights_in_float16_are_computed_with_in_float32(folder: Path, tmp_path: Path) -> None:
    weights = {name: weight.half() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, change(folder, tmp_path) / "model.safetensors")
    model = checkpoint.load_model(checkpoint.resolve(str(tmp_path)))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(model.peg.weight, weights["model.mm_projector.peg.peg.0.weight"].float())


def test_random_weights_depend_on_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    change(folder, tmp_path)
    first, again, other = (
        checkpoint.load_model(checkpoint.resolve(str(tmp_path), random_weights=True, seed=seed)).peg.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_readme_says_what_it_can_be_made_into(artifact: Any, assert_supported: Any) -> None:
    assert_supported(artifact, "mobilevlm")
