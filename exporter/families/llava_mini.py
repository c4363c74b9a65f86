"""LLaVA-Mini: CLIP vision, a compressor to one token, fusion of picture and text, a Llama 3.1 decoder.

arXiv:2501.03895; the reference is ictnlp/LLaVA-Mini (llavamini/model/llavamini_arch.py), for which transformers has no
class and which is not run. The model is LLaVA 1.5 but for two parts. The compressor's learned queries attend to CLIP's
patches, with fixed positions in the plane on both sides. The fusion is a few layers like the decoder's, causal over
patches, compressed tokens and text; the decoder gets what leaves it, without the patches.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import VlmcError
from ...files import read_json
from .. import onnx_ops
from ..family import Components, Decoder, OwnProcessor, decoder_config, from_tensors, require_all
from ..rotation import steady
from .llava import Llava, VisionEncoder, clip_tower

_HEADS = 8  # of the compressor
_VISION = "model.vision_tower."
_NAMES = {
    r"^(model\.vision_tower\.vision_tower\.)?vision_model\.": _VISION,  # without the beginning in CLIP's own file
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(compressor|prefusion_layers)\.": r"\1.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
}
_SYSTEM = (  # conversation.py's "llava_llama_3_1"
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MESSAGES = (  # before the checkpoint's own template: the system's words, and pictures and question in one piece
    "{%% set parts = messages[0]['content'] %%}{%% set pictures = %r * (parts | length - 1) %%}"
    "{%% set words = pictures + ('\n' if pictures else '') + parts[-1]['text'] | trim %%}"
    "{%% set messages = [{'role': 'system', 'content': %r}, {'role': 'user', 'content': words}] %%}"
)


class Compressor(nn.Module):
    """patches (tiles, patches, width) and their positions (patches, width) → (tiles, side², width)."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(side * side, width) * 0.02)
        self.pos_embed = nn.Parameter(_plane(width, side), requires_grad=False)
        self.ln_q, self.ln_kv = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        values = self.ln_kv(patches)
        queries = self.q_proj(self.ln_q(self.query) + self.pos_embed).expand(patches.shape[0], -1, -1)
        keys = self.k_proj(values + positions)
        queries, keys, values = (
            x.reshape(*x.shape[:2], _HEADS, -1).transpose(1, 2) for x in (queries, keys, self.v_proj(values))
        )
        attended, _ = onnx_ops.attention(self, queries, keys, values, None)
        compressed: Tensor = self.out_proj(attended.flatten(2))
        return compressed

    def positions(self, patches: int) -> Tensor:
        """Those of so many patches: the queries' own, stretched over the plane."""
        few, many = int(len(self.pos_embed) ** 0.5), int(patches**0.5)
        grid = self.pos_embed.reshape(1, few, few, -1).permute(0, 3, 1, 2)
        if few != many:
            grid = functional.interpolate(grid, (many, many), mode="bicubic", align_corners=False)
        return grid.flatten(2)[0].mT


class Projector(nn.Module):
    """patches (tiles, patches, width) → (tiles, patches + compressed, hidden), both through LLaVA's projector."""

    def __init__(self, compressor: Compressor, mlp: nn.Module, patches: int) -> None:
        super().__init__()
        self.compressor, self.mlp = compressor, mlp
        self.positions: Tensor
        self.register_buffer("positions", compressor.positions(patches).detach(), persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        features: Tensor = self.mlp(torch.cat((patches, self.compressor(patches, self.positions)), dim=1))
        return features


class Fusion(nn.Module):
    """image_features (pictures, patches + compressed, hidden), text_embeds (1, length, hidden) → (pictures, compressed,
    hidden), (1, length, hidden). Each picture meets the text by itself; of the texts that leave, the mean is taken.

    The reference takes token 0, in Llama 3 an exclamation mark, for padding: it passes the fusion as it came, and no
    other token sees it or counts it. It is known by its embedding, to which no other's is near."""

    def __init__(self, layers: nn.ModuleList, rotary: nn.Module, padding: Tensor, patches: int) -> None:
        super().__init__()
        self.layers, self.rotary, self.patches = layers, rotary, patches
        self.padding: Tensor
        self.register_buffer("padding", padding, persistent=False)

    def forward(self, image_features: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        distance = (text_embeds - self.padding).square().sum(-1)
        padded = distance < 1e-4 * self.padding.square().sum()  # 1 % of its length, for tables in fewer bits
        hidden = torch.cat((image_features, text_embeds.expand(image_features.shape[0], -1, -1)), dim=1)
        seen = torch.cat((torch.ones_like(image_features[:1, :, 0], dtype=torch.bool), ~padded), dim=1)
        index = torch.arange(hidden.shape[1], device=hidden.device)
        mask = (index[None] <= index[:, None]) & seen
        positions = self.rotary(hidden, (mask.sum(-1)[None] - 1).expand(hidden.shape[0], -1))
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=positions)
        behind = image_features.shape[1]
        text = hidden[:, behind:].mean(0, keepdim=True)
        return hidden[:, self.patches : behind], torch.where(padded[..., None], text_embeds, text)


class LlavaMini(Llava):
    model_types: ClassVar[tuple[str, ...]] = ("llava_mini", "llava_mini_llama")

    def load(self, folder: Path) -> nn.Module:
        from safetensors.torch import load_file
        from transformers import LlavaForConditionalGeneration

        weights: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= {_renamed(name): weight for name, weight in load_file(path).items()}
        original = read_json(folder / "config.json")
        if not any(name.startswith(_VISION) for name in weights):
            raise VlmcError(
                f"The checkpoint {folder} lacks its vision encoder",
                fix=f"put model.safetensors of {original.get('mm_vision_tower')} beside it, under another name",
            )
        own = {name: weights.pop(name) for name in list(weights) if name.startswith(("compressor.", "prefusion_"))}
        model, lacking = from_tensors(LlavaForConditionalGeneration, _config(original), weights)
        _add_own(model, original)
        own = _apart(own)
        missing = {name for name in model.state_dict() if name.startswith(("compressor.", "prefusion_"))} - set(own)
        require_all(missing | set(lacking), folder)
        model.load_state_dict(own, strict=False)
        return model

    def randomise(self, config: dict[str, Any], seed: int) -> nn.Module:
        model = super().randomise(_config(config).to_dict(), seed)
        _add_own(model, config)
        return model

    def split(self, model: Any) -> Components:
        inner, vision = model.model, model.config.vision_config
        table, patches = inner.language_model.get_input_embeddings(), (vision.image_size // vision.patch_size) ** 2
        projector = Projector(model.compressor, inner.multi_modal_projector, patches)
        rotary, padding = steady(inner.language_model.rotary_emb), table.weight[0].detach()
        return Components(
            vision_encoder=VisionEncoder(inner.vision_tower, projector, model.config.vision_feature_layer, 1),
            embed_tokens=table,
            decoder=Decoder(inner.language_model, model.lm_head),
            fusion=Fusion(model.prefusion_layers, rotary, padding, patches),
        )

    def own_processor(self, folder: Path) -> OwnProcessor:
        """As in training: one token that begins the text, where the reference's example has two, no white space around
        the question, where the example leaves it before one behind a picture, and the beginning of the answer, which
        that leaves to the model. No token is to spare for pictures (the reference puts them between its parts), so the
        last of those that are reserved holds their places; a text is parted at it as there."""
        from transformers import PreTrainedTokenizerFast

        config = read_json(folder / "config.json")
        ratio, side = str(config.get("image_aspect_ratio", "square")), config.get("compressor_size", 2)
        if ratio not in ("square", "pad"):
            raise VlmcError("This LLaVA-Mini prepares pictures in another way", found=ratio, expected="square or pad")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        reserved = [token for token in tokenizer.get_vocab() if token.startswith("<|reserved_special_token_")]
        if not reserved or not isinstance(tokenizer.chat_template, str):
            raise VlmcError(
                f"The tokenizer in {folder} is not Llama 3.1's",
                found="no reserved token" if not reserved else "no chat template",
                fix="fetch tokenizer.json and tokenizer_config.json of the checkpoint again",
            )
        image_token = max(reserved, key=tokenizer.convert_tokens_to_ids)
        size = _tower(config)["image_size"]
        preprocessing = {
            "kind": "clip",
            "shortest_edge": size,
            "tile": size,
            "pad": ratio == "pad",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
            "image_seq_len": side * side,
            "image_token": image_token,
            "after_image": "",
        }
        template = _MESSAGES % (image_token, _SYSTEM) + tokenizer.chat_template
        return OwnProcessor(tokenizer, preprocessing, template, ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"))


def _plane(width: int, side: int) -> Tensor:
    """Sines and cosines of column and row (side², width), as in MAE (arXiv:2111.06377)."""
    angles = torch.arange(side)[:, None] / 10000 ** (torch.arange(width // 4) / (width / 4))
    line = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat((columns, rows), dim=2).flatten(0, 1)


def _add_own(model: Any, original: dict[str, Any]) -> None:
    """Gives LLaVA the two parts that this model has besides."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    text = model.model.language_model.config
    model.compressor = Compressor(_tower(original)["hidden_size"], original.get("compressor_size", 2))
    layers = (LlamaDecoderLayer(text, index) for index in range(original.get("prefusion_layer_num", 4)))
    model.prefusion_layers = nn.ModuleList(layers)


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The compressor's queries, keys and values, which are rows of one matrix, apart."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        before, fused, after = name.replace(".attn.out_proj.", ".out_proj.").partition(".attn.in_proj_")
        parts = dict(zip("qkv", weight.chunk(3), strict=True)) if fused else {}
        found |= {f"{before}.{part}_proj.{after}": rows for part, rows in parts.items()} or {before: weight}
    return found


def _tower(original: dict[str, Any]) -> dict[str, Any]:
    """The sizes of the vision encoder."""
    name = str(original.get("mm_vision_tower"))
    return clip_tower(original, name, "LLaVA-Mini")


def _config(original: dict[str, Any]) -> Any:
    """transformers' config of the LLaVA that this model is but for compressor and fusion."""
    from transformers import CLIPVisionConfig, LlavaConfig

    tower = _tower(original)
    for what, found, expected in (
        ("projector", str(original.get("mm_projector_type")), "mlp2x_gelu"),
        ("choice of features", str(original.get("mm_vision_select_feature", "patch")), "patch"),
        ("number of parts of a picture", str(original.get("resolution_ratio", 1)), "1"),
        ("use of marks around pictures", str(original.get("mm_use_im_start_end", False)), "False"),
    ):
        if found != expected:
            raise VlmcError(f"This LLaVA-Mini has another {what} than the published", found=found, expected=expected)
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=decoder_config("llama", original),
        vision_feature_layer=original["mm_vision_select_layer"],
        image_token_index=0,
    )
