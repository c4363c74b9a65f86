"""Files that are whole or absent: staged folders, atomic JSON, checksums, paths that stay inside the artefact.

A stage writes beside its target, syncs and renames, so that a killed run or a full disk leaves what was there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import VlmcError, reason

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_JSON_BYTES = 64 * 1024 * 1024
_AGAIN = "run the command that wrote it again, or copy it again"


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, refused where it leaves `root` (absolute, `..`, or a link that points outside)."""
    fix = "use an artefact that vlmc wrote"
    try:
        base = root.resolve()
        path = (base / relative).resolve()
        path.exists()  # raises where the name is one that no file can have
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links that go round in circles
        raise VlmcError(f"The path {relative[:99]!r} is no path in {root}", found=reason(error)[:99], fix=fix) from None
    if Path(relative).is_absolute() or not path.is_relative_to(base):
        raise VlmcError(f"The path {relative!r} leaves the folder {root}", found=str(path), fix=fix)
    return path


def refuse_links_out(root: Path, *names: str) -> None:
    """Refuses every link in these files and folders of `root` that points out of it: what is written or read through
    one would be someone else's."""
    for name in names:
        inside(root, name)
        for folder, folders, files in os.walk(root / name):
            for path in (Path(folder, entry) for entry in (*folders, *files)):
                if path.is_symlink():
                    inside(root, path.relative_to(root).as_posix())


def read_json(path: Path) -> Any:
    """The parsed file; a missing, oversized, truncated or malformed one is a VlmcError that names it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a folder, or a pipe that may never end
            raise VlmcError(f"{path} cannot be read", found="it is no file", fix=_AGAIN)
        if (size := status.st_size) > MAX_JSON_BYTES:
            expected = f"at most {MAX_JSON_BYTES}"
            raise VlmcError(f"{path} is too large", found=f"{size} bytes", expected=expected, fix=_AGAIN)
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VlmcError(f"{path} is missing", fix=_AGAIN) from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number too long, or nested too deeply
        raise VlmcError(f"{path} is not valid JSON", found=reason(error), fix=_AGAIN) from None
    except OSError as error:
        found = error.strerror or reason(error)
        raise VlmcError(f"{path} cannot be read", found=found, fix="check the path and who may read it") from None


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file, as `numpy.savez` writes it: one that cannot be read, holds anything else, or packs
    more than it is large, is a VlmcError that names it. Nothing is unpickled."""
    import numpy as np  # not at the top, for `vlmc --help` reads this module

    try:
        with zipfile.ZipFile(path) as packed:
            if sum(entry.file_size for entry in packed.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed")  # and could hold any number of bytes
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{strange[0]!r} is no array")
    except Exception as error:  # numpy and zipfile raise whatever a broken file makes them stumble over
        raise VlmcError(f"{path} holds no arrays that vlmc reads", found=reason(error), fix=_AGAIN) from None
    return arrays


def write_text(path: Path, text: str) -> None:
    """Replaces the file in one step: written beside it, synced, renamed."""
    _replace(path, text.encode())


def _replace(path: Path, content: bytes) -> None:
    temporary = _beside(path, "partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file in one step, as `write_text` does."""
    _replace(path, content)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of the value as indented JSON; NaN and infinity are refused, for they are no JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns an operating-system failure while `target` is written into one sentence."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise VlmcError(
                f"No space is left on the disk for {target}",
                fix="free some space and run the same command again; nothing half-written was kept",
            ) from None
        raise VlmcError(
            f"{target} cannot be written",
            found=(error.strerror or reason(error)) + (f": {error.filename}" if error.filename else ""),
            fix="choose a folder you may write to",
        ) from None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While open, no other process is here with the same folder: the second is refused. It ends with the process,
    however that ends, and leaves nothing behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                what = f"Another vlmc is at work in {folder}"
                raise VlmcError(what, fix="wait until it has ended, and run the same command again") from None
        yield
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Whether it says that there is no room on the disk."""
    # numpy's writes that stop short ("problem writing", "requested and … written") come without a number.
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or (not error.errno and "writ" in str(error))


@contextlib.contextmanager
def staged_folder(target: Path, key: str = "") -> Iterator[Path]:
    """A folder to fill, which becomes `target` only when the block ends without an exception.

    What an earlier, killed run left beside the target is removed first. A `key` (letters and digits) stands for all
    that decides what will be in the folder: one that a run of the same key was filling when it was killed or
    interrupted is handed out again as it was left, and the caller has to find out what in it is whole.
    """
    with writing(target):
        target = target.resolve()  # `.` has no name, and a link is to stay one
        target.parent.mkdir(parents=True, exist_ok=True)
        stage, retired = _beside(target, f"partial-{key}" if key else "partial"), _beside(target, "old")
        remove_leftovers(target, stage if key else None)
        stage.mkdir(exist_ok=bool(key))
        keep = False
        try:
            yield stage
            for path in (*stage.rglob("*"), stage):
                _sync(path)
            if target.exists():
                os.replace(target, retired)
            os.replace(stage, target)
            _sync(target.parent)
        except BaseException as error:
            keep = bool(key) and not isinstance(error, Exception)  # Ctrl-C, not a failure that would only come again
            raise
        finally:
            if retired.exists() and not target.exists():  # interrupted between the two renames
                os.replace(retired, target)
            if not keep:
                _discard(stage)
            _discard(retired)


def _beside(target: Path, kind: str) -> Path:
    """Where this process keeps the target while it is not whole (`partial`) or no longer wanted (`old`)."""
    return target.with_name(f".{target.name}.{os.getpid()}.{kind}")


def remove_leftovers(target: Path, stage: Path | None = None) -> None:
    """Clears away what killed runs left beside the target, and brings back one that was cut off between renames. One
    folder that differs from `stage` in nothing but its process is not cleared away: it becomes `stage`."""
    for path in list(target.parent.iterdir()) if target.parent.is_dir() else ():
        ours = re.fullmatch(rf"\.{re.escape(target.name)}\.([0-9]+)\.(partial(?:-[0-9A-Za-z]+)?|old)", path.name)
        if ours is None or _works(int(ours[1])):
            continue
        if ours[2] == "old" and not target.exists():
            os.replace(path, target)
        elif stage is not None and stage == _beside(target, ours[2]) and (path == stage or not stage.exists()):
            with contextlib.suppress(FileNotFoundError):  # another run of the same key was faster
                os.replace(path, stage)
        else:
            _discard(path)


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _works(pid: int) -> bool:
    """Whether another process of that number is there; our own number was an earlier process's, as in containers."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
