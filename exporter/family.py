"""What a family is: how a kind of checkpoint loads and splits into components.

A new family is one file in `families/` with a subclass of `Family`; it is found by its `model_types`.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..artifact import GRAPH_FILES, KvSpec
from ..errors import VlmcError
from . import families, onnx_ops, rotation
from .nearest import nearest
from .onnx_ops import IMPLEMENTATION

# What a model has until `use_canonical_attention`. config.json is not asked, for it may name a kernel of the hub, which
# transformers would fetch and run.
_ATTENTION = "eager"


@dataclass(frozen=True)
class Components:
    """A model's parts as float32 modules in evaluation mode. Their `forward` is what is exported, and their module
    paths key the plan.

    vision_encoder: `Family.vision_inputs`, mostly pixel_values (tiles, 3, height, width) → image_features (…, hidden),
        mostly (tiles, tokens, hidden).
    embed_tokens: input_ids (1, length) → inputs_embeds (1, length, hidden). One with an attribute `outputs`, names that
        begin with inputs_embeds, returns so many; the further ones (1, length, …) are inputs of the decoder.
    decoder: see `Decoder.forward`. What its `forward` has behind `past` it takes at a prompt and at every step:
        prefix_length, or a further output of embed_tokens, by its name. One with an attribute `positions` takes
        position_ids of (positions, 1, length).
    fusion, in few models: image_features as they come and text_embeds (1, text_length, hidden), the embeddings of all
        tokens but the image ones → image features (…, hidden) and text_embeds to take in their places. One whose second
        argument is question_ids (1, question_length) reads the prompt but for its last token, which is all that the
        decoder reads; its one output is the decoder's further input `fused_image_features`.
    """

    vision_encoder: nn.Module
    embed_tokens: nn.Module
    decoder: nn.Module
    fusion: nn.Module | None = None

    def __post_init__(self) -> None:
        for _, component in self.items():
            component.eval()  # the wrappers are new and would be in training mode

    def items(self) -> list[tuple[str, nn.Module]]:
        """Those that there are, by name, in the order in which a question passes them."""
        return [(name, getattr(self, name)) for name in GRAPH_FILES if getattr(self, name) is not None]

    def map(self, change: Callable[[str, nn.Module], nn.Module]) -> Components:
        """Each changed, called with its name."""
        return Components(**{name: change(name, component) for name, component in self.items()})


@dataclass(frozen=True)
class VisionInput:
    """An input of the vision encoder: an example to trace with, whose sizes are no other's by chance, and its free axes
    with the names of their sizes."""

    example: Tensor
    free: dict[int, str]


class Decoder(nn.Module):
    """A transformers decoder and its head, over a KV cache of fixed capacity."""

    def __init__(self, model: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.model, self.lm_head = copy.copy(model), lm_head
        # The table of embeddings is a component of its own, so this one neither counts nor copies it.
        self.model._modules = {k: m for k, m in model._modules.items() if not isinstance(m, nn.Embedding)}
        if (rotary := self.model._modules.get("rotary_emb")) is not None:
            self.model._modules["rotary_emb"] = rotation.steady(rotary)

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, write_index: Tensor, logits_index: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """inputs_embeds (1, length, hidden); position_ids (1, length); write_index (1,): where in the cache the first
        of them goes; logits_index (1,): whose logits are wanted; past: key0, value0, key1, … (1, kv_heads, capacity,
        head_dim). Returns logits (1, vocabulary) and the updated cache in the order of `past`."""
        mask = onnx_ops.causal_mask(write_index, inputs_embeds.shape[1], past[0])
        return self.attend(inputs_embeds, position_ids, write_index, logits_index, past, mask)

    def attend(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        logits_index: Tensor,
        past: list[Tensor],
        mask: Any,
        **further: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """`forward` under this attention mask, or these by type of layer; `further` goes to transformers' decoder."""
        cache = onnx_ops.static_cache(past, write_index, inputs_embeds.shape[1])
        hidden = self.model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            attention_mask=mask,
            **further,
        ).last_hidden_state
        # Only one position's logits are wanted: a prompt's others would cost as much as the rest of the prefill.
        logits = self.lm_head(hidden.index_select(1, logits_index))[:, 0]
        return logits, [state for layer in cache.layers for state in (layer.keys, layer.values)]


class PrefixDecoder(Decoder):
    """A decoder in which the first positions of a prompt see one another."""

    def forward(  # type: ignore[override]  # what a decoder takes further is known by its own signature
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        logits_index: Tensor,
        past: list[Tensor],
        prefix_length: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """prefix_length (1,): how many do, 0 at a step; the rest as in `Decoder.forward`."""
        mask = onnx_ops.causal_mask(write_index, inputs_embeds.shape[1], past[0], prefix_length)
        return self.attend(inputs_embeds, position_ids, write_index, logits_index, past, mask)


@dataclass(frozen=True)
class OwnProcessor:
    """What a family says of a checkpoint that brings no processor of transformers: a fast tokenizer, the manifest's
    `preprocessing`, a template in Jinja as transformers renders it, and the tokens each of which ends an answer."""

    tokenizer: Any
    preprocessing: dict[str, Any]
    chat_template: str
    eos_tokens: tuple[str, ...]


class Family(ABC):
    """How a kind of checkpoint loads and splits. Nothing is overridden that transformers already does right."""

    model_types: ClassVar[tuple[str, ...]]
    unread_types: ClassVar[tuple[str, ...]] = ()  # of its models in a layout that `of` refuses, saying what to take
    left_out: ClassVar[str] = ""  # what the checkpoints have and the artefact lacks, in words: export says it
    # transformers' model types of the decoders that it may have, each compared with transformers' own (test_llava.py).
    # Of the others some need what attention here is not told: the parity ladder, which has the same, would not see it.
    decoders: ClassVar[tuple[str, ...]] = ("llama", "mistral", "phi3", "qwen2", "qwen3")

    def load(self, folder: Path) -> nn.Module:
        """The model in float32 from a local folder with config.json and safetensors."""
        from transformers import AutoModelForImageTextToText

        return loaded(AutoModelForImageTextToText, folder)

    def randomise(self, config: dict[str, Any], seed: int) -> nn.Module:
        """A model of the config's size with seeded random weights, as transformers initialises them."""
        from transformers import AutoModelForImageTextToText

        torch.manual_seed(seed)
        model: nn.Module = AutoModelForImageTextToText.from_config(config_of(config), dtype=torch.float32)
        return model

    def of(self, config: dict[str, Any]) -> Family:
        """The family of a checkpoint with this config.json: another one where a model type has several."""
        return self

    def own_processor(self, folder: Path) -> OwnProcessor | None:
        """For checkpoints that transformers has no processor for, or one that writes another text around a picture than
        processor.py knows; None where it has one that does, as it mostly has."""
        return None

    def picture_settings(self, config: dict[str, Any]) -> dict[str, Any]:
        """What config.json says of how pictures are prepared, where the processor's own files do not."""
        return {}

    @abstractmethod
    def split(self, model: nn.Module) -> Components:
        """The model's parts, sharing its weights."""

    def kv(self, model: Any, capacity: int) -> KvSpec:
        """The cache that the decoder needs; here of one of `decoders`, as transformers describes it."""
        text = model.config.text_config
        if text.model_type not in self.decoders:
            raise VlmcError(
                "The checkpoint has a decoder that vlmc was not compared with",
                found=f"text_config of the model type {text.model_type}",
                expected=" or ".join(self.decoders),
                fix="name it in the family's `decoders`, with a test that compares it (docs/add-a-model.md)",
            )
        return standard_kv(text, capacity)

    def use_canonical_attention(self, model: Any) -> None:
        """Has the model compute attention through `onnx_ops`, by transformers' interface for it."""
        model.set_attn_implementation(IMPLEMENTATION)

    def vision_inputs(self, model: nn.Module) -> dict[str, VisionInput]:
        """What the vision encoder takes, by name, in the order of its arguments: tiles of `image_size`."""
        return {"pixel_values": VisionInput(torch.zeros(2, 3, *self.image_size(model)), {0: "tiles"})}

    def image_size(self, model: Any) -> tuple[int, int]:
        """Height and width in pixels of one tile; where the vision encoder takes tiles."""
        size = model.config.vision_config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width


class Composed(nn.Module):
    """A vision encoder and a decoder as transformers has them, and what connects them: of a checkpoint that it has no
    class for."""

    def __init__(self, vision: Any, connector: nn.Module, text: Any) -> None:
        super().__init__()
        self.vision, self.connector, self.text = vision, connector, text

    def set_attn_implementation(self, name: str) -> None:
        self.vision.set_attn_implementation(name)
        self.text.set_attn_implementation(name)


def layers_up_to(state: int, layers: Any) -> Any:
    """Those of a vision encoder's `layers` that make the hidden state `state`, counted as transformers does: 0 is what
    enters the first layer, -1 what leaves the last."""
    count = len(layers)
    if not -count - 1 <= state <= count:
        found, expected = f"{state} of a vision encoder of {count} layers", f"from {-count - 1} to {count}"
        raise VlmcError("config.json takes features of a layer that there is not", found=found, expected=expected)
    return layers[: state % (count + 1)]


def standard_kv(text: Any, capacity: int) -> KvSpec:
    """The cache of a decoder whose layers are all alike, from its config: refused where its attention is another than
    `Decoder` computes, to all tokens before, or its rotation would change within the cache."""
    rotation.check(text, capacity)
    slides = "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"])
    # A config keeps any value that it is given; of a decoder that has windows the field is its class's.
    window = text.sliding_window if slides and hasattr(type(text), "sliding_window") else None
    if window is not None and window < capacity:
        raise VlmcError(
            "The decoder attends in a sliding window, which vlmc does not follow",
            found=f"a window of {window} tokens, a KV cache of {capacity}",
            expected=f"at most {window} positions",
            fix=f"export with --capacity {window} or less",
        )
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise VlmcError(
            "The decoder caps its attention's logits, which vlmc does not follow",
            found=f"attn_logit_softcapping {text.attn_logit_softcapping}",
        )
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return KvSpec(text.num_hidden_layers, text.num_key_value_heads, head_dim, capacity)


def config_of(values: Mapping[str, Any], model_type: str = "") -> Any:
    """transformers' config of a config.json or a part of it; `model_type`: in the place of its own."""
    from transformers import AutoConfig

    given = {name: value for name, value in values.items() if name != "model_type"}
    config = AutoConfig.for_model(model_type or values["model_type"], **given)
    config._attn_implementation = _ATTENTION
    return config


def decoder_config(model_type: str, original: dict[str, Any]) -> Any:
    """transformers' config of the decoder `model_type` from one of the checkpoint's own that names its fields as Llama
    does; only what decides about the computation is taken."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    rest = ("num_key_value_heads", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias")
    rope = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")  # the third: of transformers 5
    windows = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    ends = ("max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    wanted = sizes + rest + rope + windows + ends
    return config_of({name: original[name] for name in wanted if original.get(name) is not None}, model_type)


def loaded(kind: Any, folder: Path) -> nn.Module:
    """The checkpoint as that class of transformers, in float32, with all of its weights there and no remote code."""
    model, missing = _made(kind, folder, local_files_only=True, use_safetensors=True, trust_remote_code=False)
    require_all(missing, folder)
    return model


def from_tensors(kind: Any, config: Any, weights: dict[str, Tensor]) -> tuple[nn.Module, list[str]]:
    """That class of transformers with these weights in float32, and the names of those that it lacks."""
    return _made(kind, None, config=config, state_dict=weights)


def _made(kind: Any, folder: Path | None, **given: Any) -> tuple[nn.Module, list[str]]:
    """What transformers makes of that, and the names of the weights that it lacks; one of another shape is refused, and
    so are layers that the config leaves out."""
    model: nn.Module
    given |= {"dtype": torch.float32, "attn_implementation": _ATTENTION}
    model, report = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **given)
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise VlmcError(
            f"The checkpoint's weight {name} has another shape than config.json gives it",
            found=str(tuple(found)),
            expected=str(tuple(expected)),
            fix="download the checkpoint again; its config.json may be of another model",
        )
    _require_layers(model, report["unexpected_keys"])
    return model, sorted(report["missing_keys"])


_NUMBERED = re.compile(r"(?<=\.)(\d+)\.")  # the first number in a weight's name


def _require_layers(model: nn.Module, unused: Collection[str]) -> None:
    """Raises where weights that the model does not use are of a whole layer that it does not have."""
    known = [f"{name}." for name, _ in model.named_modules()]
    for name in sorted(unused):
        layers, *number = _NUMBERED.split(name, maxsplit=1)[:2]
        if number and f"{layers}0." in known and f"{layers}{number[0]}." not in known:
            raise VlmcError(
                f"The checkpoint has more layers than its config.json says: {layers}{number[0]}",
                found=name,
                fix="download the checkpoint again; its config.json may be of another model",
            )


def require_all(missing: Collection[str], folder: Path) -> None:
    """Raises where there are names of weights that the checkpoint does not have."""
    if missing:
        raise VlmcError(
            f"The checkpoint {folder} lacks {len(missing)} weights",
            found=f"no {', '.join(sorted(missing)[:3])}",
            fix="download it again; a complete checkpoint holds every weight that its config.json names",
        )


@cache
def all_families() -> dict[str, Family]:
    """Every family by each of its model types."""
    found: dict[str, Family] = {}
    for module_info in pkgutil.iter_modules(families.__path__):
        module = importlib.import_module(f"{families.__name__}.{module_info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Family) and value.__module__ == module.__name__:
                found.update(dict.fromkeys(value.model_types, value()))
    return found


def family_for(model_type: str, where: str, config: Mapping[str, Any] | None = None) -> Family:
    """The family of a checkpoint's `model_type`. An unknown one is answered with what is near: the family that its
    config.json is most like, a name that is spelt nearly so; or else with where to begin."""
    known = all_families()
    if model_type in known:
        return known[model_type]
    for family in known.values():
        if model_type in family.unread_types:
            return family
    alike, spelt = nearest(config or {}), difflib.get_close_matches(model_type, known, n=1, cutoff=0.8)
    fix = "add a file to exporter/families/ (docs/add-a-model.md)"
    if spelt:
        fix = f"did you mean {spelt[0]}? Otherwise {fix}"
    if alike:
        fix += f"; its config.json is nearest to those of exporter/families/{alike}.py"
    elif not spelt:
        fix += "; no family is near, so begin with the simplest, exporter/families/llava.py"
    raise VlmcError(
        f"{where} is of the model type {model_type!r}, which no family knows",
        expected="one of " + ", ".join(sorted(known)),
        fix=fix,
    )
