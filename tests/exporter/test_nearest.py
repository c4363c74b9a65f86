from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoConfig
from vlmc.exporter.nearest import PRESETS, nearest


@pytest.mark.parametrize(
    ("unknown", "family"),
    [
        ("aya_vision", "llava"),
        ("mistral3", "llava"),
        ("idefics2", "smolvlm"),
        ("glm4v", "qwen2_5_vl"),
        ("gemma3", "paligemma"),
        ("siglip", "clip"),
        ("florence2", ""),
    ],
)
def test_models_of_transformers_are_nearest_to_what_is_built_like_them(unknown: str, family: str) -> None:
    assert nearest(AutoConfig.for_model(unknown).to_diff_dict()) == family


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.json")), ids=lambda path: path.stem)
def test_a_preset_is_nearest_to_its_own_family(path: Any) -> None:
    assert nearest(json.loads(path.read_text())["config"]) == path.stem.split("-")[0]


def test_a_config_with_nothing_in_it_is_near_to_none() -> None:
    nested: dict[str, Any] = {}
    for _ in range(10_000):
        nested = {"text_config": nested}
    assert nearest({}) == nearest(nested) == ""
