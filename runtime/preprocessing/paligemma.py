"""Pictures for PaliGemma: each squeezed into one square, and picture and question see one another.

Equal to the last bit to transformers' SiglipImageProcessorPil (5.23).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...records import from_json
from . import Normalise, Prepared, check_range, stretched


@dataclass(frozen=True)
class Config:
    """`tile`: side of the square. `resample`: Pillow's number of the filter. A value v becomes
    (v · rescale_factor − mean) / std. `image_seq_len`: image tokens a picture; `after_image`: text behind them."""

    tile: int
    resample: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_seq_len: int
    image_token: str
    after_image: str = ""


def load(config: Mapping[str, Any]) -> PaliGemma:
    """The preprocessor for the manifest's `preprocessing`; a value that is missing or out of range is a VlmcError."""
    checked = from_json(Config, dict(config), "preprocessing")
    check_range(checked, tile=(1, 4096), resample=(0, len(Image.Resampling) - 1), image_seq_len=(1, 1 << 14))
    return PaliGemma(checked)


class PaliGemma:
    """The preprocessor; see `Preprocessor` and `Prefix`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._normalise = Normalise(config.rescale_factor, config.mean, config.std)

    def largest(self, capacity: int) -> dict[str, int]:
        return {"tiles": 1}

    def __call__(self, images: Sequence[Image.Image]) -> Prepared:
        config = self.config
        pixels = stretched(images, config.tile, config.resample)
        text = config.image_token * config.image_seq_len + config.after_image
        return Prepared({"pixel_values": self._normalise(pixels)}, (text,) * len(images))

    def prefix_length(self, places: NDArray[np.bool_], prepared: Prepared | None) -> int:
        """The whole prompt."""
        return len(places)
