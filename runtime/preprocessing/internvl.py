"""Pictures for InternVL: stretched to a grid of square tiles of the nearest shape, and shown once more as a whole.

Equal to the last bit to transformers' GotOcr2ImageProcessorPil as InternVLProcessor calls it (5.23), and to InternVL's
own `dynamic_preprocess` (arXiv:2404.16821, section 3.2) with torchvision's transforms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...records import from_json
from ..images import to_rgb
from . import Normalise, Prepared, check_range

_MAX_EDGE = 4096
_MAX_TILES = 64


@dataclass(frozen=True)
class Config:
    """`tile`: side of the squares that the vision encoder sees; a picture becomes `min_tiles` to `max_tiles` of them,
    and with `thumbnail`, where it is more than one, another one that shows the whole. `resample`: Pillow's number of
    the filter. A value v becomes (v · rescale_factor − mean) / std. `image_seq_len`: image tokens a tile. The tokens
    of the text: one of the picture itself, one before and one after all of its tiles; `after_image`: text behind."""

    tile: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    resample: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_seq_len: int
    image_token: str
    start_token: str
    end_token: str
    after_image: str = ""


def load(config: Mapping[str, Any]) -> InternVl:
    """The preprocessor for the manifest's `preprocessing`; a value that is missing or out of range is a VlmcError."""
    checked = from_json(Config, dict(config), "preprocessing")
    check_range(
        checked,
        tile=(1, _MAX_EDGE),
        max_tiles=(1, _MAX_TILES),
        min_tiles=(1, checked.max_tiles),
        resample=(0, len(Image.Resampling) - 1),
        image_seq_len=(1, 1 << 14),
    )
    return InternVl(checked)


class InternVl:
    """The preprocessor; see `Preprocessor`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._normalise = Normalise(config.rescale_factor, config.mean, config.std)
        tiles = range(1, config.max_tiles + 1)
        grids = [(c, r) for c in tiles for r in tiles if config.min_tiles <= c * r <= config.max_tiles]
        self._grids = sorted(grids, key=lambda grid: grid[0] * grid[1])

    def largest(self, capacity: int) -> dict[str, int]:
        return {"tiles": self.config.max_tiles + self.config.thumbnail}

    def __call__(self, images: Sequence[Image.Image]) -> Prepared:
        config = self.config
        pixels = [np.empty((0, config.tile, config.tile, 3), np.uint8)]
        texts = []
        for image in images:
            tiles = self._cut(to_rgb(image))
            pixels.append(tiles)
            tokens = config.image_token * (config.image_seq_len * len(tiles))
            texts.append(config.start_token + tokens + config.end_token + config.after_image)
        return Prepared({"pixel_values": self._normalise(np.concatenate(pixels))}, tuple(texts))

    def _cut(self, image: Image.Image) -> NDArray[np.uint8]:
        """(tiles, tile, tile, 3), row by row, the whole last."""
        tile = self.config.tile
        columns, rows = self._grid(*image.size)
        stretched = np.asarray(image.resize((columns * tile, rows * tile), self.config.resample))
        tiles = stretched.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
        if not self.config.thumbnail or len(tiles) == 1:
            return tiles
        return np.concatenate((tiles, np.asarray(image.resize((tile, tile), self.config.resample))[None]))

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of the nearest aspect ratio. Of several, the last, in the order of their tiles, that the
        picture fills by more than half."""
        best, nearest = (1, 1), float("inf")
        for columns, rows in self._grids:
            distance = abs(width / height - columns / rows)
            filled = width * height > 0.5 * self.config.tile * self.config.tile * columns * rows
            if distance < nearest or (distance == nearest and filled):
                best, nearest = (columns, rows), distance
        return best
