"""A device is data: one file in `devices/`, read here, never code.

A figure that no source gives is left out of the file and is None here: unknown, not zero. Every figure in a file names
its source in a comment. A new device is a new file.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import VlmcError, mended_by
from ..records import from_json
from ..runtime import backends
from . import power

if sys.version_info >= (3, 11):
    import tomllib
else:  # JetPack 6 has Python 3.10
    import tomli as tomllib

FOLDER = Path(__file__).parent / "devices"


@dataclass(frozen=True)
class Device:
    """What a build and a measurement need to know of the machine that the engines run on.

    backends and power_sources are in order of preference. `precisions` are those that its backends build engines in,
    of recipes their `kind`; `opset` and `typing` are the ONNX dialect: with `weak` typing a float32 graph
    gets its precision from builder flags, with `strong` it is in the graph. `sm` is the compute capability of an NVIDIA
    GPU that engines run on, 87 for 8.7; where none tells the device from others, `board` is what the device tree's
    model has to hold ("Raspberry Pi 5"). `calibration_set` is `demo` or a file beside the device's. Budgets: memory of
    the whole process, and time from the picture to the first token. Peaks are dense (no sparsity), in 10^12 operations
    a second, a multiply-add counting as two. `handover` is the one sentence that says what remains to be done on the
    device once this machine has done its part.
    """

    name: str
    title: str
    architecture: str  # as `uname -m` says it
    backends: tuple[str, ...]
    precisions: tuple[str, ...]
    opset: int
    typing: str
    ahead_of_time: bool
    ahead_of_time_why: str
    handover: str
    calibration_set: str
    power_sources: tuple[str, ...] = ()
    power_rails: tuple[str, ...] = ()
    unified_memory: bool = False
    sm: int | None = None
    board: str = ""
    tensorrt: str | None = None
    memory_gb: float | None = None
    memory_budget_gb: float | None = None
    latency_budget_ms: float | None = None
    dram_gb_per_s: float | None = None
    peak_fp32_tflops: float | None = None
    peak_fp16_tflops: float | None = None
    peak_int8_tops: float | None = None

    @property
    def own_set(self) -> Path | None:
        """The file of the calibration set that the device has of its own."""
        return None if self.calibration_set == "demo" else FOLDER / self.calibration_set


def device_names(folder: Path = FOLDER) -> list[str]:
    """Every device there is a file for."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load_device(name: str, folder: Path = FOLDER) -> Device:
    """The device of that name; an unknown name or a file that does not fit is a VlmcError."""
    names = device_names(folder)
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
        raise VlmcError(
            f"There is no device {name!r}",
            found=f"nearest: {', '.join(near)}" if near else "",
            expected=f"one of {', '.join(names)}",
            fix="choose one of them (`vlmc devices` describes them)",
        )
    path = folder / f"{name}.toml"
    with mended_by(f"mend {path}"):
        try:
            data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise VlmcError(f"{path} is not valid TOML", found=str(error)) from None
        unknown = data.keys() - {field.name for field in dataclasses.fields(Device)} | data.keys() & {"name"}
        if unknown:
            raise VlmcError(f"{path} has fields that no device has", found=", ".join(sorted(unknown)))
        device = from_json(Device, {"name": name} | data, path.name)
        _require_known(device, path)
        return device


def _require_known(device: Device, path: Path) -> None:
    """Raises where a name stands in the file that none of vlmc's own files has, or a version that is none."""
    for field, known in (("backends", backends.names()), ("power_sources", power.names())):
        if unknown := [name for name in getattr(device, field) if name not in known]:
            what = f"{path} has {field} that vlmc does not have"
            raise VlmcError(what, found=", ".join(unknown), expected=f"some of {', '.join(known)}")
    if not device.backends:
        raise VlmcError(f"{path} names no backend", expected=f"some of {', '.join(backends.names())}")
    if device.tensorrt is not None and not re.fullmatch(r"\d+\.\d+(\.\d+)*", device.tensorrt):
        raise VlmcError(f"{path} has no version of TensorRT", found=device.tensorrt, expected='one like "10.3"')


def require_backends(device: Device, wanted: Iterable[str]) -> None:
    """Refuses names that are no backend of the device."""
    if strange := [name for name in wanted if name not in device.backends]:
        raise VlmcError(
            f"The device {device.name!r} has no backend {', '.join(strange)}",
            expected=f"some of {', '.join(device.backends)}",
            fix="name these, or leave --backend out",
        )


def require_precision(device: Device, recipe: str, kind: str) -> None:
    """Refuses a recipe whose precision (`Recipe.kind`) no backend of the device builds; fp32 is none."""
    if kind != "fp32" and kind not in device.precisions:
        raise VlmcError(
            f"The recipe {recipe!r} gives no engine on {device.title}",
            expected=f"a precision among {', '.join(device.precisions)}",
            fix="choose another recipe; `vlmc build --help` lists them",
        )
