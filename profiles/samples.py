"""Raw samples: JSON Lines, one row a run, written as they come.

A row is one write of one whole line, so a killed process leaves at most one torn line at the end; `read` drops it, and
the run that it belonged to is done again.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from ..errors import VlmcError
from ..files import writing

Row = dict[str, Any]
# What an interrupted measurement is gone on with by: numbers that every row of the kind has.
_NUMBERS = {"run": ("index", "turn"), "turn": ("turn",), "agreement": ("case",), "answer": ("row",)}


def read(path: Path) -> list[Row]:
    """Every whole row; a torn last line is cut off the file. A file that is not there has no rows."""
    if not os.path.lexists(path):
        return []
    if path.is_fifo():
        raise OSError(errno.EINVAL, "is a pipe", str(path))  # which would be waited for
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with writing(path):
            os.truncate(path, len(whole))
    return [_row(line, path, number) for number, line in enumerate(whole.splitlines(), 1)]


def append(path: Path, *rows: Row) -> None:
    """Adds rows, all or none as far as a kill of this process goes."""
    with writing(path), path.open("ab", buffering=0) as file:
        file.write(b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows))


def of_kind(rows: list[Row], kind: str) -> list[Row]:
    """The rows whose `kind` it is."""
    return [row for row in rows if row["kind"] == kind]


def _row(line: bytes, path: Path, number: int) -> Row:
    try:
        row = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        row, found = None, str(error)
    else:
        found = "no object with a kind"
    if isinstance(row, dict) and isinstance(row.get("kind"), str):
        lacking = [name for name in _NUMBERS.get(row["kind"], ()) if type(row.get(name)) is not int]
        if not lacking:
            return row
        found = f"no number {lacking[0]!r}"
    fix = f"remove {path.parent}, and measure again with `vlmc profile`"
    raise VlmcError(f"Line {number} of {path} is no sample", found=found, fix=fix)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
