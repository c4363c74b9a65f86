from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from vlmc.profiles import machine, memory
from vlmc.profiles.device import load_device


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_a_known_machine_is_described(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/cpuinfo": "processor : 0\nmodel name\t: Acme 9000\ncpu MHz\t\t: 1000.0\n\ncpu MHz\t: 2000.0\n",
            "proc/meminfo": "MemTotal:       1024 kB\nMemAvailable:    512 kB\n",
            "proc/loadavg": "0.25 0.1 0.1 1/100 1234\n",
            "etc/os-release": 'NAME="X"\nPRETTY_NAME="Acme Linux 3"\n',
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
            "sys/class/thermal/thermal_zone0/temp": "41000\n",
            "sys/class/thermal/thermal_zone1/temp": "55500\n",
            "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "0\n",
        },
    )
    got = machine.describe(3, root)
    assert got["cpu"] == "Acme 9000"
    assert got["threads"] == 3
    assert got["memory_bytes"] == 1024 * 1024
    assert got["os"].endswith("Acme Linux 3")
    assert got["frequency_mhz"] == 1500.0
    assert got["governor"] == "performance"
    assert got["temperature_c"] == 55.5
    assert got["throttled"] == "no"
    assert got["load_average"] == 0.25


def test_what_cannot_be_read_says_why_and_is_never_zero(tmp_path: Path) -> None:
    got = machine.describe(0, tmp_path)
    for key in ("memory_bytes", "frequency_mhz", "governor", "temperature_c", "load_average"):
        assert str(got[key]).startswith("unavailable: "), key
    assert got["threads"] == got["cores"] == len(os.sched_getaffinity(0))


def test_cpufreq_is_believed_over_the_nominal_clock(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/cpuinfo": "cpu MHz : 9999.0\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "600000\n",
        },
    )
    assert machine.state(root)["frequency_mhz"] == 1050.0


def test_an_arm_board_is_named_by_its_device_tree(tmp_path: Path) -> None:
    root = tree(
        tmp_path, {"proc/cpuinfo": "processor : 0\n", "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"}
    )
    assert machine.describe(1, root)["cpu"] == "Raspberry Pi 5 Model B Rev 1.0"


@pytest.mark.parametrize(
    ("name", "model", "says"),
    [
        ("rpi5", "Raspberry Pi 5 Model B Rev 1.0\0", ""),
        ("rpi5", "Raspberry Pi 4 Model B Rev 1.4\0", "Raspberry Pi 4 Model B Rev 1.4, and no Raspberry Pi 5"),
        ("rpi5", "", "no board that a device tree names, and no Raspberry Pi 5"),
        ("jetson-nano", "NVIDIA Jetson Nano Developer Kit\0", ""),
        ("cpu-arm", "Raspberry Pi 4 Model B Rev 1.4\0", ""),
        ("cpu-arm", "", ""),
        ("cpu", "Raspberry Pi 5 Model B Rev 1.0\0", "aarch64, and x86-64 CPU is x86_64"),
    ],
)
def test_an_arm_machine_is_a_device_by_its_board(
    name: str, model: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    root = tree(tmp_path, {"proc/device-tree/model": model} if model else {})
    assert machine.other_than(load_device(name), root) == (f"this machine is {says}" if says else "")


def test_other_systems_names_of_an_architecture_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "AMD64")
    assert machine.other_than(load_device("cpu")) == ""


def test_a_machine_is_called_by_its_gpu_where_that_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0"})
    monkeypatch.setattr(machine, "_nvidia_smi", lambda fields: "NVIDIA H200")
    assert machine.title(gpu=True, root=root) == "NVIDIA H200"
    assert machine.title(gpu=False, root=root) == "NVIDIA Jetson AGX Orin Developer Kit"
    monkeypatch.setattr(machine, "_nvidia_smi", lambda fields: "unavailable: no NVIDIA driver")
    assert machine.title(gpu=True, root=root) == "NVIDIA Jetson AGX Orin Developer Kit"


def test_throttling_is_told_with_its_count(tmp_path: Path) -> None:
    root = tree(tmp_path, {"sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "7\n"})
    assert machine.state(root)["throttled"] == "7 thermal events since the machine started"


def test_a_count_of_throttling_that_cannot_be_read_does_not_end_the_profile(tmp_path: Path) -> None:
    root = tree(tmp_path, {"sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": ""})
    assert machine.state(root)["throttled"] == "unavailable: a count of throttling cannot be read"


def test_a_thermal_zone_that_is_switched_off_does_not_hide_the_others(tmp_path: Path) -> None:
    root = tree(
        tmp_path, {"sys/class/thermal/thermal_zone0/temp": "", "sys/class/thermal/thermal_zone1/temp": "30000\n"}
    )
    assert machine.state(root)["temperature_c"] == 30.0


def test_versions_list_only_what_is_installed() -> None:
    assert set(machine.versions()) <= set(machine.PACKAGES)
    assert {"numpy", "tensorrt-rtx-cu13"} <= set(machine.versions())
    assert set(machine.versions(("numpy", "no such package"))) == {"numpy"}


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert machine.git_commit(tmp_path) == "unavailable: vlmc is not run from a git checkout"


def test_memory_is_read_in_bytes(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/status": "Name:\tx\nVmPeak:\t  900 kB\nVmHWM:\t  100 kB\nVmRSS:\t   50 kB\n",
            "proc/meminfo": "MemTotal:       4096 kB\nMemFree:  1 kB\nMemAvailable:   2048 kB\nSwapFree: 512 kB\n",
        },
    )
    assert memory.peak_rss_bytes(root) == 100 * 1024
    assert memory.available_bytes(root) == 2048 * 1024
    assert memory.obtainable_bytes(root) == (2048 + 512) * 1024
    assert memory.total_bytes(root) == 4096 * 1024


def test_without_proc_memory_is_unknown(tmp_path: Path) -> None:
    assert memory.peak_rss_bytes(tmp_path) is None
    assert memory.available_bytes(tmp_path) is None
    assert memory.obtainable_bytes(tmp_path) is None


def test_a_system_without_swap_has_what_is_available(tmp_path: Path) -> None:
    assert memory.obtainable_bytes(tree(tmp_path, {"proc/meminfo": "MemAvailable:  7 kB\n"})) == 7 * 1024


@pytest.mark.parametrize("garbage", ["", "VmHWM: lots\n", "VmHWM:\t 12\n", "\0\0"])
def test_a_garbled_status_is_unknown_rather_than_wrong(tmp_path: Path, garbage: str) -> None:
    assert memory.peak_rss_bytes(tree(tmp_path, {"proc/self/status": garbage})) is None


@pytest.mark.parametrize("own", [None, 300])
def test_the_gpus_memory_of_other_processes_is_not_ours(own: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    running = [
        SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=900),
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=own),
    ]
    fake = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=lambda gpu: running,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    unknown = "unavailable: the driver does not tell this process's share (as inside a container)"
    assert memory.device_bytes() == (own or unknown)


def test_waiting_is_told_in_seconds(tmp_path: Path) -> None:
    root = tree(
        tmp_path, {"proc/self/task/1/schedstat": "5 1500000000 9\n", "proc/self/task/2/schedstat": "5 500000000 9\n"}
    )
    assert machine.waited_seconds(root) == 2.0
