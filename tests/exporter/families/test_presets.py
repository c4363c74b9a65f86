"""Every preset of true size fits together: family, vision encoder, pictures and decoder. On the meta device."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from vlmc.exporter.checkpoint import preset_names, resolve
from vlmc.exporter.onnx_ops import IMPLEMENTATION
from vlmc.exporter.processor import describe
from vlmc.runtime import preprocessing


@pytest.mark.parametrize("name", preset_names())
def test_a_picture_has_as_many_tokens_as_the_vision_encoder_gives(name: str) -> None:
    found = resolve(name, random_weights=True)
    assert found.preset is not None
    described, prompt = describe(found.folder)
    prepared = preprocessing.load(described | found.preset["preprocessing"])([Image.new("RGB", (640, 480))])
    with torch.device("meta"):
        model = found.family.randomise(found.config, 0).eval()
        model.set_attn_implementation(IMPLEMENTATION)
        components = found.family.split(model)
        features = components.vision_encoder(torch.empty(prepared.pixel_values.shape))
        embeds = components.embed_tokens(torch.zeros(1, 3, dtype=torch.long))
    assert prepared.pixel_values.shape[2:] == found.family.image_size(model)
    assert prepared.image_texts[0].count(prompt.image_token) == features.shape[0] * features.shape[1]
    assert features.shape[2] == embeds.shape[2]


@pytest.mark.parametrize("name", preset_names())
def test_the_cache_is_as_wide_as_the_decoders_keys(name: str) -> None:
    found = resolve(name, random_weights=True)
    with torch.device("meta"):
        model = found.family.randomise(found.config, 0)
        decoder = found.family.split(model).decoder
    kv = found.family.kv(model, 1024)
    keys = [module for path, module in decoder.named_modules() if path.endswith(".k_proj")]
    assert len(keys) == kv.layers
    assert {module.out_features for module in keys} == {kv.kv_heads * kv.head_dim}
