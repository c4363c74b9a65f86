"""What the independent renderings of published code share: equations in plain PyTorch on a checkpoint's own tensors,
random weights under such names, and tokenizers. Nothing of vlmc or transformers is in it."""

from __future__ import annotations

import math
import re

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.nn import functional


class Weights:
    """Random weights by name, in `found`; larger than fresh ones, so that attention is not flat."""

    def __init__(self, seed: int) -> None:
        self.found: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, name: str, *shape: int, around: float = 0.0, scale: float = 0.2) -> None:
        self.found[name] = around + scale * torch.randn(shape, generator=self._generator)

    def linear(self, name: str, outputs: int, inputs: int, bias: bool = True) -> None:
        self.add(f"{name}.weight", outputs, inputs)
        if bias:
            self.add(f"{name}.bias", outputs)

    def norm(self, name: str, width: int, bias: bool = True) -> None:
        self.add(f"{name}.weight", width, around=1.0)
        if bias:
            self.add(f"{name}.bias", width)

    def clip(self, prefix: str, width: int, inner: int, layers: int, places: int, patch: int) -> None:
        """CLIP's vision tower; `places` counts the class token's."""
        self.add(f"{prefix}.embeddings.class_embedding", width)
        self.add(f"{prefix}.embeddings.patch_embedding.weight", width, 3, patch, patch)
        self.add(f"{prefix}.embeddings.position_embedding.weight", places, width)
        norms = [f"{prefix}.pre_layrnorm", f"{prefix}.post_layernorm"]
        for index in range(layers):
            layer = f"{prefix}.encoder.layers.{index}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                self.linear(f"{layer}.self_attn.{name}", width, width)
            self.linear(f"{layer}.mlp.fc1", inner, width)
            self.linear(f"{layer}.mlp.fc2", width, inner)
            norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        for name in norms:
            self.norm(name, width)


class Equations:
    """Layers on the tensors of a checkpoint, by their names there."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def layer_norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def rms_norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * self.weights[f"{name}.weight"]

    def clip(self, prefix: str, pixel_values: Tensor, heads: int, layers: int) -> Tensor:
        """CLIP's vision tower (arXiv:2103.00020) behind that many layers, without the class token: (tiles, patches,
        width)."""
        kernel = self.weights[f"{prefix}.embeddings.patch_embedding.weight"]
        patches = functional.conv2d(pixel_values, kernel, stride=kernel.shape[-1]).flatten(2).mT
        first = self.weights[f"{prefix}.embeddings.class_embedding"].expand(len(patches), 1, -1)
        x = torch.cat((first, patches), dim=1) + self.weights[f"{prefix}.embeddings.position_embedding.weight"]
        x = self.layer_norm(f"{prefix}.pre_layrnorm", x)
        for index in range(layers):
            layer = f"{prefix}.encoder.layers.{index}"
            normed = self.layer_norm(f"{layer}.layer_norm1", x)
            q, k, v = (
                self.linear(f"{layer}.self_attn.{name}_proj", normed).unflatten(-1, (heads, -1)).transpose(1, 2)
                for name in "qkv"
            )
            attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
            x = x + self.linear(f"{layer}.self_attn.out_proj", attention.transpose(1, 2).flatten(2))
            inner = self.linear(f"{layer}.mlp.fc1", self.layer_norm(f"{layer}.layer_norm2", x))
            x = x + self.linear(f"{layer}.mlp.fc2", inner * torch.sigmoid(1.702 * inner))
        return x[:, 1:]


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """(length, heads, dim): the pairs (i, i + dim/2) turned by the angles (length, 1, dim/2) (RoFormer)."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


class SlowTokenizer:
    """What transformers' tokenizers in Python make of a SentencePiece model (4.33 and 4.37, which published code asks
    for): added tokens are cut out of a text, and each stretch between them is encoded by itself."""

    def __init__(self, model: bytes, added: dict[str, int]) -> None:
        self._model, self._added = SentencePieceProcessor(model_proto=model), added
        self._cut = re.compile("|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)))

    def __call__(self, text: str) -> list[int]:
        """The ids without the one that begins a text."""
        ids: list[int] = []
        tokens = [self._added[token] for token in self._cut.findall(text)]
        for stretch in self._cut.split(text):
            ids += self._model.encode(stretch) + tokens[:1]
            del tokens[:1]
        return ids
