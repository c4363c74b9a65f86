"""PaliGemma: SigLIP vision, a linear projector, a Gemma decoder in which picture and question see one another.

arXiv:2407.07726. Positions begin at 1 there and at 0 here, which a rotary embedding does not see. PaliGemma 2, whose
decoder is Gemma 2 (capped logits, sliding windows), is not covered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ...errors import VlmcError
from ..family import Components, Family, OwnProcessor, PrefixDecoder
from ..processor import describe_values, read_tokenizer

_TEMPLATE = (  # PaliGemmaProcessor's: pictures, then the token that begins the text, the question and a line break
    "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ bos_token + part['text'] + '\n' }}{% endif %}{% endfor %}"
)


class VisionEncoder(nn.Module):
    """pixel_values (tiles, 3, height, width) → image_features (tiles, tokens, hidden)."""

    def __init__(self, tower: Any, projector: nn.Module) -> None:
        super().__init__()
        self.embeddings, self.layers, self.norm = tower.embeddings, tower.encoder.layers, tower.post_layernorm
        self.projector = projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden = layer(hidden, None)
        features: Tensor = self.projector(self.norm(hidden))
        return features


class PaliGemma(Family):
    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)
    decoders: ClassVar[tuple[str, ...]] = ("gemma",)

    def load(self, folder: Path) -> nn.Module:
        return _with_plain_norms(super().load(folder))

    def randomise(self, config: dict[str, Any], seed: int) -> nn.Module:
        return _with_plain_norms(super().randomise(config, seed))

    def split(self, model: Any) -> Components:
        inner = model.model
        return Components(
            vision_encoder=VisionEncoder(inner.vision_tower, inner.multi_modal_projector),
            embed_tokens=inner.language_model.get_input_embeddings(),
            decoder=PrefixDecoder(inner.language_model, model.lm_head),
        )

    def own_processor(self, folder: Path) -> OwnProcessor:
        """transformers has a processor, but its prompt is code and no template."""
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        pictures = SiglipImageProcessorPil.from_pretrained(folder, local_files_only=True).to_dict()
        size = dict(pictures["size"])
        if size.get("height") != size.get("width") or not size.get("height") or not pictures.get("image_seq_length"):
            found = f"size {size}, {pictures.get('image_seq_length')} tokens"
            raise VlmcError(f"The picture processor in {folder} is not PaliGemma's", found=found)
        tokenizer = read_tokenizer(folder)
        tokenizer.add_bos_token = False  # it does not begin the prompt, for the pictures do
        preprocessing = describe_values(pictures) | {
            "kind": "paligemma",
            "tile": size["height"],
            "image_seq_len": pictures["image_seq_length"],
            "image_token": "<image>",
            "after_image": "",
        }
        return OwnProcessor(tokenizer, preprocessing, _TEMPLATE, (str(tokenizer.eos_token),))


def _with_plain_norms(model: nn.Module) -> nn.Module:
    """Gemma's norms multiply by 1 + weight, and the operator by the weight."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, GemmaRMSNorm):
                plain: Any = LlamaRMSNorm(len(child.weight), eps=child.eps)
                plain.weight = nn.Parameter(1 + child.weight.detach())
                setattr(module, name, plain)
    return model
