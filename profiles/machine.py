"""What machine measured, in what state: without this a number cannot be compared with another.

What cannot be read is "unavailable: " and the reason, never empty and never zero.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..runtime.backends import processors
from . import memory, nvidia
from .device import Device

ROOT = Path("/")
PACKAGES = (  # distributions
    *("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13"),
    *("torch", "transformers", "tokenizers"),
)


ARCHITECTURES = {"arm64": "aarch64", "AMD64": "x86_64"}  # as other systems than Linux say it


def architecture() -> str:
    """As `uname -m` says it on Linux."""
    return ARCHITECTURES.get(platform.machine(), platform.machine())


def other_than(device: Device, root: Path = ROOT) -> str:
    """Why this machine is not of the device's kind, as far as processor and board tell; empty where it is."""
    if (here := architecture()) != device.architecture:
        return f"this machine is {here}, and {device.title} is {device.architecture}"
    if device.board not in (board := _board(root)):
        return f"this machine is {board or 'no board that a device tree names'}, and no {device.board}"
    return ""


def describe(threads: int, root: Path = ROOT) -> dict[str, Any]:
    """Everything that stays as it is while we measure, and `state` at the time of the call.

    `threads` is what was asked for, 0 meaning all that this process may use; the answer holds the number that this
    comes to.
    """
    cores = processors()
    return {
        "name": platform.node() or "unavailable: the machine has no name",
        "cpu": _cpu(root),
        "gpu": _gpu(),
        "cores": cores,
        "threads": threads or cores,
        "memory_bytes": memory.total_bytes(root) or "unavailable: no /proc/meminfo",
        "os": f"{platform.system()} {platform.release()}, {_os_name(root)}",
        "python": platform.python_version(),
        "versions": versions(),
        "git_commit": git_commit(Path(__file__).parent),
        **state(root),
    }


def title(gpu: bool, root: Path = ROOT) -> str:
    """What to call the machine: its GPU where that is meant and nvidia-smi knows it, else its processor or board."""
    name = _nvidia_smi("name") if gpu else "unavailable"
    return _cpu(root) if name.startswith("unavailable") else name


def state(root: Path = ROOT) -> dict[str, Any]:
    """What changes while a machine works: clock, governor, power mode, temperature, throttling, other load."""
    return {
        "frequency_mhz": _read(lambda: _frequency(root), "the kernel tells no clock frequency"),
        "governor": _read(
            lambda: _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"), "no cpufreq in this kernel"
        ),
        "power_mode": _command(["nvpmodel", "-q"], "not a Jetson"),
        "temperature_c": _read(lambda: _temperature(root), "no thermal zone that can be read"),
        "throttled": _read(lambda: _throttled(root), "a count of throttling cannot be read"),
        "gpu_state": _gpu_state(),
        "load_average": _read(lambda: float(_text(root / "proc/loadavg").split()[0]), "no /proc/loadavg"),
    }


def waited_seconds(root: Path = ROOT) -> float | None:
    """For how long this process's threads, added up, were ready to run while others had the processors; None where
    the kernel does not count it. Source: Linux, Documentation/scheduler/sched-stats.rst (schedstat's second field)."""
    try:
        waits = [int(_text(path).split()[1]) for path in (root / "proc/self/task").glob("*/schedstat")]
    except (OSError, ValueError, IndexError):
        return None
    return sum(waits) / 1e9 if waits else None


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of what a measurement depends on, or of these distributions, without those that are not here."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path) -> str:
    """The commit of vlmc's own sources, "+changes" where files differ from it."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit[:12] + ("+changes" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, ValueError) as error:
        return f"unavailable: {error}"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError("vlmc is not run from a git checkout")
    return done.stdout.strip()


def _cpu(root: Path) -> str:
    """x86 names its model in /proc/cpuinfo, Arm boards in the device tree."""
    try:
        text = (root / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    named = found.group(1).strip() if found else _board(root)
    return named or platform.processor() or platform.machine()


def _board(root: Path) -> str:
    """What the device tree calls the board; empty where there is none."""
    try:
        return (root / "proc/device-tree/model").read_text(errors="replace").strip("\0 \n")
    except OSError:
        return ""


def _gpu() -> str:
    return _nvidia_smi("name,driver_version")


def _gpu_state() -> str:
    """Clocks, temperature, power and why the clocks are held back, of the GPU that vlmc runs on."""
    return _nvidia_smi("clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_throttle_reasons.active")


def _nvidia_smi(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={nvidia.name()}"]
    return _command(command, "no NVIDIA driver")


def _os_name(root: Path) -> str:
    try:
        found = re.search(r'^PRETTY_NAME="?([^"\n]+)', (root / "etc/os-release").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else "unnamed distribution"


def _frequency(root: Path) -> float:
    """The mean over the cores, in MHz: as cpufreq reads it, else as the processor reports it."""
    files = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    if files:
        clocks = [int(_text(path)) / 1000 for path in files]
    else:
        clocks = [float(mhz) for mhz in re.findall(r"cpu MHz\s*:\s*([\d.]+)", _text(root / "proc/cpuinfo"))]
    if not clocks:
        raise ValueError
    return round(sum(clocks) / len(clocks), 1)


def _temperature(root: Path) -> float:
    """The hottest thermal zone, in degrees Celsius."""
    zones = []
    for path in (root / "sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            zones.append(int(_text(path)) / 1000)
        except (OSError, ValueError):
            continue  # a zone that is switched off answers with an error
    return max(zones)


def _throttled(root: Path) -> str:
    """ "no", or what slowed the processor down since it started; each maker counts in a place of its own."""
    if shutil.which("vcgencmd"):  # Raspberry Pi: bits 0-3 now, 16-19 since the start
        answer = _command(["vcgencmd", "get_throttled"], "vcgencmd does not answer")
        return "no" if answer == "throttled=0x0" else answer
    counts = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/package_throttle_count"))
    if not counts:
        return "unavailable: the kernel counts no throttling here"
    events = max(int(_text(path)) for path in counts)
    return f"{events} thermal events since the machine started" if events else "no"


def _read(read: Callable[[], Any], reason: str) -> Any:
    try:
        return read()
    except (OSError, ValueError):
        return f"unavailable: {reason}"


def _command(command: list[str], reason: str) -> str:
    """The command's answer in one line, or why there is none."""
    if not shutil.which(command[0]):
        return f"unavailable: {reason}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unavailable: {error}"
    lines = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip().splitlines()
    answer = ", ".join(line.strip() for line in lines) or "no answer"
    return answer if done.returncode == 0 else f"unavailable: {answer[:200]}"


def _text(path: Path) -> str:
    return path.read_text().strip()
