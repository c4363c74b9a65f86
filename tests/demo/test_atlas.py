"""No real picture serves two splits: neither a garment nor a photograph."""

from __future__ import annotations

import gzip
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image
from vlmc.demo import atlas
from vlmc.demo.words import GARMENTS, SPLITS


@pytest.mark.parametrize(("one", "other"), combinations(SPLITS, 2))
def test_splits_share_no_garment_and_no_photograph(one: str, other: str) -> None:
    a, b = atlas.bundled(one), atlas.bundled(other)
    for kind in GARMENTS:
        assert not {g.tobytes() for g in a.garments[kind]} & {g.tobytes() for g in b.garments[kind]}
    assert not set(a.pictures) & set(b.pictures)
    assert not {p.tobytes() for p in a.pictures.values()} & {p.tobytes() for p in b.pictures.values()}


def test_photographs_used_only_for_training_are_in_no_other_split() -> None:
    held_out = {p.name for split in ("calibration", "test") for p in atlas.PHOTOS[split]}
    assert not held_out & {p.name for p in (*atlas.MORE_PHOTOS, *atlas.PHOTOS["train"])}


def test_every_split_has_garments_of_every_kind_and_a_photograph() -> None:
    for split in SPLITS:
        sources = atlas.bundled(split)
        assert {kind: len(g) for kind, g in sources.garments.items()} == dict.fromkeys(GARMENTS, atlas.EACH[split])
        assert sources.photos


def test_the_atlas_is_small() -> None:
    assert sum(path.stat().st_size for path in atlas.FOLDER.iterdir()) < 1_500_000


def test_training_takes_nothing_from_fashion_mnist_that_the_atlas_holds(tmp_path: Path) -> None:
    each = atlas.ACROSS + 2
    labels = bytes(label for label in range(10) for _ in range(each))
    # Each picture is told by its first two pixels.
    pixels = b"".join(bytes([label, i]) + bytes(atlas.CELL**2 - 2) for label in range(10) for i in range(each))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels))
    for photo in atlas.MORE_PHOTOS:
        Image.new("RGB", (200, 150)).save(tmp_path / f"{photo.name}.jpg")
    sources = atlas.full(tmp_path)
    for kind in GARMENTS:
        told = [tuple(g.tobytes()[:2]) for g in sources.garments[kind]]
        assert told == [(atlas.LABELS[kind], atlas.ACROSS), (atlas.LABELS[kind], atlas.ACROSS + 1)]
    assert set(sources.pictures) == {p.name for p in sources.photos}
