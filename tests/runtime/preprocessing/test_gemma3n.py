"""Pixels equal to the last bit to transformers' picture processor as Gemma 3n's checkpoints set it up."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from vlmc.errors import VlmcError
from vlmc.runtime import preprocessing

CONFIG: dict[str, Any] = {
    "kind": "gemma3n",
    "tile": 32,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "image_seq_len": 3,
    "image_token": "<i>",
    "start_token": "<s>",
    "end_token": "<e>",
}
SIZES = [(1, 1), (2, 1), (7, 300), (300, 7), (513, 511), (32, 32), (33, 31), (32, 64)]


@functools.cache
def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def assert_equal(image: Image.Image, **changes: Any) -> None:
    config = CONFIG | changes
    reference = SiglipImageProcessorPil(
        size={"height": config["tile"], "width": config["tile"]},
        resample=config["resample"],
        rescale_factor=config["rescale_factor"],
        do_normalize=False,
    )
    prepared = preprocessing.load(config)([image])
    assert prepared.vision["pixel_values"].dtype == np.float32
    assert np.array_equal(prepared.vision["pixel_values"], reference([image], return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("size", SIZES)
def test_odd_sizes(size: tuple[int, int]) -> None:
    assert_equal(picture(*size))


@pytest.mark.parametrize("resample", range(6))
def test_every_filter(resample: int) -> None:
    assert_equal(picture(90, 61), resample=resample)


def test_the_published_size() -> None:
    assert_equal(picture(90, 61), tile=768, rescale_factor=0.00392156862745098)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "RGBA"])
def test_a_picture_in_another_mode_is_converted(mode: str) -> None:
    assert_equal(picture(40, 30, mode))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(width=st.integers(1, 120), height=st.integers(1, 120), tile=st.integers(1, 70))
def test_any_size(width: int, height: int, tile: int) -> None:
    assert_equal(picture(width, height), tile=tile)


def test_the_text_of_a_picture_stands_between_empty_lines() -> None:
    prepared = preprocessing.load(CONFIG)([picture(4, 5), picture(5, 4)])
    assert prepared.image_texts == ("\n\n<s><i><i><i><e>\n\n",) * 2
    assert prepared.vision["pixel_values"].shape == (2, 3, 32, 32)
    assert prepared.rows is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tile": 0}, "preprocessing.tile is out of range"),
        ({"tile": 5000}, "preprocessing.tile is out of range"),
        ({"resample": 99}, "preprocessing.resample is out of range"),
        ({"image_seq_len": 0}, "preprocessing.image_seq_len is out of range"),
        ({"start_token": None}, "start_token has the wrong type"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(VlmcError, match=reason):
        preprocessing.load(CONFIG | change)
