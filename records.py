"""Dataclasses as JSON and back, every field checked: what a file says is of the right kind, or refused by its name. And
the files that a record vouches for, by size and sha256."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import VlmcError
from .files import read_json, sha256_of, write_json

SCHEMA = 1  # of every record
REMAKE = "copy the artefact again from where it is whole, or make it again with `vlmc export`"
T = TypeVar("T")


@dataclass(frozen=True)
class FileSpec:
    sha256: str
    bytes: int


def to_json(value: Any) -> Any:
    """A dataclass as dictionaries, ready for `json`."""
    return dataclasses.asdict(value)


def from_json(kind: type[T], data: Any, where: str) -> T:
    """`data` as the dataclass `kind`, every field checked; what does not fit is named by its path in `where`."""
    return typing.cast(T, _convert(kind, data, where))


def read_record(kind: type[T], path: Path) -> T:
    """A JSON record with a `schema` field, refused by number where this version does not know it."""
    data = read_json(path)
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        what = f"{path} has a schema that this version of vlmc does not read"
        raise VlmcError(what, found=str(schema)[:99], expected=str(SCHEMA), fix=REMAKE)
    return from_json(kind, data, path.name)


def write_record(path: Path, record: Any) -> None:
    """Writes the dataclass as JSON, in one step."""
    write_json(path, to_json(record))


def check_file(path: Path, known: FileSpec) -> None:
    """Raises where the file is missing, of another size, or of other content than recorded."""
    if not path.is_file():
        raise VlmcError(f"{path} is missing", fix=REMAKE)
    if (size := path.stat().st_size) != known.bytes:
        raise VlmcError(f"{path} is truncated or altered", found=f"{size} bytes", expected=f"{known.bytes}", fix=REMAKE)
    if sha256_of(path) != known.sha256:
        raise VlmcError(f"{path} was altered: its sha256 is not the recorded one", fix=REMAKE)


def describe_files(folder: Path) -> dict[str, FileSpec]:
    """Size and sha256 of every file below the folder, by relative path, records of the folder itself left out."""
    return {
        path.relative_to(folder).as_posix(): FileSpec(sha256_of(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", "engine.json")
    }


def _convert(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _convert_fields(kind, data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        for option in arguments:
            if option is not type(None):
                try:
                    return _convert(option, data, where)
                except VlmcError as error:
                    failure = error
        raise failure
    if kind is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        if abs(data) <= sys.float_info.max:  # not so for NaN
            return float(data)
        raise VlmcError(f"{where} is no finite number", fix=REMAKE)
    if (
        origin is None
        and isinstance(kind, type)
        and isinstance(data, kind)
        and not (kind is int and isinstance(data, bool))
    ):
        return data
    expected = getattr(kind, "__name__", str(kind))
    raise VlmcError(f"{where} has the wrong type", found=type(data).__name__, expected=expected, fix=REMAKE)


def _convert_fields(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise VlmcError(f"{where} is no JSON object", found=type(data).__name__, fix=REMAKE)
    hints = typing.get_type_hints(kind, vars(sys.modules[kind.__module__]))
    values = {}
    for item in dataclasses.fields(kind):
        if item.name in data:
            values[item.name] = _convert(hints[item.name], data[item.name], f"{where}.{item.name}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise VlmcError(f"{where} lacks the field {item.name!r}", fix=REMAKE)
    return kind(**values)
