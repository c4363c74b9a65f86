"""Moondream2 in its own layout: a plain rendering of the published equations on the checkpoint's tensors judges.

It is one from the picture and the question to the logits, so that tiles, pooling and tokens are judged, too."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import checkpoint, parity
from vlmc.exporter.processor import describe, save_tokenizer
from vlmc.runtime.prompt import Tokenizer as Saved
from vlmc.runtime.prompt import render

from .conftest import assert_answers

QUESTION = "How many {red} boats are on the water? 42 €"
SPECIAL = ["<|endoftext|>", *(f"<|md_reserved_{index}|>" for index in range(7))]
TEXT = {"dim": 32, "ff_dim": 48, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1}
VISION = {"enc_dim": 24, "enc_patch_size": 2, "enc_n_layers": 2, "enc_ff_dim": 40, "enc_n_heads": 2, "crop_size": 14}
VISION |= {"max_crops": 6, "overlap_margin": 2, "proj_inner_dim": 40, "proj_out_dim": 32, "in_channels": 3}
WIDTH, HEADS, LAYERS, HEAD = TEXT["dim"], TEXT["n_heads"], TEXT["n_layers"], 16
SIDE, PATCH, MARGIN = 7, 2, 2
STEP = SIDE - 2 * MARGIN


def config(vocabulary_size: int) -> dict[str, Any]:
    """config.json as vikhyatk/moondream2 has it, but that its `config` is empty there. The reference read prefix_attn
    only from 077ae4e to bea5d40 (January 2025) and counts patches since."""
    return {
        "architectures": ["HfMoondream"],
        "auto_map": {"AutoModelForCausalLM": "hf_moondream.HfMoondream"},
        "config": {"text": TEXT | {"vocab_size": vocabulary_size, "prefix_attn": 730}, "vision": VISION},
        "model_type": "moondream1",
        "torch_dtype": "bfloat16",
    }


def tensors(vocabulary_size: int) -> dict[str, Tensor]:
    """Random weights under the original names."""
    generator = torch.Generator().manual_seed(3)
    found: dict[str, Tensor] = {}

    def add(name: str, *shape: int, around: float = 0.0, scale: float = 0.2) -> None:
        found[f"model.{name}"] = around + scale * torch.randn(shape, generator=generator)

    def linear(name: str, outputs: int, inputs: int) -> None:
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width, around=1.0)
        add(f"{name}.bias", width)

    width = VISION["enc_dim"]
    linear("vision.patch_emb", width, 3 * PATCH**2)
    add("vision.pos_emb", 1, SIDE**2, width)
    for index in range(VISION["enc_n_layers"]):
        block = f"vision.blocks.{index}"
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", VISION["enc_ff_dim"], width)
        linear(f"{block}.mlp.fc2", width, VISION["enc_ff_dim"])
        norm(f"{block}.ln1", width)
        norm(f"{block}.ln2", width)
    norm("vision.post_ln", width)
    linear("vision.proj_mlp.fc1", VISION["proj_inner_dim"], 2 * width)
    linear("vision.proj_mlp.fc2", WIDTH, VISION["proj_inner_dim"])
    add("text.wte", vocabulary_size, WIDTH, scale=1.0)
    for index in range(LAYERS):
        block = f"text.blocks.{index}"
        linear(f"{block}.attn.qkv", WIDTH + 2 * HEAD, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", TEXT["ff_dim"], WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, TEXT["ff_dim"])
        norm(f"{block}.ln", WIDTH)
    norm("text.post_ln", WIDTH)
    linear("text.lm_head", vocabulary_size, WIDTH)
    for name in ("coord_encoder", "coord_decoder.fc1", "size_decoder.fc2"):  # of the region head, which is left out
        linear(f"region.{name}", 8, 8)
    add("region.coord_features", 1, 4)
    return found


class Published:
    """The equations of moondream/torch/: vision.py, image_crops.py, text.py, rope.py, and query() of moondream.py."""

    def __init__(self, folder: Path) -> None:
        self.weights = {n.removeprefix("model."): w for n, w in load_file(folder / "model.safetensors").items()}
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def mlp(self, name: str, x: Tensor) -> Tensor:
        inner = self.linear(f"{name}.fc1", x)
        inner = inner / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        return self.linear(f"{name}.fc2", inner)

    def crops(self, image: Image.Image) -> tuple[Tensor, int, int]:
        """The whole and the tiles (1 + rows · columns, 3, 14, 14), rows, columns."""
        step, overlap = PATCH * STEP, 2 * PATCH * MARGIN
        height, width, most = image.height - overlap, image.width - overlap, VISION["max_crops"]
        rows, columns = 1, 1
        if height > step and width > step:
            rows, columns = math.ceil(height / step), math.ceil(width / step)
            if rows * columns > most:  # as it is for every picture of this file
                ratio = math.sqrt(most / (rows * columns))
                rows, columns = max(1, int(rows * ratio)), max(1, int(columns * ratio))
        whole = image.resize((14, 14), Image.Resampling.LANCZOS)
        large = image.resize((columns * step + overlap, rows * step + overlap), Image.Resampling.LANCZOS)
        boxes = [(x * step, y * step, x * step + 14, y * step + 14) for y in range(rows) for x in range(columns)]
        pixels = np.stack([np.asarray(crop) for crop in (whole, *(large.crop(box) for box in boxes))])
        return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5, rows, columns

    def encoded(self, pixels: Tensor) -> Tensor:
        """(crops, 3, 14, 14) → (crops, 49, width)."""
        patches = pixels.reshape(-1, 3, SIDE, PATCH, SIDE, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(len(pixels), 49, -1)
        x = self.linear("vision.patch_emb", patches) + self.weights["vision.pos_emb"]
        for index in range(VISION["enc_n_layers"]):
            block = f"vision.blocks.{index}"
            qkv = self.linear(f"{block}.attn.qkv", self.layer_norm(f"{block}.ln1", x)).chunk(3, dim=-1)
            q, k, v = (part.unflatten(-1, (VISION["enc_n_heads"], -1)).transpose(1, 2) for part in qkv)
            attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
            x = x + self.linear(f"{block}.attn.proj", attention.transpose(1, 2).flatten(2))
            x = x + self.mlp(f"{block}.mlp", self.layer_norm(f"{block}.ln2", x))
        return self.layer_norm("vision.post_ln", x)

    def picture(self, image: Image.Image) -> Tensor:
        """(49, WIDTH)."""
        pixels, rows, columns = self.crops(image)
        features = self.encoded(pixels)
        grid = torch.zeros(rows * STEP + 2 * MARGIN, columns * STEP + 2 * MARGIN, features.shape[-1])
        for index, crop in enumerate(features[1:].unflatten(1, (SIDE, SIDE))):
            y, x = divmod(index, columns)
            y0, x0 = (MARGIN if y else 0), (MARGIN if x else 0)
            y1, x1 = (SIDE - MARGIN if y < rows - 1 else SIDE), (SIDE - MARGIN if x < columns - 1 else SIDE)
            grid[y * STEP + y0 : y * STEP + y1, x * STEP + x0 : x * STEP + x1] = crop[y0:y1, x0:x1]
        pooled = functional.adaptive_avg_pool2d(grid.permute(2, 0, 1), (SIDE, SIDE)).permute(1, 2, 0).reshape(49, -1)
        return self.mlp("vision.proj_mlp", torch.cat((features[0], pooled), dim=-1))

    def embed(self, ids: Tensor | list[int]) -> Tensor:
        return self.weights["text.wte"][ids]

    def prompt(self, images: list[Image.Image], question: str) -> tuple[Tensor, int]:
        """(length, WIDTH) and how many positions see one another."""
        word = self.tokenizer.encode("query").ids
        ids = [1, *word, 2, *self.tokenizer.encode(question).ids, 3, 3]
        pictures = [self.picture(image) for image in images]
        return torch.cat((self.embed([0]), *pictures, self.embed(ids))), 50 if images else 0

    def rotated(self, x: Tensor) -> Tensor:
        """(length, heads, 16): the first eight channels as four complex numbers, turned, real and imaginary parts side
        by side as the reference leaves them."""
        angle = torch.arange(len(x))[:, None, None] * 1e4 ** -(torch.arange(4) / 4)
        turned = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((torch.view_as_real(turned).flatten(-2), x[..., 8:]), dim=-1)

    def logits(self, x: Tensor, prefix: int) -> Tensor:
        """(length, WIDTH) → (length, vocabulary)."""
        unseen = torch.full((len(x), len(x)), -math.inf).triu(1)
        unseen[:prefix, :prefix] = 0
        for index in range(LAYERS):
            block = f"text.blocks.{index}"
            normed = self.layer_norm(f"{block}.ln", x)
            q, k, v = self.linear(f"{block}.attn.qkv", normed).split((WIDTH, HEAD, HEAD), dim=-1)
            q, k, v = (part.unflatten(-1, (-1, HEAD)) for part in (q, k, v))
            q, k, v = (part.transpose(0, 1) for part in (self.rotated(q), self.rotated(k), v))
            attention = (q @ k.mT / math.sqrt(HEAD) + unseen).softmax(-1) @ v  # one key and value for both heads
            attended = self.linear(f"{block}.attn.proj", attention.transpose(0, 1).flatten(1))
            x = x + attended + self.mlp(f"{block}.mlp", normed)
        return self.linear("text.lm_head", self.layer_norm("text.post_ln", x))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it is published, with the tokenizer that belongs to it."""
    target = tmp_path_factory.mktemp("moondream") / "checkpoint"
    target.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["query How many red boats are on the water? two red boats"] * 9, trainer)
    tokenizer.save(str(target / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    (target / "config.json").write_text(json.dumps(config(size)))
    save_file(tensors(size), target / "model.safetensors")
    return target


@pytest.fixture(scope="module")
def artifact(folder: Path, export_tiny: Callable[[Path], Artifact]) -> Artifact:
    return export_tiny(folder)


@torch.inference_mode()
def test_a_picture_and_a_question_become_the_published_logits_and_tokens(
    folder: Path, artifact: Artifact, make_picture: Any
) -> None:
    reference, session = Published(folder), parity.canonical_session(artifact)
    for pictures in ([], [make_picture(14, 14)], [make_picture(90, 31)], [make_picture(17, 60)]):
        embeds, prefix = reference.prompt(pictures, QUESTION)
        logits = partial(reference.logits, prefix=prefix)
        assert_answers(session, session.prepare(pictures, QUESTION), embeds, logits, reference.embed)


@torch.inference_mode()
def test_the_vision_encoder_gives_the_published_features(folder: Path, artifact: Artifact, make_picture: Any) -> None:
    reference, session = Published(folder), parity.canonical_session(artifact)
    for size in ((14, 14), (90, 31), (17, 60), (200, 190)):
        found = session.vision.run(session.prepare([make_picture(*size)], QUESTION).vision)["image_features"]
        expected = reference.picture(make_picture(*size)).numpy()
        np.testing.assert_allclose(found[0], expected, atol=2e-4, rtol=2e-4)


def test_every_tensor_but_the_region_heads_is_used_once(folder: Path, artifact: Artifact) -> None:
    weights = load_file(folder / "model.safetensors")
    used = sum(weight.numel() for name, weight in weights.items() if "region." not in name)
    assert used == sum(spec.parameters for spec in artifact.manifest.components.values())


def test_the_published_count_is_the_presets_and_the_region_heads() -> None:
    """Of encoders and decoders for coordinates and sizes, from config.py's sizes."""
    layers = [(256, 2048), (2048, 8192), (8192, 1024), (512, 2048), (2048, 8192), (8192, 2048)]
    region = sum(inputs * outputs + outputs for inputs, outputs in layers) + 256 // 2 + 512
    found = checkpoint.resolve("moondream-1.9b", random_weights=True)
    assert found.preset is not None
    assert found.preset["published_parameters"] + region == 1_927_237_104


def test_the_prompt_is_that_of_query(folder: Path) -> None:
    described, prompt = describe(folder)
    behind = "<|md_reserved_0|>query<|md_reserved_1|>{text}<|md_reserved_2|><|md_reserved_2|>"
    assert prompt.text_only == "<|endoftext|>" + behind
    assert prompt.with_image == "<|endoftext|>{image}" + behind
    assert prompt.eos_token_ids == (0,)
    wanted = {"kind": "moondream", "tile": 14, "patch": 2, "max_tiles": 6, "margin": 2, "after_image": ""}
    assert {name: described[name] for name in wanted} == wanted
    with pytest.raises(VlmcError, match="stands for a picture"):
        render(prompt, "Where is <|md_reserved_4|>?", ())


PARTS = ["How", " many ", "boats", "   ", "\n", "query", "<|endoftext|>", "<|md_reserved_0|>", " <|md_reserved_2|> "]
PARTS += ["<|md_reserved_", "{image}", "{text}", "42", "€", "é", "😀", "'s", ""]


def test_any_question_becomes_the_ids_of_query(folder: Path, tmp_path: Path) -> None:
    """`query` of moondream.py puts the question, encoded by itself as the tokenizer's file says, between the ids of its
    template; a picture stands behind the token that begins the text."""
    _, prompt = describe(folder)
    save_tokenizer(folder, tmp_path / "tokenizer.json")
    tokenizer = Saved(tmp_path / "tokenizer.json")
    encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join), st.integers(0, 1))
    def check(question: str, pictures: int) -> None:
        expected = [0, *[5] * 49 * pictures, 1, *encode("query").ids, 2, *encode(question).ids, 3, 3]
        rendered = render(prompt, question, ["<|md_reserved_4|>" * 49] * pictures)
        assert tokenizer.encode(rendered).tolist() == expected

    check()


def test_several_pictures_are_refused(artifact: Artifact, make_picture: Any) -> None:
    session = parity.canonical_session(artifact)
    with pytest.raises(VlmcError, match="takes one picture"):
        session.prepare([make_picture(14, 14), make_picture(20, 14)], QUESTION)


def change(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of the checkpoint without weights, with another config.json."""
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    (target / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    return target


def test_the_sizes_are_the_references_where_the_config_says_nothing(folder: Path, tmp_path: Path) -> None:
    described, _ = describe(change(folder, tmp_path, config={}))
    assert (described["tile"], described["patch"], described["max_tiles"], described["margin"]) == (378, 14, 12, 4)
    found = checkpoint.resolve(str(tmp_path), random_weights=True)
    with torch.device("meta"):
        model = found.family.randomise(found.config, 0)
    preset = checkpoint.resolve("moondream-1.9b", random_weights=True).preset
    assert preset is not None
    assert sum(weight.numel() for weight in model.parameters()) == preset["published_parameters"]


def test_the_tokenizer_before_is_refused_with_where_the_right_one_is(folder: Path, tmp_path: Path) -> None:
    """vikhyatk/moondream2 still holds it."""
    old = Tokenizer(models.BPE())
    old.add_special_tokens(["a", "<|endoftext|>"])
    old.save(str(change(folder, tmp_path) / "tokenizer.json"))
    with pytest.raises(VlmcError, match=r"<\|endoftext\|> 1.*starmie-v1.*2025-06-21; older"):
        describe(tmp_path)


def test_a_token_of_a_huge_number_is_refused(folder: Path, tmp_path: Path) -> None:
    path = change(folder, tmp_path) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["zebra"] = 4_000_000_000
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(VlmcError, match="numbers a token 4000000000"):
        describe(tmp_path)


def test_the_layout_before_2025_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match=r"before 2025.*text_config.*2025-06-21"):
        checkpoint.resolve(str(change(folder, tmp_path, text_config={"model_type": "phi"})))


def test_a_revision_that_was_trained_with_the_tokenizer_before_is_refused(folder: Path, tmp_path: Path) -> None:
    """From 2025-01-09 to 2025-04-14: same config.json and names; the code beside them names its tokenizer."""
    code = change(folder, tmp_path) / "moondream.py"
    code.write_text('Tokenizer.from_pretrained("moondream/starmie-v1")')
    describe(tmp_path)
    code.write_text('Tokenizer.from_pretrained("vikhyatk/moondream2", revision="2025-01-09")')
    with pytest.raises(VlmcError, match=r"before 2025-06-21.*take revision 2025-06-21"):
        describe(tmp_path)


def test_quantised_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    quantised = {"text": TEXT | {"group_size": 128}, "vision": VISION}
    found = checkpoint.resolve(str(change(folder, tmp_path, config=quantised)), random_weights=True)
    with pytest.raises(VlmcError, match="is quantised"):
        checkpoint.load_model(found)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vision.pos_emb", 1),
        ("vision.proj_mlp.fc2.bias", 1),
        ("text.wte", 1),
        ("text.blocks.1.attn.qkv.weight", 3),
        ("vision.blocks.0.attn.qkv.bias", 3),
    ],
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(name: str, count: int, folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[f"model.{name}"]
    save_file(weights, change(folder, tmp_path) / "model.safetensors")
    with pytest.raises(VlmcError, match=f"lacks {count} weights"):
        checkpoint.load_model(checkpoint.resolve(str(tmp_path)))


def test_names_may_lack_their_beginning_and_weights_are_computed_with_in_float32(folder: Path, tmp_path: Path) -> None:
    weights = {n.removeprefix("model."): w.bfloat16() for n, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, change(folder, tmp_path) / "model.safetensors")
    model = checkpoint.load_model(checkpoint.resolve(str(tmp_path)))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(model.text.lm_head.bias, weights["text.lm_head.bias"].float())


def test_random_weights_depend_on_the_seed_alone(folder: Path) -> None:
    first, again, other = (
        checkpoint.load_model(checkpoint.resolve(str(folder), random_weights=True, seed=seed)).state_dict()
        for seed in (1, 1, 2)
    )
    for name in ("connector.fc1.weight", "text.lm_head.weight", "vision.embeddings.patch_embedding.weight"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_a_step_on_a_gpu_needs_no_host(artifact: Any, assert_steps_need_no_host: Any) -> None:
    assert_steps_need_no_host(artifact)


def test_the_readme_says_what_it_can_be_made_into(artifact: Any, assert_supported: Any) -> None:
    assert_supported(artifact, "moondream")


def test_vision_as_tensorrt_gets_it_computes_what_pytorch_does(artifact: Any, as_tensorrt: Any) -> None:
    """Both of its inputs have as many tiles, and no part of them stands alone."""
    as_tensorrt(artifact, "vision_encoder")
