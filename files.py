"""Files that are whole or absent: staged folders, atomic JSON, checksums, paths that stay inside the artefact.

A stage writes beside its target, syncs and renames, so that a killed run or a full disk leaves what was there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import VlmcError

MAX_JSON_BYTES = 64 * 1024 * 1024


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, refused where it leaves `root` (absolute, `..`, or a link that points outside)."""
    base = root.resolve()
    path = (base / relative).resolve()
    if Path(relative).is_absolute() or not path.is_relative_to(base):
        raise VlmcError(f"The path {relative!r} leaves the folder {root}", fix="use an artefact that vlmc wrote")
    return path


def read_json(path: Path) -> Any:
    """The parsed file; a missing, oversized, truncated or malformed one is a VlmcError that names it."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise VlmcError(f"{path} is too large", found=f"{size} bytes", expected=f"at most {MAX_JSON_BYTES}")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VlmcError(f"{path} is missing", fix="run the stage that writes it again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VlmcError(f"{path} is not valid JSON", found=str(error), fix="make it again") from None
    except OSError as error:
        raise VlmcError(f"{path} cannot be read", found=error.strerror or str(error)) from None


def write_text(path: Path, text: str) -> None:
    """Replaces the file in one step: written beside it, synced, renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of the value as indented JSON; NaN and infinity are refused, for they are no JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns an operating-system failure while `target` is written into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise VlmcError(
                f"No space is left on the disk for {target}",
                fix="free some space and run the same command again; nothing half-written was kept",
            ) from None
        raise VlmcError(
            f"{target} cannot be written",
            found=error.strerror or str(error),
            fix="choose a folder you may write to",
        ) from None


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` only when the block ends without an exception.

    What an earlier, killed run left beside the target is removed first.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        stage = target.with_name(f".{target.name}.{os.getpid()}.partial")
        stage.mkdir()
        try:
            yield stage
            for path in stage.rglob("*"):
                if path.is_file():
                    _sync(path)
            retired = target.with_name(f".{target.name}.{os.getpid()}.old")
            if target.exists():
                os.replace(target, retired)
            os.replace(stage, target)
            _sync(target.parent)
            shutil.rmtree(retired, ignore_errors=True)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    for path in target.parent.glob(f".{target.name}.*"):
        pid, _, kind = path.name.removeprefix(f".{target.name}.").partition(".")
        if kind not in ("partial", "old") or not pid.isdigit() or _alive(int(pid)):
            continue
        if kind == "old" and not target.exists():  # killed between the two renames: the old one is the artefact
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
