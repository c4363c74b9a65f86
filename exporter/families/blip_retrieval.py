"""BLIP for retrieval: picture and text, each by itself, to one space, as CLIP (arXiv:2201.12086, the paper's ITC).

The head that reads a text with an eye on the picture (ITM) is left out: it would have to run for every pair.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .. import processor
from ..matching import Encoders, MatchingFamily
from .blip import Checkpoint, Reader, VisionEncoder, pictures_of

# Cosines are multiplied by it before the softmax. The temperature that BLIP learned, 0.07 at first, is in no checkpoint
# of transformers.
_SHARPNESS = 1 / 0.07


class FirstOfAll(nn.Module):
    """States (n, tokens, hidden) → (n, dim): the first of each, which stands for all, projected, of length 1."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, states: Tensor) -> Tensor:
        features = self.projection(states[:, :1])
        unit: Tensor = features / features.norm(dim=-1, keepdim=True)
        return unit[:, 0]


class TextEncoder(nn.Module):
    """input_ids (texts, length), filled up with `padding` → text_features (texts, dim), of length 1."""

    def __init__(self, bert: Any, projection: nn.Module, padding: int) -> None:
        super().__init__()
        self.reader, self.head, self.padding = Reader(bert, crosses=False), FirstOfAll(projection), padding

    def forward(self, input_ids: Tensor) -> Tensor:
        seen = (input_ids != self.padding)[:, None, None].expand(-1, -1, input_ids.shape[1], -1)
        made: Tensor = self.head(self.reader(input_ids, mask=seen))
        return made


class BlipRetrieval(Checkpoint, MatchingFamily):
    model_types: ClassVar[tuple[str, ...]] = ()  # Blip's, which says when it is this one
    left_out: ClassVar[str] = "BLIP's head that reads each text again for every picture (ITM)"

    def load(self, folder: Path) -> nn.Module:
        """What fills texts up is the tokenizer's to say, as in transformers; config.json may differ."""
        model: Any = super().load(folder)
        model.config.text_config.pad_token_id = processor.read_tokenizer(folder).pad_token_id
        return cast(nn.Module, model)

    def encoders(self, model: Any) -> Encoders:
        text = model.config.text_config
        return Encoders(
            vision_encoder=VisionEncoder(model.vision_model, FirstOfAll(model.vision_proj)),
            text_encoder=TextEncoder(model.text_encoder, model.text_proj, text.pad_token_id),
            logit_scale=torch.tensor(_SHARPNESS),
            text_length=text.max_position_embeddings,
            vocabulary=text.vocab_size,
        )

    def describe_pictures(self, folder: Path) -> dict[str, Any]:
        with processor.reading("picture processor", folder):
            return pictures_of(folder)
