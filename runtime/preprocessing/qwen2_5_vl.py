"""Pictures for Qwen2-VL and 2.5-VL: each in nearly its own size, cut into patches, with what the model makes of it.

Patches are equal to the last bit to transformers' Qwen2VLImageProcessorPil (5.23), windows and positions equal to what
its model computes. A block of `merge` × `merge` patches is one token, so arrays are (tokens, merge², …).
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
from ..images import MAX_PIXELS, to_rgb
from . import Normalise, Prepared, check_range

_MAX_EDGE = 4096
_MAX_ASPECT = 200  # the reference's own limit


@dataclass(frozen=True)
class Config:
    """A picture is resized to `min_pixels` to `max_pixels`, both sides multiples of `merge` patches of `patch` pixels;
    it is shown in `frames` equal frames. `window`: side in pixels of the windows that the vision encoder attends in; 0
    where it has none and takes none.
    `resample`: Pillow's number of the filter. A value v becomes (v · rescale_factor − mean) / std. The text: one
    `image_token` a token of the picture, `before_image` and `after_image` around them."""

    min_pixels: int
    max_pixels: int
    patch: int
    frames: int
    merge: int
    window: int
    resample: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_token: str
    before_image: str = ""
    after_image: str = ""


def load(config: Mapping[str, Any]) -> Qwen25Vl:
    """The preprocessor for the manifest's `preprocessing`; a value that is missing or out of range is a VlmcError."""
    checked = from_json(Config, dict(config), "preprocessing")
    check_range(checked, patch=(1, _MAX_EDGE), merge=(1, 16), frames=(1, 16), max_pixels=(1, MAX_PIXELS))
    check_range(
        checked,
        min_pixels=(1, checked.max_pixels),
        window=(checked.window and checked.merge * checked.patch, _MAX_EDGE),
        resample=(0, len(Image.Resampling) - 1),
    )
    return Qwen25Vl(checked)


class Qwen25Vl:
    """The preprocessor; see `Preprocessor` and `Positions`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._normalise = Normalise(config.rescale_factor, config.mean, config.std)

    def largest(self, capacity: int) -> dict[str, int]:
        side = self.config.patch * self.config.merge
        tokens = min(self.config.max_pixels // side**2, capacity)
        if not self.config.window:
            return {"tokens": tokens}
        return {"tokens": tokens, "windows": -(-tokens // (self.config.window // side))}  # of a strip, which has most

    def __call__(self, images: Sequence[Image.Image]) -> Prepared:
        """`vision` as `VisionEncoder.forward` of exporter/families/qwen2_5_vl.py says, tokens row by row."""
        config = self.config
        block = config.merge**2
        pixels = [np.empty((0, block, 3 * config.frames * config.patch**2), np.float32)]
        places, ids, windows, texts, count = [np.empty((0, block, 2), np.int64)], [np.empty(0, np.int64)], [], [], 0
        for index, image in enumerate(images):
            patches = self._patches(to_rgb(image))
            rows, columns = patches.shape[:2]
            pixels.append(patches.reshape(rows * columns, block, -1))
            places.append(self._positions(rows, columns))
            ids.append(np.full(rows * columns, index, np.int64))
            windows += [self._windows(rows, columns, count)] if config.window else []
            texts.append(config.before_image + config.image_token * (rows * columns) + config.after_image)
            count += rows * columns
        vision: dict[str, NDArray[Any]] = {
            "pixel_values": np.concatenate(pixels),
            "patch_positions": np.concatenate(places),
            "image_ids": np.concatenate(ids),
        }
        if config.window:
            window_index = np.concatenate([np.empty((0, self._side**2), np.int64), *windows])
            taken = np.flatnonzero(window_index.ravel() >= 0)
            window_places = np.empty(count, np.int64)
            window_places[window_index.ravel()[taken]] = taken
            vision |= {"window_index": window_index, "window_places": window_places}
        return Prepared(vision, tuple(texts))

    def positions(self, places: NDArray[np.bool_], prepared: Prepared | None) -> NDArray[np.int64]:
        """M-RoPE (arXiv:2409.12191, section 2.1) as (3, length): a text's tokens have their place three times; those of
        a picture the place where it begins, plus row and column. What follows it goes on behind its longer side."""
        positions = np.tile(np.arange(len(places), dtype=np.int64), (3, 1))
        if prepared is None:
            return positions
        grid = prepared.vision["patch_positions"][:, 0].T // self.config.merge
        ids, tokens = prepared.vision["image_ids"], np.flatnonzero(places)
        for index in range(len(prepared.image_texts)):
            mine = ids == index
            own, (rows, columns) = tokens[mine], grid[:, mine]
            start, end = positions[0, own[0]], own[-1] + 1
            positions[:, own] = start + np.stack((np.zeros_like(rows), rows, columns))
            behind = start + max(rows.max(), columns.max()) + 1
            positions[:, end:] = behind + np.arange(len(places) - end)
        return positions

    @property
    def _side(self) -> int:
        """Tokens a side of a window."""
        return self.config.window // self.config.merge // self.config.patch

    def _patches(self, image: Image.Image) -> NDArray[np.float32]:
        """(rows, columns, merge, merge, 3, frames, patch, patch) of tokens."""
        config = self.config
        width, height = self._fit(*image.size)
        resized = np.asarray(image.resize((width, height), config.resample))
        values = self._normalise(resized[None])[0]
        block, unit = config.merge * config.patch, (config.merge, config.patch)
        cut = values.reshape(3, height // block, *unit, width // block, *unit).transpose(1, 4, 2, 5, 0, 3, 6)
        shape = (*cut.shape[:5], config.frames, *cut.shape[5:])
        return np.broadcast_to(cut[:, :, :, :, :, None], shape)

    def _fit(self, width: int, height: int) -> tuple[int, int]:
        """The size that a picture is resized to, rounded as the reference does (smart_resize)."""
        config = self.config
        factor = config.merge * config.patch
        if max(width, height) / min(width, height) > _MAX_ASPECT:
            raise VlmcError(
                "A picture is too long for its width",
                found=f"{width} × {height}",
                expected=f"at most {_MAX_ASPECT} times as long as wide",
                fix="cut out the part that matters",
            )
        sides = [round(side / factor) * factor for side in (width, height)]
        if sides[0] * sides[1] > config.max_pixels:
            shrink = math.sqrt(width * height / config.max_pixels)
            sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height)]
        elif sides[0] * sides[1] < config.min_pixels:
            grow = math.sqrt(config.min_pixels / (width * height))
            sides = [math.ceil(side * grow / factor) * factor for side in (width, height)]
        return sides[0], sides[1]

    def _positions(self, rows: int, columns: int) -> NDArray[np.int64]:
        """Row and column of every patch, (tokens, merge², 2)."""
        merge = self.config.merge
        grid: NDArray[np.int64] = np.indices((rows * merge, columns * merge), np.int64)
        blocks = grid.reshape(2, rows, merge, columns, merge).transpose(1, 3, 2, 4, 0)
        return blocks.reshape(-1, merge**2, 2)

    def _windows(self, rows: int, columns: int, first: int) -> NDArray[np.int64]:
        """The tokens of each window, counted from `first` on, (windows, side²); −1 where it hangs over the edge."""
        side = self._side
        index = np.full((-(-rows // side) * side, -(-columns // side) * side), -1, np.int64)
        index[:rows, :columns] = first + np.arange(rows * columns).reshape(rows, columns)
        tall, wide = (length // side for length in index.shape)
        return index.reshape(tall, side, wide, side).swapaxes(1, 2).reshape(-1, side * side)
