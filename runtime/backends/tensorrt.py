"""TensorRT engines on NVIDIA GPUs, with NumPy and cuda-bindings alone.

All buffers are made once. A decode step is one CUDA graph: the engine looks the token up, runs, and chooses the next;
two small kernels (../kernels.cu) append the new keys and values and move the position on. The host launches several
steps before it looks at the tokens, so it costs next to nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifact import EngineSpec, KvContract
from ...errors import VlmcError
from ..cuda import Gpu, architecture
from ..kernels import PTX
from ..runner import Array, Decoder, Runner

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
ENGINE = "engine.trt"  # the file of an engine in its folder
STRIDE = 8  # tokens that decode() likes to make before the host looks
THREADS = 128  # of a block of the kernels
SLOT = 256  # bytes from one of the state's numbers to the next: position, input token, tokens kept


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


@functools.cache  # TensorRT keeps the process's first logger: where that was freed, a later builder hangs
def logger(trt: Any) -> Any:
    """Keeps what TensorRT would print: `errors` and `warnings`, the newest last, which are replaced to begin anew."""

    class Logger(trt.ILogger):  # type: ignore[misc]
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


class Engine:
    """A loaded engine, a buffer for each of its tensors, as large as its profiles allow, and shared scratch memory."""

    def __init__(self, trt: Any, gpu: Gpu, spec: EngineSpec, path: Path) -> None:
        self.gpu, self._trt = gpu, trt
        title = TITLES[trt.__name__]
        self._check(spec, path)
        log = logger(trt)
        log.errors = []
        self._runtime = trt.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise VlmcError(
                f"{title} {trt.__version__} cannot load {path}",
                found="; ".join(log.errors[-2:]) or "no message",
                fix="build the engine again on this machine; if memory is short, end what else runs on the GPU",
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self.inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if modes[name] != trt.TensorIOMode.INPUT]
        self.dtypes = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self.profiles = [self._largest_shapes(index) for index in range(self._engine.num_optimization_profiles)]
        self._scratch = gpu.allocate(int(self._engine.device_memory_size))

    def _check(self, spec: EngineSpec, path: Path) -> None:
        """Refuses an engine of another TensorRT or another kind of GPU by name: loading it would fail without one."""
        here = {"version": str(self._trt.__version__), "sm": architecture()}
        for what, name in (("version", f"version of {TITLES[self._trt.__name__]}"), ("sm", "GPU architecture (SM)")):
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
        if hasattr(self._trt, "ExecutionContextAllocationStrategy"):  # TensorRT 10 on
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            made = self._engine.create_execution_context(strategy)
        else:
            made = self._engine.create_execution_context_without_device_memory()
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
            assert self._context.set_optimization_profile_async(index, self._stream)
            self._profile = index
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise VlmcError(f"The engine does not take {name} of this shape", found=str(shape))

    def bind(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            assert self._context.set_tensor_address(name, address)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._context.get_tensor_shape(name))

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise VlmcError("The engine does not run", fix="see `nvidia-smi`; build the engine again on this machine")


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


class TensorrtDecoder:
    """A decoder whose engine looks tokens up and chooses them (passes/token_loop.py), with its KV cache on the GPU.

    Its forms are `append` (the engine returns new keys and values, the kernel writes them) and `shared` (the engine
    writes them itself). Profile 0 has the decode step; further ones are ranges of prompt lengths. An engine with one
    profile uses it for both, which TensorRT allows from version 10 on.
    """

    stride = STRIDE

    def __init__(self, engine: Engine, kv: KvContract) -> None:
        self.capacity, self._kv, self._engine = kv.capacity, kv, engine
        gpu = self._gpu = engine.gpu
        self._prefill, self._step = engine.context(), engine.context()
        self._addresses = engine.allocate(self._prefill)
        self._logits = np.empty(self._shape_of("logits"), engine.dtypes["logits"])
        self._append, self._advance = gpu.kernel(PTX, "append"), gpu.kernel(PTX, "advance")
        self._state = gpu.allocate(3 * SLOT)
        self._history = gpu.allocate((kv.capacity + 2) * 4)
        self._zero = gpu.allocate(8)
        self._tokens = gpu.pinned((kv.capacity + 2,), np.int32)
        self._kept, self._position = 0, 0
        self._bind_cache()
        self._launch = self._capture_step()

    def prefill(self, inputs_embeds: NDArray[np.float32], **further: Array) -> int:
        assert not further, "the builder refuses decoders with further inputs"
        length = inputs_embeds.shape[1]
        gpu, addresses, dtypes = self._gpu, self._addresses, self._engine.dtypes
        uploads = {
            addresses["inputs_embeds"]: np.ascontiguousarray(inputs_embeds, dtypes["inputs_embeds"]),
            addresses["input_ids"]: np.full((1, length), -1, dtypes["input_ids"]),
            addresses["position_ids"]: np.arange(length, dtype=dtypes["position_ids"])[None],
            addresses["logits_index"]: np.array([length - 1], dtypes["logits_index"]),
            self._state: np.zeros(3 * SLOT, np.int8),
        }
        for address, array in uploads.items():
            gpu.upload(address, array)
        shapes = {name: self._at_length(name, length) for name in self._engine.inputs}
        self._prefill.use_profile(self._profile_for(length), shapes)
        self._prefill.enqueue()
        self._after(length)
        self._kept, self._position = 0, length
        (token,) = self._take(1)
        return token

    def decode(self, count: int) -> list[int]:
        if self._position + count > self.capacity:
            raise VlmcError("The KV cache is full", found=f"{self._position} positions", expected=f"< {self.capacity}")
        for _ in range(count):
            self._launch()
        self._position += count
        return self._take(count)

    def feed(self, token: int) -> int:
        """The choice after `token`, whether or not it was the last one chosen (teacher forcing)."""
        self._gpu.upload(self._state + SLOT, np.array([token], np.int32))
        self._gpu.wait()
        return self.decode(1)[0]

    def logits(self) -> NDArray[np.float32]:
        self._gpu.download(self._logits, self._addresses["logits"])
        self._gpu.wait()
        logits: NDArray[np.float32] = self._logits[0].astype(np.float32)
        return logits

    def _take(self, count: int) -> list[int]:
        tokens = self._tokens[:count]
        self._gpu.download(tokens, self._history + 4 * self._kept)
        self._gpu.wait()
        self._kept += count
        return [int(token) for token in tokens]

    def _after(self, length: int) -> None:
        """Queues what follows the engine: keys and values appended, the token chosen, the position moved on."""
        kv = self._kv
        if kv.form == "append":
            words = kv.head_dim * np.dtype(kv.dtype).itemsize // 4
            arguments = [self._pairs, self._state, length, words, kv.capacity]
            self._append((2 * kv.layers, kv.kv_heads), THREADS, arguments)
        self._advance((1,), 1, [self._state, self._addresses["next_token"], self._history, length])

    def _bind_cache(self) -> None:
        """Binds every buffer; each present tensor is its own cache where the engine writes in place."""
        states = [f"{layer}.{part}" for layer in range(self._kv.layers) for part in ("key", "value")]
        addresses = self._addresses
        if self._kv.form == "shared":
            addresses |= {f"present.{state}": addresses[f"past_key_values.{state}"] for state in states}
        self._prefill.bind(addresses | {"write_index": self._state})
        pairs = [(addresses[f"present.{state}"], addresses[f"past_key_values.{state}"]) for state in states]
        self._pairs = self._gpu.allocate(16 * len(pairs))
        self._gpu.upload(self._pairs, np.array(pairs, np.uint64))
        self._gpu.wait()

    def _capture_step(self) -> Any:
        """The decode step as one CUDA graph. It reads token and position where the kernel before left them."""
        step = {"input_ids": self._state + SLOT, "position_ids": self._state, "write_index": self._state}
        self._step.use_profile(0, {name: self._at_length(name, 1) for name in self._engine.inputs})
        self._step.bind(self._addresses | step | {"logits_index": self._zero})

        def enqueue() -> None:
            self._step.enqueue()
            self._after(1)

        enqueue()  # TensorRT sets itself up in a first run, which must not be captured
        self._gpu.wait()
        return self._gpu.capture(enqueue)

    def _profile_for(self, length: int) -> int:
        """The first whose range of prompts holds the length; the step's own is taken by its context."""
        lengths = [largest["inputs_embeds"][1] for largest in self._engine.profiles]
        return next(i for i, most in enumerate(lengths) if most >= length and (i or len(lengths) == 1))

    def _at_length(self, name: str, length: int) -> tuple[int, ...]:
        """The input's shape for that many positions: an axis that is 1 in a step and more in a prompt is the length."""
        step, prompt = self._engine.smallest(name, 0), self._engine.profiles[-1][name]
        return tuple(length if one != many else one for one, many in zip(step, prompt, strict=True))

    def _shape_of(self, name: str) -> tuple[int, ...]:
        return self._prefill.shape(name)
