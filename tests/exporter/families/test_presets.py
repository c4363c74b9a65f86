"""Every preset of true size fits together: family, vision encoder, pictures and decoder. On the meta device."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from vlmc.artifact import ComponentSpec, TensorSpec
from vlmc.exporter import graph, onnx_ops
from vlmc.exporter.checkpoint import preset_names, resolve
from vlmc.exporter.onnx_ops import IMPLEMENTATION
from vlmc.exporter.processor import describe
from vlmc.runtime import preprocessing

MODELS = [name for name in preset_names() if not name.startswith(("clip-", "blip-"))]  # with pictures among the tokens


@pytest.mark.parametrize("name", MODELS)
def test_a_picture_has_as_many_tokens_as_the_vision_encoder_gives(name: str) -> None:
    found = resolve(name, random_weights=True)
    assert found.preset is not None
    described, prompt = describe(found.folder)
    prepared = preprocessing.load(described | found.preset["preprocessing"])([Image.new("RGB", (640, 480))])
    with torch.device("meta"):
        model = found.family.randomise(found.config, 0).eval()
        model.set_attn_implementation(IMPLEMENTATION)
        components = found.family.split(model)
        shapes = {name: torch.from_numpy(array).to("meta") for name, array in prepared.vision.items()}
        features = components.vision_encoder(*shapes.values())
        embeds = components.embed_tokens(torch.zeros(1, 3, dtype=torch.long))
        embeds = embeds[0] if isinstance(embeds, tuple) else embeds
        if components.fusion is not None:
            features, _ = components.fusion(features, embeds)
    inputs = found.family.vision_inputs(model)
    assert list(inputs) == list(prepared.vision)
    for name, value in inputs.items():
        assert value.example.dtype == shapes[name].dtype
        fixed = [axis for axis in range(value.example.ndim) if axis not in value.free]
        assert [value.example.shape[axis] for axis in fixed] == [shapes[name].shape[axis] for axis in fixed]
    rows = features.flatten(0, -2) if prepared.rows is None else prepared.rows
    assert prepared.image_texts[0].count(prompt.image_token) == len(rows)
    assert features.shape[-1] == embeds.shape[2]


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_is_as_wide_as_the_decoders_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_ops, "fixed_shapes", lambda _: True)  # on the meta device no place is known
    found = resolve(name, random_weights=True)
    with torch.device("meta"):
        model = found.family.randomise(found.config, 0).eval()
        model.set_attn_implementation(IMPLEMENTATION)
        components = found.family.split(model)
        kv = found.family.kv(model, 24)
        made = components.embed_tokens(torch.zeros(1, 7, dtype=torch.long))
        names = getattr(components.embed_tokens, "outputs", ("inputs_embeds",))
        values = made if isinstance(made, tuple) else (made,)
        outputs = [
            TensorSpec(name, "float32", (1, "length", *value.shape[2:]))
            for name, value in zip(names, values, strict=True)
        ]
        signature = graph.decoder_signature(components.decoder, ComponentSpec("", (), tuple(outputs), 0), kv)
        with torch.inference_mode():
            logits, states = components.decoder(*signature.example)
    assert logits.ndim == 2
    assert [state.shape for state in states] == [(1, kv.kv_heads, 24, kv.head_dim)] * (2 * kv.layers)
