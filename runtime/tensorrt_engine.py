"""A loaded TensorRT engine: its tensors, their buffers, and execution contexts. On NumPy and cuda-bindings alone.

`trt` is the module `tensorrt` everywhere, or one with its API, as `tensorrt_rtx` is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import EngineSpec
from ..errors import VlmcError
from . import backends
from .cuda import Gpu, architecture

ENGINE = "engine.trt"  # the file of an engine in its folder
APART = ("tiles", "texts")  # free sizes of things that have nothing to do with one another


@functools.cache  # TensorRT keeps the process's first logger: where that was freed, a later builder hangs
def logger(trt: Any) -> Any:
    """Keeps what TensorRT would print: `errors` and `warnings`, the newest last, which are replaced to begin anew."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # chosen at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors.append(message.strip())
            elif int(severity) == int(trt.ILogger.WARNING):
                self.warnings.append(message.strip())

    return Logger()


def title(trt: Any) -> str:
    """`TensorRT-RTX 1.7.1.116`."""
    return f"{backends.title(trt.__name__)} {trt.__version__}"


def scratch_bytes(engine: Any) -> int:
    """Device memory that an ICudaEngine needs while it runs. Its name has changed: 8.6 knows the older one alone,
    TensorRT 11 and TensorRT-RTX the newer one alone."""
    newer = hasattr(engine, "device_memory_size_v2")
    return int(engine.device_memory_size_v2 if newer else engine.device_memory_size)


def new_context(trt: Any, engine: Any) -> Any:
    """An IExecutionContext that is still to be given its scratch memory."""
    log = logger(trt)
    log.errors = []
    if hasattr(trt, "ExecutionContextAllocationStrategy"):  # TensorRT 10 on
        made = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    else:
        made = engine.create_execution_context_without_device_memory()
    if made is None:  # 8.6 and half of its engines of CLIP's text encoder: "Myelin internal error"
        raise VlmcError(
            f"{title(trt)} cannot run an engine that it has built",
            found="; ".join(log.errors[-2:]) or "no message",
            fix="build it again; should that fail too, delete timing.cache in the folder of the device's engines first,"
            " so that it times its kernels anew and may take others",
        )
    return made


def batch_dimension(shapes: Sequence[Sequence[int | str]]) -> str:
    """The name of the size that is the first axis of all inputs and outputs of a component, these being their shapes,
    and counts things that are apart: the inputs can then be run in parts. Empty where there is none."""
    first = {shape[0] if shape else 1 for shape in shapes}
    name = first.pop()
    return name if not first and isinstance(name, str) and name in APART else ""


class Engine:
    """A loaded engine, a buffer for each of its tensors, as large as its profiles allow, and shared scratch memory."""

    def __init__(self, trt: Any, gpu: Gpu, spec: EngineSpec, path: Path) -> None:
        self.gpu, self._trt = gpu, trt
        self._check(spec, path)
        log = logger(trt)
        log.errors = []
        self._runtime = trt.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise VlmcError(
                f"{title(trt)} cannot load {path}",
                found="; ".join(log.errors[-2:]) or "no message",
                fix="build the engine again on this machine; if memory is short, end what else runs on the GPU",
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self.inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if modes[name] != trt.TensorIOMode.INPUT]
        self.dtypes = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self.profiles = [self._largest_shapes(index) for index in range(self._engine.num_optimization_profiles)]
        self._scratch_bytes = scratch_bytes(self._engine)
        self._scratch = gpu.allocate(self._scratch_bytes)

    def _check(self, spec: EngineSpec, path: Path) -> None:
        """Refuses an engine of another TensorRT or another kind of GPU by name: loading it would fail without one."""
        here = {"version": str(self._trt.__version__), "sm": architecture()}
        for what, name in (
            ("version", f"version of {backends.title(self._trt.__name__)}"),
            ("sm", "GPU architecture (SM)"),
        ):
            if spec.settings.get(what) != here[what]:
                raise VlmcError(
                    f"The engine {path} was built for another {name}",
                    found=str(spec.settings.get(what)),
                    expected=str(here[what]),
                    fix=f"run `vlmc build ARTEFACT --device {spec.device}` on this machine",
                )

    def _largest_shapes(self, profile: int) -> dict[str, tuple[int, ...]]:
        """Each input's largest shape in the profile."""
        fixed = {name: tuple(self._engine.get_tensor_shape(name)) for name in self.inputs}
        return {
            name: tuple(self._engine.get_tensor_profile_shape(name, profile)[2]) if -1 in shape else shape
            for name, shape in fixed.items()
        }

    def smallest(self, name: str, profile: int) -> tuple[int, ...]:
        """The input's smallest shape in the profile."""
        fixed = tuple(self._engine.get_tensor_shape(name))
        return tuple(self._engine.get_tensor_profile_shape(name, profile)[0]) if -1 in fixed else fixed

    def context(self) -> Context:
        """An execution context. All use the same scratch memory, so only one may run at a time."""
        made = new_context(self._trt, self._engine)
        if hasattr(made, "set_device_memory"):  # 10.1 on
            made.set_device_memory(self._scratch, self._scratch_bytes)
        else:
            made.device_memory = self._scratch
        return Context(made, self.gpu.stream)

    def output_shapes(self, context: Context) -> dict[str, tuple[int, ...]]:
        """Of every output, for the input shapes that the context has."""
        return {name: context.shape(name) for name in self.outputs}

    def allocate(self, context: Context) -> dict[str, int]:
        """A buffer for every tensor, by name."""
        sizes: dict[str, int] = {}
        for index, shapes in enumerate(self.profiles):
            context.use_profile(index, shapes)
            for name, shape in (shapes | self.output_shapes(context)).items():
                size = int(np.prod(shape)) * self.dtypes[name].itemsize
                sizes[name] = max(sizes.get(name, 0), size)
        return {name: self.gpu.allocate(size) for name, size in sizes.items()}


class Context:
    """An execution context that remembers its profile."""

    def __init__(self, context: Any, stream: int) -> None:
        self._context, self._stream = context, stream
        self._profile = -1

    def use_profile(self, index: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if index != self._profile:
            if not self._context.set_optimization_profile_async(index, self._stream):
                raise VlmcError("The engine has no such optimisation profile", found=str(index))
            self._profile = index
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise VlmcError(f"The engine does not take {name} of this shape", found=str(shape))

    def bind(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise VlmcError("The engine takes no buffer for a tensor", found=name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._context.get_tensor_shape(name))

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise VlmcError("The engine does not run", fix="see `nvidia-smi`; build the engine again on this machine")
