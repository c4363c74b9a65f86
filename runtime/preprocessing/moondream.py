"""Pictures for Moondream2: the whole as one tile, and overlapping tiles of it at a higher resolution.

The tiles' patches are put together to one grid without the overlaps, which is averaged down to as many cells as a tile
has patches. Both are linear, so one matrix, `pooling`, says it all, and the vision encoder only multiplies with it.

Equal to the last bit to vikhyat/moondream's image_crops.py where pyvips is not installed (its Lanczos filter rounds
otherwise than Pillow's), but that values are not rounded to bfloat16 on the way, as they are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import VlmcError
from ...records import from_json
from ..images import to_rgb
from . import Normalise, Prepared, check_range

_MAX_EDGE = 1024
_MAX_TILES = 64


@dataclass(frozen=True)
class Config:
    """`tile`: side of the squares that the vision encoder sees, cut into patches of `patch`; besides the whole there
    are at most `max_tiles` (more of a long strip). `margin`: patches of a tile that lie in its neighbour. A value v
    becomes (v · rescale_factor − mean) / std. `after_image`: text behind a picture's tokens."""

    tile: int
    patch: int
    max_tiles: int
    margin: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_token: str
    after_image: str = ""


def load(config: Mapping[str, Any]) -> Moondream:
    """The preprocessor for the manifest's `preprocessing`; a value that is missing or out of range is a VlmcError."""
    checked = from_json(Config, dict(config), "preprocessing")
    check_range(checked, tile=(1, _MAX_EDGE), patch=(1, checked.tile), max_tiles=(1, _MAX_TILES))
    check_range(checked, margin=(0, (checked.tile // checked.patch - 1) // 2))
    return Moondream(checked)


class Moondream:
    """The preprocessor; see `Preprocessor` and `Prefix`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.side = config.tile // config.patch
        self._normalise = Normalise(config.rescale_factor, config.mean, config.std)

    def largest(self, capacity: int) -> dict[str, int]:
        return {"tiles": self.config.max_tiles + 1}  # a long strip that makes more is refused by such an engine

    def __call__(self, images: Sequence[Image.Image]) -> Prepared:
        config, cells = self.config, self.side**2
        if len(images) > 1:
            raise VlmcError("Moondream2 takes one picture", found=f"{len(images)}", fix="ask about one after the other")
        pixels = np.empty((0, config.tile, config.tile, 3), np.uint8)
        pooling = np.empty((cells, 0, cells), np.float32)
        for image in images:
            pixels, rows, columns = self._cut(to_rgb(image))
            pooling = grid_pooling(rows, columns, self.side, config.margin)
        text = config.image_token * cells + config.after_image
        return Prepared({"pixel_values": self._normalise(pixels), "pooling": pooling}, (text,) * len(images))

    def prefix_length(self, places: NDArray[np.bool_], prepared: Prepared | None) -> int:
        """The picture's tokens and the one that begins the text."""
        return int(places.sum()) + 1 if prepared else 0

    def _cut(self, image: Image.Image) -> tuple[NDArray[np.uint8], int, int]:
        """The whole and the tiles row by row (1 + rows · columns, tile, tile, 3), rows and columns."""
        config = self.config
        overlap = 2 * config.margin * config.patch
        step = self.side * config.patch - overlap
        rows, columns = tiling(image.height - overlap, image.width - overlap, step, config.max_tiles)
        size = (columns * step + overlap, rows * step + overlap)
        tiles = [np.asarray(image.resize((config.tile, config.tile), Image.Resampling.LANCZOS))]
        resized = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
        for y in range(0, rows * step, step):
            for x in range(0, columns * step, step):
                tile = np.zeros_like(tiles[0])  # as wide as the patches, should they not fill it
                part = resized[y : y + config.tile, x : x + config.tile]
                tile[: part.shape[0], : part.shape[1]] = part
                tiles.append(tile)
        return np.stack(tiles), rows, columns


def tiling(height: int, width: int, step: int, most: int) -> tuple[int, int]:
    """Rows and columns of tiles for a picture of this size without its margins, of which a tile shows `step` pixels
    each way: as many as cover it, in its shape, and at most `most`, but in a row of its own length for a strip."""
    if height <= step or width <= step:
        return 1, 1
    rows, columns = math.ceil(height / step), math.ceil(width / step)
    if rows * columns > most:
        shrink = math.sqrt(most / (rows * columns))
        return max(1, math.floor(rows * shrink)), max(1, math.floor(columns * shrink))
    rows = max(rows, math.floor(math.sqrt(most * height / width)))
    columns = max(columns, math.floor(math.sqrt(most * width / height)))
    if rows * columns > most:
        if columns > rows:
            columns = most // rows
        else:
            rows = most // columns
    return max(1, rows), max(1, columns)


def grid_pooling(rows: int, columns: int, side: int, margin: int) -> NDArray[np.float32]:
    """(side², 1 + rows · columns, side²): the weight of each patch of each tile, the whole first, in each cell."""
    down, right = (_averages(tiles, side, margin) for tiles in (rows, columns))
    tiles = np.einsum("yar,xbc->yxabrc", down, right).reshape(side**2, rows * columns, side**2)
    return np.concatenate((np.zeros_like(tiles[:, :1]), tiles), axis=1)


def _averages(tiles: int, side: int, margin: int) -> NDArray[np.float32]:
    """One direction of it (side, tiles, side). A tile's outer patches count where it has no neighbour. Cell i of n is
    the mean from ⌊i · length / n⌋ to ⌈(i + 1) · length / n⌉, as in torch.nn.functional.adaptive_avg_pool2d."""
    step = side - 2 * margin
    length = tiles * step + 2 * margin
    place = np.arange(length)
    tile = np.clip((place - margin) // step, 0, tiles - 1)
    found = np.zeros((side, tiles, side), np.float32)
    for cell in range(side):
        inside = slice(cell * length // side, -((cell + 1) * length // -side))
        found[cell, tile[inside], (place - tile * step)[inside]] = 1 / (inside.stop - inside.start)
    return found
