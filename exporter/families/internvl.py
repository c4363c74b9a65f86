"""InternVL as transformers has it: InternViT vision, pixel unshuffle and a projector, a Qwen2 or Llama decoder.

arXiv:2404.16821 (InternVL 1.5), arXiv:2412.05271 (2.5), arXiv:2504.10479 (3): the checkpoints whose names end in -hf.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ...errors import VlmcError
from ..family import Components, Decoder, Family, layers_up_to


class VisionEncoder(nn.Module):
    """pixel_values (tiles, 3, height, width) → image_features (tiles, tokens, hidden).

    `layer`: as of `layers_up_to`; `side` is the patches a side, `block` of which a side become one token."""

    def __init__(self, tower: Any, projector: nn.Module, layer: int, side: int, block: int) -> None:
        super().__init__()
        self.embeddings, self.layers = tower.embeddings, layers_up_to(layer, tower.encoder.layer)
        self.layernorm = tower.layernorm if layer == -1 else nn.Identity()
        self.projector, self.side, self.block = projector, side, block

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden = layer(hidden)
        patches = self.layernorm(hidden)[:, 1:]  # without the class token
        features: Tensor = self.projector(self._unshuffle(patches))
        return features

    def _unshuffle(self, patches: Tensor) -> Tensor:
        """(tiles, side², width) → (tiles, (side / block)², block² · width): a block's patches, row by row, as one."""
        blocks, width = self.side // self.block, patches.shape[-1]
        grid = patches.reshape(-1, blocks, self.block, blocks, self.block, width)
        return grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, blocks * blocks, self.block * self.block * width)


class InternVl(Family):
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)

    def randomise(self, config: dict[str, Any], seed: int) -> nn.Module:
        # transformers 4 said it of the decoder alone, and transformers 5 takes what is missing for true.
        tied = config.get("text_config", {}).get("tie_word_embeddings", False)
        return super().randomise({"tie_word_embeddings": tied} | config, seed)

    def split(self, model: Any) -> Components:
        inner, config = model.model, model.config
        if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != "default":
            raise VlmcError(
                "This InternVL takes other features than those of one layer without the class token",
                found=f"layer {config.vision_feature_layer}, {config.vision_feature_select_strategy}",
            )
        height, width = config.vision_config.image_size
        patch = config.vision_config.patch_size[0]
        if height != width or config.vision_config.patch_size[1] != patch:
            raise VlmcError("This InternVL's tiles are not square", found=f"{height} × {width}")
        return Components(
            vision_encoder=VisionEncoder(
                inner.vision_tower,
                inner.multi_modal_projector,
                config.vision_feature_layer,
                height // patch,
                int(1 / config.downsample_ratio),
            ),
            embed_tokens=inner.language_model.get_input_embeddings(),
            decoder=Decoder(inner.language_model, model.lm_head),
        )
