"""Pictures for SmolVLM, SmolVLM2 and Idefics3: resized, cut into square tiles, and shown once more as a whole.

Equal to the last bit to transformers' Idefics3ImageProcessorPil and SmolVLMImageProcessorPil, which are the same
(5.23; their mask of valid pixels is all ones for one prompt, so there is none here). The way to equality is to stay in
8 bits until the end, as they do, and to normalise by a table.
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

_MAX_EDGE = 4096  # above it the reference shrinks once more; no checkpoint asks for that
_MAX_GRID = 16  # tiles a side


@dataclass(frozen=True)
class Config:
    """`longest_edge`: pixels of a picture's longer side before it is cut. `tile`: side of the squares that the vision
    encoder sees. `split`: without it a picture is squeezed into one tile. `resample`: Pillow's number of the filter.
    A value v becomes (v · rescale_factor − mean) / std. `image_seq_len`: image tokens a tile. The tokens of the text:
    one of the picture itself, one around it, one before the tile that shows the whole."""

    longest_edge: int
    tile: int
    split: bool
    resample: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_seq_len: int
    image_token: str
    around_token: str
    global_token: str


def load(config: Mapping[str, Any]) -> Idefics3:
    """The preprocessor for the manifest's `preprocessing`; a value that is missing or out of range is a VlmcError."""
    checked = from_json(Config, dict(config), "preprocessing")
    check_range(
        checked,
        longest_edge=(1, _MAX_EDGE),
        tile=(max(1, checked.longest_edge // _MAX_GRID), _MAX_EDGE),
        resample=(0, len(Image.Resampling) - 1),
        image_seq_len=(1, 1 << 14),
    )
    return Idefics3(checked)


class Idefics3:
    """The preprocessor; see `Preprocessor`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._normalise = Normalise(config.rescale_factor, config.mean, config.std)

    def largest(self, capacity: int) -> dict[str, int]:
        side = -(-self.config.longest_edge // self.config.tile)
        return {"tiles": side**2 + 1 if self.config.split else 1}

    def __call__(self, images: Sequence[Image.Image]) -> Prepared:
        tile = self.config.tile
        pixels = [np.empty((0, tile, tile, 3), np.uint8)]
        texts = []
        for image in images:
            tiles, rows, columns = self._cut(to_rgb(image))
            pixels += tiles
            texts.append(self._text(rows, columns))
        return Prepared({"pixel_values": self._normalise(np.concatenate(pixels))}, tuple(texts))

    def _cut(self, image: Image.Image) -> tuple[list[NDArray[np.uint8]], int, int]:
        """Arrays (tiles, tile, tile, 3) of the tiles row by row and of the whole, and the grid: 0 × 0 if only whole."""
        tile = self.config.tile
        image = self._resize(image, *_fit(*image.size, self.config.longest_edge))
        rows = columns = 0
        tiles = []
        if self.config.split:
            columns, rows = _grid(*image.size, tile)
            image = self._resize(image, columns * tile, rows * tile)
            if (columns, rows) == (1, 1):
                rows = columns = 0
            else:
                cut = np.asarray(image).reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
                tiles.append(cut.reshape(-1, tile, tile, 3))
        whole = self._resize(image, tile, tile)
        return [*tiles, np.asarray(whole)[None]], rows, columns

    def _resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        return image.resize((width, height), self.config.resample)

    def _text(self, rows: int, columns: int) -> str:
        config = self.config
        tile = config.image_token * config.image_seq_len
        whole = f"{config.around_token}{config.global_token}{tile}{config.around_token}"
        if rows == 0:
            return whole
        grid = "".join(
            "".join(f"{config.around_token}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
            for row in range(1, rows + 1)
        )
        return f"{grid}\n{whole}"


def _fit(width: int, height: int, edge: int) -> tuple[int, int]:
    """The size with the longer side at `edge` and the other one even, rounded as the reference does (in floats)."""
    aspect = width / height
    if width >= height:
        width, height = edge, int(edge / aspect)
        height += height % 2
    else:
        width, height = int(edge * aspect), edge
        width += width % 2
    return max(width, 1), max(height, 1)


def _grid(width: int, height: int, tile: int) -> tuple[int, int]:
    """Columns and rows of whole tiles that cover the picture once its longer side is stretched to whole tiles."""
    aspect = width / height
    if width >= height:
        columns = _ceil(width, tile)
        return columns, _ceil(int(columns * tile / aspect), tile)
    rows = _ceil(height, tile)
    return _ceil(int(rows * tile * aspect), tile), rows


def _ceil(length: int, tile: int) -> int:
    return max(1, -(-length // tile))
