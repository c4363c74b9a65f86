"""MobileVLM V2: CLIP vision, the lightweight projector LDPv2, a small Llama.

arXiv:2402.03766; the reference is Meituan-AutoML/MobileVLM. transformers has no such class. The model is LLaVA 1.5 but
for its projector, which goes on after LLaVA's two layers: it averages neighbours down to 12 × 12 tokens and adds to
each what a depthwise convolution makes of its surroundings (PEG, arXiv:2102.10882).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from ...errors import VlmcError
from ...files import read_json
from ..family import Components, Decoder, OwnProcessor, decoder_config, from_tensors, require_all
from ..inspection import read_settings
from ..sentence_piece import fast_tokenizer
from .llava import Llava, VisionEncoder, clip_tower

_SIDE = 12  # tokens a side that LDPv2 leaves
_NAMES = {
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.mm_projector\.mlp\.mlp\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.mlp\.mlp\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.mm_projector\.peg\.peg\.0\.": "peg.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
}
_TEMPLATE = (  # conversation.py's "v1", for one question; `space` is what the tokenizer puts before a text
    "{{ space }}A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: {% for part in messages[0]['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<unk>' + space + '\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    " ASSISTANT:"
)


class Projector(nn.Module):
    """LDPv2: patches (tiles, side², width) → tokens (tiles, 144, hidden)."""

    def __init__(self, mlp: nn.Module, peg: nn.Module) -> None:
        super().__init__()
        self.mlp, self.peg = mlp, peg

    def forward(self, patches: Tensor) -> Tensor:
        hidden = self.mlp(patches)
        side = int(hidden.shape[1] ** 0.5)
        pooled = functional.avg_pool2d(hidden.mT.unflatten(2, (side, side)), side // _SIDE)
        tokens: Tensor = (self.peg(pooled) + pooled).flatten(2).mT
        return tokens


class MobileVlm(Llava):
    model_types: ClassVar[tuple[str, ...]] = ("mobilevlm",)

    def load(self, folder: Path) -> nn.Module:
        from safetensors.torch import load_file
        from transformers import LlavaForConditionalGeneration

        weights: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= {_renamed(name): weight for name, weight in load_file(path).items()}
        peg = {name.removeprefix("peg."): weights.pop(name) for name in list(weights) if name.startswith("peg.")}
        config = _config(read_json(folder / "config.json"))
        model, lacking = from_tensors(LlavaForConditionalGeneration, config, weights)
        model.peg = made = _peg(model)
        missing = {f"peg.{name}" for name in made.state_dict() if name not in peg}
        require_all(missing | set(lacking), folder)
        made.load_state_dict(peg)
        return model

    def randomise(self, config: dict[str, Any], seed: int) -> nn.Module:
        model = super().randomise(_config(config).to_dict(), seed)
        model.peg = _peg(model)
        return model

    def split(self, model: Any) -> Components:
        inner = model.model
        projector = Projector(inner.multi_modal_projector, model.peg)
        return Components(
            vision_encoder=VisionEncoder(inner.vision_tower, projector, model.config.vision_feature_layer, 1),
            embed_tokens=inner.language_model.get_input_embeddings(),
            decoder=Decoder(inner.language_model, model.lm_head),
        )

    def own_processor(self, folder: Path) -> OwnProcessor:
        """The vocabulary has no token to spare for pictures (the reference puts them between its parts), so the
        unknown token, which no text encodes to, holds their places."""
        config = read_json(folder / "config.json")
        size = _tower(config)["image_size"]
        preprocessing = {
            "kind": "clip",
            "shortest_edge": size,
            "tile": size,
            "pad": config.get("image_aspect_ratio") == "pad",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
            "image_seq_len": _SIDE * _SIDE,
            "image_token": "<unk>",
            "after_image": "",
        }
        tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        legacy = read_settings(folder / "tokenizer_config.json").get("legacy") is not False
        tokenizer = fast_tokenizer(folder / "tokenizer.model", {}, legacy, **tokens)
        space = "" if legacy else " "
        return OwnProcessor(tokenizer, preprocessing, f"{{% set space = {space!r} %}}{_TEMPLATE}", ("</s>",))


def _peg(model: Any) -> nn.Conv2d:
    width = model.config.text_config.hidden_size
    return nn.Conv2d(width, width, 3, padding=1, groups=width)


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _tower(original: dict[str, Any]) -> dict[str, Any]:
    """The sizes of the vision encoder."""
    name = str(original.get("mm_vision_tower"))
    return clip_tower(original, name, "MobileVLM")


def _config(original: dict[str, Any]) -> Any:
    """transformers' config of the LLaVA that this model is but for its projector."""
    from transformers import CLIPVisionConfig, LlavaConfig

    tower = _tower(original)  # of the marks: train.py and eval/ write them where config.json says so, run.sh never does
    side = tower["image_size"] // tower["patch_size"]
    for what, found, expected in (
        ("projector", str(original.get("mm_projector_type")), "ldpnetv2"),
        ("choice of features", str(original.get("mm_vision_select_feature", "patch")), "patch"),
        ("use of marks around pictures", str(original.get("mm_use_im_start_end", False)), "False"),
        ("number of patches a side", str(side), str(side // _SIDE * _SIDE or _SIDE)),
    ):
        if found != expected:
            raise VlmcError(f"This MobileVLM has another {what} than V2", found=found, expected=expected)
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=decoder_config("llama", original),
        vision_feature_layer=original["mm_vision_select_layer"],
        image_token_index=0,
    )
