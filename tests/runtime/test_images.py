"""Any file becomes the upright RGB picture that transformers would see, or one sentence."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image
from vlmc.errors import VlmcError
from vlmc.runtime import images
from vlmc.runtime.images import open_image, picture_hash, to_rgb

RNG = np.random.default_rng(0)
COLOURS = Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8))
ALPHA = Image.fromarray(RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


FILES = {
    "rgb.png": encoded(COLOURS, "PNG"),
    "rgb.jpg": encoded(COLOURS, "JPEG"),
    "rgb.webp": encoded(COLOURS, "WEBP"),
    "rgb.bmp": encoded(COLOURS, "BMP"),
    "rgb.ppm": encoded(COLOURS, "PPM"),
    "rgb.tiff": encoded(COLOURS, "TIFF", compression="tiff_lzw"),
    "cmyk.jpg": encoded(COLOURS.convert("CMYK"), "JPEG"),
    "grey.png": encoded(COLOURS.convert("L"), "PNG"),
    "grey_alpha.png": encoded(ALPHA.convert("LA"), "PNG"),
    "alpha.png": encoded(ALPHA, "PNG"),
    "black_and_white.png": encoded(COLOURS.convert("1"), "PNG"),
    "palette.png": encoded(COLOURS.quantize(8), "PNG"),
    "palette_transparent.png": encoded(COLOURS.quantize(8), "PNG", transparency=0),
    "palette.gif": encoded(COLOURS.quantize(8), "GIF"),
    "animation.gif": encoded(COLOURS.quantize(8), "GIF", save_all=True, append_images=[COLOURS.rotate(180)]),
    **{f"turned{n}.jpg": encoded(COLOURS, "JPEG", exif=turned(n)) for n in range(1, 9)},
    "turned.png": encoded(COLOURS, "PNG", exif=turned(6)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_becomes_what_transformers_loads(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    mine, reference = open_image(path), load_image(str(path))
    assert mine.mode == "RGB"
    assert np.array_equal(np.asarray(mine), np.asarray(reference))


def test_an_exif_orientation_turns_the_picture(tmp_path: Path) -> None:
    (tmp_path / "turned.png").write_bytes(FILES["turned.png"])
    assert np.array_equal(np.asarray(open_image(tmp_path / "turned.png")), np.rot90(np.asarray(COLOURS), -1))


DEEP = (np.arange(35, dtype=np.uint16) * 1872).reshape(5, 7)  # from black to 63,648 of 65,535


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_upper_bits_where_transformers_clips_to_white(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "deep"
    path.write_bytes(encoded(Image.fromarray(DEEP), kind))
    eight_bit = Image.fromarray((DEEP // 256).astype(np.uint8)).convert("RGB")
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(eight_bit))
    assert (np.asarray(load_image(str(path))) == 255).mean() > 0.9


def test_sixteen_bit_grey_is_turned_upright_too(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(encoded(Image.fromarray(DEEP), "PNG", exif=turned(3)))
    assert np.array_equal(np.asarray(open_image(path))[..., 0], np.rot90(DEEP // 256, 2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_of_unknown_range_are_refused(dtype: type, tmp_path: Path) -> None:
    path = tmp_path / "values.tiff"
    path.write_bytes(encoded(Image.fromarray(DEEP.astype(dtype)), "TIFF"))
    with pytest.raises(VlmcError, match="32-bit values"):
        open_image(path)


def test_a_picture_in_memory_follows_the_same_rules() -> None:
    assert to_rgb(COLOURS) == COLOURS
    assert np.array_equal(np.asarray(to_rgb(ALPHA)), np.asarray(ALPHA)[..., :3])
    assert np.asarray(to_rgb(Image.fromarray(DEEP))).max() == DEEP.max() // 256


def test_a_picture_is_known_by_its_pixels_and_its_shape() -> None:
    wide, tall = (Image.frombytes("RGB", size, bytes(range(18))) for size in ((3, 2), (2, 3)))
    assert picture_hash(wide) == picture_hash(wide.copy())
    assert picture_hash(wide) != picture_hash(tall)


def test_what_is_no_picture_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(encoded(COLOURS, "PNG")[:-30])
    (tmp_path / "cut.jpg").write_bytes(encoded(COLOURS, "JPEG")[:-30])
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    for name, reason in {
        "missing.png": "no picture",
        "empty.png": "empty",
        "text.png": "not a picture that vlmc reads",
        "cut.png": "truncated or broken",
        "cut.jpg": "truncated or broken",
        "pipe.png": "not a file",
        ".": "not a file",
        "text.png/inner.png": "cannot be read",
        "x" * 300: "cannot be read",
        "nul\0.png": "cannot be read",
    }.items():
        with pytest.raises(VlmcError, match=rf"{reason}.* To mend it: "):
            open_image(tmp_path / name)


def test_a_format_that_starts_another_program_is_not_tried(tmp_path: Path) -> None:
    (tmp_path / "script.eps").write_bytes(encoded(COLOURS, "EPS"))
    with pytest.raises(VlmcError, match="not a picture that vlmc reads"):
        open_image(tmp_path / "script.eps")


@pytest.mark.parametrize("side", [10_000, 60_000])  # below and above where Pillow itself refuses
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side: int, tmp_path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + encoded(COLOURS, "PNG")[33:])
    with pytest.raises(VlmcError, match=r"too many pixels.* To mend it: save it smaller"):
        open_image(bomb)


def test_a_file_that_is_too_large_is_not_even_opened(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(images.MAX_FILE_BYTES + 1)  # sparse: takes no room
    with pytest.raises(VlmcError, match="too large"):
        open_image(tmp_path / "large.png")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=4),
    keep=st.floats(0.2, 1.5),
)
def test_damaged_files_give_a_picture_or_a_sentence(
    name: str, changes: list[tuple[int, int]], keep: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(FILES[name])
    for position, value in changes:
        content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "damaged-picture"
    path.write_bytes(content[: int(keep * len(content))])
    try:
        opened = open_image(path)
    except VlmcError:
        return
    assert opened.mode == "RGB"
