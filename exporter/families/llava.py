"""LLaVA 1.5: CLIP vision, a two-layer projector, a Vicuna (Llama) decoder.

arXiv:2304.08485 (LLaVA), arXiv:2310.03744 (LLaVA 1.5). A picture is one tile; its features are those of CLIP's last
layer but one, so that the last layer and the norm behind it are left out.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ...errors import VlmcError
from ..family import Components, Decoder, Family, layers_up_to

# What a checkpoint names and does not describe, by the last part of its name on the hub.
TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
}


class VisionEncoder(nn.Module):
    """pixel_values (tiles, 3, height, width) → image_features (tiles, tokens, hidden).

    `layer`: as of `layers_up_to`. `first_token` 1 leaves CLIP's class token out."""

    def __init__(self, tower: Any, projector: nn.Module, layer: int, first_token: int) -> None:
        super().__init__()
        self.embeddings, self.pre_layernorm = tower.embeddings, tower.pre_layrnorm
        self.layers = layers_up_to(layer, tower.encoder.layers)
        self.projector, self.first_token = projector, first_token

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.pre_layernorm(self.embeddings(pixel_values))
        for layer in self.layers:
            hidden = layer(hidden, None)
        features: Tensor = self.projector(hidden[:, self.first_token :])
        return features


class Llava(Family):
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    unread_types: ClassVar[tuple[str, ...]] = ("llava_llama",)

    def of(self, config: dict[str, Any]) -> Family:
        """LLaVA's authors only name the vision encoder, and transformers would take all sizes for its defaults."""
        found = config["model_type"]
        if found in Llava.unread_types or (found in Llava.model_types and "mm_vision_tower" in config):
            raise VlmcError(
                "This LLaVA is in its authors' layout, which only names its vision encoder",
                found=f"model_type {found}, mm_vision_tower {config.get('mm_vision_tower')}",
                expected="a vision_config",
                fix="take a checkpoint that was converted for transformers, as llava-hf/llava-1.5-7b-hf",
            )
        return self

    def split(self, model: Any) -> Components:
        inner, config = model.model, model.config
        if config.vision_config.model_type != "clip_vision_model" or not isinstance(config.vision_feature_layer, int):
            raise VlmcError(
                "This LLaVA has another vision encoder than LLaVA 1.5",
                found=f"{config.vision_config.model_type}, features of layer {config.vision_feature_layer}",
                expected="clip_vision_model, features of one layer",
            )
        first_token = int(config.vision_feature_select_strategy == "default")
        return Components(
            vision_encoder=VisionEncoder(
                inner.vision_tower, inner.multi_modal_projector, config.vision_feature_layer, first_token
            ),
            embed_tokens=inner.language_model.get_input_embeddings(),
            decoder=Decoder(inner.language_model, model.lm_head),
        )


def clip_tower(original: dict[str, Any], name: str, title: str) -> dict[str, Any]:
    """The sizes of the CLIP vision encoder that a checkpoint of the original layout refers to by `name`. Its own
    `vision_config` goes first, where there is one: config.json mostly names the encoder only. `title` says in the error
    whose it is."""
    found: dict[str, Any] | None = original.get("vision_config") or TOWERS.get(name.rpartition("/")[2])
    if found is None:
        raise VlmcError(f"This {title} has an unknown vision encoder", found=name, expected=", ".join(TOWERS))
    return found
