"""Phi-3.5-Vision in its own layout: a plain rendering of the published equations on the checkpoint's tensors judges.

It is one from the picture and the question to the logits, so that tiles, separators and tokens are judged, too."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import Tensor
from torch.nn import functional
from transformers.tokenization_utils_base import generate_merges
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import checkpoint, parity
from vlmc.exporter.processor import describe, save_tokenizer
from vlmc.runtime import preprocessing
from vlmc.runtime.prompt import Tokenizer as Saved
from vlmc.runtime.prompt import render

from .conftest import assert_answers, change
from .reference import Equations, SlowTokenizer, Weights, turned

QUESTION = "How many {red} boats are on the water? 42 €"
WIDTH, HEADS, KV_HEADS, INNER, LAYERS = 32, 2, 1, 48, 2
VISION, VISION_LAYERS, IMAGE, PATCH = 24, 3, 8, 2
TOWER = {"hidden_size": VISION, "intermediate_size": INNER, "num_hidden_layers": VISION_LAYERS}
TOWER |= {"num_attention_heads": HEADS, "image_size": IMAGE, "patch_size": PATCH}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHORT = [1.08, 1.1, 1.13, 1.28, 1.31, 1.45, 1.45, 1.95]  # of Phi-3.5-Vision, the first of 48
LONG = [1.08, 1.11, 1.14, 1.34, 1.59, 1.6, 1.62, 2.62]
# Microsoft's added tokens, and whether they swallow the white space behind them, as Llama's "</s>" does there.
ADDED = {"<|endoftext|>": False, "<|assistant|>": True, "<|end|>": False, "<|user|>": False, "<|image|>": True}
VISION_PREFIX = "model.vision_embed_tokens.img_processor.vision_model"


def config(vocabulary_size: int) -> dict[str, Any]:
    """config.json as microsoft/Phi-3.5-vision-instruct has it, and besides the sizes of a smaller vision encoder."""
    return {
        "architectures": ["Phi3VForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM"},
        "model_type": "phi3_v",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "img_processor": {
            "image_dim_out": VISION,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 144,
        },
        "intermediate_size": INNER,
        "max_position_embeddings": 131072,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "su"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "vision_config": TOWER,
        "vocab_size": vocabulary_size,
    }


def tensors(vocabulary_size: int) -> dict[str, Tensor]:
    """Random weights under the original names."""
    random = Weights(7)
    add, linear = random.add, random.linear

    random.clip(VISION_PREFIX, VISION, INNER, VISION_LAYERS, 1 + (IMAGE // PATCH) ** 2, PATCH)
    add("model.vision_embed_tokens.glb_GN", 1, 1, 4 * VISION, scale=1.0)
    add("model.vision_embed_tokens.sub_GN", 1, 1, 1, 4 * VISION, scale=1.0)
    linear("model.vision_embed_tokens.img_projection.0", WIDTH, 4 * VISION)
    linear("model.vision_embed_tokens.img_projection.2", WIDTH, WIDTH)
    add("model.embed_tokens.weight", vocabulary_size, WIDTH, scale=1.0)
    for index in range(LAYERS):
        layer, head = f"model.layers.{index}", WIDTH // HEADS
        linear(f"{layer}.self_attn.qkv_proj", (HEADS + 2 * KV_HEADS) * head, WIDTH, bias=False)
        linear(f"{layer}.self_attn.o_proj", WIDTH, WIDTH, bias=False)
        linear(f"{layer}.mlp.gate_up_proj", 2 * INNER, WIDTH, bias=False)
        linear(f"{layer}.mlp.down_proj", WIDTH, INNER, bias=False)
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"{layer}.{name}.weight", WIDTH, around=1.0)
    add("model.norm.weight", WIDTH, around=1.0)
    linear("lm_head", vocabulary_size, WIDTH, bias=False)
    return random.found


class Published(Equations):
    """The equations of CLIP (arXiv:2103.00020), Phi-3.5-Vision's embedding of pictures and its decoder
    (arXiv:2404.14219), with LongRoPE (arXiv:2402.13753) for texts of the first context."""

    def __init__(self, folder: Path) -> None:
        super().__init__(load_file(folder / "model.safetensors"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.crops = json.loads((folder / "preprocessor_config.json").read_text())["num_crops"]

    def crops_of(self, image: Image.Image) -> tuple[Tensor, int, int]:
        """The whole and the tiles (1 + rows · columns, 3, IMAGE, IMAGE), rows, columns."""
        tall = image.width < image.height
        if tall:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        ratio, scale = image.width / image.height, 1
        while scale * math.ceil(scale / ratio) <= self.crops:
            scale += 1
        width = (scale - 1) * IMAGE
        image = image.resize((width, int(width / ratio)), Image.Resampling.BILINEAR)
        missing = math.ceil(image.height / IMAGE) * IMAGE - image.height
        image = ImageOps.expand(image, (0, missing // 2, 0, missing - missing // 2), fill=(255, 255, 255))
        if tall:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        pixels = torch.from_numpy(np.array(image) / 255).permute(2, 0, 1)
        pixels = ((pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]).float()
        whole = functional.interpolate(pixels[None], size=(IMAGE, IMAGE), mode="bicubic")
        tiles = [part for row in pixels.split(IMAGE, 1) for part in row.split(IMAGE, 2)]
        return torch.cat((whole, torch.stack(tiles))), image.height // IMAGE, image.width // IMAGE

    def patches(self, pixel_values: Tensor) -> Tensor:
        """CLIP's last layer but one, as a picture: (tiles, side, side, VISION)."""
        x = self.clip(VISION_PREFIX, pixel_values, HEADS, VISION_LAYERS - 1)
        return x.unflatten(1, (IMAGE // PATCH, -1))

    def lines(self, picture: Tensor) -> Tensor:
        """(height, width, VISION) → (lines · (tokens a line + 1), 4 · VISION): squares of four patches, their channels
        one after the other, and at each line's end the separator."""
        squares = [picture[y::2, x::2] for y in (0, 1) for x in (0, 1)]
        merged = torch.cat(squares, dim=-1)
        end = self.weights["model.vision_embed_tokens.sub_GN"][0].expand(len(merged), 1, -1)
        return torch.cat((merged, end), dim=1).flatten(0, 1)

    def picture(self, image: Image.Image) -> Tensor:
        """(image tokens, WIDTH)."""
        pixels, rows, columns = self.crops_of(image)
        patches = self.patches(pixels)
        tiles = patches[1:].unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        parts = self.lines(tiles), self.weights["model.vision_embed_tokens.glb_GN"][0], self.lines(patches[0])
        hidden = self.linear("model.vision_embed_tokens.img_projection.0", torch.cat(parts))
        return self.linear("model.vision_embed_tokens.img_projection.2", functional.gelu(hidden))

    def chunks(self, pictures: int, question: str) -> list[str]:
        """The model card's prompt as processing_phi3_v.py parts it: before, between and behind the pictures."""
        tags = "".join(f"<|image_{index}|>\n" for index in range(1, pictures + 1))
        return re.split(r"<\|image_\d+\|>", f"<|user|>\n{tags}{question}<|end|>\n<|assistant|>\n")

    def prompt(self, images: list[Image.Image], question: str) -> Tensor:
        """(length, WIDTH). Each chunk begins with the token that begins a text; pictures stand between them."""
        texts = [self.embed([1, *self.tokenizer.encode(chunk).ids]) for chunk in self.chunks(len(images), question)]
        parts = [part for image, text in zip(images, texts[1:], strict=True) for part in (self.picture(image), text)]
        return torch.cat((texts[0], *parts))

    def embed(self, ids: Tensor | list[int]) -> Tensor:
        return self.weights["model.embed_tokens.weight"][ids]

    def rotated(self, x: Tensor) -> Tensor:
        """(length, heads, dim): the pairs (i, i + dim/2) turned by position / (factor · 10000^(2i/dim)), and scaled."""
        half = x.shape[-1] // 2
        angle = torch.arange(len(x))[:, None, None] / (torch.tensor(SHORT) * 1e4 ** (torch.arange(half) / half))
        return turned(x, angle) * math.sqrt(1 + math.log(131072 / 4096) / math.log(4096))

    def logits(self, x: Tensor) -> Tensor:
        """(length, WIDTH) → (length, vocabulary)."""
        for index in range(LAYERS):
            layer, head = f"model.layers.{index}", WIDTH // HEADS
            normed = self.rms_norm(f"{layer}.input_layernorm", x)
            q, k, v = self.linear(f"{layer}.self_attn.qkv_proj", normed).split(
                (HEADS * head, KV_HEADS * head, KV_HEADS * head), dim=-1
            )
            q, k, v = (part.unflatten(-1, (-1, head)) for part in (q, k, v))
            q, k, v = (part.transpose(0, 1) for part in (self.rotated(q), self.rotated(k), v))
            unseen = torch.full((len(x), len(x)), -math.inf).triu(1)
            attention = (q @ k.mT / math.sqrt(head) + unseen).softmax(-1) @ v  # one key and value for both heads
            x = x + self.linear(f"{layer}.self_attn.o_proj", attention.transpose(0, 1).flatten(1))
            normed = self.rms_norm(f"{layer}.post_attention_layernorm", x)
            gate, up = self.linear(f"{layer}.mlp.gate_up_proj", normed).chunk(2, dim=-1)
            x = x + self.linear(f"{layer}.mlp.down_proj", functional.silu(gate) * up)
        return self.linear("lm_head", self.rms_norm("model.norm", x))


@pytest.fixture(scope="module")
def folder(vocabulary: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as Microsoft saves it: Llama's tokenizer, whose "</s>" is no special token."""
    target = tmp_path_factory.mktemp("phi3_v") / "checkpoint"
    target.mkdir()
    vocab, _ = vocabulary(["<unk>", "<s>", "</s>"])
    merges = generate_merges(vocab, skip_tokens=list(vocab)[:259])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>")])
    tokenizer.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    tokenizer.add_special_tokens([AddedToken(token, rstrip=b, normalized=False) for token, b in ADDED.items()])
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer", "eos_token": "<|endoftext|>"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    pictures = {"image_processor_type": "Phi3VImageProcessor", "num_crops": 4, "num_img_tokens": 144}
    pictures |= {"image_mean": MEAN, "image_std": STD}
    (target / "preprocessor_config.json").write_text(json.dumps(pictures))
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
    square, wide, tall = make_picture(16, 16), make_picture(90, 31), make_picture(7, 24)
    for pictures in ([], [square], [wide], [tall], [tall, wide, square]):
        prompt = reference.prompt(pictures, QUESTION)
        assert_answers(session, session.prepare(pictures, QUESTION), prompt, reference.logits, reference.embed)


@torch.inference_mode()
def test_the_vision_encoder_gives_the_published_features_in_the_order_of_rows(
    folder: Path, artifact: Artifact, make_picture: Any
) -> None:
    reference, session = Published(folder), parity.canonical_session(artifact)
    pictures = [make_picture(90, 31), make_picture(7, 24)]
    inputs = session.prepare(pictures, QUESTION)
    found = session.vision.run(inputs.vision)["image_features"].reshape(-1, WIDTH)
    expected = torch.cat([reference.picture(picture) for picture in pictures])
    np.testing.assert_allclose(found[inputs.rows], expected.numpy(), atol=2e-4, rtol=2e-4)


def test_only_clips_last_layer_and_the_norm_behind_it_are_left_out(folder: Path, artifact: Artifact) -> None:
    weights = load_file(folder / "model.safetensors")
    unused = f"vision_model.encoder.layers.{VISION_LAYERS - 1}.", "vision_model.post_layernorm."
    used = sum(w.numel() for name, w in weights.items() if not any(part in name for part in unused))
    assert used == sum(spec.parameters for spec in artifact.manifest.components.values())


def test_the_prompt_is_the_model_cards(folder: Path) -> None:
    described, prompt = describe(folder)
    assert prompt.text_only == "<s><|user|>\n{text}<|end|>\n<|assistant|>\n"
    assert prompt.with_image == "<s><|user|>\n{image}{text}<|end|>\n<|assistant|>\n"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert prompt.eos_token_ids == tuple(tokenizer.token_to_id(token) for token in ("<|end|>", "<|endoftext|>"))
    wanted = {"max_tiles": 4, "tile": IMAGE, "side": 2, "end_token": "<s>", "after_image": "\n"}
    assert {name: described[name] for name in wanted} == wanted


PARTS = ["How", " many ", "boats", "   ", "\n", "<|end|>", "<|user|>\n", "<|assistant|>", "</s>", "<s>", "<unk>", "42"]
PARTS += ["<|endoftext|>", "<|image", "<image>", "{image}", "{text}", "€", "😀", "▁", "<0x0A>"]


def test_any_question_becomes_the_ids_of_the_published_processor(
    folder: Path, sentence_piece: Any, make_picture: Any, tmp_path: Path
) -> None:
    """Each chunk begins with the token that begins a text; a space comes before every stretch between added tokens."""
    described, prompt = describe(folder)
    save_tokenizer(folder, tmp_path / "tokenizer.json")
    tokenizer, reference = Saved(tmp_path / "tokenizer.json"), Published(folder)
    ids = {token: reference.tokenizer.token_to_id(token) for token in (*ADDED, "<unk>", "<s>", "</s>")}
    vocab = sorted(reference.tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    pieces = [(piece, {0: 2, 1: 3, 2: 3}.get(id, 6 if id < 259 else 1)) for piece, id in vocab]
    slow = SlowTokenizer(sentence_piece(pieces, True), ids)
    images = [make_picture(90, 31), make_picture(7, 24)]
    texts = preprocessing.load(described)(images).image_texts
    counts = [(rows * columns + 1) * 4 + 1 + (rows + 1) * 2 for _, rows, columns in map(reference.crops_of, images)]

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=8).map("".join), st.integers(0, 2))
    def check(question: str, pictures: int) -> None:
        chunks = (re.sub(r"(<\|assistant\|>|</s>)\s+", r"\1", c) for c in reference.chunks(pictures, question))
        first, *others = [[1, *slow(chunk)] for chunk in chunks]
        for count, chunk in zip(counts, others, strict=False):
            first += [ids["<|image|>"]] * count + chunk
        assert tokenizer.encode(render(prompt, question, texts[:pictures])).tolist() == first

    check()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_file_that_is_missing_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    (change(folder, tmp_path) / name).unlink()
    with pytest.raises(VlmcError, match=f"{name} is missing"):
        describe(tmp_path)


def test_a_tokenizer_that_begins_no_text_puts_nothing_behind_pictures(folder: Path, tmp_path: Path) -> None:
    (change(folder, tmp_path) / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    described, prompt = describe(tmp_path)
    assert described["end_token"] == ""
    assert prompt.text_only.startswith("<|user|>")


def test_the_published_vision_encoder_is_known_by_its_name(folder: Path, tmp_path: Path) -> None:
    described, _ = describe(change(folder, tmp_path, vision_config=None))
    assert (described["tile"], described["side"]) == (336, 12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"embd_layer": {"hd_transform_order": "glb_sub"}}, "another order of tiles and whole.*glb_sub"),
        ({"embd_layer": {"projection_cls": "linear"}}, "another projector"),
        ({"embd_layer": {"with_learnable_separator": False}}, "another use of separators"),
        ({"img_processor": {"layer_idx": -1}}, "another layer of features"),
        ({"img_processor": {"type_feature": "cls_patch"}}, "another choice of features"),
        ({"vision_config": TOWER | {"image_size": 6}}, "another number of patches a side"),
        ({"vision_config": None, "img_processor": {"model_name": "google/siglip"}}, "unknown vision encoder.*siglip"),
    ],
)
def test_what_the_family_does_not_cover_is_refused(
    changes: dict[str, Any], reason: str, folder: Path, tmp_path: Path
) -> None:
    found = checkpoint.resolve(str(change(folder, tmp_path, **changes)), random_weights=True)
    with pytest.raises(VlmcError, match=reason):
        checkpoint.load_model(found)


def test_texts_beyond_the_first_context_are_refused_and_those_of_plain_rotation_are_not(
    folder: Path, tmp_path: Path
) -> None:
    found = checkpoint.resolve(str(folder), random_weights=True)
    model = checkpoint.load_model(found)
    assert found.family.kv(model, 4096).capacity == 4096
    with pytest.raises(VlmcError, match="4097 positions"):
        found.family.kv(model, 4097)
    plain = checkpoint.resolve(str(change(folder, tmp_path, rope_scaling=None)), random_weights=True)
    assert plain.family.kv(checkpoint.load_model(plain), 8192).capacity == 8192


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_embed_tokens.glb_GN",
        "model.vision_embed_tokens.img_projection.2.weight",
        f"{VISION_PREFIX}.encoder.layers.0.mlp.fc1.bias",
        "model.layers.1.self_attn.qkv_proj.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, change(folder, tmp_path) / "model.safetensors")
    with pytest.raises(VlmcError, match=f"lacks 1 weights.*{name}"):
        checkpoint.load_model(checkpoint.resolve(str(tmp_path)))


def test_the_table_of_embeddings_may_have_its_other_name_and_weights_their_half_precision(
    folder: Path, tmp_path: Path
) -> None:
    weights = {name: weight.half() for name, weight in load_file(folder / "model.safetensors").items()}
    weights["model.vision_embed_tokens.wte.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, change(folder, tmp_path) / "model.safetensors")
    model = checkpoint.load_model(checkpoint.resolve(str(tmp_path)))
    table = model.text.get_input_embeddings().weight
    assert torch.equal(table, weights["model.vision_embed_tokens.wte.weight"].float())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_random_weights_depend_on_the_seed_alone(folder: Path) -> None:
    first, again, other = (
        checkpoint.load_model(checkpoint.resolve(str(folder), random_weights=True, seed=seed)).state_dict()
        for seed in (1, 1, 2)
    )
    for name in ("connector.sub_GN", "text.model.layers.0.mlp.down_proj.weight", "vision.embeddings.class_embedding"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_the_readme_says_what_it_can_be_made_into(artifact: Any, assert_supported: Any) -> None:
    assert_supported(artifact, "phi3_v")
