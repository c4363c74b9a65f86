"""Pictures for Gemma 3n: each stretched to one square, values from 0 to 1.

Equal to the last bit to transformers' SiglipImageProcessorPil (5.23) with `do_normalize` off, as Gemma 3n's
checkpoints have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ...records import from_json
from . import Normalise, Prepared, check_range, stretched

_MAX_EDGE = 4096


@dataclass(frozen=True)
class Config:
    """`tile`: side of the square. `resample`: Pillow's number of the filter. A value v becomes v · rescale_factor.
    `image_seq_len`: image tokens a picture, between `start_token` and `end_token`, with an empty line before and
    behind; `after_image`: text behind all of it."""

    tile: int
    resample: int
    rescale_factor: float
    image_seq_len: int
    image_token: str
    start_token: str
    end_token: str
    after_image: str = ""


def load(config: Mapping[str, Any]) -> Gemma3n:
    """The preprocessor for the manifest's `preprocessing`; a value that is missing or out of range is a VlmcError."""
    checked = from_json(Config, dict(config), "preprocessing")
    check_range(checked, tile=(1, _MAX_EDGE), resample=(0, len(Image.Resampling) - 1), image_seq_len=(1, 1 << 14))
    return Gemma3n(checked)


class Gemma3n:
    """The preprocessor; see `Preprocessor`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._normalise = Normalise(config.rescale_factor, (0.0,) * 3, (1.0,) * 3)

    def largest(self, capacity: int) -> dict[str, int]:
        return {"tiles": 1}

    def __call__(self, images: Sequence[Image.Image]) -> Prepared:
        config = self.config
        pixels = stretched(images, config.tile, config.resample)
        tokens = config.start_token + config.image_token * config.image_seq_len + config.end_token
        text = f"\n\n{tokens}\n\n{config.after_image}"
        return Prepared({"pixel_values": self._normalise(pixels)}, (text,) * len(images))
