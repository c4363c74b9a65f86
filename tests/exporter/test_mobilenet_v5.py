"""Gemma 3n's vision against what timm and transformers give, where both are: mobilenet_v5_reference.py says how."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from vlmc.exporter.family import family_for
from vlmc.exporter.mobilenet_v5 import LAYOUTS, Attend, Bottleneck, Edge, Layout, MobileNetV5

from . import mobilenet_v5_reference as reference

REFERENCE = json.loads(reference.PATH.read_text())
PUBLISHED = LAYOUTS["mobilenetv5_300m_enc"]
CHECKPOINT = {  # where a published checkpoint has the parts of the family's model
    "vision_tower": "model.vision_tower.timm_model.",
    "embed_vision": "model.embed_vision.",
    "embed_audio": "model.embed_audio.",
    "text.model": "model.language_model.",
}
SMALL = (  # the reference's SMALL
    (Edge(16, stride=2), Edge(16)),
    (Bottleneck(24, 6, start=3, middle=5, stride=2), Bottleneck(24, 4, start=5)),
    (
        Bottleneck(32, 6, start=5, middle=5, stride=2),
        Bottleneck(32, 1),
        Attend(32, heads=3, width=16, stride=2),
        Bottleneck(32, 2),
    ),
    (Bottleneck(40, 6, start=5, middle=5, stride=2), Attend(40, heads=2, width=24), Bottleneck(40, 2)),
)


def layout_of(case: reference.Case) -> Layout:
    if case.shrink is None:
        return Layout(8, SMALL, features=2048, side=case.side, image_size=case.image_size)
    narrow = [[replace(block, channels=block.channels // case.shrink) for block in stage] for stage in PUBLISHED.stages]
    return replace(PUBLISHED, stages=tuple(map(tuple, narrow)), side=case.side, image_size=case.image_size)


def test_the_tensors_are_named_and_shaped_as_timms() -> None:
    with torch.device("meta"):
        model = MobileNetV5(PUBLISHED)
    assert reference.digest(model.state_dict()) == REFERENCE["published"]["tensors"]
    assert sum(weight.numel() for weight in model.parameters()) == REFERENCE["published"]["parameters"]


def test_a_picture_becomes_as_many_features_as_gemma_3n_has_tokens() -> None:
    with torch.device("meta"):
        features = MobileNetV5(PUBLISHED)(torch.zeros(2, 3, PUBLISHED.image_size, PUBLISHED.image_size))
    assert features.shape == (2, 2048, 16, 16)


@pytest.mark.parametrize("name", reference.CASES)
def test_pictures_become_what_transformers_makes_of_them_with_timms_tower(name: str, tmp_path: Path) -> None:
    """From a checkpoint's files: the tower's features, and the soft tokens that the language model is given."""
    case, expected, family = reference.CASES[name], REFERENCE[name], family_for("gemma3n", "here")
    config = reference.config_for(case, architecture=name, hidden_size=2048)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with mock.patch.dict(LAYOUTS, {name: layout_of(case)}):
        made = family.randomise(config, 0)
        reference.fill(made.vision_tower)
        reference.fill(made.embed_vision)
        parts = {start: made.get_submodule(part).state_dict() for part, start in CHECKPOINT.items()}
        weights = {start + key: value for start, part in parts.items() for key, value in part.items()}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        encoder = family.split(family.load(tmp_path)).vision_encoder
    assert reference.digest(reference.vision(weights)) == expected["tensors"]

    encoder, pixel_values = encoder.double(), reference.pictures(case).double()  # as the reference was made
    with torch.inference_mode():
        features, soft_tokens = encoder.tower(pixel_values), encoder(pixel_values)
        one_by_one = torch.cat([encoder.tower(picture[None]) for picture in pixel_values])
    torch.testing.assert_close(features, one_by_one, atol=1e-9, rtol=0)
    for kind, values in reference.kept(features, soft_tokens).items():
        wanted = torch.tensor([float(value) for value in expected[kind].split()], dtype=values.dtype)
        torch.testing.assert_close(values, wanted, atol=2e-6, rtol=0)  # it has six decimals
