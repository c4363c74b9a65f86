"""Memory as the kernel counts it: of this process, and of the machine (which on unified memory is the GPU's too).

Source: Linux, Documentation/filesystems/proc.rst (VmHWM: peak resident set; MemAvailable: what can be had without
swapping). Where there is no /proc the answer is None and the report says "unavailable".
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from . import nvidia

ROOT = Path("/")


def peak_rss_bytes(root: Path = ROOT) -> int | None:
    """The highest resident set of this process since it started, weights mapped from files included."""
    return _kibibytes(root / "proc/self/status", "VmHWM")


def available_bytes(root: Path = ROOT) -> int | None:
    """What programs can still get on the whole machine without swapping."""
    return _kibibytes(root / "proc/meminfo", "MemAvailable")


def obtainable_bytes(root: Path = ROOT) -> int | None:
    """What programs can still get at all: what is available, and the swap that is free."""
    available, swap = available_bytes(root), _kibibytes(root / "proc/meminfo", "SwapFree")
    return None if available is None else available + (swap or 0)


def total_bytes(root: Path = ROOT) -> int | None:
    """The machine's memory, without what firmware and kernel keep."""
    return _kibibytes(root / "proc/meminfo", "MemTotal")


def _kibibytes(path: Path, field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def device_free_and_total() -> tuple[int, int] | tuple[None, None]:
    """Of the GPU's memory, whoever uses the rest; None where NVML does not tell."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        known = pynvml.nvmlDeviceGetMemoryInfo(nvidia.handle(pynvml))
    except pynvml.NVMLError:
        return None, None
    return int(known.free), int(known.total)


def device_bytes() -> int | str:
    """What this process holds on its GPU now, as the driver counts it, or "unavailable: " and why it does not tell."""
    try:
        import pynvml
    except ImportError:
        return "unavailable: pynvml is not installed (`pip install nvidia-ml-py`)"
    try:
        pynvml.nvmlInit()
        gpu = nvidia.handle(pynvml)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu):
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
    except pynvml.NVMLError as error:
        return f"unavailable: NVML does not answer: {error}"
    return "unavailable: the driver does not tell this process's share (as inside a container)"
