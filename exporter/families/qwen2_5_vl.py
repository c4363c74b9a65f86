"""Qwen2.5-VL: a vision encoder of any resolution that attends in windows, a Qwen2 decoder with three positions a token.

arXiv:2502.13923; the positions (M-RoPE) are arXiv:2409.12191, section 2.1. Four patches, two a side, are one token of
the decoder; the encoder keeps them together all along. What depends on the pictures' sizes is an input, made in NumPy
(runtime/preprocessing/qwen2_5_vl.py).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...artifact import KvSpec
from ...errors import VlmcError
from .. import onnx_ops
from ..family import Components, Decoder, Family, VisionInput, standard_kv


class VisionEncoder(nn.Module):
    """Any number of pictures as (tokens, …) one after the other → image_features (tokens, hidden)."""

    inv_freq: Tensor

    def __init__(self, visual: Any) -> None:
        super().__init__()
        kernel = visual.patch_embed.proj.weight  # of a convolution whose stride is its size
        self.patch_embed = nn.Linear(kernel[0].numel(), len(kernel), bias=False)
        self.patch_embed.weight = nn.Parameter(kernel.flatten(1), requires_grad=False)
        self.blocks, self.merger = visual.blocks, visual.merger
        self.whole = frozenset(getattr(visual, "fullatt_block_indexes", ()))
        self.register_buffer("inv_freq", visual.rotary_pos_emb.inv_freq, persistent=False)

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        image_ids: Tensor,
        window_index: Tensor | None = None,
        window_places: Tensor | None = None,
    ) -> Tensor:
        """pixel_values (tokens, patches, values); patch_positions (tokens, patches, 2): row and column in the picture;
        image_ids (tokens,): which picture; window_index (windows, most): the tokens of each window, −1 for none;
        window_places (tokens,): where each token is among the windows' places, all counted. Without windows every block
        sees all of a picture."""
        patches = pixel_values.shape[1]
        angles = (patch_positions[..., None] * self.inv_freq).flatten(2)
        pictures = image_ids[:, None].expand(-1, patches).reshape(1, 1, 1, -1)
        whole = _turns(angles, 1, pixel_values.dtype), pictures == pictures.mT
        if window_index is not None:
            taken, windows = window_index.flatten().clamp(min=0), window_index.shape[0]
            inside = (window_index >= 0)[..., None].expand(-1, -1, patches).reshape(windows, 1, 1, -1)
            # ONNX Runtime's Attention wants a row of the mask for each query, though they are all the same.
            turns = _turns(angles.index_select(0, taken), windows, pixel_values.dtype)
            window = turns, inside.expand(-1, -1, inside.shape[-1], -1)

        hidden = self.patch_embed(pixel_values)
        for index, block in enumerate(self.blocks):
            attention, normal = block.attn, block.norm1(hidden)
            states = attention.qkv(normal)
            if window_places is None or index in self.whole:
                seen = _attend(attention, states, *whole)
            else:
                seen = _attend(attention, states.index_select(0, taken), *window).index_select(0, window_places)
            hidden = hidden + attention.proj(seen)
            hidden = hidden + block.mlp(block.norm2(hidden))
        features: Tensor = self.merger.mlp(self.merger.ln_q(hidden).flatten(1))
        return features


def _turns(angles: Tensor, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (batch, patches, channels / 2) of (tokens, patches, channels / 2)."""
    flat = angles.reshape(batch, -1, angles.shape[-1])
    return flat.cos().to(dtype), flat.sin().to(dtype)


def _attend(attention: Any, states: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """Attention of each batch of patches within itself; queries, keys and values (tokens, patches, 3 · width), turned
    by `turns` (batch, …) → (tokens, patches, width)."""
    patches, batch = states.shape[1], turns[0].shape[0]
    split = states.reshape(batch, -1, 3, attention.num_heads, attention.head_dim)
    query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = (onnx_ops.rotary(part, *turns) for part in (query, key))
    output, _ = onnx_ops.attention(attention, query, key, value, mask, attention.scaling)
    return output.reshape(-1, patches, attention.dim)


class MropeDecoder(Decoder):
    """A decoder whose position_ids are (3, 1, length): time, row and column."""

    positions: ClassVar[int] = 3


class Qwen25Vl(Family):
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)

    def split(self, model: Any) -> Components:
        inner = model.model
        return Components(
            vision_encoder=VisionEncoder(inner.visual),
            embed_tokens=inner.language_model.get_input_embeddings(),
            decoder=MropeDecoder(inner.language_model, model.lm_head),
        )

    def picture_settings(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"window": config["vision_config"].get("window_size", 112)}  # transformers' default

    def kv(self, model: Any, capacity: int) -> KvSpec:
        text = model.config.text_config
        rope = text.rope_parameters["rope_type"]
        if rope != "default" or model.model.language_model.has_sliding_layers:
            raise VlmcError(
                "This Qwen-VL has a decoder that vlmc does not follow",
                found=f"{rope} RoPE" if rope != "default" else "sliding windows",
                expected="default RoPE and attention to all tokens before",
            )
        spec, sections = standard_kv(text, capacity), model.model.language_model.rotary_emb.mrope_section
        if 2 * sum(sections) != spec.head_dim:
            raise VlmcError(
                "This Qwen-VL's three positions do not turn all of a head",
                found=f"mrope_section {sections}, heads of {spec.head_dim} values",
                expected=f"sections that add up to {spec.head_dim // 2}",
            )
        return spec

    def vision_inputs(self, model: Any) -> dict[str, VisionInput]:
        vision = model.config.vision_config
        patches = vision.spatial_merge_size**2
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        tokens, windows = 11, 5
        inputs = {
            "pixel_values": VisionInput(torch.zeros(tokens, patches, values), {0: "tokens"}),
            "patch_positions": VisionInput(torch.zeros(tokens, patches, 2, dtype=torch.long), {0: "tokens"}),
            "image_ids": VisionInput(torch.zeros(tokens, dtype=torch.long), {0: "tokens"}),
        }
        if window := getattr(vision, "window_size", 0):
            most = (window // vision.spatial_merge_size // vision.patch_size) ** 2
            index = torch.arange(windows * most).reshape(windows, most)
            inputs["window_index"] = VisionInput(torch.where(index < tokens, index, -1), {0: "windows"})
            inputs["window_places"] = VisionInput(torch.arange(tokens), {0: "tokens"})
        return inputs
