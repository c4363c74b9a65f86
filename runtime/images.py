"""Opening pictures: any file becomes an upright RGB picture or one sentence that says why not.

A file may come from anywhere, so size and pixels are bounded before decoding, and only formats that Pillow decodes by
itself are tried (its EPS reader, for one, starts Ghostscript).
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import VlmcError

MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_PIXELS = 64 * 1024 * 1024  # 192 MiB once decoded as RGB
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_RESAVE = "save it again as an 8-bit PNG or JPEG"


def open_image(path: Path) -> Image.Image:
    """The file's first frame as an upright RGB picture, equal to what transformers' `load_image` gives, except for
    16-bit grey (see `to_rgb`). A missing, empty, oversized, truncated or undecodable file is a VlmcError."""
    _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes and of odd metadata: the size is checked below
            with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
                _check_pixels(path, image)
                image.load()
                return to_rgb(image)
    except VlmcError:
        raise
    except UnidentifiedImageError:
        raise VlmcError(
            f"{path} is not a picture that vlmc reads", expected="one of " + ", ".join(FORMATS), fix=_RESAVE
        ) from None
    except Image.DecompressionBombError:
        raise _too_many_pixels(path, "a decompression bomb") from None
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        raise VlmcError(
            f"{path} is a truncated or broken picture", found=str(error) or type(error).__name__, fix=_RESAVE
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture upright (by its EXIF orientation) and as RGB; what is hidden by transparency is shown.

    That is transformers' `load_image`, with one exception: Pillow turns 16-bit grey into RGB by clipping at 255, so
    that all but the darkest 0.4 % of the range is white. Here the upper 8 bits are kept, as Pillow itself does for
    16-bit colour. Values of 32 bits or floats have no known range and are refused.
    """
    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    upright = ImageOps.exif_transpose(image)
    if sixteen_bit:
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise VlmcError(
            "A picture holds 32-bit values, whose range is not known", found=f"Pillow's mode {image.mode}", fix=_RESAVE
        )
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def picture_hash(image: Image.Image) -> str:
    """SHA-256 of an RGB picture's size and pixels: the same for the same picture saved in another lossless format."""
    return hashlib.sha256(b"%d %d " % image.size + image.tobytes()).hexdigest()


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise VlmcError(f"There is no picture {path}", fix="check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise VlmcError(f"The picture {path} cannot be read", found=str(error), fix="check the path") from None
    if not path.is_file():  # a folder, or a pipe or device that may never end
        raise VlmcError(f"{path} is not a file", expected="a picture", fix="check the path")
    if size == 0:
        raise VlmcError(f"The picture {path} is empty", fix="copy it again")
    if size > MAX_FILE_BYTES:
        raise VlmcError(
            f"The picture {path} is too large", found=f"{size} bytes", expected=f"at most {MAX_FILE_BYTES}", fix=_RESAVE
        )


def _check_pixels(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_many_pixels(path, f"{width} × {height}")


def _too_many_pixels(path: Path, found: str) -> VlmcError:
    expected = f"at most {MAX_PIXELS}"
    return VlmcError(f"The picture {path} has too many pixels", found=found, expected=expected, fix="save it smaller")
