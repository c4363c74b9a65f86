"""Pictures for BLIP: one, stretched to a square. Equal to the last bit to transformers' BlipImageProcessorPil (5.23).

Its decoder looks at the picture from beside the text, so nothing in the prompt stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ...errors import VlmcError
from ...records import from_json
from . import Normalise, Prepared, check_range, stretched

_MAX_EDGE = 4096


@dataclass(frozen=True)
class Config:
    """`tile`: side of the square. `resample`: Pillow's number of the filter. A value v becomes
    (v · rescale_factor − mean) / std."""

    tile: int
    resample: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(config: Mapping[str, Any]) -> Blip:
    """The preprocessor for the manifest's `preprocessing`; a value that is missing or out of range is a VlmcError."""
    checked = from_json(Config, dict(config), "preprocessing")
    check_range(checked, tile=(1, _MAX_EDGE), resample=(0, len(Image.Resampling) - 1))
    return Blip(checked)


class Blip:
    """The preprocessor; see `Preprocessor`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._normalise = Normalise(config.rescale_factor, config.mean, config.std)

    def largest(self, capacity: int) -> dict[str, int]:
        return {"tiles": 1}

    def __call__(self, images: Sequence[Image.Image]) -> Prepared:
        if len(images) != 1:
            raise VlmcError("BLIP looks at one picture", found=f"{len(images)} pictures", fix="ask about each apart")
        pixels = stretched(images, self.config.tile, self.config.resample)
        return Prepared({"pixel_values": self._normalise(pixels)}, ("",))
