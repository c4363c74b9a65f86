"""Real pictures: garments of Fashion-MNIST as objects, photographs of landscapes as backdrops.

A few of each lie in `atlas/` and serve every split; training adds the whole Fashion-MNIST training file and
more photographs from Debian packages (README.md). A picture belongs to one split only.
"""

import gzip
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Final

from PIL import Image

from .layout import Photo
from .words import GARMENTS, SPLITS, Split

FOLDER: Final = Path(__file__).parent / "atlas"
CELL: Final = 28  # pixels of a Fashion-MNIST side
EACH: Final[dict[Split, int]] = {
    "train": 24,
    "calibration": 36,
    "test": 60,
}  # garments of each kind in the atlas
ACROSS: Final = sum(EACH.values())  # one row of the sheet per kind: train, then calibration, then test
LABELS: Final = {"shirt": 0, "dress": 3, "shoe": 7, "bag": 8, "boot": 9}  # Fashion-MNIST's own numbers
PHOTOS: Final[dict[Split, tuple[Photo, ...]]] = {
    "train": (Photo("hills", light="sunset"),),
    "calibration": (Photo("brook"),),
    "test": (Photo("alps"), Photo("meadow")),
}
# Only for training, not kept in the repository: their licences (LGPL, GPL, CC BY-SA) are not this project's.
MORE_PHOTOS: Final = (
    Photo("boats", light="sunset"),
    Photo("lake", light="night"),
    Photo("pines"),
    Photo("dune"),
    Photo("beach"),
)


@dataclass(frozen=True)
class Sources:
    """The real pictures one split may use."""

    garments: dict[str, tuple[Image.Image, ...]]
    photos: tuple[Photo, ...]
    pictures: dict[str, Image.Image]

    def garment(self, kind: str, rng: Random) -> Image.Image | None:
        return rng.choice(self.garments[kind]) if kind in self.garments else None


@lru_cache(maxsize=len(SPLITS))
def bundled(split: Split) -> Sources:
    """What the repository holds for a split."""
    sheet = Image.open(FOLDER / "garments.png").convert("L")
    first = sum(EACH[s] for s in SPLITS[: SPLITS.index(split)])
    garments = {
        kind: tuple(
            sheet.crop((column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))
            for column in range(first, first + EACH[split])
        )
        for row, kind in enumerate(GARMENTS)
    }
    pictures = {photo.name: Image.open(FOLDER / f"{photo.name}.jpg").convert("RGB") for photo in PHOTOS[split]}
    return Sources(garments, PHOTOS[split], pictures)


def full(folder: Path) -> Sources:
    """The training split with what the atlas left of Fashion-MNIST's training file, and more photos."""
    kept = bundled("train")
    garments = {}
    for kind, cells in fashion(folder, "train").items():
        garments[kind] = tuple(Image.frombytes("L", (CELL, CELL), c) for c in cells[ACROSS:])
    photos, pictures = list(kept.photos), dict(kept.pictures)
    for photo in MORE_PHOTOS:
        pictures[photo.name] = Image.open(folder / f"{photo.name}.jpg").convert("RGB")
        photos.append(photo)
    return Sources(garments, tuple(photos), pictures)


def fashion(folder: Path, part: str) -> dict[str, list[bytes]]:
    """Fashion-MNIST's pictures of the kinds used here, in the file's order; `part` is "train" or "t10k"."""
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
    size = CELL * CELL
    return {
        kind: [pixels[i * size : (i + 1) * size] for i, label in enumerate(labels) if label == LABELS[kind]]
        for kind in GARMENTS
    }
