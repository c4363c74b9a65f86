"""Calibration sets: pictures with the prompts that go with them, one JSON object a line.

    {"image": "pictures/0001.png", "prompt": "How many cats are there?", "answer": "2", "task": "objects_and_counts"}

`image` is relative to the file. `answer` (optional) is what decoding is calibrated on; `task` and `facts` are for
evaluation, which reads the same files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import VlmcError
from ..files import sha256_of
from ..profiles.questions import read_lines
from ..runtime.images import open_image, picture_hash

_FORM = 'one {"image": …, "prompt": …} a line'


@dataclass(frozen=True)
class Row:
    """One picture and question. `answer` is empty where none is known; `facts` are what a caption should state."""

    image: Path
    prompt: str
    answer: str = ""
    task: str = ""
    facts: tuple[str, ...] = ()


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
        values, where = dict(line.values), line.where
        row = _row(values, path.parent, where)
        if row.image not in pictures:
            pictures[row.image] = _hashes(row.image, where)
        digest.update(f"{json.dumps(values, sort_keys=True)}\n{pictures[row.image][0]}\n".encode())
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


def _row(values: dict[str, Any], folder: Path, where: str) -> Row:
    for name in ("image", "prompt", "answer", "task"):
        value = values.get(name, "")
        if not isinstance(value, str) or (name in ("image", "prompt") and not value):
            raise VlmcError(f"{where} has no text in {name!r}", found=json.dumps(value)[:80], expected=_FORM)
    facts = values.get("facts", [])
    if not isinstance(facts, list) or not all(isinstance(fact, str) for fact in facts):
        raise VlmcError(f"{where} has no list of texts in 'facts'", found=json.dumps(facts)[:80])
    image = (folder / values["image"]).absolute()
    return Row(image, values["prompt"], values.get("answer", ""), values.get("task", ""), tuple(facts))


def _hashes(image: Path, where: str) -> tuple[str, str]:
    try:
        pixels = picture_hash(open_image(image))  # first, for it says best what is wrong with a file
        return sha256_of(image), pixels
    except VlmcError as error:
        raise VlmcError(f"{where}: {error.what}", found=error.found, expected=error.expected, fix=error.fix) from None
