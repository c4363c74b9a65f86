"""What vlmc says of a GPU, and of what CUDA answers. The driver is a stand-in; see benchmarks/ for a real one."""

from __future__ import annotations

import sys
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vlmc.errors import VlmcError
from vlmc.runtime import cuda


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


def driver(**answers: Any) -> Any:
    """The driver's module; each answer is what a function returns beside success, or the Result that it fails with."""

    def function(answer: Any) -> Any:
        return lambda *_: (answer,) if isinstance(answer, Result) else (Result.CUDA_SUCCESS, *answer)

    known = {"cuInit": (), "cuDeviceGet": (0,), "cuDevicePrimaryCtxRetain": (1,), "cuCtxSetCurrent": ()}
    known |= {"cuStreamCreate": (7,), "cuMemsetD8Async": (), "cuMemAlloc": (4096,), "cuMemGetInfo": (10, 20)}
    known |= {"cuMemFree": ()}
    functions = {name: function(answer) for name, answer in (known | answers).items()}
    attributes = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )
    capability = {"major": (8,), "minor": (7,)}
    return SimpleNamespace(
        **functions,
        CUdevice_attribute=attributes,
        CUstream_flags=SimpleNamespace(CU_STREAM_NON_BLOCKING=1),
        cuDeviceGetAttribute=lambda name, device: (Result.CUDA_SUCCESS, *capability[name]),
    )


def install(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.driver = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)


def test_a_gpu_is_known_by_its_sm(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, driver())
    assert cuda.architecture() == 87


def test_without_the_bindings_the_reason_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "pip install 'vlm-compile[tensorrt]'" in str(cuda.architecture())


def test_without_a_driver_or_a_gpu_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: int) -> None:
        raise RuntimeError("Failure finding libcuda.so")

    install(monkeypatch, SimpleNamespace(cuInit=missing))
    assert cuda.architecture() == "no NVIDIA driver is installed"
    install(monkeypatch, driver(cuInit=Result.CUDA_ERROR_NO_DEVICE))
    assert cuda.architecture() == "the NVIDIA driver shows no usable GPU: CUDA_ERROR_NO_DEVICE"


def test_too_little_memory_is_a_sentence_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, driver(cuMemAlloc=Result.CUDA_ERROR_OUT_OF_MEMORY))
    with pytest.raises(
        VlmcError, match=r"too little free memory\. Found: CUDA_ERROR_OUT_OF_MEMORY.*smaller --capacity"
    ):
        cuda.Gpu().allocate(1 << 40)


def test_any_other_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, driver(cuMemsetD8Async=Result.CUDA_ERROR_ILLEGAL_ADDRESS))
    with pytest.raises(VlmcError, match=r"CUDA refused a call\. Found: CUDA_ERROR_ILLEGAL_ADDRESS"):
        cuda.Gpu().allocate(16)


def test_free_memory_and_addresses_are_plain_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, driver())
    gpu = cuda.Gpu()
    assert (gpu.stream, gpu.allocate(16), gpu.free_bytes()) == (7, 4096, 10)


def test_memory_is_zeroed_in_line_with_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = driver(), []
    made.cuMemsetD8Async = lambda *arguments: calls.append(arguments) or (Result.CUDA_SUCCESS,)
    install(monkeypatch, made)
    gpu = cuda.Gpu()
    gpu.allocate(16)
    assert calls == [(4096, 0, 16, gpu.stream)], "on another stream the zeros may come late"


def test_memory_goes_with_the_last_user_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = driver(), []
    made.cuMemFree = lambda address: calls.append(address) or (Result.CUDA_SUCCESS,)
    install(monkeypatch, made)
    gpu = cuda.Gpu()
    gpu.allocate(16)
    gpu.allocate(16)
    assert calls == []
    del gpu
    assert calls == [4096, 4096]


def test_a_graph_that_nobody_can_launch_any_more_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = driver(cuStreamBeginCapture=(), cuStreamEndCapture=(11,), cuGraphInstantiate=(12,)), []
    made.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    for name in ("cuGraphDestroy", "cuGraphLaunch", "cuGraphExecDestroy"):
        setattr(made, name, lambda *arguments, name=name: calls.append((name, *arguments)) or (Result.CUDA_SUCCESS,))
    install(monkeypatch, made)
    launch = cuda.Gpu().capture(lambda: None)
    launch()
    assert calls == [("cuGraphDestroy", 11), ("cuGraphLaunch", 12, 7)]
    del launch
    assert calls[2:] == [("cuGraphExecDestroy", 12)]
