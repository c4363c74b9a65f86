"""What Gemma 3n's vision is with timm's tower and transformers' own classes: writes mobilenet_v5_reference.json.

timm imports torchvision, whose wheels do not import beside the torch 2.13.0 that vlmc is tested with; so this runs in
an environment of its own (Python 3.11), without vlmc, and test_mobilenet_v5.py draws the same weights and pictures:

    python3.11 -m venv /tmp/timm
    /tmp/timm/bin/pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.23.0
    /tmp/timm/bin/python tests/exporter/mobilenet_v5_reference.py
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PATH = Path(__file__).with_suffix(".json")
FEATURES, SOFT = 500, 5  # steps: of a place's 2048 features and of a soft token's values, one in so many is kept
WIDTH = 32  # of a soft token
SMALL = [  # in timm's notation
    ["er_r1_k3_s2_e4_c16", "er_r1_k3_s1_e4_c16"],
    ["uir_r1_a3_k5_s2_e6_c24", "uir_r1_a5_k0_s1_e4_c24"],
    ["uir_r1_a5_k5_s2_e6_c32", "uir_r1_a0_k0_s1_e1_c32", "mqa_r1_k3_h3_v2_s1_d16_c32", "uir_r1_a0_k0_s1_e2_c32"],
    ["uir_r1_a5_k5_s2_e6_c40", "mqa_r1_k3_h2_s1_d24_c40", "uir_r1_a0_k0_s1_e2_c40"],
]


@dataclass(frozen=True)
class Case:
    """`shrink`: how many times narrower than the published tower its blocks are; None: the blocks of SMALL."""

    image_size: int
    side: int
    shrink: int | None = None


CASES = {
    "small": Case(64, 2),
    "odd": Case(72, 5),  # 36, 18, 9, 5 and 3 places a side: the padding is odd, and nothing is pooled
    "narrow": Case(384, 8, shrink=16),  # every block that is published; pooled by three, as is published
}


def config_for(case: Case, **vision: Any) -> dict[str, Any]:
    """A whole Gemma 3n's config.json, with as little beside the vision tower as may be."""
    text = {"vocab_size": 104, "vocab_size_per_layer_input": 100, "hidden_size": WIDTH, "intermediate_size": 8}
    text |= {"hidden_size_per_layer_input": 4, "num_hidden_layers": 2, "num_kv_shared_layers": 0, "laurel_rank": 4}
    text |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]}
    audio = {"hidden_size": 8, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 1}
    audio |= {"sscp_conv_channel_size": [4, 4], "vocab_size": 2, "vocab_offset": 102}
    return {
        "model_type": "gemma3n",
        "vision_soft_tokens_per_image": case.side**2,
        "text_config": {"model_type": "gemma3n_text"} | text,
        "vision_config": {"model_type": "gemma3n_vision", "vocab_size": 2, "vocab_offset": 100} | vision,
        "audio_config": {"model_type": "gemma3n_audio"} | audio,
    }


def wave(shape: tuple[int, ...], seed: int) -> Tensor:
    """Values in -1 … 1, the same everywhere."""
    places = np.arange(np.prod(shape), dtype=np.float64)
    return torch.from_numpy(np.sin(places * places * 0.7 + places * 1.3 + seed).astype(np.float32)).reshape(shape)


def fill(model: nn.Module) -> None:
    """Vectors (norms, scales, a bias) around 1, kernels so large that nothing vanishes."""
    with torch.no_grad():
        for seed, (_, weight) in enumerate(sorted(model.named_parameters())):
            noise = wave(tuple(weight.shape), seed)
            weight.copy_(1 + noise / 2 if weight.ndim == 1 else noise * 2 / weight[0].numel() ** 0.5)


def pictures(case: Case) -> Tensor:
    return wave((2, 3, case.image_size, case.image_size), 0) / 2 + 0.5


def digest(tensors: dict[str, Tensor]) -> str:
    """Of the names and shapes."""
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def vision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a whole model's tensors makes soft tokens of pictures."""
    return {name: state[name] for name in state if name.startswith(("model.vision_tower.", "model.embed_vision."))}


def kept(features: Tensor, soft_tokens: Tensor) -> dict[str, Tensor]:
    """(2, 2048, side, side) and (2, side², WIDTH), thinned out."""
    return {"features": features[:, ::FEATURES].flatten(), "soft_tokens": soft_tokens[..., ::SOFT].flatten()}


def _of_timm_and_transformers(case: Case) -> dict[str, Any]:
    from timm.models._efficientnet_builder import decode_arch_def
    from transformers import Gemma3nConfig, Gemma3nForConditionalGeneration

    if case.shrink:
        arguments = {"channel_multiplier": 1 / case.shrink}
    else:
        arguments = {"block_args": decode_arch_def(SMALL), "stem_size": 8}
    arguments |= {"msfa_output_resolution": case.side}
    model = Gemma3nForConditionalGeneration(Gemma3nConfig(**config_for(case, model_args=arguments))).eval()
    fill(model.model.vision_tower.timm_model)
    fill(model.model.embed_vision)
    model, pixel_values = model.double(), pictures(case).double()  # else the last digits are the machine's
    with torch.inference_mode():
        features = model.model.vision_tower(pixel_values, do_pooling=False).last_hidden_state
        soft_tokens = model.get_image_features(pixel_values).pooler_output
    numbers = kept(features, soft_tokens)
    texts = {name: " ".join(f"{value:.6f}" for value in values.tolist()) for name, values in numbers.items()}
    return {"tensors": digest(vision(model.state_dict()))} | texts


def main() -> None:
    import timm
    import transformers

    with torch.device("meta"):
        tower = timm.create_model("mobilenetv5_300m_enc")
    published = {"tensors": digest(tower.state_dict()), "parameters": sum(part.numel() for part in tower.parameters())}
    made = {"versions": {part.__name__: part.__version__ for part in (timm, transformers, torch)}}
    made |= {"published": published} | {name: _of_timm_and_transformers(case) for name, case in CASES.items()}
    PATH.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
