"""What the tests of every family share: small tokenizers and weights, and the comparison with a reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from vlmc.artifact import Artifact
from vlmc.exporter import checkpoint, parity
from vlmc.exporter.export import Options, export

from . import support

TEXT = "A chat between a user and an assistant. USER: How many red boats are on the water? ASSISTANT: two red boats"
QUESTION = "How many {red} boats are on the water? 42 €"


class Reference(Protocol):
    """A whole model without a cache, not vlmc's."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """(tiles, 3, height, width) → (tiles, tokens, hidden)."""

    def logits(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """(1, length) → (length, vocabulary)."""


@pytest.fixture(scope="session")
def make_picture() -> Callable[[int, int], Image.Image]:
    """make_picture(width, height): noise, always the same for a size."""

    def make(width: int, height: int) -> Image.Image:
        noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(noise)

    return make


@pytest.fixture(scope="session")
def vocabulary() -> Callable[..., tuple[dict[str, int], list[tuple[str, str]]]]:
    """vocabulary(special, text=""): a small BPE with ▁ for a space and <0x00> … <0xFF> for bytes, as SentencePiece
    makes them: its tokens and merges, the special tokens first."""

    def train(special: list[str], text: str = "") -> tuple[dict[str, int], list[tuple[str, str]]]:
        bpe = Tokenizer(models.BPE(byte_fallback=True))
        bpe.pre_tokenizer = pre_tokenizers.Metaspace()
        first = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
        bpe.train_from_iterator(
            [TEXT, text] * 9,
            trainers.BpeTrainer(vocab_size=400 + 2 * len(text), special_tokens=first, show_progress=False),
        )
        model = json.loads(bpe.to_str())["model"]
        return model["vocab"], [tuple(merge) for merge in model["merges"]]

    return train


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module, int], None]:
    """randomise(model, seed): weights larger than fresh ones, so that attention is not flat and greedy choices are no
    ties; no bias is zero and no norm is one."""

    def fill(model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * (1.0 if "embed_tokens" in name else 0.2))
                if "norm" in name and name.endswith("weight"):
                    weight.add_(1)

    return fill


@pytest.fixture(scope="session")
def export_tiny(picture_set: Path) -> Callable[[Path], Artifact]:
    """export_tiny(folder): the checkpoint exported beside itself, with a KV cache of 512."""

    def run(folder: Path) -> Artifact:
        options = Options(capacity=512, cases=2, picture_set=picture_set, max_new_tokens=4)
        return export(checkpoint.resolve(str(folder)), folder.parent / "artefact", options, lambda *_: None)

    return run


@pytest.fixture(scope="session")
def assert_parity() -> Callable[[Artifact, Reference, list[list[Image.Image]]], None]:
    """assert_parity(artifact, reference, prompts): for each prompt's pictures the ONNX graphs in ONNX Runtime give the
    reference's features, logits of the prompt and greedy tokens. Tolerance: float32 sums in another order."""

    def check(artifact: Artifact, reference: Reference, prompts: list[list[Image.Image]]) -> None:
        session = parity.canonical_session(artifact)
        for pictures in prompts:
            inputs = session.prepare(pictures, QUESTION)
            ids, pixels = torch.from_numpy(inputs.input_ids)[None], None
            with torch.inference_mode():
                if inputs.vision:
                    pixels = torch.from_numpy(inputs.vision["pixel_values"])
                    found = session.vision.run(inputs.vision)["image_features"]
                    np.testing.assert_allclose(found, reference.features(pixels).numpy(), atol=2e-4, rtol=2e-4)
                tokens = list(session.generate(inputs, 1, ignore_eos=True))
                logits: Any = session.decoder.logits()
                expected = reference.logits(ids, pixels)[-1]
                np.testing.assert_allclose(logits, expected.numpy(), atol=5e-4, rtol=5e-4)
                tokens, wanted = list(session.generate(inputs, 5, ignore_eos=True)), []
                for _ in range(5):
                    wanted.append(int(reference.logits(ids, pixels)[-1].argmax()))
                    ids = torch.cat((ids, torch.tensor([wanted[-1:]])), dim=1)
            assert tokens == wanted

    return check


@pytest.fixture
def assert_supported(picture_set: Path, tmp_path: Path) -> Callable[[Artifact, str], None]:
    """assert_supported(artifact, family): what the README's table promises of the family is what can be done."""

    def check(artifact: Artifact, family: str) -> None:
        copy = Artifact(Path(shutil.copytree(artifact.root, tmp_path / "supported")))
        assert support.row(copy, picture_set) == support.promised(family)

    return check
