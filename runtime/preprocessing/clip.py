"""Pictures for CLIP and for LLaVA 1.5, LLaVA-Mini and MobileVLM, whose vision it is: one square each.

The shorter side is resized to `shortest_edge` and the middle is cut out; with `pad` the picture is first made square
with bars of the mean colour, and nothing is lost. Equal to the last bit to transformers' CLIPImageProcessorPil and
LlavaImageProcessorPil (5.23).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import VlmcError
from ...records import from_json
from ..images import MAX_PIXELS, to_rgb
from . import Normalise, Prepared, check_range

_MAX_EDGE = 4096


@dataclass(frozen=True)
class Config:
    """`tile`: side of the square. `resample`: Pillow's number of the filter. A value v becomes
    (v · rescale_factor − mean) / std. `image_seq_len`: image tokens a picture; `after_image`: text behind them."""

    shortest_edge: int
    tile: int
    pad: bool
    resample: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_seq_len: int
    image_token: str
    after_image: str = ""


def load(config: Mapping[str, Any]) -> Clip:
    """The preprocessor for the manifest's `preprocessing`; a value that is missing or out of range is a VlmcError."""
    checked = from_json(Config, dict(config), "preprocessing")
    check_range(
        checked,
        shortest_edge=(1, _MAX_EDGE),
        tile=(1, _MAX_EDGE),
        resample=(0, len(Image.Resampling) - 1),
        image_seq_len=(1, 1 << 14),
    )
    return Clip(checked)


class Clip:
    """The preprocessor; see `Preprocessor`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._normalise = Normalise(config.rescale_factor, config.mean, config.std)
        self._bars = tuple(int(value * 255) for value in config.mean)

    def largest(self, capacity: int) -> dict[str, int]:
        return {"tiles": 1}

    def __call__(self, images: Sequence[Image.Image]) -> Prepared:
        config = self.config
        pixels = np.empty((len(images), config.tile, config.tile, 3), np.uint8)
        for image, target in zip(images, pixels, strict=True):
            square = to_rgb(image)
            if config.pad:
                square = self._pad(square)
            target[:] = _middle(self._resize(square), config.tile)
        text = config.image_token * config.image_seq_len + config.after_image
        return Prepared({"pixel_values": self._normalise(pixels)}, (text,) * len(images))

    def _pad(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        _check(image, side * side)
        square = Image.new("RGB", (side, side), self._bars)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _resize(self, image: Image.Image) -> Image.Image:
        edge, short = self.config.shortest_edge, min(image.size)
        width, height = (int(edge * length / short) for length in image.size)
        _check(image, width * height)
        return image.resize((width, height), self.config.resample)


def _check(image: Image.Image, pixels: int) -> None:
    """A strip of few pixels can grow to any number of them before its middle is cut out."""
    if pixels > MAX_PIXELS:
        raise VlmcError(
            "A picture is too long for its width",
            found=f"{image.width} × {image.height}, which is {pixels} pixels once resized",
            expected=f"at most {MAX_PIXELS}",
            fix="cut out the part that matters",
        )


def _middle(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """The square (side, side, 3) in the middle; what lies outside of the picture is black."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))
