"""Tiles equal to the last bit to Moondream2's with Pillow in float32, and a pooling that does what it stands for."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional
from vlmc.errors import VlmcError
from vlmc.runtime import preprocessing
from vlmc.runtime.preprocessing.moondream import grid_pooling, tiling

CONFIG: dict[str, Any] = {
    "kind": "moondream",
    "tile": 14,
    "patch": 2,
    "max_tiles": 12,
    "margin": 2,
    "rescale_factor": 1 / 255,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "image_token": "<|md_reserved_4|>",
}


@functools.cache
def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def assemble(tiles: list[Tensor], rows: int, columns: int, margin: int) -> Tensor:
    """One grid (height, width, channels) of the tiles' patches (side, side, channels). A tile covers its neighbours to
    the left and above by its margin and is itself covered so; what is shown of it begins behind the margin."""
    side = len(tiles[0])
    step = side - 2 * margin
    grid = torch.zeros(rows * step + 2 * margin, columns * step + 2 * margin, tiles[0].shape[-1])
    for index, tile in enumerate(tiles):
        y, x = divmod(index, columns)
        top, left = (margin if at else 0 for at in (y, x))
        grid[y * step + top : y * step + side, x * step + left : x * step + side] = tile[top:, left:]
    return grid


@pytest.mark.parametrize(
    "size", [(1, 1), (14, 14), (15, 14), (300, 7), (90, 61), (61, 90), (17, 200), (500, 500), (40, 41)]
)
def test_the_tiles_are_cut_out_of_the_stretched_picture_and_overlap(size: tuple[int, int]) -> None:
    image = picture(*size)
    prepared = preprocessing.load(CONFIG)([image])
    pixels = prepared.vision["pixel_values"]
    rows, columns = tiling(image.height - 8, image.width - 8, 6, 12)
    assert len(pixels) == 1 + rows * columns

    def values(one: Image.Image) -> Any:
        return torch.from_numpy(np.array(one)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5).numpy()

    assert np.array_equal(pixels[0], values(image.resize((14, 14), Image.Resampling.LANCZOS)))
    whole = values(image.resize((6 * columns + 8, 6 * rows + 8), Image.Resampling.LANCZOS))
    for index, found in enumerate(pixels[1:]):
        y, x = (6 * at for at in divmod(index, columns))
        assert np.array_equal(found, whole[:, y : y + 14, x : x + 14])
    assert prepared.image_texts == ("<|md_reserved_4|>" * 49,)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(width=st.integers(-200, 3000), height=st.integers(-200, 3000), most=st.sampled_from([1, 6, 12]))
def test_the_tiles_are_never_too_many_and_follow_the_shape(width: int, height: int, most: int) -> None:
    rows, columns = tiling(height, width, 266, most)
    assert min(rows, columns) >= 1
    assert rows * columns <= most or min(rows, columns) == 1
    if min(width, height) <= 266:
        assert (rows, columns) == (1, 1)


@pytest.mark.parametrize(
    ("size", "expected"),
    [  # of select_tiling(height, width, 266, 12), by hand
        ((378, 378), (1, 1)),
        ((400, 379), (3, 3)),
        ((640, 480), (2, 4)),
        ((480, 640), (4, 2)),
        ((1200, 400), (2, 6)),
        ((1442, 392), (2, 6)),
        ((1920, 1080), (2, 4)),
        ((4000, 3000), (2, 4)),
        ((400, 20000), (21, 1)),
    ],
)
def test_published_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    width, height = size
    assert tiling(height - 112, width - 112, 266, 12) == expected


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), side=st.integers(1, 9), data=st.data())
def test_pooling_is_the_average_over_the_grid_without_the_overlaps(
    rows: int, columns: int, side: int, data: st.DataObject
) -> None:
    margin = data.draw(st.integers(0, (side - 1) // 2))
    features = torch.randn(1 + rows * columns, side, side, 3, generator=torch.Generator().manual_seed(1))
    grid = assemble(list(features[1:]), rows, columns, margin)
    expected = functional.adaptive_avg_pool2d(grid.permute(2, 0, 1), (side, side)).permute(1, 2, 0).flatten(0, 1)
    pooling = grid_pooling(rows, columns, side, margin)
    assert pooling.dtype == np.float32
    assert pooling.shape == (side**2, 1 + rows * columns, side**2)
    found = torch.from_numpy(pooling).flatten(1) @ features.reshape(-1, 3)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)


def test_the_prefix_is_the_picture_and_the_token_before_it_and_a_text_has_none() -> None:
    prepare = preprocessing.load(CONFIG)
    assert isinstance(prepare, preprocessing.Prefix)
    places = np.array([False, *[True] * 49, False, False])
    assert prepare.prefix_length(places, prepare([picture(20, 20)])) == 50
    assert prepare.prefix_length(np.zeros(5, bool), None) == 0


def test_one_picture_is_taken_and_no_more() -> None:
    prepare = preprocessing.load(CONFIG)
    assert prepare([]).vision["pixel_values"].shape == (0, 3, 14, 14)
    assert prepare([]).vision["pooling"].shape == (49, 0, 49)
    assert prepare([]).image_texts == ()
    with pytest.raises(VlmcError, match="takes one picture"):
        prepare([picture(20, 20), picture(30, 20)])


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_a_picture_in_another_mode_is_converted(mode: str) -> None:
    prepare, image = preprocessing.load(CONFIG), picture(60, 40, mode)
    found, expected = prepare([image]), prepare([image.convert("RGB")])
    assert np.array_equal(found.vision["pixel_values"], expected.vision["pixel_values"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tile": 0}, "tile is out of range"),
        ({"patch": 15}, "patch is out of range"),
        ({"max_tiles": 0}, "max_tiles is out of range"),
        ({"margin": 4}, "margin is out of range"),
        ({"mean": [0.5]}, "three numbers"),
        ({"std": [0.5, 0.0, 0.5]}, "not 0"),
    ],
)
def test_a_config_out_of_range_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(VlmcError, match=reason):
        preprocessing.load(CONFIG | change)
