"""TensorRT and a GPU without either, for tests of what stands around them.

The engine is the real lowered graph, run by ONNX Runtime behind TensorRT's API; the GPU is an array whose indices are
the addresses, and the two kernels are done in NumPy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from vlmc.artifact import Artifact, EngineSpec, KvContract
from vlmc.calibration.plan import read_plan
from vlmc.engines import builders
from vlmc.engines.builders import tensorrt as builder
from vlmc.engines.passes import quantize
from vlmc.engines.pieces import constant_bytes, cut
from vlmc.engines.tensorrt_profiles import ranges
from vlmc.profiles.device import load_device
from vlmc.runtime.tensorrt_decoder import TensorrtDecoder
from vlmc.runtime.tensorrt_engine import Engine

SIZE = 1 << 24


class FakeGpu:
    """A GPU's memory, and what is queued done at once."""

    stream = 7

    def __init__(self) -> None:
        self.memory = np.zeros(SIZE, np.uint8)
        self._end = 256

    def allocate(self, size: int) -> int:
        address, self._end = self._end, self._end + -(-max(size, 1) // 256) * 256
        return address

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype)

    def view(self, address: int, shape: Sequence[int], dtype: Any) -> Any:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.memory[address : address + size].view(dtype).reshape(shape)

    def upload(self, address: int, array: Any) -> None:
        assert array.flags.c_contiguous
        self.view(address, array.shape, array.dtype)[...] = array

    def download(self, array: Any, address: int) -> None:
        assert array.flags.c_contiguous
        array[...] = self.view(address, array.shape, array.dtype)

    def wait(self) -> None: ...

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        return enqueue

    def kernel(self, ptx: Path, name: str) -> Callable[..., None]:
        assert re.search(rf"\.entry {name}\(", ptx.read_text())
        return {"append": self._append, "advance": self._advance}[name]

    def _append(self, grid: Sequence[int], block: int, arguments: Sequence[int]) -> None:
        states, position, length, words, capacity = arguments
        for new, cache in self.view(states, (grid[0], 2), np.uint64):
            start = int(self.view(position, (1,), np.int32)[0])
            rows = self.view(int(new), (grid[1], length, words), np.uint32)
            self.view(int(cache), (grid[1], capacity, words), np.uint32)[:, start : start + length] = rows

    def _advance(self, grid: Sequence[int], block: int, arguments: Sequence[int]) -> None:
        state, chosen, history, length = arguments
        numbers = self.view(state, (3, 64), np.int32)
        kept, token = int(numbers[2, 0]), self.view(chosen, (1,), np.int32)[0]
        self.view(history + 4 * kept, (1,), np.int32)[0] = token
        numbers[0, 0] += length
        numbers[1, 0], numbers[2, 0] = token, kept + 1


class Bound:
    """A fake as bindings show it that have these names, by class of TensorRT's API, and no others."""

    def __init__(self, fake: object, names: Mapping[str, set[str]], kind: str) -> None:
        vars(self).update(_fake=fake, _names=names, _kind=kind)

    def __getattr__(self, name: str) -> Any:
        if name not in self._names[self._kind]:
            raise AttributeError(f"{self._kind} has no {name}")
        value = getattr(self._fake, name)
        if name.startswith("create_execution_context"):
            return lambda *given: Bound(value(*given), self._names, "IExecutionContext")
        if name == "deserialize_cuda_engine":
            return lambda *given: Bound(value(*given), self._names, "ICudaEngine")
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self._names[self._kind]:
            raise AttributeError(f"{self._kind} has no {name}")
        setattr(self._fake, name, value)


class FakeEngine:
    """TensorRT's ICudaEngine over an ONNX file; KV caches are float16 outside, as the builder makes them."""

    device_memory_size = device_memory_size_v2 = 1024

    def __init__(self, gpu: FakeGpu, path: Path, profiles: list[Any]) -> None:
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._gpu, self._profiles = gpu, profiles
        self.values = {v.name: v for v in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.names = list(self.values)
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), max(len(profiles), 1)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in [value.name for value in self.session.get_inputs()] else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        kind = {"tensor(float)": np.float32, "tensor(int32)": np.int32}[self.values[name].type]
        return np.float16 if name.startswith(("past", "present")) else kind

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self.values[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self._profiles[profile][name]

    def create_execution_context_without_device_memory(self) -> FakeContext:
        return FakeContext(self, self._gpu)

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "user managed"
        return FakeContext(self, self._gpu)


class FakeContext:
    device_memory = 0

    def __init__(self, engine: FakeEngine, gpu: FakeGpu) -> None:
        self._engine, self._gpu = engine, gpu
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile = -1

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= FakeEngine.device_memory_size
        self.device_memory = memory

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == self._gpu.stream
        self._profile = index
        return index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        known = self._engine._profiles[self._profile].get(name)
        self._shapes[name] = tuple(shape)
        fixed = tuple(shape) == self._engine.get_tensor_shape(name)
        return fixed or all(low <= d <= high for low, d, high in zip(known[0], shape, known[2], strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{name} is not aligned"
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        free = {
            dim: size
            for key, shape in self._shapes.items()
            for dim, size in zip(self._engine.values[key].shape, shape, strict=True)
            if not isinstance(dim, int)
        }
        return tuple(d if isinstance(d, int) else free[d] for d in self._engine.values[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert self.device_memory
        engine = self._engine
        names = [value.name for value in engine.session.get_inputs()]
        feeds = {n: self._gpu.view(self._addresses[n], self._shapes[n], engine.get_tensor_dtype(n)) for n in names}
        feeds = {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in feeds.items()}
        for value, result in zip(engine.session.get_outputs(), engine.session.run(None, feeds), strict=True):
            dtype = engine.get_tensor_dtype(value.name)
            self._gpu.view(self._addresses[value.name], result.shape, dtype)[...] = result
        return True


class Made:
    """A lowered component, loaded as an engine, or about as many as `count` pieces of one."""

    def __init__(
        self, artifact: Artifact, component: str, recipe: str, folder: Path, profiles: int = 0, count: int = 1
    ) -> None:
        model = ir.load(artifact.graph(component))
        if recipe != "fp16":
            quantize.apply(model, read_plan(artifact, recipe), component)
        embed = ir.load(artifact.graph("embed_tokens"))
        self.kv = artifact.manifest.kv
        device = load_device("h100")
        sizes = ranges(artifact, component)
        job = builders.Job(component, recipe, device, self.kv, folder, lambda: embed, sizes, folder / "timing.cache")
        self.form = builder.lower(model, job)
        self.shapes = builder.profiles(model, job)[-profiles:]
        self.pieces = cut(model, constant_bytes(model) / count)
        self.path, self.gpu, engines = folder / "engine.trt", FakeGpu(), {}
        for index, piece in enumerate(self.pieces):
            path, shapes = folder / f"{index}.onnx", builder.profiles(piece, job)[-profiles:]
            ir.save(piece, path, external_data=f"{path.name}.data")
            fixed = {v.name: tuple(v.shape) for v in piece.graph.inputs if all(isinstance(d, int) for d in v.shape)}
            whole = [
                {name: (shape,) * 3 for name, shape in fixed.items()} | dict(profile) for profile in shapes or [{}]
            ]
            engines[f"piece {index:3}".encode()] = (path, whole)
        self.path.write_bytes(b"".join(engines))
        self.trt = fake_trt(lambda data: FakeEngine(self.gpu, *engines[data]) if data in engines else None)

    def engine(self) -> Engine:
        sizes = {"pieces": [len("piece 000")] * len(self.pieces)} if len(self.pieces) > 1 else {}
        return Engine(self.trt, self.gpu, spec(**sizes), self.path)  # type: ignore[arg-type]

    def decoder(self) -> TensorrtDecoder:
        kv = self.kv
        contract = KvContract(self.form, kv.layers, kv.kv_heads, kv.head_dim, kv.capacity, "float16")
        return TensorrtDecoder(self.engine(), contract)


def fake_trt(load: Callable[[bytes], FakeEngine | None]) -> Any:
    class ILogger:
        ERROR, WARNING = 1, 2

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
            engine = load(data)
            if engine is None:
                self._logger.log(1, "Magic tag does not match")
            return engine

    trt: Any = ModuleType("tensorrt")
    trt.__version__, trt.ILogger, trt.Runtime = "8.6.0", ILogger, Runtime
    trt.TensorIOMode, trt.nptype = SimpleNamespace(INPUT="in"), lambda dtype: dtype
    return trt


def spec(**settings: Any) -> EngineSpec:
    return SimpleNamespace(device="h100", settings={"version": "8.6.0", "sm": 90} | settings)  # type: ignore[return-value]
