"""BLIP captioning: a ViT, and a BERT decoder that looks at the picture through cross-attention.

arXiv:2201.12086. The keys and values of cross-attention depend on the picture alone, so the vision encoder makes them,
once a picture, and the decoder takes them as they are at the prompt and at every step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...artifact import KvSpec
from ...errors import VlmcError
from ...files import read_json
from .. import onnx_ops
from ..family import Components, Family, OwnProcessor, VisionInput

_TEMPLATE = (  # the picture has no place in the text; [PAD], which no text encodes to, says where it was given
    "[DEC]{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}[PAD]{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}"
)


def _heads(hidden: Tensor, heads: int) -> Tensor:
    """(1, length, hidden) → (1, heads, length, head_dim)."""
    return hidden.view(*hidden.shape[:-1], heads, -1).transpose(1, 2)


class VisionEncoder(nn.Module):
    """pixel_values (1, 3, height, width) → image_features (layers, 2, heads, tokens, head_dim): for each layer of the
    decoder the keys and the values of its cross-attention."""

    def __init__(self, vision: Any, decoder: Any, heads: int) -> None:
        super().__init__()
        self.embeddings, self.layers = vision.embeddings, vision.encoder.layers
        self.post_layernorm = vision.post_layernorm
        cross = [layer.crossattention.self for layer in decoder.encoder.layer]
        self.keys, self.values = (nn.ModuleList(getattr(one, name) for one in cross) for name in ("key", "value"))
        self.heads = heads

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.embeddings(pixel_values)
        for layer in self.layers:
            own = layer.self_attn
            states = own.qkv(layer.layer_norm1(hidden)).unflatten(-1, (3, own.num_heads, own.head_dim))
            query, key, value = states.permute(2, 0, 3, 1, 4)
            seen, _ = onnx_ops.attention(own, query, key, value, None, own.scale)
            hidden = hidden + own.projection(seen.flatten(2))
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        features = self.post_layernorm(hidden)
        pairs = zip(self.keys, self.values, strict=True)
        states = [_heads(make(features), self.heads)[0] for pair in pairs for make in pair]
        return torch.stack(states).reshape(-1, 2, *states[0].shape)


class DecoderLayer(nn.Module):
    """One of BERT's layers, less what makes the cross-attention's keys and values."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = layer.attention, layer.intermediate, layer.output
        self.cross_query, self.cross_output = layer.crossattention.self.query, layer.crossattention.output

    def forward(self, hidden: Tensor, mask: Tensor, cache: Any, crossed: Tensor) -> Tensor:
        """cache: the layer's; crossed (2, heads, tokens, head_dim); the rest as in `Decoder.forward`."""
        own, heads = self.attention.self, crossed.shape[1]
        query, key, value = (_heads(make(hidden), heads) for make in (own.query, own.key, own.value))
        key, value = cache.update(key, value)
        seen, _ = onnx_ops.attention(own, query, key, value, mask)
        hidden = self.attention.output(seen.flatten(2), hidden)
        query = _heads(self.cross_query(hidden), heads)
        seen, _ = onnx_ops.attention(own, query, crossed[:1], crossed[1:], None)
        hidden = self.cross_output(seen.flatten(2), hidden)
        result: Tensor = self.output(self.intermediate(hidden), hidden)
        return result


class Decoder(nn.Module):
    """BERT with its positions and its head, over a KV cache of fixed capacity."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        embeddings = model.bert.embeddings
        self.position_embeddings, self.norm = embeddings.position_embeddings, embeddings.LayerNorm
        self.layers, self.head = nn.ModuleList(map(DecoderLayer, model.bert.encoder.layer)), model.cls.predictions

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        logits_index: Tensor,
        past: list[Tensor],
        image_features: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """image_features as the vision encoder gives them; the rest as in `family.Decoder.forward`."""
        length = inputs_embeds.shape[1]
        mask, cache = (
            onnx_ops.causal_mask(write_index, length, past[0]),
            onnx_ops.static_cache(past, write_index, length),
        )
        hidden = self.norm(inputs_embeds + self.position_embeddings(position_ids))
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, mask, cache.layers[index], image_features[index])
        logits = self.head(hidden.index_select(1, logits_index))[:, 0]
        return logits, [state for layer in cache.layers for state in (layer.keys, layer.values)]


class Blip(Family):
    model_types: ClassVar[tuple[str, ...]] = ("blip",)

    def load(self, folder: Path) -> nn.Module:
        found = read_json(folder / "config.json").get("architectures") or []
        if "BlipForConditionalGeneration" not in found:
            raise VlmcError(
                f"{folder} is a BLIP that does not write captions",
                found=", ".join(found) or "no architectures in its config.json",
                expected="BlipForConditionalGeneration",
            )
        return super().load(folder)

    def use_canonical_attention(self, model: Any) -> None:
        """Nothing to do: transformers' BLIP cannot be given another attention, so the layers here are our own."""

    def split(self, model: Any) -> Components:
        decoder = model.text_decoder
        return Components(
            vision_encoder=VisionEncoder(
                model.vision_model, decoder.bert, model.config.text_config.num_attention_heads
            ),
            embed_tokens=decoder.bert.embeddings.word_embeddings,
            decoder=Decoder(decoder),
        )

    def kv(self, model: Any, capacity: int) -> KvSpec:
        text = model.config.text_config
        if capacity > text.max_position_embeddings:
            raise VlmcError(
                "BLIP knows fewer positions than the KV cache would have",
                found=f"a capacity of {capacity}",
                expected=f"at most {text.max_position_embeddings}",
                fix=f"add --capacity {text.max_position_embeddings}",
            )
        heads = text.num_attention_heads
        return KvSpec(text.num_hidden_layers, heads, text.hidden_size // heads, capacity)

    def vision_inputs(self, model: Any) -> dict[str, VisionInput]:
        size = model.config.vision_config.image_size
        return {"pixel_values": VisionInput(torch.zeros(1, 3, size, size), {})}

    def own_processor(self, folder: Path) -> OwnProcessor | None:
        """The published tokenizer has no token for the beginning, whose id is the one behind its vocabulary."""
        from transformers import AutoImageProcessor, AutoTokenizer

        local = {"local_files_only": True, "trust_remote_code": False}
        pictures = AutoImageProcessor.from_pretrained(folder, backend="pil", **local).to_dict()
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        begin = read_json(folder / "config.json")["text_config"].get("bos_token_id", 30522)
        if (found := tokenizer.bos_token_id) != begin:
            raise VlmcError("[DEC] would have another id than config.json says", found=f"{found}", expected=f"{begin}")
        size = pictures["size"]
        if size.get("height") != size.get("width"):
            raise VlmcError("The picture processor does not make squares", found=str(size))
        described = {
            "kind": "blip",
            "tile": size["height"],
            "resample": int(pictures["resample"]),
            "rescale_factor": float(pictures["rescale_factor"]),
            "mean": [float(value) for value in pictures["image_mean"]],
            "std": [float(value) for value in pictures["image_std"]],
            "image_token": "[PAD]",
        }
        return OwnProcessor(tokenizer, described, _TEMPLATE, "[SEP]")
