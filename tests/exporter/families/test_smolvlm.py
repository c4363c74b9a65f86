"""SmolVLM and Idefics3, which the whole chain is tested with: here with any number of pictures, and what the README's
table says of them. Preprocessing is judged in tests/runtime, one picture's answers in tests/exporter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vlmc.artifact import Artifact


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


def test_the_readme_says_what_it_can_be_made_into(
    tiny: Artifact, assert_supported: Callable[[Artifact, str], None]
) -> None:
    assert_supported(tiny, "smolvlm")
