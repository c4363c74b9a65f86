"""Gemma 3n (E2B, E4B): MobileNet-V5 vision, the Gemma 3n decoder with its per-layer embeddings; without hearing.

The published checkpoints google/gemma-3n-E2B-it and -E4B-it; AltUp is arXiv:2301.13310, Laurel arXiv:2411.07501. The
decoder is transformers' own. Its model as a whole is not used: that needs timm for the vision tower. The audio tower's
weights are not read; its tokens are looked up as ever, so that any text means what it does there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...artifact import KvSpec
from ...errors import VlmcError
from ...files import read_json
from .. import onnx_ops
from ..family import Components, Decoder, Family, OwnProcessor, config_of, from_tensors, require_all
from ..mobilenet_v5 import LAYOUTS, Layout, MobileNetV5
from ..processor import read_tokenizer

_VISION = "model.vision_tower.timm_model."
_TEXT = "model.language_model."


class Model(nn.Module):
    """The parts: a vision tower, what embeds pictures and the tokens of pictures and sounds, the language model."""

    def __init__(self, config: dict[str, Any], text: Any) -> None:
        super().__init__()
        from transformers.models.gemma3n.modeling_gemma3n import Gemma3nMultimodalEmbedder

        self.layout = _layout(config)
        self.vision_tower = MobileNetV5(self.layout)
        self.embed_vision: Any = Gemma3nMultimodalEmbedder(_embedder_config(config["vision_config"]), text.config)
        self.embed_audio: Any = Gemma3nMultimodalEmbedder(_embedder_config(config["audio_config"]), text.config)
        self.text = text
        end = self.embed_vision.vocab_offset + self.embed_vision.vocab_size
        if self.embed_audio.vocab_offset != end:
            raise VlmcError(
                "This Gemma 3n's tokens of sounds do not follow those of pictures",
                found=f"the former begin at {self.embed_audio.vocab_offset}, the latter end at {end}",
            )

    def set_attn_implementation(self, name: str) -> None:
        self.text.set_attn_implementation(name)


class VisionEncoder(nn.Module):
    """pixel_values (tiles, 3, height, width) → image_features (tiles, tokens, hidden)."""

    def __init__(self, tower: MobileNetV5, embedder: Any) -> None:
        super().__init__()
        self.tower, self.embedder = tower, embedder
        self.scale = float(embedder.multimodal_hidden_size) ** 0.5

    def forward(self, pixel_values: Tensor) -> Tensor:
        places = self.tower(pixel_values).flatten(2).transpose(1, 2)
        features: Tensor = self.embedder(inputs_embeds=places * self.scale)
        return features


class EmbedTokens(nn.Module):
    """input_ids (1, length) → inputs_embeds (1, length, hidden), per_layer_inputs (1, length, layers, width).

    The last tokens of the vocabulary, which stand around and for pictures and sounds, have tables of their own, as
    wide as the towers; what they become in the language model's space is worked out here once."""

    outputs = ("inputs_embeds", "per_layer_inputs")

    def __init__(self, text: Any, embedders: list[Any]) -> None:
        super().__init__()
        self.tokens, self.per_layer = text.embed_tokens, text.embed_tokens_per_layer
        self.per_layer_size = text.config.vocab_size_per_layer_input
        self.layers = text.config.num_hidden_layers
        self.first = embedders[0].vocab_offset
        rows = []
        for embedder in embedders:
            ids = torch.arange(embedder.vocab_size, device=embedder.embedding.weight.device)
            with torch.no_grad():
                rows.append(embedder(input_ids=ids + embedder.vocab_offset))
        self.marks: Tensor
        self.register_buffer("marks", torch.cat(rows), persistent=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        marks = functional.embedding((input_ids - self.first).clamp(0, len(self.marks) - 1), self.marks)
        embeds = torch.where((input_ids >= self.first)[..., None], marks, self.tokens(input_ids))
        known = torch.where(input_ids < self.per_layer_size, input_ids, 0)
        return embeds, self.per_layer(known).unflatten(2, (self.layers, -1))


class Gemma3nDecoder(Decoder):
    """With masks by type of layer, inputs a layer, and logits within ± `cap`."""

    def __init__(self, model: Any, lm_head: nn.Module) -> None:
        super().__init__(model, lm_head)
        self.window, self.cap = model.config.sliding_window, model.config.final_logit_softcapping

    def forward(  # type: ignore[override]  # it takes what its embed_tokens gives further
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        logits_index: Tensor,
        past: list[Tensor],
        per_layer_inputs: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """per_layer_inputs (1, length, layers, width); the rest as in `Decoder.forward`."""
        masks = {
            kind: onnx_ops.causal_mask(write_index, inputs_embeds.shape[1], past[0], window=window)
            for kind, window in (("full_attention", 0), ("sliding_attention", self.window))
        }
        with _canonical_rotation():
            logits, present = self.attend(
                inputs_embeds, position_ids, write_index, logits_index, past, masks, per_layer_inputs=per_layer_inputs
            )
        return torch.tanh(logits / self.cap) * self.cap, present


class Gemma3n(Family):
    model_types: ClassVar[tuple[str, ...]] = ("gemma3n",)
    left_out: ClassVar[str] = "Gemma 3n's audio tower"

    def load(self, folder: Path) -> nn.Module:
        from safetensors import safe_open
        from transformers import Gemma3nForCausalLM

        config, weights = read_json(folder / "config.json"), dict[str, Tensor]()
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                weights |= {name: file.get_tensor(name) for name in sorted(file.keys()) if ".audio_tower." not in name}
        own = {name.replace(_TEXT, "model."): weights[name] for name in weights if name.startswith(_TEXT)}
        text, lacking = from_tensors(Gemma3nForCausalLM, _text_config(config), own)
        model = Model(config, text)
        parts: list[tuple[nn.Module, str]] = [(model.vision_tower, _VISION)]
        parts += [(getattr(model, name), f"model.{name}.") for name in ("embed_vision", "embed_audio")]
        missing = {name.replace("model.", _TEXT, 1) for name in lacking}
        missing |= {start + name for part, start in parts for name in part.state_dict() if start + name not in weights}
        require_all(missing, folder)
        for part, start in parts:
            part.load_state_dict({name: weights[start + name] for name in part.state_dict()})
        return model

    def randomise(self, config: dict[str, Any], seed: int) -> nn.Module:
        from transformers import Gemma3nForCausalLM

        torch.manual_seed(seed)
        return Model(config, Gemma3nForCausalLM._from_config(_text_config(config), dtype=torch.float32))

    def split(self, model: Any) -> Components:
        text = model.text.model
        for part in (model.embed_vision, model.embed_audio):
            _give_scale(part.embedding_post_projection_norm, part.text_hidden_size)
        for layer in text.layers:
            if not layer.self_attn.is_kv_shared_layer:
                _give_scale(layer.self_attn.v_norm, layer.self_attn.head_dim)
            if layer.mlp.activation_sparsity > 0:
                layer.mlp._gaussian_topk = partial(_strongest, deviations=_deviations(layer.mlp.activation_sparsity))
        return Components(
            vision_encoder=VisionEncoder(model.vision_tower, model.embed_vision),
            embed_tokens=EmbedTokens(text, [model.embed_vision, model.embed_audio]),
            decoder=Gemma3nDecoder(text, model.text.lm_head),
        )

    def kv(self, model: Any, capacity: int) -> KvSpec:
        """The last layers read the keys and values of earlier ones and have none of their own."""
        text = model.text.config
        layers = text.num_hidden_layers - text.num_kv_shared_layers
        return KvSpec(layers, text.num_key_value_heads, text.head_dim, capacity)

    def image_size(self, model: Any) -> tuple[int, int]:
        return model.layout.image_size, model.layout.image_size

    def own_processor(self, folder: Path) -> OwnProcessor:
        """Gemma3nProcessor's rules. It is not asked itself, for its part that prepares sounds is not wanted here."""
        from transformers import AutoImageProcessor

        config, tokenizer = read_json(folder / "config.json"), read_tokenizer(folder)
        pictures = AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        ).to_dict()
        size, steps = pictures["size"], [pictures[f"do_{step}"] for step in ("resize", "rescale", "normalize")]
        if steps != [True, True, False] or size.get("height") != size.get("width") or not size.get("height"):
            raise VlmcError(
                "This Gemma 3n prepares pictures otherwise than the published ones",
                found=f"size {dict(size)}, resize, rescale, normalise {steps}",
                expected="a square, and values that are rescaled and not normalised",
            )
        template = folder / "chat_template.jinja"
        chat = template.read_text(encoding="utf-8") if template.is_file() else tokenizer.chat_template
        image, start, end = (
            tokenizer.convert_ids_to_tokens(config[f"{name}_token_id"]) for name in ("image", "boi", "eoi")
        )
        preprocessing = {
            "kind": "gemma3n",
            "tile": size["height"],
            "resample": int(pictures["resample"]),
            "rescale_factor": float(pictures["rescale_factor"]),
            "image_seq_len": config.get("vision_soft_tokens_per_image", 256),
            "image_token": image,
            "start_token": start,
            "end_token": end,
            "after_image": "",
        }
        return OwnProcessor(tokenizer, preprocessing, chat, ("<end_of_turn>", "<eos>"))


def _give_scale(norm: nn.Module, width: int) -> None:
    """Gives a norm that has none the factors that change nothing: the standard operator wants some."""
    norm.register_buffer("weight", torch.ones(width), persistent=False)


def _deviations(share: float) -> float:
    """How many standard deviations above the mean this share of a normal distribution ends, as transformers finds it:
    computed here, for no ONNX operator does."""
    normal: Any = torch.distributions.Normal(torch.zeros((), device="cpu"), torch.ones((), device="cpu"))
    return float(normal.icdf(torch.tensor(share, dtype=torch.float32, device="cpu")))


def _strongest(inputs: Tensor, deviations: float) -> Tensor:
    """What of inputs (…, inner) is more than so many standard deviations above their mean, and by how much."""
    spread = torch.std(inputs, dim=-1, keepdim=True, unbiased=False)
    return functional.relu(inputs - (inputs.mean(-1, keepdim=True) + spread * deviations))


@contextlib.contextmanager
def _canonical_rotation() -> Iterator[None]:
    """While a graph is written, Gemma 3n's rotation, which takes queries and keys apart and with the heads behind the
    length, is the standard operator."""
    from transformers.models.gemma3n import modeling_gemma3n

    if not onnx_ops.exporting():
        yield
        return
    with mock.patch.object(modeling_gemma3n, "apply_rotary_pos_emb", _rotate):
        yield


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 2) -> Tensor:
    """x (1, length, heads, dim), turned by cos and sin (1, length, dim), whose two halves are equal."""
    half = x.shape[-1] // 2
    return onnx_ops.rotary(x.transpose(1, 2), cos[..., :half], sin[..., :half]).transpose(1, 2)


def _layout(config: dict[str, Any]) -> Layout:
    """The vision tower's sizes; config.json only names them."""
    vision = config["vision_config"]
    name, arguments = vision.get("architecture", "mobilenetv5_300m_enc"), vision.get("model_args")
    if name not in LAYOUTS or arguments:
        found = name + (f" with {arguments}" if arguments else "")
        raise VlmcError("This Gemma 3n has an unknown vision tower", found=found, expected=", ".join(LAYOUTS))
    return LAYOUTS[name]


def _embedder_config(part: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    known = ("hidden_size", "rms_norm_eps", "vocab_offset", "vocab_size")
    return AutoConfig.for_model(part["model_type"], **{name: part[name] for name in known if name in part})


def _text_config(config: dict[str, Any]) -> Any:
    return config_of(config["text_config"], "gemma3n_text")
