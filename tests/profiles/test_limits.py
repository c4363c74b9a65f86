from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from vlmc.profiles import limits
from vlmc.profiles.device import load_device

GIB = 1 << 30


def machine(root: Path, caches: list[str], free_gib: float) -> Path:
    for index, size in enumerate(caches):
        path = root / f"sys/devices/system/cpu/cpu0/cache/index{index}/size"
        path.parent.mkdir(parents=True)
        path.write_text(size + "\n")
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemAvailable: {int(free_gib * (1 << 20))} kB\n")
    return root


@pytest.mark.parametrize(
    ("caches", "free", "wanted"),
    [
        (["48K", "2048K", "266240K"], 24, 4 * 266240 * 1024),  # a server: four times its 260 MiB
        (["32K", "1M"], 24, GIB),  # a small cache: 1 GiB is far larger
        (["64K", "512K"], 0.5, GIB // 8),  # a board with little memory left: a quarter of it
    ],
)
def test_the_buffer_is_far_larger_than_the_caches(tmp_path: Path, caches: list[str], free: float, wanted: int) -> None:
    root = machine(tmp_path, caches, free)
    assert limits.buffer_bytes(limits.largest_cache(root), root) == wanted


def test_rates_are_those_of_the_work_that_is_timed_in_units_of_ten_to_the_ninth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[Any] = []

    def best(work: Callable[[], Any]) -> float:
        done.append(work())
        return 0.001

    monkeypatch.setattr(limits, "_fastest", best)
    monkeypatch.setattr(limits, "READ", 24_000_000)
    assert limits.read_gb_per_s(8_000_000, 2) == pytest.approx(24.0)
    assert done.pop() == [[1, 1, 1]] * 2  # each thread's maximum, three times over
    assert limits.read_gb_per_s(32_000_000, 2) == pytest.approx(32.0)
    assert done.pop() == [[1]] * 2
    assert limits.float32_gflop_per_s(100, 1) == pytest.approx(2.0)
    for product in (done.pop(), done.pop()):  # ONNX Runtime's and numpy's
        np.testing.assert_array_equal(product, np.full((100, 100), 0.5 * 0.5 * 100))
    assert limits.int8_gop_per_s(100, 1) == pytest.approx(2.0)
    np.testing.assert_array_equal(done.pop(), np.full((100, 100), 1 * 3 * 100))


def test_a_limit_is_the_fastest_of_all_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    now, tries = [0.0], iter([0.3, 0.1, 0.2])
    monkeypatch.setattr(limits, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    assert limits._fastest(lambda: now.append(now.pop() + next(tries))) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("kind", "given", "product"),
    [
        (limits.INT8, np.full((4, 4), 129, np.uint8), (129 - 128) * 3 * 4),
        (limits.FLOAT, np.ones((4, 4), np.float32), 2),
    ],
)
def test_the_hand_written_models_are_valid_onnx_and_multiply(kind: int, given: Any, product: int) -> None:
    model = limits._model(4, kind)
    onnx.checker.check_model(onnx.load_from_string(model))
    (got,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": given})
    assert (got == product).all()


def test_without_onnxruntime_int8_is_unavailable_and_float_is_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    monkeypatch.setattr(limits, "_fastest", lambda work: 0.001 if work() is not None else 0)
    assert str(limits.int8_gop_per_s(64, 1)).startswith("unavailable: onnxruntime")
    assert limits.float32_gflop_per_s(100, 1) == pytest.approx(2.0)


@pytest.mark.parametrize(("seconds", "rate"), [((0.004, 0.001), 2.0), ((0.001, 0.004), 2.0)])
def test_the_faster_of_two_float_products_is_the_limit(
    seconds: tuple[float, float], rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy's BLAS has half of ONNX Runtime's rate on a processor that it does not know."""
    tries = iter(seconds)
    monkeypatch.setattr(limits, "_fastest", lambda work: next(tries))
    assert limits.float32_gflop_per_s(100, 1) == pytest.approx(rate)


def test_a_data_sheet_stands_in_for_a_gpu_and_says_so() -> None:
    got = limits.from_data_sheet(load_device("orin"))
    assert got["read_gb_per_s"] == 204.8
    assert got["int8_gop_per_s"] == 85_000
    assert "not measured" in got["how"]
    assert limits.from_data_sheet(load_device("thor"))["int8_gop_per_s"].startswith("unavailable")


def test_of_two_measurements_the_higher_rates_count() -> None:
    one = {"read_gb_per_s": 10.0, "int8_gop_per_s": "unavailable: x", "how": "so"}
    other = {"read_gb_per_s": 12.0, "int8_gop_per_s": "unavailable: x", "how": "so"}
    assert limits.best(one, other) == other
    assert limits.best(other, one) == other
