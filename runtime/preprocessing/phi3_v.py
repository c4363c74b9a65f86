"""Pictures for Phi-3-Vision and Phi-3.5-Vision: a grid of square tiles, and once more the whole.

The picture is stretched to as many tiles as `max_tiles` allows, its shorter side filled up with white (the HD transform
of InternLM-XComposer2-4KHD, arXiv:2404.06512); the whole is shrunk from that. Tiles are equal to the last bit to
microsoft/Phi-3.5-vision-instruct's image_processing_phi3_v.py, the whole to the order of float sums.

In the prompt stand the grid's tokens line by line, a separator, then the whole's; each line ends with another
separator. The vision encoder gives the tokens tile by tile and, after all, the two separators, so `rows` puts them in
order.
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
_WHITE = (255, 255, 255)
_HALFWAY = (-0.09375, 0.59375, 0.59375, -0.09375)  # the bicubic kernel (a = -0.75) midway between two pixels


@dataclass(frozen=True)
class Config:
    """`tile`: side of the squares that the vision encoder sees; a picture becomes at most `max_tiles` of them and one
    of the whole. A value v becomes (v · rescale_factor − mean) / std. `side`: image tokens along a tile's side.
    `end_token`: token behind a picture's tokens; `after_image`: text behind that."""

    tile: int
    max_tiles: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int
    image_token: str
    end_token: str
    after_image: str = ""


def load(config: Mapping[str, Any]) -> Phi3V:
    """The preprocessor for the manifest's `preprocessing`; a value that is missing or out of range is a VlmcError."""
    checked = from_json(Config, dict(config), "preprocessing")
    check_range(checked, tile=(1, _MAX_EDGE), max_tiles=(1, _MAX_TILES), side=(1, 1 << 7))
    return Phi3V(checked)


class Phi3V:
    """The preprocessor; see `Preprocessor`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._normalise = Normalise(config.rescale_factor, config.mean, config.std)

    def largest(self, capacity: int) -> dict[str, int]:
        return {"tiles": self.config.max_tiles + 1}

    def __call__(self, images: Sequence[Image.Image]) -> Prepared:
        config, tile = self.config, self.config.tile
        tiles = [np.empty((0, 3, tile, tile), np.float32)]
        grids = []
        for image in images:
            picture = self._normalise(np.asarray(self._stretched(to_rgb(image)))[None])[0]
            rows, columns = (length // tile for length in picture.shape[1:])
            cut = picture.reshape(3, rows, tile, columns, tile).transpose(1, 3, 0, 2, 4)
            tiles += [shrunk(picture, rows, columns)[None], cut.reshape(-1, 3, tile, tile)]
            grids.append((rows, columns))
        rows = token_rows(grids, config.side)
        texts = (config.image_token * len(row) + config.end_token + config.after_image for row in rows)
        return Prepared(
            vision={"pixel_values": np.concatenate(tiles)},
            image_texts=tuple(texts),
            rows=np.concatenate([*rows, np.empty(0, np.int64)]),
        )

    def _stretched(self, image: Image.Image) -> Image.Image:
        """Resized and filled up to whole tiles. A tall picture is treated as a wide one on its side."""
        tile = self.config.tile
        if image.width < image.height:
            return self._stretched(image.transpose(Image.Transpose.TRANSPOSE)).transpose(Image.Transpose.TRANSPOSE)
        ratio, columns = image.width / image.height, 1
        while (columns + 1) * math.ceil((columns + 1) / ratio) <= self.config.max_tiles:
            columns += 1
        width, height = columns * tile, int(columns * tile / ratio)
        if not height:
            raise VlmcError(
                "A picture is too long for its width",
                found=f"{image.width} × {image.height}",
                expected=f"less than {width} times as long as wide",
                fix="cut out the part that matters",
            )
        whole = Image.new("RGB", (width, math.ceil(height / tile) * tile), _WHITE)
        whole.paste(image.resize((width, height), Image.Resampling.BILINEAR), (0, (whole.height - height) // 2))
        return whole


def shrunk(picture: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """The picture (3, rows · tile, columns · tile) as one tile (3, tile, tile), bicubic and without antialiasing as
    torch.nn.functional.interpolate does it. As the factors are whole, every output pixel lies on a pixel (odd) or
    midway between two (even), with the same weights everywhere."""
    return _shrunk(_shrunk(picture, columns).swapaxes(1, 2), rows).swapaxes(1, 2)


def _shrunk(picture: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    if factor % 2:
        return picture[..., factor // 2 :: factor]
    middle = np.arange(factor // 2, picture.shape[-1], factor)  # right of the middle between two pixels
    taps = (np.clip(middle + offset, 0, picture.shape[-1] - 1) for offset in (-2, -1, 0, 1))
    parts = [np.float32(weight) * picture[..., tap] for weight, tap in zip(_HALFWAY, taps, strict=True)]
    total: NDArray[np.float32] = parts[0] + parts[1] + parts[2] + parts[3]
    return total


def token_rows(grids: Sequence[tuple[int, int]], side: int) -> list[NDArray[np.int64]]:
    """For pictures of (rows, columns) tiles each, whose tiles the vision encoder saw one picture after the other, the
    whole first: the row of image features that stands at each of the picture's image tokens."""
    line_end = sum(rows * columns + 1 for rows, columns in grids) * side * side
    found, first = [], 0
    for rows, columns in grids:
        whole = (first + np.arange(side * side)).reshape(side, side)
        tiles = first + side * side + np.arange(rows * columns * side * side)
        grid = tiles.reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, columns * side)
        lines = [np.pad(part, ((0, 0), (0, 1)), constant_values=line_end).ravel() for part in (grid, whole)]
        found.append(np.concatenate([lines[0], [line_end + 1], lines[1]]))
        first += (rows * columns + 1) * side * side
    return found
