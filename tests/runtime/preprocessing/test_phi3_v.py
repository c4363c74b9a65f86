"""Tiles equal to the last bit to Phi-3.5-Vision's published image processor, the whole picture to float rounding."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.nn import functional
from vlmc.errors import VlmcError
from vlmc.runtime import preprocessing

TILE, SIDE = 8, 3
CONFIG: dict[str, Any] = {
    "kind": "phi3_v",
    "tile": TILE,
    "max_tiles": 16,
    "rescale_factor": 1 / 255,
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "side": SIDE,
    "image_token": "<|image|>",
    "end_token": "<s>",
    "after_image": "\n",
}


@functools.cache
def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def published(image: Image.Image, tile: int, most: int) -> tuple[NDArray[Any], NDArray[Any], tuple[int, int]]:
    """What the model card's processor does: the whole (3, tile, tile), the tiles, and the grid (rows, columns).
    torchvision resizes Pillow's pictures with Pillow; ToTensor divides by 255, Normalize does the rest in float32."""
    image = image.convert("RGB")
    tall = image.width < image.height
    if tall:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio, scale = image.width / image.height, 1
    while scale * np.ceil(scale / ratio) <= most:
        scale += 1
    width = (scale - 1) * tile
    height = int(width / ratio)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    missing = int(np.ceil(height / tile) * tile) - height
    image = ImageOps.expand(image, (0, missing // 2, 0, missing - missing // 2), fill=(255, 255, 255))
    if tall:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255)
    mean, std = (torch.tensor(CONFIG[name])[:, None, None] for name in ("mean", "std"))
    pixels = pixels.sub(mean).div(std)
    whole = functional.interpolate(pixels[None], size=(tile, tile), mode="bicubic")[0]
    rows, columns = (length // tile for length in pixels.shape[1:])
    tiles = pixels.reshape(1, 3, rows, tile, columns, tile).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, tile, tile)
    return whole.numpy(), tiles.numpy(), (rows, columns)


def published_order(grids: list[tuple[int, int]], side: int) -> list[list[int]]:
    """Where, for each picture, the tokens lie among all tiles' tokens and the two separators after them."""
    first, separator = 0, sum(rows * columns + 1 for rows, columns in grids) * side**2
    found = []
    for rows, columns in grids:
        order = []
        for y in range(rows * side):
            for x in range(columns * side):
                tile = 1 + (y // side) * columns + x // side
                order.append((first + tile) * side**2 + (y % side) * side + x % side)
            order.append(separator)
        order.append(separator + 1)
        for y in range(side):
            order += [first * side**2 + y * side + x for x in range(side)] + [separator]
        found.append(order)
        first += rows * columns + 1
    return found


def assert_equal(image: Image.Image, **changes: Any) -> None:
    config = CONFIG | changes
    whole, tiles, (rows, columns) = published(image, config["tile"], config["max_tiles"])
    prepared = preprocessing.load(config)([image])
    pixels = prepared.vision["pixel_values"]
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels[1:], tiles)
    np.testing.assert_allclose(pixels[0], whole, atol=2e-6)
    assert prepared.rows is not None and prepared.rows.dtype == np.int64
    assert prepared.rows.tolist() == published_order([(rows, columns)], SIDE)[0]
    # The published processor counts so: (tiles + 1) · 144 + 1 + (rows + 1) · 12.
    count = (rows * columns + 1) * SIDE**2 + 1 + (rows + 1) * SIDE
    assert prepared.image_texts == ("<|image|>" * count + "<s>\n",)


@pytest.mark.parametrize(
    "size", [(1, 1), (2, 1), (1, 2), (7, 90), (90, 7), (41, 40), (40, 41), (8, 8), (9, 7), (8, 16), (128, 8), (3, 48)]
)
def test_odd_sizes(size: tuple[int, int]) -> None:
    assert_equal(picture(*size))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_a_picture_in_another_mode_is_converted(mode: str) -> None:
    assert_equal(picture(40, 30, mode))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 90), height=st.integers(1, 90), tile=st.integers(4, 20), most=st.sampled_from([1, 4, 9, 16])
)
def test_any_size_tile_and_number_of_tiles(width: int, height: int, tile: int, most: int) -> None:
    if max(width, height) <= tile * min(width, height):
        assert_equal(picture(width, height), tile=tile, max_tiles=most)


def test_the_published_size_has_the_published_number_of_tokens() -> None:
    """757 tokens for a usual photograph with num_crops 4, 2509 for a square one with 16."""
    for most, size, count in ((4, (640, 480), 757), (16, (700, 700), 2509), (16, (640, 480), 1921)):
        prepared = preprocessing.load(CONFIG | {"tile": 336, "side": 12, "max_tiles": most})([picture(*size)])
        assert prepared.image_texts[0].count("<|image|>") == count
        assert len(prepared.rows) == count


def test_several_pictures_are_prepared_in_order_and_none_gives_none() -> None:
    prepare, pictures = preprocessing.load(CONFIG), [picture(90, 30), picture(30, 90), picture(8, 8)]
    together = prepare(pictures)
    apart = [prepare([one]) for one in pictures]
    assert np.array_equal(
        together.vision["pixel_values"], np.concatenate([one.vision["pixel_values"] for one in apart])
    )
    assert together.image_texts == tuple(one.image_texts[0] for one in apart)
    grids = [published(one, TILE, 16)[2] for one in pictures]
    assert together.rows.tolist() == [row for order in published_order(grids, SIDE) for row in order]
    assert prepare([]).vision["pixel_values"].shape == (0, 3, TILE, TILE)
    assert prepare([]).image_texts == ()
    assert prepare([]).rows.shape == (0,)


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000)])
def test_a_picture_that_would_vanish_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(VlmcError, match="too long for its width"):
        preprocessing.load(CONFIG)([picture(*size)])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tile": 0}, "tile is out of range"),
        ({"max_tiles": 0}, "max_tiles is out of range"),
        ({"side": 0}, "side is out of range"),
        ({"mean": [0.5]}, "three numbers"),
        ({"std": [0.5, 0.0, 0.5]}, "not 0"),
        ({"image_token": None}, "image_token has the wrong type"),
    ],
)
def test_a_config_out_of_range_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(VlmcError, match=reason):
        preprocessing.load(CONFIG | change)
