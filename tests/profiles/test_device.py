from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmc.errors import VlmcError
from vlmc.profiles.device import FOLDER, device_names, load_device

MISSION = {"cpu", "rpi4", "rpi5", "orin", "thor", "gb10", "jetson-nano", "xavier-nx", "snapdragon8gen3"}
FIGURES = ("memory_gb", "memory_budget_gb", "latency_budget_ms", "dram_gb_per_s", "peak_", "tensorrt ")


def test_the_devices_that_the_mission_names_are_there() -> None:
    assert set(device_names()) >= MISSION


@pytest.mark.parametrize("name", device_names())
def test_every_device_is_whole(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    assert device.backends
    assert device.typing in ("weak", "strong")
    assert device.handover.endswith(".")
    assert device.architecture in ("x86_64", "aarch64")
    assert ("tensorrt" in device.backends) <= (device.tensorrt is not None)


@pytest.mark.parametrize("name", device_names())
def test_every_figure_names_its_source(name: str) -> None:
    for line in (FOLDER / f"{name}.toml").read_text().splitlines():
        if line.startswith(FIGURES):
            assert re.search(r"# .{4,}", line), line


@pytest.mark.parametrize("name", device_names())
def test_the_peaks_are_in_the_order_that_hardware_has(name: str) -> None:
    device = load_device(name)
    known = [x for x in (device.peak_fp32_tflops, device.peak_fp16_tflops, device.peak_int8_tops) if x is not None]
    assert known == sorted(known)


def test_the_tiers_of_the_seed_are_carried() -> None:
    assert (load_device("xavier-nx").memory_budget_gb, load_device("xavier-nx").latency_budget_ms) == (4, 150)
    assert (load_device("orin").memory_budget_gb, load_device("orin").latency_budget_ms) == (16, 30)


def test_only_what_tensorrt_rtx_can_build_is_said_to_be_built_ahead_of_time() -> None:
    for device in map(load_device, device_names()):
        if device.backends[0] == "tensorrt_rtx":
            assert device.sm in (75, 80, 86, 89, 120, 121)  # anchors.md, "TensorRT facts"
        if device.backends[0] == "tensorrt":
            assert not device.ahead_of_time


def test_an_unknown_figure_is_none_and_not_zero() -> None:
    assert load_device("gb10").peak_int8_tops is None


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(VlmcError, match=r"no device 'orin-nanno'.*nearest: orin-nano"):
        load_device("orin-nanno")


@pytest.mark.parametrize("name", ["../cpu", "", "cpu.toml", "/etc/passwd"])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(VlmcError, match="There is no device"):
        load_device(name)


@given(st.binary(max_size=200))
def test_a_damaged_file_is_a_sentence(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder: Path = tmp_path_factory.mktemp("devices")
    (folder / "x.toml").write_bytes(data)
    with pytest.raises(VlmcError):
        load_device("x", folder)


def test_a_field_that_is_missing_is_mended_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('title = "X"')
    with pytest.raises(VlmcError, match=rf"lacks the field.*To mend it: mend {tmp_path / 'x.toml'}\."):
        load_device("x", tmp_path)


def test_a_misspelt_field_is_refused(tmp_path: Path) -> None:
    for line, field in (("memory_bg = 3", "memory_bg"), ('name = "y"', "name")):  # the file has the name
        (tmp_path / "x.toml").write_text(f"{(FOLDER / 'cpu.toml').read_text()}\n{line}\n")
        with pytest.raises(VlmcError, match=f"fields that no device has. Found: {field}"):
            load_device("x", tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            'backends = ["onnxruntime", "openvno"]',
            r"has backends that vlmc does not have. Found: openvno. Expected: .*openvino",
        ),
        ("backends = []", "names no backend"),
        ('power_sources = ["raple"]', r"has power_sources that vlmc does not have. Found: raple. Expected: .*rapl"),
        ('tensorrt = "ten"', 'has no version of TensorRT. Found: ten. Expected: one like "10.3"'),
    ],
)
def test_a_misspelt_value_is_refused_with_those_that_there_are(line: str, says: str, tmp_path: Path) -> None:
    key = line.split(" =")[0]
    lines = [text for text in (FOLDER / "cpu.toml").read_text().splitlines() if not text.startswith(f"{key} =")]
    (tmp_path / "x.toml").write_text("\n".join([*lines, line]))
    with pytest.raises(VlmcError, match=rf"{says}.*To mend it: mend {tmp_path / 'x.toml'}\."):
        load_device("x", tmp_path)
