"""CLIP: a vision and a text transformer whose outputs are compared by their cosine.

arXiv:2103.00020. A text's feature is that of its first end token, which has seen what is before it and nothing behind:
the padding of a batch therefore needs no mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..family import config_of, loaded
from ..matching import Encoders, MatchingFamily


class VisionEncoder(nn.Module):
    """pixel_values (tiles, 3, height, width) → image_features (tiles, dim), of length 1."""

    def __init__(self, tower: Any, projection: nn.Module) -> None:
        super().__init__()
        self.embeddings, self.pre_layernorm = tower.embeddings, tower.pre_layrnorm
        self.layers, self.post_layernorm = tower.encoder.layers, tower.post_layernorm
        self.projection = projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.pre_layernorm(self.embeddings(pixel_values))
        for layer in self.layers:
            hidden = layer(hidden, None)
        return _unit(self.projection(self.post_layernorm(hidden[:, :1])))


class TextEncoder(nn.Module):
    """input_ids (texts, length) → text_features (texts, dim), of length 1.

    `end` is the end token's id. OpenAI's configs say 2, which is wrong, and mean the largest id of the text."""

    def __init__(self, tower: Any, projection: nn.Module, end: int) -> None:
        super().__init__()
        self.embeddings, self.layers = tower.embeddings, tower.encoder.layers
        self.final_layer_norm, self.projection, self.end = tower.final_layer_norm, projection, end

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embeddings(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        causal = (positions[None] <= positions[:, None])[None, None]
        for layer in self.layers:
            hidden = layer(hidden, causal)
        ends = (input_ids if self.end == 2 else (input_ids == self.end)).to(torch.int32).argmax(dim=-1)
        last = hidden[torch.arange(hidden.shape[0], device=hidden.device), ends]
        return _unit(self.projection(self.final_layer_norm(last[:, None])))


def _unit(features: Tensor) -> Tensor:
    """(n, 1, dim) → (n, dim), of length 1. The axis in the middle is there so that the projection becomes a MatMul, as
    every other layer does, and not a Gemm."""
    unit: Tensor = features / features.norm(dim=-1, keepdim=True)
    return unit[:, 0]


class Clip(MatchingFamily):
    model_types: ClassVar[tuple[str, ...]] = ("clip",)

    def load(self, folder: Path) -> nn.Module:
        from transformers import CLIPModel

        return loaded(CLIPModel, folder)

    def randomise(self, config: dict[str, Any], seed: int) -> nn.Module:
        from transformers import CLIPModel

        torch.manual_seed(seed)
        model: nn.Module = CLIPModel(config_of(config)).float()  # its parts may have types of their own
        return model

    def encoders(self, model: Any) -> Encoders:
        text = model.config.text_config
        return Encoders(
            vision_encoder=VisionEncoder(model.vision_model, model.visual_projection),
            text_encoder=TextEncoder(model.text_model, model.text_projection, text.eos_token_id),
            logit_scale=model.logit_scale.exp(),
            text_length=text.max_position_embeddings,
            vocabulary=text.vocab_size,
        )
