"""TensorRT engines on NVIDIA GPUs, with NumPy and cuda-bindings alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...artifact import EngineSpec
from ..cuda import Gpu, architecture
from ..runner import Array, Decoder, Runner
from ..tensorrt_decoder import TensorrtDecoder
from ..tensorrt_engine import Engine


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


def runner(trt: Any, spec: EngineSpec, path: Path) -> TensorrtRunner:
    """`trt` is the module `tensorrt`, or one with its API."""
    return TensorrtRunner(Engine(trt, Gpu(), spec, path))


def decoder(trt: Any, spec: EngineSpec, path: Path) -> TensorrtDecoder:
    assert spec.kv is not None
    return TensorrtDecoder(Engine(trt, Gpu(), spec, path), spec.kv)


class TensorrtRunner:
    """A component without state; the first axis of its only input is a batch, which runs in parts that fit."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._context = engine, engine.context()
        self._addresses = engine.allocate(self._context)
        self._context.bind(self._addresses)
        (self._input,) = engine.inputs
        self._ranges = [
            (engine.smallest(self._input, index)[0], shapes[self._input][0])
            for index, shapes in enumerate(engine.profiles)
        ]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        array = np.ascontiguousarray(inputs[self._input], self._engine.dtypes[self._input])
        parts: list[dict[str, Array]] = []
        start = 0
        while start < len(array):
            rest = len(array) - start
            fitting = [(min(most, rest), index) for index, (least, most) in enumerate(self._ranges) if least <= rest]
            count, profile = max(fitting)
            parts.append(self._run(array[start : start + count], profile))
            start += count
        return {name: np.concatenate([part[name] for part in parts]) for name in self._engine.outputs}

    def _run(self, array: Array, profile: int) -> dict[str, Array]:
        gpu = self._engine.gpu
        self._context.use_profile(profile, {self._input: array.shape})
        gpu.upload(self._addresses[self._input], array)
        self._context.enqueue()
        shapes = self._engine.output_shapes(self._context)
        results = {name: np.empty(shape, self._engine.dtypes[name]) for name, shape in shapes.items()}
        for name, result in results.items():
            gpu.download(result, self._addresses[name])
        gpu.wait()
        return results
