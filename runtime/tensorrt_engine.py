"""A loaded TensorRT engine: its tensors, their buffers, and execution contexts. On NumPy and cuda-bindings alone.

`trt` is the module `tensorrt` everywhere, or one with its API, as `tensorrt_rtx` is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
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
    """A loaded engine, a buffer for each of its tensors, as large as its profiles allow, and shared scratch memory.

    A decoder's may be in pieces (engines/pieces.py), which lie one behind the other in the file: settings["pieces"] has
    their bytes. They run in that order on one stream. What one makes for others counts among `outputs`.
    """

    def __init__(self, trt: Any, gpu: Gpu, spec: EngineSpec, path: Path) -> None:
        self.gpu, self._trt = gpu, trt
        self._check(spec, path)
        self._runtime = trt.Runtime(logger(trt))
        self._pieces = [self._load(data, path) for data in _parts(path, spec)]
        made = {name for piece in self._pieces for name in piece.outputs}
        self.inputs = list(dict.fromkeys(name for piece in self._pieces for name in piece.inputs if name not in made))
        self.outputs = [name for piece in self._pieces for name in piece.outputs]
        self.dtypes = {name: dtype for piece in self._pieces for name, dtype in piece.dtypes(trt).items()}
        count = max(piece.profiles for piece in self._pieces)
        self.profiles = [{name: self._range(name, index)[2] for name in self.inputs} for index in range(count)]
        self._scratch_bytes = max(scratch_bytes(piece.engine) for piece in self._pieces)
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

    def _load(self, data: bytes, path: Path) -> _Piece:
        log = logger(self._trt)
        log.errors = []
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise VlmcError(
                f"{title(self._trt)} cannot load {path}",
                found="; ".join(log.errors[-2:]) or "no message",
                fix="build the engine again on this machine; if memory is short, end what else runs on the GPU",
            )
        return _Piece(self._trt, engine)

    def _range(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        """The input's smallest, usual and largest shape in the profile."""
        engine = next(piece.engine for piece in self._pieces if name in piece.inputs)
        fixed = tuple(engine.get_tensor_shape(name))
        shapes = engine.get_tensor_profile_shape(name, profile) if -1 in fixed else (fixed,) * 3
        return tuple(tuple(shape) for shape in shapes)

    def smallest(self, name: str, profile: int) -> tuple[int, ...]:
        """The input's smallest shape in the profile."""
        return self._range(name, profile)[0]

    def context(self) -> Context:
        """An execution context. All use the same scratch memory, so only one may run at a time."""
        made = []
        for piece in self._pieces:
            context = new_context(self._trt, piece.engine)
            if hasattr(context, "set_device_memory"):  # 10.1 on
                context.set_device_memory(self._scratch, self._scratch_bytes)
            else:
                context.device_memory = self._scratch
            made.append((piece, context))
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


def _parts(path: Path, spec: EngineSpec) -> Iterator[bytes]:
    """The pieces that lie in the file; its own record may be anybody's."""
    whole = path.stat().st_size
    sizes = spec.settings.get("pieces", [whole])
    if not all(isinstance(size, int) and size >= 0 for size in sizes) or sum(sizes) != whole:
        raise VlmcError(
            f"{path} does not hold the pieces that engine.json names",
            found=f"{whole} bytes",
            expected=f"{sizes}",
            fix=f"run `vlmc build ARTEFACT --device {spec.device}` on this machine",
        )
    with path.open("rb") as file:
        yield from map(file.read, sizes)


class _Piece:
    """An ICudaEngine and the names of its tensors."""

    def __init__(self, trt: Any, engine: Any) -> None:
        self.engine = engine
        self.profiles = int(engine.num_optimization_profiles)  # one where no size is free
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]

    def dtypes(self, trt: Any) -> dict[str, np.dtype[Any]]:
        return {name: np.dtype(trt.nptype(self.engine.get_tensor_dtype(name))) for name in self.inputs + self.outputs}


class Context:
    """An execution context of each piece, which remember their profile."""

    def __init__(self, pieces: Sequence[tuple[_Piece, Any]], stream: int) -> None:
        self._pieces, self._stream = pieces, stream
        self._profile = -1

    def use_profile(self, index: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`shapes` are those of the engine's inputs; what pieces hand over follows from them."""
        known = dict(shapes)
        for piece, context in self._pieces:
            new = index != self._profile and index < piece.profiles
            if new and not context.set_optimization_profile_async(index, self._stream):
                raise VlmcError("The engine has no such optimisation profile", found=str(index))
            for name in piece.inputs:
                if name in known and not context.set_input_shape(name, known[name]):
                    raise VlmcError(f"The engine does not take {name} of this shape", found=str(known[name]))
            known |= {name: tuple(context.get_tensor_shape(name)) for name in piece.outputs}
        self._profile = index

    def bind(self, addresses: Mapping[str, int]) -> None:
        for piece, context in self._pieces:
            for name in (*piece.inputs, *piece.outputs):
                if name in addresses and not context.set_tensor_address(name, addresses[name]):
                    raise VlmcError("The engine takes no buffer for a tensor", found=name)

    def shape(self, name: str) -> tuple[int, ...]:
        context = next(context for piece, context in self._pieces if name in piece.inputs + piece.outputs)
        return tuple(context.get_tensor_shape(name))

    def enqueue(self) -> None:
        for _, context in self._pieces:
            if not context.execute_async_v3(self._stream):
                raise VlmcError(
                    "The engine does not run", fix="see `nvidia-smi`; build the engine again on this machine"
                )
