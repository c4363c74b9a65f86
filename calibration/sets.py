"""Calibration sets: pictures with the prompts that go with them, one JSON object a line.

    {"image": "pictures/0001.png", "prompt": "How many cats are there?", "answer": "2", "task": "objects_and_counts"}

`image` is relative to the file. `answer` (optional) is what decoding is calibrated on; what else stands there is for
evaluation, which reads the same files (`profiles.questions`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..errors import VlmcError
from ..files import sha256_of
from ..profiles.questions import Line, read_lines
from ..runtime.images import open_image, picture_hash

_FORM = 'one {"image": …, "prompt": …} a line'


@dataclass(frozen=True)
class Row:
    """One picture and question. `answer` is empty where none is known."""

    image: Path
    prompt: str
    answer: str = ""


@dataclass(frozen=True)
class CalibrationSet:
    """`sha256` covers the rows, in their order, and the bytes of their pictures, wherever the files lie.
    `pictures` are the distinct pictures by `picture_hash`, sorted."""

    name: str
    rows: tuple[Row, ...]
    sha256: str
    pictures: tuple[str, ...]


def load_set(path: Path, limit: int = 0) -> CalibrationSet:
    """The set in a JSONL file, or its first `limit` rows.

    An unreadable or empty file, a line that is no such object (named by its number) and a missing or broken picture
    are VlmcErrors.
    """
    digest = hashlib.sha256()
    rows: list[Row] = []
    pictures: dict[Path, tuple[str, str]] = {}  # path: (sha256 of the file, picture_hash)
    for line in islice(read_lines(path, "calibration set", _FORM), limit or None):
        row = _row(line, path.parent)
        if row.image not in pictures:
            pictures[row.image] = _hashes(row.image, line.where)
        digest.update(f"{json.dumps(dict(line.values), sort_keys=True)}\n{pictures[row.image][0]}\n".encode())
        rows.append(row)
    if not rows:
        raise VlmcError(f"The calibration set {path} is empty", expected=_FORM)
    return CalibrationSet(path.stem, tuple(rows), digest.hexdigest(), tuple(sorted({p for _, p in pictures.values()})))


def demo_set(folder: Path, count: int) -> CalibrationSet:
    """`count` of the demo's own calibration pictures, made in `folder`, each with one question, the tasks in turn."""
    from ..demo.sets import write_set

    lines = write_set(folder, "calibration", count).read_text(encoding="utf-8").splitlines()
    tasks = len(lines) // count
    path = folder / "demo.jsonl"
    path.write_text("\n".join(lines[i * tasks + i % tasks] for i in range(count)), encoding="utf-8")
    return load_set(path)


def _row(line: Line, folder: Path) -> Row:
    image, prompt = line.text("image"), line.text("prompt")
    if not image or not prompt:
        raise VlmcError(f"{line.where} has an empty 'image' or 'prompt'", expected=line.form)
    return Row((folder / image).absolute(), prompt, line.text("answer") if "answer" in line.values else "")


def _hashes(image: Path, where: str) -> tuple[str, str]:
    try:
        pixels = picture_hash(open_image(image))  # first, for it says best what is wrong with a file
        return sha256_of(image), pixels
    except VlmcError as error:
        raise VlmcError(f"{where}: {error.what}", found=error.found, expected=error.expected, fix=error.fix) from None
