"""BLIP: a ViT, and BERTs that look at the picture through cross-attention. One writes captions; for questions one reads
the question with an eye on the picture, and another writes the answer with an eye on what the first made of it. What
matches pictures and texts is in blip_retrieval.py.

arXiv:2201.12086. The keys and values of cross-attention depend only on what is looked at, so what comes before makes
them, once a picture or question, and the decoder takes them as they are at the prompt and at every step.
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
from ..family import Components, Family, OwnProcessor, VisionInput, config_of, loaded
from ..processor import describe_values, read_tokenizer

_CAPTIONS, _ANSWERS = "BlipForConditionalGeneration", "BlipForQuestionAnswering"
_MATCHES = "BlipForImageTextRetrieval"
# The picture has no place in the text; [PAD], which no text encodes to, says where it was given.
_PARTS = "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}[PAD]{% else %}"
_PARTS += "{{ part['text'] }}{% endif %}{% endfor %}"
_TEMPLATES = {_CAPTIONS: "[DEC]" + _PARTS, _ANSWERS: "[CLS]" + _PARTS + "[SEP][DEC]"}


def _heads(hidden: Tensor, heads: int) -> Tensor:
    """(batch, length, hidden) → (batch, heads, length, head_dim)."""
    return hidden.view(*hidden.shape[:-1], heads, -1).transpose(1, 2)


class Layer(nn.Module):
    """One of BERT's layers, with or without cross-attention, whose keys and values it is given."""

    def __init__(self, layer: Any, crosses: bool = True) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = layer.attention, layer.intermediate, layer.output
        if crosses:
            self.cross_query, self.cross_output = layer.crossattention.self.query, layer.crossattention.output

    def forward(
        self, hidden: Tensor, crossed: Tensor | None = None, mask: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """hidden (batch, length, hidden); crossed (2, heads, tokens, head_dim), then of a batch of 1; mask and the
        layer's cache as in `Decoder.forward`; without them every position sees all."""
        own = self.attention.self
        heads = own.num_attention_heads
        query, key, value = (_heads(make(hidden), heads) for make in (own.query, own.key, own.value))
        if cache is not None:
            key, value = cache.update(key, value)
        seen, _ = onnx_ops.attention(own, query, key, value, mask)
        hidden = self.attention.output(seen.flatten(2), hidden)
        if crossed is not None:
            query = _heads(self.cross_query(hidden), heads)
            seen, _ = onnx_ops.attention(own, query, crossed[:1], crossed[1:], None)
            hidden = self.cross_output(seen.flatten(2), hidden)
        result: Tensor = self.output(self.intermediate(hidden), hidden)
        return result


class Crossing(nn.Module):
    """States (1, tokens, width) → (layers, 2, heads, tokens, head_dim): for each layer of BERT the keys and the values
    of its cross-attention to them."""

    def __init__(self, bert: Any, heads: int) -> None:
        super().__init__()
        cross = [layer.crossattention.self for layer in bert.encoder.layer]
        self.keys, self.values = (nn.ModuleList(getattr(one, name) for one in cross) for name in ("key", "value"))
        self.heads = heads

    def forward(self, states: Tensor) -> Tensor:
        pairs = zip(self.keys, self.values, strict=True)
        made = [_heads(make(states), self.heads)[0] for pair in pairs for make in pair]
        return torch.stack(made).reshape(-1, 2, *made[0].shape)


class VisionEncoder(nn.Module):
    """pixel_values (tiles, 3, height, width) → image_features, which `head` makes of the states (tiles, tokens,
    hidden): `Crossing`, of one tile, or retrieval's `FirstOfAll`."""

    def __init__(self, vision: Any, head: nn.Module) -> None:
        super().__init__()
        self.embeddings, self.layers = vision.embeddings, vision.encoder.layers
        self.post_layernorm, self.head = vision.post_layernorm, head

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.embeddings(pixel_values)
        for layer in self.layers:
            own = layer.self_attn
            states = own.qkv(layer.layer_norm1(hidden)).unflatten(-1, (3, own.num_heads, own.head_dim))
            query, key, value = states.permute(2, 0, 3, 1, 4)
            seen, _ = onnx_ops.attention(own, query, key, value, None, own.scale)
            hidden = hidden + own.projection(seen.flatten(2))
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        made: Tensor = self.head(self.post_layernorm(hidden))
        return made


class Reader(nn.Module):
    """BERT over a whole text, every position of which sees all."""

    def __init__(self, bert: Any, crosses: bool) -> None:
        super().__init__()
        self.embeddings = bert.embeddings
        self.layers = nn.ModuleList(Layer(layer, crosses) for layer in bert.encoder.layer)

    def forward(self, ids: Tensor, crossed: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """ids (texts, length) → (texts, length, hidden). crossed: as of `Crossing`; mask: what is no padding, boolean
        (texts, 1, length, length)."""
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        words, places = self.embeddings.word_embeddings(ids), self.embeddings.position_embeddings(positions)
        hidden: Tensor = self.embeddings.LayerNorm(words + places)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, None if crossed is None else crossed[index], mask)
        return hidden


class QuestionEncoder(nn.Module):
    """image_features as the vision encoder gives them, question_ids (1, question_length) → what the decoder's
    cross-attention sees, as of `Crossing`: BERT reads the question with an eye on the picture."""

    def __init__(self, bert: Any, crossing: Crossing) -> None:
        super().__init__()
        self.reader, self.crossing = Reader(bert, crosses=True), crossing

    def forward(self, image_features: Tensor, question_ids: Tensor) -> Tensor:
        made: Tensor = self.crossing(self.reader(question_ids, image_features))
        return made


class Decoder(nn.Module):
    """BERT with its positions and its head, over a KV cache of fixed capacity, with cross-attention to the picture."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        embeddings = model.bert.embeddings
        self.position_embeddings, self.norm = embeddings.position_embeddings, embeddings.LayerNorm
        self.layers, self.lm_head = nn.ModuleList(map(Layer, model.bert.encoder.layer)), model.cls.predictions

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        logits_index: Tensor,
        past: list[Tensor],
        image_features: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """image_features as of `Crossing`; the rest as in `family.Decoder.forward`."""
        length = inputs_embeds.shape[1]
        mask = onnx_ops.causal_mask(write_index, length, past[0])
        cache = onnx_ops.static_cache(past, write_index, length)
        hidden = self.norm(inputs_embeds + self.position_embeddings(position_ids))
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, image_features[index], mask, cache.layers[index])
        logits = self.lm_head(hidden.index_select(1, logits_index))[:, 0]
        return logits, [state for layer in cache.layers for state in (layer.keys, layer.values)]


class AnswerDecoder(Decoder):
    """The same, with cross-attention to what the question encoder made of picture and question."""

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        logits_index: Tensor,
        past: list[Tensor],
        fused_image_features: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        return super().forward(inputs_embeds, position_ids, write_index, logits_index, past, fused_image_features)


class Checkpoint:
    """How all of them load."""

    def load(self, folder: Path) -> nn.Module:
        return loaded(_class_of(read_json(folder / "config.json"), folder), folder)

    def randomise(self, config: dict[str, Any], seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = _class_of(config, "the config")(config_of(config))
        return model

    def use_canonical_attention(self, model: Any) -> None:
        """Nothing to do: transformers' BLIP cannot be given another attention, so the layers here are our own."""


class Blip(Checkpoint, Family):
    model_types: ClassVar[tuple[str, ...]] = ("blip",)

    def of(self, config: dict[str, Any]) -> Family:
        from .blip_retrieval import BlipRetrieval  # which is made of what is here

        return BlipRetrieval() if _MATCHES in (config.get("architectures") or ()) else self

    def split(self, model: Any) -> Components:
        decoder, heads = model.text_decoder, model.config.text_config.num_attention_heads
        crossing, table = Crossing(decoder.bert, heads), decoder.bert.embeddings.word_embeddings
        if type(model).__name__ == _CAPTIONS:
            return Components(VisionEncoder(model.vision_model, crossing), table, Decoder(decoder))
        reader = model.text_encoder
        return Components(
            vision_encoder=VisionEncoder(model.vision_model, Crossing(reader, heads)),
            embed_tokens=table,
            decoder=AnswerDecoder(decoder),
            fusion=QuestionEncoder(reader, crossing),
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
        config = read_json(folder / "config.json")
        if self.of(config) is not self:
            return None
        tokenizer = read_tokenizer(folder)
        answers = _class_of(config, folder).__name__ == _ANSWERS
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["[DEC]"], "bos_token": "[CLS]" if answers else "[DEC]"}
        )
        begin = config["text_config"].get("bos_token_id", 30522)
        if (found := tokenizer.convert_tokens_to_ids("[DEC]")) != begin:
            raise VlmcError("[DEC] would have another id than config.json says", found=f"{found}", expected=f"{begin}")
        template = _TEMPLATES[_ANSWERS if answers else _CAPTIONS]
        return OwnProcessor(tokenizer, pictures_of(folder) | {"image_token": "[PAD]"}, template, ("[SEP]",))


def pictures_of(folder: Path) -> dict[str, Any]:
    """`runtime/preprocessing/blip.py`'s config for the checkpoint's picture processor."""
    from transformers import AutoImageProcessor

    pictures = AutoImageProcessor.from_pretrained(
        folder, backend="pil", local_files_only=True, trust_remote_code=False
    ).to_dict()
    size = pictures["size"]
    if size.get("height") != size.get("width"):
        raise VlmcError("The picture processor does not make squares", found=str(size))
    return describe_values(pictures) | {"kind": "blip", "tile": size["height"]}


def _class_of(config: dict[str, Any], where: Path | str) -> Any:
    """transformers' class of the checkpoint: all of BLIP has one model type."""
    from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

    found = config.get("architectures") or ["no architectures"]
    for known in (BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval):
        if known.__name__ in found:
            return known
    raise VlmcError(
        f"The BLIP in {where} neither writes captions nor answers questions nor matches",
        found=", ".join(found),
        expected=f"{_CAPTIONS}, {_ANSWERS} or {_MATCHES} in its config.json",
    )
