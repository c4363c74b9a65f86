"""Dataclasses as JSON and back, every field checked: what a file says is of the right kind, or refused by its name."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from typing import Any, TypeVar

from .errors import VlmcError

REMAKE = "make the artefact again with `vlmc export`"
T = TypeVar("T")


def to_json(value: Any) -> Any:
    """A dataclass as dictionaries, ready for `json`."""
    return dataclasses.asdict(value)


def from_json(kind: type[T], data: Any, where: str) -> T:
    """`data` as the dataclass `kind`, every field checked; what does not fit is named by its path in `where`."""
    return typing.cast(T, _convert(kind, data, where))


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
