"""Phi-3-Vision and Phi-3.5-Vision: CLIP vision on tiles, a two-layer projector, the Phi-3 mini decoder.

arXiv:2404.14219; the reference is microsoft/Phi-3.5-vision-instruct (modeling_phi3_v.py, processing_phi3_v.py), which
transformers has no class for and which is not run. Four neighbouring patches become one token, and two learned
separators, which the projector sees as any token, end each line of tokens and part the tiles from the whole picture.

The decoder's rotation is LongRoPE (arXiv:2402.13753): other angles for the whole text once it is longer than 4096
tokens. Keys in a cache are rotated already, so texts end there.
"""

from __future__ import annotations

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
    Decoder,
    Family,
    OwnProcessor,
    decoder_config,
    from_tensors,
    require_all,
    standard_kv,
)
from ..inspection import AGAIN, read_settings
from .llava import VisionEncoder, clip_tower

_VISION = "model.vision_embed_tokens.img_processor.vision_model."
_CONNECTOR = "model.vision_embed_tokens."
_TEMPLATE = (  # the model card's, for one question
    "{{ '<|user|>\n' }}{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}{{ '<|image|>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|end|>\n<|assistant|>\n' }}"
)


class Connector(nn.Module):
    """patches (tiles, side², width) → image features (1, tiles · side² / 4 + 2, hidden), the last two of which are the
    separators at the end of a line and between the tiles and the whole."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.sub_GN = nn.Parameter(torch.randn(1, 1, 1, 4 * width))
        self.glb_GN = nn.Parameter(torch.randn(1, 1, 4 * width))
        self.img_projection = nn.Sequential(nn.Linear(4 * width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, patches: Tensor) -> Tensor:
        half = int(patches.shape[1] ** 0.5) // 2
        squares = patches.reshape(-1, half, 2, half, 2, patches.shape[2]).transpose(2, 3)  # tiles, y, x, 2, 2, width
        tokens = squares.flatten(3).flatten(0, 2)
        features: Tensor = self.img_projection(torch.cat((tokens, self.sub_GN[0, 0], self.glb_GN[0]))[None])
        return features


class Phi3V(Family):
    model_types: ClassVar[tuple[str, ...]] = ("phi3_v",)

    def load(self, folder: Path) -> nn.Module:
        from safetensors.torch import load_file
        from transformers import CLIPVisionModel, Phi3ForCausalLM

        config, text = read_json(folder / "config.json"), dict[str, Tensor]()
        for path in sorted(folder.glob("*.safetensors")):
            text |= load_file(path)
        vision, between = _taken(text, _VISION), _taken(text, _CONNECTOR)
        if (table := between.pop("wte.weight", None)) is not None:  # another name of the table of embeddings
            text.setdefault("model.embed_tokens.weight", table)
        connector = _connector(config)
        found, lacking = from_tensors(CLIPVisionModel, _vision_config(config), vision)
        missing = [_VISION + name for name in lacking]
        decoder, lacking = from_tensors(Phi3ForCausalLM, _text_config(config), text)
        missing += lacking + [_CONNECTOR + name for name in connector.state_dict() if name not in between]
        require_all(missing, folder)
        connector.load_state_dict(between)
        return Composed(found, connector, decoder)

    def randomise(self, config: dict[str, Any], seed: int) -> nn.Module:
        from transformers import CLIPVisionModel, Phi3ForCausalLM

        torch.manual_seed(seed)
        vision = CLIPVisionModel._from_config(_vision_config(config), dtype=torch.float32)
        text = Phi3ForCausalLM._from_config(_text_config(config), dtype=torch.float32)
        return Composed(vision, _connector(config), text)

    def split(self, model: Any) -> Components:
        return Components(
            vision_encoder=VisionEncoder(model.vision, model.connector, -2, 1),
            embed_tokens=model.text.get_input_embeddings(),
            decoder=Decoder(model.text.model, model.text.lm_head),
        )

    def kv(self, model: Any, capacity: int) -> KvSpec:
        return standard_kv(model.text.config, capacity)

    def image_size(self, model: Any) -> tuple[int, int]:
        size = model.vision.config.image_size
        return size, size

    def own_processor(self, folder: Path) -> OwnProcessor:
        """The reference tokenises what stands before, between and behind pictures apart, each with the token that
        begins a text: that one stands behind every picture, too."""
        tower = _tower(read_json(folder / "config.json"))
        pictures = read_settings(folder / "preprocessor_config.json")
        tokenizer, begin = _tokenizer(folder)
        preprocessing = {
            "kind": "phi3_v",
            "tile": tower["image_size"],
            "max_tiles": pictures.get("num_crops", 1),
            "rescale_factor": 1 / 255,
            "mean": pictures.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
            "std": pictures.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
            "side": tower["image_size"] // tower["patch_size"] // 2,
            "image_token": "<|image|>",
            "end_token": begin,
            "after_image": "",
        }
        return OwnProcessor(tokenizer, preprocessing, _TEMPLATE, ("<|end|>", "<|endoftext|>"))


def _taken(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Takes the tensors whose names begin so out of `weights`; without the beginning."""
    names = [name for name in weights if name.startswith(prefix)]
    return {name.removeprefix(prefix): weights.pop(name) for name in names}


def _tower(original: dict[str, Any]) -> dict[str, Any]:
    """The sizes of the vision encoder."""
    described = original.get("img_processor") or {}
    name = str(described.get("model_name"))
    return clip_tower(original, name, "Phi-3-Vision")


def _vision_config(original: dict[str, Any]) -> Any:
    from transformers import CLIPVisionConfig

    tower, described, layer = _tower(original), original.get("img_processor") or {}, original.get("embd_layer") or {}
    for what, found, expected in (
        ("order of tiles and whole", layer.get("hd_transform_order", "glb_sub"), "sub_glb"),
        ("projector", layer.get("projection_cls", "linear"), "mlp"),
        ("use of separators", str(layer.get("with_learnable_separator", False)), "True"),
        ("layer of features", str(described.get("layer_idx", -2)), "-2"),
        ("choice of features", described.get("type_feature", "patch"), "patch"),
        ("number of patches a side", str(tower["image_size"] // tower["patch_size"] % 2), "0"),
    ):
        if found != expected:
            raise VlmcError(f"This Phi-3-Vision has another {what} than Phi-3.5-Vision", found=found, expected=expected)
    return CLIPVisionConfig(**tower)


def _text_config(original: dict[str, Any]) -> Any:
    scaling, first = original.get("rope_scaling"), original.get("original_max_position_embeddings", 4096)
    if scaling:
        factor = original["max_position_embeddings"] / first
        scaling = scaling | {"original_max_position_embeddings": first, "factor": factor}
    config = decoder_config("phi3", original | {"rope_scaling": scaling})
    config.pad_token_id = None  # it may lie beyond a small vocabulary, and nothing is padded
    return config


def _connector(original: dict[str, Any]) -> Connector:
    return Connector(_tower(original)["hidden_size"], original["hidden_size"])


def _tokenizer(folder: Path) -> tuple[Any, str]:
    """The checkpoint's tokenizer.json as it is, and the token that begins a text, if there is one."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    settings, path = read_settings(folder / "tokenizer_config.json"), folder / "tokenizer.json"
    if not path.is_file():
        raise VlmcError(f"{path} is missing", fix=AGAIN)
    tokenizer, begin = Tokenizer.from_file(str(path)), ""
    tokenizer.post_processor = processors.Sequence([])
    if settings.get("add_bos_token", True):
        begin = "<s>"
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    special = {"bos_token": "<s>", "eos_token": "<|end|>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special), begin
