"""Pixels and grids equal to the last bit to transformers' picture processor of InternVL, and to InternVL's own rule."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from vlmc.errors import VlmcError
from vlmc.runtime import preprocessing

CONFIG: dict[str, Any] = {
    "kind": "internvl",
    "tile": 28,
    "min_tiles": 1,
    "max_tiles": 12,
    "thumbnail": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "image_seq_len": 2,
    "image_token": "<IMG_CONTEXT>",
    "start_token": "<img>",
    "end_token": "</img>",
    "after_image": "\n",
}
SIZES = [(1, 1), (2, 1), (7, 300), (300, 7), (1, 500), (500, 1), (513, 511), (28, 28), (29, 27), (28, 56), (168, 28)]


@functools.cache
def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def assert_equal(image: Image.Image, **changes: Any) -> None:
    config = CONFIG | changes
    reference = GotOcr2ImageProcessorPil(
        size={"height": config["tile"], "width": config["tile"]},
        min_patches=config["min_tiles"],
        max_patches=config["max_tiles"],
        resample=config["resample"],
        rescale_factor=config["rescale_factor"],
        image_mean=config["mean"],
        image_std=config["std"],
        crop_to_patches=True,
    )
    expected = reference([image], return_tensors="np")["pixel_values"]
    prepared = preprocessing.load(config)([image])
    assert prepared.vision["pixel_values"].dtype == np.float32
    assert np.array_equal(prepared.vision["pixel_values"], expected)
    assert prepared.image_texts == ("<img>" + "<IMG_CONTEXT>" * 2 * len(expected) + "</img>\n",)


@pytest.mark.parametrize("size", SIZES)
def test_odd_sizes(size: tuple[int, int]) -> None:
    assert_equal(picture(*size))


@pytest.mark.parametrize("size", [(16, 18), (18, 16)])
def test_a_picture_of_just_half_a_larger_grids_area_keeps_the_smaller(size: tuple[int, int]) -> None:
    assert_equal(picture(*size), tile=8, max_tiles=12)


@pytest.mark.parametrize("resample", range(6))
def test_every_filter(resample: int) -> None:
    assert_equal(picture(90, 61), resample=resample)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_a_picture_in_another_mode_is_converted(mode: str) -> None:
    assert_equal(picture(40, 30, mode))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    tile=st.integers(1, 40),
    most=st.integers(1, 12),
    least=st.integers(1, 12),
)
def test_any_size_tile_and_number_of_tiles(width: int, height: int, tile: int, most: int, least: int) -> None:
    assert_equal(picture(width, height), tile=tile, max_tiles=most, min_tiles=min(least, most))


def own_grid(width: int, height: int, tile: int, least: int, most: int) -> tuple[int, int]:
    """InternVL's own choice as its model cards describe it: candidates from a set, ordered by their area alone."""
    candidates = {(c, r) for n in range(least, most + 1) for c in range(1, n + 1) for r in range(1, n + 1)}
    best, nearest = (1, 1), float("inf")
    for columns, rows in sorted((g for g in candidates if least <= g[0] * g[1] <= most), key=lambda g: g[0] * g[1]):
        distance = abs(width / height - columns / rows)
        if distance < nearest or (distance == nearest and width * height > 0.5 * tile**2 * columns * rows):
            best, nearest = (columns, rows), distance
    return best


@settings(max_examples=200, deadline=None, derandomize=True)
@given(width=st.integers(1, 2000), height=st.integers(1, 2000), most=st.sampled_from([6, 12, 24, 40]))
def test_the_grids_are_those_of_internvls_own_rule(width: int, height: int, most: int) -> None:
    """The order among grids of one area, which a set leaves open, decides nothing."""
    prepare = preprocessing.load(CONFIG | {"tile": 448, "max_tiles": most})
    assert prepare._grid(width, height) == own_grid(width, height, 448, 1, most)


def test_without_a_thumbnail_there_are_only_the_tiles() -> None:
    wide = picture(90, 30)
    tiles = preprocessing.load(CONFIG | {"thumbnail": False})([wide])
    both = preprocessing.load(CONFIG)([wide])
    assert np.array_equal(tiles.vision["pixel_values"], both.vision["pixel_values"][:-1])
    assert tiles.image_texts[0].count("<IMG_CONTEXT>") == 2 * len(tiles.vision["pixel_values"])


def test_several_pictures_are_prepared_in_order_and_none_gives_none() -> None:
    prepare, pictures = preprocessing.load(CONFIG), [picture(90, 30), picture(30, 90), picture(28, 28)]
    together = prepare(pictures)
    apart = [prepare([one]) for one in pictures]
    assert np.array_equal(
        together.vision["pixel_values"], np.concatenate([one.vision["pixel_values"] for one in apart])
    )
    assert together.image_texts == tuple(one.image_texts[0] for one in apart)
    assert prepare([]).vision["pixel_values"].shape == (0, 3, 28, 28)
    assert prepare([]).image_texts == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tile": 0}, "tile is out of range"),
        ({"max_tiles": 1000}, "max_tiles is out of range"),
        ({"min_tiles": 13}, "min_tiles is out of range"),
        ({"resample": 99}, "resample is out of range"),
        ({"image_seq_len": 0}, "image_seq_len is out of range"),
        ({"mean": [0.5]}, "three numbers"),
        ({"std": [0.5, 0.0, 0.5]}, "not 0"),
        ({"thumbnail": 1}, "thumbnail has the wrong type"),
    ],
)
def test_a_config_out_of_range_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(VlmcError, match=reason):
        preprocessing.load(CONFIG | change)
