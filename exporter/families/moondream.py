"""Moondream2 as released since June 2025: SigLIP vision on the whole and on tiles, a projector, a Phi-1.5 decoder.

The reference is vikhyat/moondream (moondream/torch/), whose sizes are in its code, not in config.json. The decoder is
Phi's (arXiv:2309.05463), attention and MLP side by side and half of each head rotated, but the token that begins the
text and the picture's see one another. The tiles' features, averaged to as many as the whole has, stand beside those of
the whole, so a picture is always 729 tokens.

The region head, which turns hidden states into coordinates for detecting and pointing, is left out: answers are text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...artifact import KvSpec
from ...errors import VlmcError
from ...files import read_json
from ..family import (
    Components,
    Composed,
    Family,
    OwnProcessor,
    PrefixDecoder,
    VisionInput,
    from_tensors,
    require_all,
    standard_kv,
)

# The defaults of the reference's config.py; config.json's `config` may say otherwise.
_TEXT: dict[str, Any] = {"dim": 2048, "ff_dim": 8192, "n_layers": 24, "vocab_size": 51200, "max_context": 2048}
_TEXT |= {"n_heads": 32, "n_kv_heads": 32, "group_size": None}
_VISION = {"enc_dim": 1152, "enc_patch_size": 14, "enc_n_layers": 27, "enc_ff_dim": 4304, "enc_n_heads": 16}
_VISION |= {"crop_size": 378, "max_crops": 12, "overlap_margin": 4, "proj_inner_dim": 8192}
_NAMES = {
    r"^vision\.patch_emb\.": "vision.embeddings.patch_embedding.",
    r"^vision\.pos_emb$": "vision.embeddings.position_embedding.weight",
    r"^vision\.blocks\.(\d+)\.ln": r"vision.encoder.layers.\1.layer_norm",
    r"^vision\.blocks\.(\d+)\.attn\.proj\.": r"vision.encoder.layers.\1.self_attn.out_proj.",
    r"^vision\.blocks\.(\d+)\.attn\.": r"vision.encoder.layers.\1.self_attn.",
    r"^vision\.blocks\.": "vision.encoder.layers.",
    r"^vision\.post_ln\.": "vision.post_layernorm.",
    r"^vision\.proj_mlp\.": "connector.",
    r"^text\.wte$": "text.model.embed_tokens.weight",
    r"^text\.blocks\.(\d+)\.ln\.": r"text.model.layers.\1.input_layernorm.",
    r"^text\.blocks\.(\d+)\.attn\.proj\.": r"text.model.layers.\1.self_attn.dense.",
    r"^text\.blocks\.(\d+)\.attn\.": r"text.model.layers.\1.self_attn.",
    r"^text\.blocks\.": "text.model.layers.",
    r"^text\.post_ln\.": "text.model.final_layernorm.",
}
_STARMIE, _NEWER = "moondream/starmie-v1", "take revision 2025-06-21 of huggingface.co/vikhyatk/moondream2"
# The tokens of starmie-v1 that make the reference's template for a question, with their ids in it.
_BEGIN, _IMAGE = "<|endoftext|>", "<|md_reserved_4|>"
_IDS = {_BEGIN: 0, "<|md_reserved_0|>": 1, "<|md_reserved_1|>": 2, "<|md_reserved_2|>": 3, _IMAGE: 5}
_TEMPLATE = (  # the token that begins the answer stands there twice: the reference's query() adds it twice
    "<|endoftext|>{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<|md_reserved_4|>"
    "{% endif %}{% endfor %}<|md_reserved_0|>query<|md_reserved_1|>{% for part in messages[0]['content'] %}"
    "{% if part['type'] != 'image' %}{{ part['text'] }}{% endif %}{% endfor %}<|md_reserved_2|><|md_reserved_2|>"
)


class Projector(nn.Module):
    """(1, tokens, width of whole and tiles) → (1, tokens, hidden)."""

    def __init__(self, width: int, inner: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, hidden)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.fc2(nn.functional.gelu(self.fc1(features), approximate="tanh"))
        return projected


class VisionEncoder(nn.Module):
    """pixel_values (tiles, 3, height, width), the whole first, and pooling (tokens, tiles, tokens), which averages the
    other tiles' features → image_features (1, tokens, hidden)."""

    def __init__(self, tower: Any, projector: nn.Module) -> None:
        super().__init__()
        self.embeddings, self.layers, self.norm = tower.embeddings, tower.encoder.layers, tower.post_layernorm
        self.projector = projector

    def forward(self, pixel_values: Tensor, pooling: Tensor) -> Tensor:
        hidden = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden = layer(hidden, None)
        hidden = self.norm(hidden)
        pooled = pooling.flatten(1) @ hidden.flatten(0, 1)
        features: Tensor = self.projector(torch.cat((hidden[:1], pooled[None]), dim=-1))
        return features


class Moondream(Family):
    model_types: ClassVar[tuple[str, ...]] = ("moondream1",)
    left_out: ClassVar[str] = "Moondream2's region head (detecting, pointing)"

    def of(self, config: dict[str, Any]) -> Family:
        if older := {"text_config", "phi_config"} & set(config):
            raise VlmcError(
                "This Moondream is in the layout before 2025, which has other parts",
                found=", ".join(older),
                expected="sizes in `config`",
                fix=_NEWER,
            )
        return self

    def load(self, folder: Path) -> nn.Module:
        from safetensors.torch import load_file
        from transformers import PhiForCausalLM, SiglipVisionModel

        config = _sizes(read_json(folder / "config.json"))
        parts: dict[str, dict[str, Tensor]] = {"vision": {}, "connector": {}, "text": {}, "region": {}}
        for path in sorted(folder.glob("*.safetensors")):
            for name, weight in _renamed(load_file(path), config).items():
                part, _, rest = name.partition(".")
                parts.setdefault(part, {})[rest] = weight
        connector = _projector(config)
        vision, lacking = from_tensors(SiglipVisionModel, _vision_config(config), parts["vision"])
        missing = [f"vision.{name}" for name in lacking]
        text, lacking = from_tensors(PhiForCausalLM, _text_config(config), parts["text"])
        missing += [f"text.{name}" for name in lacking]
        missing += [f"connector.{name}" for name in connector.state_dict() if name not in parts["connector"]]
        require_all(missing, folder)
        connector.load_state_dict(parts["connector"])
        return Composed(vision, connector, text)

    def randomise(self, config: dict[str, Any], seed: int) -> nn.Module:
        from transformers import PhiForCausalLM, SiglipVisionModel

        torch.manual_seed(seed)
        sizes = _sizes(config)
        vision = SiglipVisionModel._from_config(_vision_config(sizes), dtype=torch.float32)
        text = PhiForCausalLM._from_config(_text_config(sizes), dtype=torch.float32)
        return Composed(vision, _projector(sizes), text)

    def split(self, model: Any) -> Components:
        return Components(
            vision_encoder=VisionEncoder(model.vision, model.connector),
            embed_tokens=model.text.get_input_embeddings(),
            decoder=PrefixDecoder(model.text.model, model.text.lm_head),
        )

    def kv(self, model: Any, capacity: int) -> KvSpec:
        text = model.text.config
        return standard_kv(text, capacity)

    def vision_inputs(self, model: Any) -> dict[str, VisionInput]:
        tokens = model.vision.embeddings.num_patches
        pooling = VisionInput(torch.zeros(tokens, 2, tokens), {1: "tiles"})
        return super().vision_inputs(model) | {"pooling": pooling}

    def image_size(self, model: Any) -> tuple[int, int]:
        size = model.vision.config.image_size
        return size, size

    def own_processor(self, folder: Path) -> OwnProcessor:
        """The reference fetches its tokenizer from another place, and vikhyatk/moondream2 still holds the one before,
        with which its revisions of early 2025 were trained: their config.json and weights look the same. A token for
        coordinates, which no question encodes to, holds the places of the picture."""
        from transformers import PreTrainedTokenizerFast

        code = folder / "moondream.py"  # only there where the hub's whole folder is
        if code.is_file() and _STARMIE not in code.read_text(encoding="utf-8", errors="replace"):
            raise VlmcError(
                "This Moondream2 is of a revision before 2025-06-21, which has other tokens and another prompt",
                found=f"{code} does not name {_STARMIE}",
                fix=_NEWER,
            )
        vision = _sizes(read_json(folder / "config.json"))["vision"]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), bos_token=_BEGIN, eos_token=_BEGIN, unk_token=_BEGIN
        )
        found = {token: id for token, id in tokenizer.get_vocab().items() if token in _IDS}
        if found != _IDS:
            raise VlmcError(
                f"{folder / 'tokenizer.json'} is not the tokenizer that Moondream2 uses since June 2025",
                found=", ".join(f"{token} {id}" for token, id in sorted(found.items())) or "none of its tokens",
                expected=", ".join(f"{token} {id}" for token, id in sorted(_IDS.items())),
                fix=f"put tokenizer.json of huggingface.co/{_STARMIE} in its place if the weights are of revision "
                "2025-06-21; older ones, which it does not fit, are not read",
            )
        preprocessing = {
            "kind": "moondream",
            "tile": vision["crop_size"],
            "patch": vision["enc_patch_size"],
            "max_tiles": vision["max_crops"],
            "margin": vision["overlap_margin"],
            "rescale_factor": 1 / 255,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "image_token": _IMAGE,
            "after_image": "",
        }
        return OwnProcessor(tokenizer, preprocessing, _TEMPLATE, (_BEGIN,))


def _sizes(original: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The reference's `text` and `vision`, defaults included."""
    own = original.get("config") or {}
    found = {"text": _TEXT | own.get("text", {}), "vision": _VISION | own.get("vision", {})}
    if found["text"]["group_size"] is not None:
        raise VlmcError(
            "This Moondream2 is quantised", found=f"groups of {found['text']['group_size']}", fix="take the float one"
        )
    return found


def _vision_config(sizes: dict[str, dict[str, Any]]) -> Any:
    from transformers import SiglipVisionConfig

    vision = sizes["vision"]
    return SiglipVisionConfig(
        hidden_size=vision["enc_dim"],
        intermediate_size=vision["enc_ff_dim"],
        num_hidden_layers=vision["enc_n_layers"],
        num_attention_heads=vision["enc_n_heads"],
        image_size=vision["crop_size"],
        patch_size=vision["enc_patch_size"],
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-5,
        vision_use_head=False,
    )


def _text_config(sizes: dict[str, dict[str, Any]]) -> Any:
    from transformers import PhiConfig

    text = sizes["text"]
    return PhiConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["dim"],
        intermediate_size=text["ff_dim"],
        num_hidden_layers=text["n_layers"],
        num_attention_heads=text["n_heads"],
        num_key_value_heads=text["n_kv_heads"],
        max_position_embeddings=text["max_context"],
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
    )


def _projector(sizes: dict[str, dict[str, Any]]) -> Projector:
    return Projector(2 * sizes["vision"]["enc_dim"], sizes["vision"]["proj_inner_dim"], sizes["text"]["dim"])


def _renamed(weights: dict[str, Tensor], sizes: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """The tensors under the names of `Composed`: queries, keys and values apart, patches as a convolution sees them."""
    patch, text = sizes["vision"]["enc_patch_size"], sizes["text"]
    found: dict[str, Tensor] = {}
    for original, weight in weights.items():
        name = original.removeprefix("model.")
        for pattern, replacement in _NAMES.items():
            name = re.sub(pattern, replacement, name)
        before, fused, after = name.partition(".qkv.")
        if fused:
            keys = text["n_kv_heads"] * (text["dim"] // text["n_heads"])
            if name.startswith("vision."):
                keys = len(weight) // 3
            parts = weight[: -2 * keys], weight[-2 * keys : -keys], weight[-keys:]
            for part, projection in zip(parts, ("q_proj", "k_proj", "v_proj"), strict=True):
                found[f"{before}.{projection}.{after}"] = part.contiguous()
        elif name.endswith("patch_embedding.weight"):
            found[name] = weight.reshape(len(weight), 3, patch, patch)
        else:
            found[name] = weight[0] if name.endswith("position_embedding.weight") else weight
    return found
