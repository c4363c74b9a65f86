"""InternVL 2, 2.5, 3 and 3.5 in OpenGVLab's own layout: the model of `internvl`, under other names.

transformers has no such class, and the checkpoint's code is not run. InternLM2 (arXiv:2403.17297) is a Llama whose
queries, keys and values are rows of one matrix, group by group, so both halves are built from transformers' blocks
and the tensors are renamed and taken apart. The reference is OpenGVLab/InternVL, internvl_chat/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ...errors import VlmcError
from ...files import read_json
from ..family import OwnProcessor, decoder_config, from_tensors, require_all
from ..inspection import read_settings
from ..sentence_piece import fast_tokenizer
from .internvl import InternVl

_VISION = {
    r"^vision_model\.": "model.vision_tower.",
    r"\.class_embedding$": ".cls_token",
    r"\.position_embedding$": ".position_embeddings",
    r"\.patch_embedding\.": ".patch_embeddings.projection.",
    r"\.encoder\.layers\.": ".encoder.layer.",
    r"\.attn\.proj\.": ".attention.projection_layer.",
    r"\.attn\.": ".attention.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.ls(\d)$": r".lambda_\1",
    r"^mlp1\.0\.": "model.multi_modal_projector.layer_norm.",
    r"^mlp1\.1\.": "model.multi_modal_projector.linear_1.",
    r"^mlp1\.3\.": "model.multi_modal_projector.linear_2.",
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.(lm_head|output)\.": "lm_head.",
}
_INTERNLM2 = {
    r"\.tok_embeddings\.": ".embed_tokens.",
    r"\.attention\.wo\.": ".self_attn.o_proj.",
    r"\.attention\.wqkv\.": ".self_attn.qkv.",
    r"\.feed_forward\.w1\.": ".mlp.gate_proj.",
    r"\.feed_forward\.w2\.": ".mlp.down_proj.",
    r"\.feed_forward\.w3\.": ".mlp.up_proj.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
}
_DECODERS = {
    "InternLM2ForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_ADAPTERS = ("use_llm_lora", "use_backbone_lora")  # their ranks; 0 once they are merged

_OLD = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_NEW = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
# config.json names one of conversation.py's templates: the system's words, and what ends a turn.
_TEMPLATES = {
    "internlm2-chat": (_OLD, "<|im_end|>"),
    "Hermes-2": (_OLD, "<|im_end|>"),
    "internvl2_5": (_NEW, "<|im_end|>\n"),
}
_ANSWER = "<|im_start|>assistant\n"
_CONTENT = (  # of the one message that there is, as Jinja
    "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)


class InternVlChat(InternVl):
    model_types: ClassVar[tuple[str, ...]] = ("internvl_chat",)

    def load(self, folder: Path) -> nn.Module:
        from safetensors.torch import load_file
        from transformers import InternVLForConditionalGeneration

        original = read_json(folder / "config.json")
        config, weights = _config(original), dict[str, Tensor]()
        for path in sorted(folder.glob("*.safetensors")):
            weights |= _renamed(load_file(path), original)
        model, missing = from_tensors(InternVLForConditionalGeneration, config, weights)
        require_all(missing, folder)
        return model

    def randomise(self, config: dict[str, Any], seed: int) -> nn.Module:
        return super().randomise(_config(config).to_dict(), seed)

    def own_processor(self, folder: Path) -> OwnProcessor:
        config = read_json(folder / "config.json")
        name, size = config.get("template"), config["vision_config"]["image_size"]
        if name not in _TEMPLATES:
            raise VlmcError(f"{folder} names an unknown chat template", found=str(name), expected=", ".join(_TEMPLATES))
        system, end = _TEMPLATES[name]
        if (given := config.get("system_message")) is not None:  # InternVL3's says null and means the template's
            system = given
        before = f"<|im_start|>system\n{system}{end}<|im_start|>user\n"
        # Python's literals are Jinja's; bare text would lose the line break at its end.
        template = f"{{{{ {before!r} }}}}{_CONTENT}{{{{ {end + _ANSWER!r} }}}}"
        side = int(size // config["vision_config"]["patch_size"] * config.get("downsample_ratio", 0.5))
        preprocessing = {
            "kind": "internvl",
            "tile": size,
            "min_tiles": config.get("min_dynamic_patch", 1),
            "max_tiles": config.get("max_dynamic_patch", 6) if config.get("dynamic_image_size", False) else 1,
            "thumbnail": bool(config.get("use_thumbnail", False)),
            "resample": 3,
            "rescale_factor": 1 / 255,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "image_seq_len": side * side,
            "image_token": "<IMG_CONTEXT>",
            "start_token": "<img>",
            "end_token": "</img>",
            "after_image": "",
        }
        return OwnProcessor(_tokenizer(folder, config), preprocessing, template, (end.strip(),))


def _config(original: dict[str, Any]) -> Any:
    """transformers' config of the same model."""
    from transformers import InternVLConfig

    vision, text = original["vision_config"], original["llm_config"]
    if rank := next((f"{name} {original[name]}" for name in _ADAPTERS if original.get(name)), None):
        raise VlmcError(
            "This InternVL's weights are apart from those of an adapter",
            found=rank,
            expected="one model",
            fix="merge them with OpenGVLab/InternVL's internvl_chat/tools/merge_lora.py",
        )
    decoder = text.get("architectures", [None])[0]
    size = original.get("force_image_size") or vision["image_size"]
    eps, normed = vision.get("layer_norm_eps", 1e-6), vision.get("qk_normalization", True)
    for what, found, expected in (
        ("decoder", decoder, tuple(_DECODERS)),
        ("bias in the decoder", bool(text.get("bias")), (False,)),  # of InternLM2, which no checkpoint has
        ("size of tiles", size, (vision["image_size"],)),  # another one needs positions in between
        ("ps_version", original.get("ps_version", "v1"), ("v2",)),
        ("layer_norm_eps beside qk_normalization", eps if normed else 1e-6, (1e-6,)),  # transformers' is fixed there
    ):
        if found not in expected:
            raise VlmcError(
                f"This InternVL has a {what} that vlmc does not know",
                found=str(found),
                expected=" or ".join(map(str, expected)),
            )
    wanted = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    return InternVLConfig(
        vision_config={name: vision[name] for name in wanted}
        | {
            "image_size": size,
            "hidden_act": vision.get("hidden_act", "gelu"),
            "layer_norm_eps": eps,
            "norm_type": vision.get("norm_type", "rms_norm"),
            "attention_bias": vision.get("qkv_bias", False),
            "use_qk_norm": normed,
        },
        text_config=decoder_config(_DECODERS[decoder], text),
        downsample_ratio=original.get("downsample_ratio", 0.5),
        vision_feature_layer=original.get("select_layer", -1),
        tie_word_embeddings=bool(text.get("tie_word_embeddings")),
    )


def _renamed(weights: dict[str, Tensor], original: dict[str, Any]) -> dict[str, Tensor]:
    """The checkpoint's tensors under transformers' names, queries, keys and values apart."""
    text = original["llm_config"]
    names = _VISION | (_INTERNLM2 if text["architectures"][0] == "InternLM2ForCausalLM" else {})
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        before, fused, after = name.partition(".qkv.")
        if not fused:
            found[name] = weight
            continue
        if ".vision_tower." in name:
            parts = weight.chunk(3)
        else:  # rows: for each key/value head its queries, its key, its value
            heads, width = text["num_key_value_heads"], weight.shape[1]
            groups = weight.reshape(heads, text["num_attention_heads"] // heads + 2, -1, width)
            parts = tuple(part.reshape(-1, width) for part in (groups[:, :-2], groups[:, -2], groups[:, -1]))
        for part, projection in zip(parts, ("q_proj", "k_proj", "v_proj"), strict=True):
            found[f"{before}.{projection}.{after}"] = part.contiguous()
    return found


def _tokenizer(folder: Path, config: dict[str, Any]) -> Any:
    """InternLM2's from its SentencePiece model, for its class is the checkpoint's own code; Llama's is what
    tokenizer.json says, the others are transformers' own."""
    decoder = config["llm_config"]["architectures"][0]
    if decoder != "InternLM2ForCausalLM":
        from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

        kind = PreTrainedTokenizerFast if decoder == "LlamaForCausalLM" else Qwen2Tokenizer
        return kind.from_pretrained(folder, local_files_only=True)
    added = read_settings(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    return fast_tokenizer(
        folder / "tokenizer.model",
        {int(id): str(token["content"]) for id, token in added.items()},
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
