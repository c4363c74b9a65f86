"""What can run here, and why the rest cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path
from typing import Any

from ..runtime import backends, cuda
from . import machine, memory, power
from .device import Device, device_names, load_device

PACKAGES = {  # distribution: what it is for
    "torch": "export, calibration and the PyTorch baselines",
    "transformers": "export and calibration",
    "onnx": "export and build",
    "onnxruntime": "the backend onnxruntime",
    "onnxruntime-gpu": "the backend onnxruntime_gpu",
    "openvino": "the backend openvino",
    "tensorrt": "the backend tensorrt",
    "tensorrt-rtx-cu13": "the backend tensorrt_rtx",
    "nvidia-ml-py": "energy and memory of NVIDIA GPUs",
    "matplotlib": "the plots of a report",
    "jinja2": "the page of a report",
}


def examine() -> dict[str, Any]:
    """{"machine", "backends", "power", "packages", "devices"}: of each thing "" where it can be used here, else the
    reason; of packages the version, or "unavailable: ...". Free disk space is the working folder's."""
    here = machine.describe(0)
    return {
        "machine": {
            "cpu": here["cpu"],
            "cores": here["cores"],
            "memory_gb": _gigabytes(memory.total_bytes()),
            "memory_free_gb": _gigabytes(memory.available_bytes()),
            "disk_free_gb": _gigabytes(shutil.disk_usage(Path()).free),
            "os": here["os"],
            "python": here["python"],
        },
        "backends": {name: backends.unavailable(name) for name in backends.names() if name != "handover"},
        "power": {name: power.probe(name) for name in power.names()},
        "packages": {name: _version(name, use) for name, use in PACKAGES.items()},
        "devices": {name: built_here(load_device(name)) for name in device_names()},
    }


def built_here(device: Device) -> str:
    """ "" where engines for the device can be built on this machine, else what stands in the way."""
    if not device.ahead_of_time:
        on_it = device.sm is not None and cuda.architecture() == device.sm
        return backends.unavailable(device.backends[0]) if on_it else device.ahead_of_time_why
    if importlib.util.find_spec(device.backends[0]) is None:
        return f"the package of its backend {device.backends[0]} is not installed"
    if importlib.util.find_spec("onnx_ir") is None:
        return "onnx and onnx-ir, the packages of vlmc's extra `build`, are not installed"
    return ""


def _version(name: str, use: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"unavailable: not installed; it is for {use}"


def _gigabytes(count: int | None) -> float | str:
    return "unavailable: the kernel does not tell" if count is None else round(count / 1e9, 1)
