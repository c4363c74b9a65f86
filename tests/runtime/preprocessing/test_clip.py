"""Pixels equal to the last bit to transformers' picture processors of CLIP and LLaVA."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from vlmc.errors import VlmcError
from vlmc.runtime import preprocessing

CONFIG: dict[str, Any] = {
    "kind": "clip",
    "shortest_edge": 28,
    "tile": 28,
    "pad": False,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "image_seq_len": 3,
    "image_token": "<image>",
    "after_image": "\n",
}
SIZES = [(1, 1), (2, 1), (7, 300), (300, 7), (1, 500), (500, 1), (513, 511), (28, 28), (29, 27), (28, 56)]


@functools.cache
def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def assert_equal(image: Image.Image, **changes: Any) -> None:
    config = CONFIG | changes
    reference = (LlavaImageProcessorPil if config["pad"] else CLIPImageProcessorPil)(
        size={"shortest_edge": config["shortest_edge"]},
        crop_size={"height": config["tile"], "width": config["tile"]},
        resample=config["resample"],
        rescale_factor=config["rescale_factor"],
        image_mean=config["mean"],
        image_std=config["std"],
        do_pad=config["pad"],
    )
    prepared = preprocessing.load(config)([image])
    assert prepared.vision["pixel_values"].dtype == np.float32
    assert np.array_equal(prepared.vision["pixel_values"], reference([image], return_tensors="np")["pixel_values"])
    assert prepared.image_texts == ("<image><image><image>\n",)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_odd_sizes(size: tuple[int, int], pad: bool) -> None:
    assert_equal(picture(*size), pad=pad)


@pytest.mark.parametrize("resample", range(6))
def test_every_filter(resample: int) -> None:
    assert_equal(picture(90, 61), resample=resample)


def test_another_scale_in_each_channel() -> None:
    assert_equal(picture(40, 30), mean=[0.5, 0.4, 0.3], std=[0.229, 0.224, 0.225], rescale_factor=0.0039)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_a_picture_in_another_mode_is_converted(mode: str) -> None:
    assert_equal(picture(40, 30, mode), pad=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    edge=st.integers(1, 40),
    tile=st.integers(1, 40),  # larger than the edge: the reference fills up with black
    pad=st.booleans(),
)
def test_any_size_edge_and_tile(width: int, height: int, edge: int, tile: int, pad: bool) -> None:
    assert_equal(picture(width, height), shortest_edge=edge, tile=tile, pad=pad)


def test_several_pictures_are_prepared_in_order_and_none_gives_none() -> None:
    prepare, pictures = preprocessing.load(CONFIG), [picture(40, 30), picture(30, 90)]
    together = prepare(pictures)
    assert np.array_equal(
        together.vision["pixel_values"], np.concatenate([prepare([one]).vision["pixel_values"] for one in pictures])
    )
    assert len(together.image_texts) == 2
    assert prepare([]).vision["pixel_values"].shape == (0, 3, 28, 28)
    assert prepare([]).image_texts == ()


@pytest.mark.parametrize("pad", [True, False])
def test_a_strip_that_would_fill_the_memory_is_refused(pad: bool) -> None:
    with pytest.raises(VlmcError, match=r"too long for its width.*cut out the part that matters"):
        preprocessing.load(CONFIG | {"pad": pad})([Image.new("RGB", (1, 100_000))])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tile": 0}, "tile is out of range"),
        ({"shortest_edge": 5000}, "shortest_edge is out of range"),
        ({"resample": 99}, "resample is out of range"),
        ({"image_seq_len": 10**9}, "image_seq_len is out of range"),
        ({"mean": [0.5]}, "three numbers"),
        ({"std": [0.5, 0.0, 0.5]}, "not 0"),
        ({"pad": "yes"}, "pad has the wrong type"),
    ],
)
def test_a_config_out_of_range_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(VlmcError, match=reason):
        preprocessing.load(CONFIG | change)
