"""SmolVLM and Idefics3, which the whole chain is tested with: here with any number of pictures, and what the README's
table says of them. Preprocessing is judged in tests/runtime, one picture's answers in tests/exporter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vlmc.artifact import Artifact
from vlmc.exporter import checkpoint


class Reference:
    """transformers' own model, which takes the tiles of a prompt as (1, tiles, 3, height, width)."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def features(self, pixel_values: Tensor) -> Tensor:
        (found,) = self.model.model.get_image_features(pixel_values[None]).pooler_output
        made: Tensor = found.view(len(pixel_values), -1, found.shape[-1])
        return made

    def logits(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        given = {} if pixel_values is None else {"pixel_values": pixel_values[None]}
        found: Tensor = self.model(input_ids=input_ids, **given).logits[0]
        return found


@pytest.mark.parametrize("model_type", ["smolvlm", "idefics3"])
def test_every_number_of_pictures_and_tiles_is_transformers(
    model_type: str,
    save_tiny: Callable[..., Path],
    export_tiny: Callable[[Path], Artifact],
    assert_parity: Any,
    make_picture: Any,
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForImageTextToText

    folder = save_tiny(tmp_path / "checkpoint", model_type, seed=5)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    small, wide, tall = make_picture(28, 28), make_picture(90, 31), make_picture(17, 60)
    prompts = [[], [small], [wide], [tall, small], [small, wide, tall]]
    assert_parity(export_tiny(folder), Reference(model), prompts)


# config.json of SmolVLM2-500M-Video-Instruct, in qewr1234/Lightweight-VLA tests/offline_vlm_cache.py. The vision
# encoder's depth, width inside, activation and epsilon are left to transformers.
SMALL: dict[str, Any] = {
    "architectures": ["SmolVLMForConditionalGeneration"],
    "image_token_id": 49190,
    "model_type": "smolvlm",
    "pad_token_id": 128002,
    "scale_factor": 4,
    "text_config": {
        "architectures": ["VLlama3ForCausalLM"],
        "head_dim": 64,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "is_llama_config": True,
        "model_type": "llama",
        "neftune_noise_alpha": 0.0,
        "num_attention_heads": 15,
        "num_hidden_layers": 32,
        "num_key_value_heads": 5,
        "pixel_shuffle_factor": 4,
        "qk_layer_norms": False,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "torch_dtype": "bfloat16",
        "use_resampler": False,
        "vocab_size": 49280,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "hidden_size": 768,
        "image_size": 512,
        "max_image_size": {"longest_edge": 512},
        "model_type": "smolvlm_vision",
        "num_attention_heads": 12,
        "patch_size": 16,
        "size": {"longest_edge": 2048},
        "use_base_siglip": False,
    },
    "vocab_size": 49280,
}
# SmolVLM-Instruct's, in lablup/mlxcel src/models/detection_tests.rs, with fields that Idefics3 once had; without
# `num_attention_heads`, as ggml-org/llama.cpp convert_hf_to_gguf.py says of SmolVLM2-2.2B's.
LARGE: dict[str, Any] = {
    "architectures": ["Idefics3ForConditionalGeneration"],
    "model_type": "idefics3",
    "image_token_id": 49153,
    "image_seq_len": 81,
    "scale_factor": 3,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama",
        "_flash_attn_2_enabled": True,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "perceiver_config": {"model_type": "vllama3", "resampler_depth": 6},
        "rms_norm_eps": 1e-05,
        "rope_theta": 273768.0,
        "vocab_size": 49155,
    },
    "vision_config": {
        "model_type": "idefics3",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 384,
    },
}


@pytest.mark.parametrize(
    ("config", "count", "heads", "theta", "tokens"),
    [(SMALL, 507_482_304, 15, 100000, 64), (LARGE, 2_246_272_880, 32, 273768, 81)],
)
def test_config_json_as_published_is_the_published_model(
    config: dict[str, Any], count: int, heads: int, theta: int, tokens: int, tmp_path: Path
) -> None:
    """The counts of the presets; `meta` holds no weights."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = checkpoint.resolve(str(tmp_path), random_weights=True)
    with torch.device("meta"):
        model: Any = found.family.randomise(found.config, 0)
        components = found.family.split(model)
        shape = components.vision_encoder(torch.zeros(2, 3, *found.family.image_size(model))).shape
    assert sum(weight.numel() for weight in model.parameters()) == count
    assert shape == (2, tokens, config["text_config"]["hidden_size"])
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.num_attention_heads, text.rope_parameters["rope_theta"], text.rms_norm_eps) == (heads, theta, 1e-5)
    assert (text.rope_parameters["rope_type"], text.hidden_act) == ("default", "silu")
    assert (vision.hidden_act, vision.layer_norm_eps) == ("gelu_pytorch_tanh", 1e-6)


def test_the_readme_says_what_it_can_be_made_into(
    tiny: Artifact, assert_supported: Callable[[Artifact, str], None]
) -> None:
    assert_supported(tiny, "smolvlm")
