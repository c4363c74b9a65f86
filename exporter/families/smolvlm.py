"""SmolVLM, SmolVLM2 and Idefics3: SigLIP vision, a pixel-shuffle connector, a Llama decoder.

arXiv:2504.05299 (SmolVLM), arXiv:2408.12637 (Idefics3). Tiles are square and full, so the patch mask is all true.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..family import Components, Decoder, Family


class VisionEncoder(nn.Module):
    """pixel_values (tiles, 3, height, width) → image_features (tiles, tokens, hidden)."""

    def __init__(self, vision_model: Any, connector: nn.Module) -> None:
        super().__init__()
        self.vision_model, self.connector = vision_model, connector
        self.register_buffer("position_ids", self._position_ids(), persistent=False)

    def _position_ids(self) -> Tensor:
        """The ids that transformers computes for a full tile (1, patches): constants once the mask is all true."""
        seen: list[Tensor] = []
        embeddings = self.vision_model.embeddings
        hook = embeddings.position_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        side, patches = embeddings.image_size, embeddings.num_patches_per_side
        with torch.no_grad():
            embeddings(torch.zeros(1, 3, side, side), torch.ones(1, patches, patches, dtype=torch.bool))
        hook.remove()
        return seen[0].long()

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeddings = self.vision_model.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden = patches + embeddings.position_embedding(self.position_ids)
        hidden = self.vision_model.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        features: Tensor = self.connector(self.vision_model.post_layernorm(hidden))
        return features


class SmolVlm(Family):
    model_types: ClassVar[tuple[str, ...]] = ("smolvlm", "idefics3")

    def split(self, model: Any) -> Components:
        inner = model.model
        return Components(
            vision_encoder=VisionEncoder(inner.vision_model, inner.connector),
            embed_tokens=inner.text_model.get_input_embeddings(),
            decoder=Decoder(inner.text_model, model.lm_head),
        )
