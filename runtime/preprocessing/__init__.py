"""From pictures to what the vision encoder takes, and to the text that stands for them in the prompt.

One module a kind, found by its name: `load(config)` in it makes the preprocessor from the manifest's `preprocessing`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import VlmcError
from ..images import to_rgb


@dataclass(frozen=True)
class Prepared:
    """`vision`: what the vision encoder takes, by name; mostly `pixel_values`, float32 (tiles, 3, height, width), all
    pictures' tiles in order, of which every pixel counts. `image_texts`: what stands for each picture in the prompt.
    `rows` (image tokens,): which row of the image features, flattened to (…, hidden), stands at each image token;
    None is all of them in order."""

    vision: dict[str, NDArray[Any]]
    image_texts: tuple[str, ...]
    rows: NDArray[np.int64] | None = None


class Preprocessor(Protocol):
    def __call__(self, images: Sequence[Image.Image]) -> Prepared:
        """The pictures (any number, any size) prepared."""

    def largest(self, capacity: int) -> dict[str, int]:
        """What each free size of `Prepared.vision` can be at most, by its name in the graph, for one picture whose
        tokens fit a KV cache of that many places. An engine is built for no more."""


@runtime_checkable
class Positions(Protocol):
    """A preprocessor of a model whose tokens have other positions than 0, 1, 2, …"""

    def positions(self, places: NDArray[np.bool_], prepared: Prepared | None) -> NDArray[np.int64]:
        """(k, length) for a prompt in which `places` (length,) says where the image tokens are. Behind it all k go on
        together, from the greatest."""


@runtime_checkable
class Prefix(Protocol):
    """A preprocessor of a model in which the first positions of a prompt see one another."""

    def prefix_length(self, places: NDArray[np.bool_], prepared: Prepared | None) -> int:
        """How many positions, for a prompt in which `places` (length,) says where the image tokens are."""


class Normalise:
    """8-bit values to floats, v → (v · rescale_factor − mean) / std, through a table for each channel that is made by
    transformers' arithmetic, so that the result is equal to the last bit."""

    def __init__(self, rescale_factor: float, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != 3 or len(std) != 3 or 0.0 in std:
            raise VlmcError("preprocessing.mean and .std must be three numbers each, and std not 0")
        with np.errstate(all="ignore"):  # what is not finite is refused below
            scaled = (np.arange(256) * rescale_factor).astype(np.float32)
            self._tables = [(scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]
        if not np.isfinite(self._tables).all():
            raise VlmcError("preprocessing.rescale_factor, .mean and .std do not make finite numbers of pixels")

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(tiles, height, width, 3) in 0…255 to float32 (tiles, 3, height, width)."""
        tiles, height, width, channels = pixels.shape
        values = np.empty((tiles, channels, height, width), np.float32)
        for source, target in zip(pixels, values, strict=True):
            for channel, table in enumerate(self._tables):  # "clip" never happens here: it spares numpy a buffer
                np.take(table, source[..., channel], out=target[channel], mode="clip")
        return values


def stretched(images: Sequence[Image.Image], side: int, resample: int) -> NDArray[np.uint8]:
    """Each picture stretched to one square: (pictures, side, side, 3). `resample`: Pillow's number of the filter."""
    pixels = np.empty((len(images), side, side, 3), np.uint8)
    for image, target in zip(images, pixels, strict=True):
        target[:] = np.asarray(to_rgb(image).resize((side, side), resample))
    return pixels


def check_range(config: object, **ranges: tuple[int, int]) -> None:
    """Raises where a field of a kind's config lies outside of its range, bounds included."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise VlmcError(f"preprocessing.{name} is out of range", found=str(value), expected=f"{low} to {high}")


def kinds() -> list[str]:
    """The names of the preprocessors that this version has."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(config: Mapping[str, Any]) -> Preprocessor:
    """The preprocessor that `config["kind"]` names, made from the rest of `config`."""
    kind = config.get("kind")
    if kind not in kinds():
        nearest = difflib.get_close_matches(str(kind), kinds(), n=len(kinds()), cutoff=0.0)
        raise VlmcError(
            f"vlmc has no preprocessing of kind {kind!r}",
            expected="one of " + ", ".join(nearest),
            fix="use the version of vlmc that made the artefact, or a newer one",
        )
    return cast(Preprocessor, importlib.import_module(f"{__name__}.{kind}").load(config))
