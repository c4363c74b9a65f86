"""TensorRT engines on NVIDIA GPUs, with NumPy and cuda-bindings alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...artifact import EngineSpec
from ...errors import VlmcError
from ..cuda import Gpu, architecture
from ..runner import Array, Decoder, Runner
from ..tensorrt_decoder import TensorrtDecoder
from ..tensorrt_engine import Context, Engine, batch

Shape = tuple[int, ...]
GRAPHS = 32  # shapes of inputs that a component keeps a CUDA graph and a context for


def unavailable() -> str:
    try:
        import tensorrt  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: one of its libraries is missing
        return f"tensorrt is not installed ({error}); a Jetson has JetPack's, elsewhere see NVIDIA's installation guide"
    found = architecture()
    return found if isinstance(found, str) else ""


def load_runner(spec: EngineSpec, path: Path, threads: int) -> Runner:
    import tensorrt

    return runner(tensorrt, spec, path)


def load_decoder(spec: EngineSpec, path: Path, embed: Runner, threads: int) -> Decoder:
    import tensorrt

    return decoder(tensorrt, spec, path)


def runner(trt: Any, spec: EngineSpec, path: Path, graphs: int = GRAPHS) -> TensorrtRunner:
    """`trt` is the module `tensorrt`, or one with its API."""
    return TensorrtRunner(Engine(trt, Gpu(), spec, path), spec, graphs)


def decoder(trt: Any, spec: EngineSpec, path: Path) -> TensorrtDecoder:
    assert spec.kv is not None
    return TensorrtDecoder(Engine(trt, Gpu(), spec, path), spec.kv)


class TensorrtRunner:
    """A component without state. Where its inputs are a batch of things that are apart, more of them than a profile
    holds run in parts.

    Shapes that come again run as one CUDA graph, for a small encoder is over before the host has queued its kernels.
    A graph has a context of its own, since one whose shapes change may not be captured from (TensorRT's Developer
    Guide, "CUDA Graphs"); `graphs` of them are kept, and further shapes run kernel by kernel.
    """

    def __init__(self, engine: Engine, spec: EngineSpec, graphs: int = GRAPHS) -> None:
        self._engine, self._context = engine, engine.context()
        self._addresses = engine.allocate(self._context)
        self._context.bind(self._addresses)
        self._graphs, self._seen = graphs, set[object]()
        self._captured: dict[object, tuple[Callable[[], None], Context]] = {}
        self._batched = bool(batch([tensor.shape for tensor in (*spec.inputs, *spec.outputs)]))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        dtypes = self._engine.dtypes
        arrays = {name: np.ascontiguousarray(inputs[name], dtypes[name]) for name in self._engine.inputs}
        if not self._batched:
            return self._run(arrays, self._fitting(arrays)[1])
        start, total = 0, min(map(len, arrays.values()))
        parts: list[dict[str, Array]] = []
        while start < total:
            rest = {name: array[start:] for name, array in arrays.items()}
            count, profile = self._fitting(rest)
            parts.append(self._run({name: array[:count] for name, array in rest.items()}, profile))
            start += count
        return {name: np.concatenate([part[name] for part in parts]) for name in self._engine.outputs}

    def _fitting(self, arrays: Mapping[str, Array]) -> tuple[int, int]:
        """How many of the batch run at once, and in which profile: the first of those that hold the most. Without a
        batch it is all or nothing."""
        engine, found = self._engine, []
        shapes = {name: array.shape for name, array in arrays.items()}
        for index, largest in enumerate(engine.profiles):
            count, tried = 0, shapes
            if self._batched:
                count = min(min(shape[0], largest[name][0]) for name, shape in shapes.items())
                tried = {name: (count, *shape[1:]) for name, shape in shapes.items()}
            if all(_within(engine.smallest(name, index), shape, largest[name]) for name, shape in tried.items()):
                found.append((count, -index))
        if not found:
            raise VlmcError(
                "The engine was not built for inputs of these sizes",
                found=_listed(shapes),
                expected="at most " + " or ".join(map(_listed, engine.profiles)),
                fix="give fewer or smaller pictures, or fewer words",
            )
        count, index = max(found)
        return count, -index

    def _run(self, arrays: Mapping[str, Array], profile: int) -> dict[str, Array]:
        gpu = self._engine.gpu
        for name, array in arrays.items():
            gpu.upload(self._addresses[name], array)
        shapes = self._enqueue(profile, {name: array.shape for name, array in arrays.items()})
        results = {name: np.empty(shape, self._engine.dtypes[name]) for name, shape in shapes.items()}
        for name, result in results.items():
            gpu.download(result, self._addresses[name])
        gpu.wait()
        return results

    def _enqueue(self, profile: int, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Queues a run and returns the shapes of what it makes."""
        key = (profile, *shapes.items())
        if key in self._captured:
            launch, context = self._captured[key]
            launch()
            return self._engine.output_shapes(context)
        again = key in self._seen and len(self._captured) < self._graphs
        context = self._engine.context() if again else self._context
        if again:
            context.bind(self._addresses)
        context.use_profile(profile, shapes)
        context.enqueue()
        self._seen.add(key)
        if again:  # TensorRT has set the context up in the run just queued, which must not be captured
            self._engine.gpu.wait()
            self._captured[key] = self._engine.gpu.capture(context.enqueue), context
        return self._engine.output_shapes(context)


def _within(smallest: Shape, shape: Shape, largest: Shape) -> bool:
    return all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))


def _listed(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {' × '.join(map(str, shape))}" for name, shape in shapes.items())
