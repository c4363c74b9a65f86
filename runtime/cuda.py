"""The little of CUDA that a TensorRT engine needs around it: memory, one stream, graphs, and kernels from PTX.

On cuda-bindings alone, the driver API. Nothing here is imported by a CPU backend.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import VlmcError

Array = NDArray[Any]


def architecture() -> int | str:
    """The SM of GPU 0, as 87 for compute capability 8.7; without one a sentence that says why."""
    try:
        driver, device = _open()
    except VlmcError as error:
        return error.what
    names = driver.CUdevice_attribute
    major, minor = (
        checked(driver.cuDeviceGetAttribute(attribute, device))
        for attribute in (
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return int(major) * 10 + int(minor)


def _open() -> tuple[Any, Any]:
    """The driver's module and GPU 0."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise VlmcError(f"cuda-bindings is not installed ({error}); pip install 'vlm-compile[tensorrt]'") from None
    try:
        checked(driver.cuInit(0))
        return driver, checked(driver.cuDeviceGet(0))
    except RuntimeError:  # cuda-bindings' word for a libcuda.so.1 that is not there
        raise VlmcError("no NVIDIA driver is installed") from None
    except VlmcError as error:
        raise VlmcError(f"the NVIDIA driver shows no usable GPU: {error.found}") from None


def checked(result: tuple[Any, ...]) -> Any:
    """The call's value; a VlmcError that names what CUDA answered otherwise."""
    code, *values = result
    if int(code) != 0:
        if code.name == "CUDA_ERROR_OUT_OF_MEMORY":
            raise VlmcError(
                "The GPU has too little free memory",
                found=code.name,
                fix="end what else runs on it, choose a smaller precision, or export with a smaller --capacity",
            )
        raise VlmcError("CUDA refused a call", found=code.name, fix="see `nvidia-smi`; the GPU may need a restart")
    return values[0] if len(values) == 1 else tuple(values)


def _free(free: Callable[[Any], Any], buffers: list[Any]) -> None:
    for address in buffers:
        free(address)


class Gpu:
    """GPU 0's primary context, which TensorRT uses as well, with one stream. Addresses are plain integers."""

    def __init__(self) -> None:
        self._driver, device = _open()
        context = checked(self._driver.cuDevicePrimaryCtxRetain(device))
        checked(self._driver.cuCtxSetCurrent(context))
        self._stream = checked(self._driver.cuStreamCreate(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.stream = int(self._stream)
        self._buffers: list[Any] = []
        end = weakref.finalize(self, _free, self._driver.cuMemFree, self._buffers)
        end.atexit = False  # the driver may be gone by then

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of device memory, zeroed, which live as long as this object."""
        address = checked(self._driver.cuMemAlloc(max(size, 1)))
        self._buffers.append(address)
        # In line with what follows: this stream does not wait for the default one, so what cuMemsetD8 has not reached
        # yet may be read, or be zeroed after it was written.
        checked(self._driver.cuMemsetD8Async(address, 0, max(size, 1), self._stream))
        return int(address)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A host array that copies reach without a detour, kept as long as the process."""
        import ctypes

        size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
        address = checked(self._driver.cuMemAllocHost(size))
        buffer = (ctypes.c_char * size).from_address(int(address))
        return np.frombuffer(buffer, dtype, int(np.prod(shape))).reshape(shape)

    def upload(self, address: int, array: Array) -> None:
        """Queues the copy of a contiguous array; it must stay unchanged until `wait`."""
        checked(self._driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self._stream))

    def download(self, array: Array, address: int) -> None:
        """Queues the copy into the contiguous array, which is filled after `wait`."""
        checked(self._driver.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, self._stream))

    def wait(self) -> None:
        """Until all that was queued is done."""
        checked(self._driver.cuStreamSynchronize(self._stream))

    def free_bytes(self) -> int:
        return int(checked(self._driver.cuMemGetInfo())[0])

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """What `enqueue` puts on the stream, as one CUDA graph; the result launches it, and the graph goes with it."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        checked(self._driver.cuStreamBeginCapture(self._stream, mode))
        try:
            enqueue()
        finally:
            graph = checked(self._driver.cuStreamEndCapture(self._stream))
        ready = checked(self._driver.cuGraphInstantiate(graph, 0))
        checked(self._driver.cuGraphDestroy(graph))
        start, stream = self._driver.cuGraphLaunch, self._stream

        def launch() -> None:
            checked(start(ready, stream))

        end = weakref.finalize(launch, self._driver.cuGraphExecDestroy, ready)
        end.atexit = False  # the driver may be gone by then
        return launch

    def kernel(self, ptx: Path, name: str) -> Callable[[Sequence[int], int, Sequence[int]], None]:
        """A kernel as a function of grid, threads a block, and 64-bit arguments (addresses and numbers alike)."""
        text = np.frombuffer(ptx.read_bytes() + b"\0", np.uint8)
        module = checked(self._driver.cuModuleLoadData(text.ctypes.data))
        function = checked(self._driver.cuModuleGetFunction(module, name.encode()))

        def launch(grid: Sequence[int], block: int, arguments: Sequence[int]) -> None:
            values = [np.array([argument], np.uint64) for argument in arguments]
            addresses = np.array([value.ctypes.data for value in values], np.uint64)
            x, y, z = (*grid, 1, 1)[:3]
            checked(
                self._driver.cuLaunchKernel(function, x, y, z, block, 1, 1, 0, self._stream, addresses.ctypes.data, 0)
            )

        return launch
