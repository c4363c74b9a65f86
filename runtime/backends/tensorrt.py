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
from ..tensorrt_engine import Engine, batch_dimension

TITLE = "TensorRT"
Shape = tuple[int, ...]


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


def runner(trt: Any, spec: EngineSpec, path: Path, graphs: bool = True) -> TensorrtRunner:
    """`trt` is the module `tensorrt`, or one with its API."""
    return TensorrtRunner(Engine(trt, Gpu(), spec, path), spec, graphs)


def decoder(trt: Any, spec: EngineSpec, path: Path) -> TensorrtDecoder:
    assert spec.kv is not None
    return TensorrtDecoder(Engine(trt, Gpu(), spec, path), spec.kv)


class TensorrtRunner:
    """A component without state. Where its inputs are a batch of things that are apart, more of them than a profile
    holds run in parts.

    Inputs of the same shapes as before run as one CUDA graph, for a small encoder is over before the host has queued
    its kernels. A graph holds while its context keeps its shapes (TensorRT's Developer Guide, "CUDA Graphs"). Contexts
    for several shapes would have to share a profile, which 8.6 answers with a crash.
    """

    def __init__(self, engine: Engine, spec: EngineSpec, graphs: bool = True) -> None:
        self._engine, self._context, self._graphs = engine, engine.context(), graphs
        self._addresses = engine.allocate(self._context)
        self._context.bind(self._addresses)
        self._batched = bool(batch_dimension([tensor.shape for tensor in (*spec.inputs, *spec.outputs)]))
        self._ready: object = None  # the profile and shapes that the context has
        self._launch: Callable[[], None] | None = None  # the graph of these

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        dtypes = self._engine.dtypes
        arrays = {name: np.ascontiguousarray(inputs[name], dtypes[name]) for name in self._engine.inputs}
        count, profile = self._fitting(arrays)
        total = min(map(len, arrays.values())) if self._batched else count
        if count == total:
            return self._run(arrays, profile, alone=True)
        start = 0
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

    def _run(self, arrays: Mapping[str, Array], profile: int, alone: bool = False) -> dict[str, Array]:
        """`alone`: no part of a batch, whose shapes would change from part to part."""
        gpu, shapes = self._engine.gpu, {name: array.shape for name, array in arrays.items()}
        for name, array in arrays.items():
            gpu.upload(self._addresses[name], array)
        again = self._ready == (profile, shapes)
        if not again:
            self._context.use_profile(profile, shapes)
            self._ready, self._launch = (profile, shapes), None
        elif alone and self._graphs and self._launch is None:
            self._launch = gpu.capture(self._context.enqueue)
        (self._launch or self._context.enqueue)()
        found = self._engine.output_shapes(self._context)
        results = {name: np.empty(shape, self._engine.dtypes[name]) for name, shape in found.items()}
        for name, result in results.items():
            gpu.download(result, self._addresses[name])
        gpu.wait()
        return results


def _within(smallest: Shape, shape: Shape, largest: Shape) -> bool:
    return all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))


def _listed(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {' × '.join(map(str, shape))}" for name, shape in shapes.items())
