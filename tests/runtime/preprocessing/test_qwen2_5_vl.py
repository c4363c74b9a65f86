"""Patches equal to the last bit to transformers' picture processor of Qwen2-VL; windows and positions as its model has
them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index
from vlmc.errors import VlmcError
from vlmc.runtime import preprocessing

CONFIG: dict[str, Any] = {
    "kind": "qwen2_5_vl",
    "min_pixels": 4 * 64,
    "max_pixels": 60 * 64,
    "patch": 4,
    "frames": 2,
    "merge": 2,
    "window": 24,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "image_token": "<image>",
    "before_image": "<s>",
    "after_image": "</s>",
}
SIZES = [(1, 1), (2, 1), (3, 300), (300, 3), (2, 400), (513, 511), (28, 28), (12, 20), (20, 28), (4, 4), (64, 60)]


@functools.cache
def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def assert_equal(images: list[Image.Image], **changes: Any) -> None:
    config = CONFIG | changes
    reference = Qwen2VLImageProcessorPil(
        size={"shortest_edge": config["min_pixels"], "longest_edge": config["max_pixels"]},
        patch_size=config["patch"],
        temporal_patch_size=config["frames"],
        merge_size=config["merge"],
        resample=config["resample"],
        rescale_factor=config["rescale_factor"],
        image_mean=config["mean"],
        image_std=config["std"],
    )(images, return_tensors="np")
    prepared = preprocessing.load(config)(images)
    pixels, grid = prepared.vision["pixel_values"], torch.from_numpy(reference["image_grid_thw"])
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    assert np.array_equal(pixels.reshape(reference["pixel_values"].shape), reference["pixel_values"])
    tokens = (grid.prod(1) // config["merge"] ** 2).tolist()
    assert prepared.image_texts == tuple(f"<s>{'<image>' * count}</s>" for count in tokens)
    assert prepared.vision["image_ids"].tolist() == np.repeat(np.arange(len(images)), tokens).tolist()
    places = get_vision_position_ids(grid, config["merge"]).numpy()
    assert np.array_equal(prepared.vision["patch_positions"].reshape(-1, 2), places)
    order, ends = get_vision_window_index(grid, config["merge"], config["window"], config["patch"])
    index = prepared.vision["window_index"]
    assert index[index >= 0].tolist() == order.tolist()
    assert ((index >= 0).sum(axis=1).cumsum() * config["merge"] ** 2).tolist() == ends[1:].tolist()
    assert index.ravel()[prepared.vision["window_places"]].tolist() == list(range(len(order)))


@pytest.mark.parametrize("size", SIZES)
def test_odd_sizes(size: tuple[int, int]) -> None:
    assert_equal([picture(*size)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=st.lists(st.tuples(st.integers(2, 90), st.integers(2, 90)), min_size=1, max_size=3))
def test_any_number_of_pictures_of_any_size(sizes: list[tuple[int, int]]) -> None:
    assert_equal([picture(*size) for size in sizes])


@pytest.mark.parametrize(
    "changes",
    [{"patch": 14, "window": 112, "min_pixels": 3136, "max_pixels": 28 * 28 * 30}, {"merge": 3}, {"frames": 1}],
)
def test_other_patches(changes: dict[str, Any]) -> None:
    assert_equal([picture(90, 61), picture(200, 133)], **changes)


@pytest.mark.parametrize("resample", range(6))
def test_every_filter(resample: int) -> None:
    assert_equal([picture(90, 61)], resample=resample)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_a_picture_in_another_mode_is_converted(mode: str) -> None:
    assert_equal([picture(40, 30, mode)])


def test_no_picture_gives_no_token() -> None:
    vision = preprocessing.load(CONFIG)([]).vision
    assert {name: array.shape for name, array in vision.items()} == {
        "pixel_values": (0, 4, 96),
        "patch_positions": (0, 4, 2),
        "image_ids": (0,),
        "window_index": (0, 9),
        "window_places": (0,),
    }


def test_a_text_goes_on_behind_a_pictures_longer_side() -> None:
    """arXiv:2409.12191, figure 3: two rows of three tokens between texts of two and of three."""
    preprocess: Any = preprocessing.load(CONFIG)
    prepared = preprocess([picture(24, 16)])
    places = np.array([False] * 2 + [True] * 6 + [False] * 3)
    assert preprocess.positions(places, prepared).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7],
    ]


def test_a_strip_is_refused() -> None:
    with pytest.raises(VlmcError, match=r"too long for its width. Found: 201 × 1"):
        preprocessing.load(CONFIG)([picture(201, 1)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"min_pixels": 0}, "min_pixels is out of range. Found: 0. Expected: 1 to 3840"),
        ({"window": 7}, "window is out of range. Found: 7. Expected: 8"),
        ({"merge": 0}, "merge is out of range"),
        ({"max_pixels": 1 << 40}, "max_pixels is out of range"),
        ({"mean": [0.5]}, "three numbers"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(VlmcError, match=says):
        preprocessing.load(CONFIG | change)
