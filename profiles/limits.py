"""How fast this machine can read memory and multiply: the roof under which every engine stays (Williams, Waterman &
Patterson 2009, "Roofline"), measured in a process of its own with the thread count of the profile.

    python -m vlmc.profiles.limits THREADS    prints the answer as JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import VlmcError
from ..runtime.backends import processors
from . import memory
from .device import Device
from .process import command, replies

SECONDS = 0.6  # each limit is the best of as many tries as fit: a limit is what no try exceeds
GIB, MIB = 1 << 30, 1 << 20
FLOAT, UINT8, INT8, INT32 = 1, 2, 3, 6  # onnx.proto's
CACHE_THAT_HOLDS_A_MODEL = 16 * MIB
READ = 256 * MIB  # bytes of one try


def measure(threads: int) -> dict[str, Any]:
    """{"read_gb_per_s", "cached_read_gb_per_s", "cache_bytes", "float32_gflop_per_s", "int8_gop_per_s", "how"}; what
    cannot be measured says why. Engines whose bytes fit the largest cache are bounded by the cached rate."""
    count = str(threads or processors())
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), count)
    done = subprocess.run(
        command(sys.executable, __name__, count), capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise VlmcError("The limits of this machine could not be measured", found=last)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def best(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The higher of each rate: two measurements some time apart, for a machine may have been busy during one."""
    return {
        key: max(value, other[key]) if isinstance(value, float) and isinstance(other.get(key), float) else value
        for key, value in one.items()
    }


def from_data_sheet(device: Device) -> dict[str, Any]:
    """The same for a device whose accelerator numpy cannot reach: its data sheet's figures."""

    def known(figure: float | None) -> float | str:
        return figure * 1000 if figure is not None else "unavailable: no published figure"

    return {
        "read_gb_per_s": device.dram_gb_per_s or "unavailable: no published figure",
        "float32_gflop_per_s": known(device.peak_fp32_tflops),
        "float16_gflop_per_s": known(device.peak_fp16_tflops),
        "int8_gop_per_s": known(device.peak_int8_tops),
        "how": f"figures of the maker ({device.name}.toml names the sources), not measured",
    }


def main(threads: int) -> dict[str, Any]:
    cache, side = largest_cache(), 1024  # larger matrices leave the caches that the fastest products live in
    size = buffer_bytes(cache)
    return {
        "read_gb_per_s": read_gb_per_s(size, threads),
        "cached_read_gb_per_s": read_gb_per_s(cache // 4, threads)
        if cache >= CACHE_THAT_HOLDS_A_MODEL
        else "unavailable: no cache here holds a model",
        "cache_bytes": cache,
        "float32_gflop_per_s": float32_gflop_per_s(side, threads),
        "int8_gop_per_s": int8_gop_per_s(side, threads),
        "how": f"the best tries of {SECONDS} s each on {threads} threads, before and after the profile: numpy's "
        f"maximum over {size / GIB:.2f} GiB (the largest cache is {cache / MIB:.0f} MiB) and over a quarter of the "
        f"cache; float32 product {side}×{side} in numpy and in ONNX Runtime; u8×s8 product of that size there",
    }


def largest_cache(root: Path = Path("/")) -> int:
    """Bytes of the largest cache that the first core uses; 0 where the kernel does not tell."""
    caches = [0]
    for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = path.read_text().strip()
        caches.append(int(number.rstrip("KMG")) * {"K": 1 << 10, "M": MIB, "G": GIB}.get(number[-1:], 1))
    return max(caches)


def buffer_bytes(cache: int, root: Path = Path("/")) -> int:
    """At least 1 GiB and four times the largest cache, so that reading it means reading memory; at most a quarter of
    what is free, which only matters on machines whose caches are small too."""
    wanted = max(GIB, 4 * cache)
    free = memory.available_bytes(root)
    return wanted if free is None else min(wanted, free // 4)


def read_gb_per_s(size: int, threads: int) -> float:
    """10^9 bytes a second that `threads` threads read together, each its own part, over and over where handing out the
    parts would else take longer than reading them."""
    parts, times = np.array_split(np.ones(size // 8, np.int64), threads), max(1, READ // size)

    def read(part: Any) -> list[Any]:
        # The maximum of integers: one comparison a word, vectorised and without the GIL; it reads as fast as C does.
        return [np.max(part) for _ in range(times)]

    with ThreadPoolExecutor(threads) as pool:
        return times * size / _fastest(lambda: list(pool.map(read, parts))) / 1e9


def float32_gflop_per_s(side: int, threads: int) -> float:
    """10^9 operations a second, a multiply-add being two: numpy's, whose BLAS has its thread count from the
    environment, or ONNX Runtime's where that is faster. On a processor that it does not know BLAS takes an older one's
    kernels, on a Zen 5 with half the rate."""
    left = np.full((side, side), 0.5, np.float32)
    product = _product(_model(side, FLOAT), threads)
    seconds = _fastest(lambda: left @ left)
    if product is not None:
        seconds = min(seconds, _fastest(lambda: product(left)))
    return 2 * side**3 / seconds / 1e9


def int8_gop_per_s(side: int, threads: int) -> float | str:
    """The same for products of 8-bit integers, where ONNX Runtime is installed: numpy has none."""
    product = _product(_model(side, INT8), threads)
    if product is None:
        return "unavailable: onnxruntime is not installed, and numpy has no fast int8 product"
    left = np.full((side, side), 129, np.uint8)
    return 2 * side**3 / _fastest(lambda: product(left)) / 1e9


def _product(model: bytes, threads: int) -> Callable[[Any], Any] | None:
    """ONNX Runtime's product of an array by the model's constant; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda left: session.run(None, {"x": left})[0]


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest try."""
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _model(side: int, kind: int) -> bytes:
    """An ONNX file with one product of x by a constant matrix, of floats (x by 0.5) or of integers (x, u8 with zero
    point 128, by 3, s8), written field by field, for the package onnx is not on the device. Numbers: onnx.proto."""
    given, made = (FLOAT, FLOAT) if kind == FLOAT else (UINT8, INT32)
    operator, names = (b"MatMul", [b"x", b"w"]) if kind == FLOAT else (b"MatMulInteger", [b"x", b"w", b"zero"])
    weights = np.full(side * side, 0.5, np.float32).tobytes() if kind == FLOAT else bytes([3]) * side * side

    def tensor(name: bytes, kind: int, dims: tuple[int, ...], data: bytes) -> bytes:
        return b"".join(_number(1, dim) for dim in dims) + _number(2, kind) + _bytes(8, name) + _bytes(9, data)

    def value(name: bytes, kind: int) -> bytes:
        shape = _bytes(1, _number(1, side)) * 2
        return _bytes(1, name) + _bytes(2, _bytes(1, _number(1, kind) + _bytes(2, shape)))

    node = b"".join(_bytes(1, name) for name in names) + _bytes(2, b"y") + _bytes(4, operator)
    graph = (
        _bytes(1, node)
        + _bytes(2, b"product")
        + _bytes(5, tensor(b"w", kind, (side, side), weights))
        + (_bytes(5, tensor(b"zero", UINT8, (), bytes([128]))) if b"zero" in names else b"")
        + _bytes(11, value(b"x", given))
        + _bytes(12, value(b"y", made))
    )
    return _number(1, 8) + _bytes(7, graph) + _bytes(8, _bytes(1, b"") + _number(2, 13))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


if __name__ == "__main__":
    with replies() as answer:
        json.dump(main(int(sys.argv[1])), answer)
