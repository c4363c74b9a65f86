"""Decoding with a TensorRT engine: all buffers are made once, and a step is one CUDA graph.

The engine looks the token up, runs, and chooses the next; two small kernels (kernels.cu) append the new keys and values
and move the position on. The host launches several steps before it looks at the tokens, so it costs next to nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact import CROSSED, KvContract
from ..errors import VlmcError
from .kernels import PTX
from .runner import Array
from .tensorrt_engine import Engine

STRIDE = 8  # tokens that decode() likes to make before the host looks
THREADS = 128  # of a block of the kernels
SLOT = 256  # bytes from one of the state's numbers to the next: position, input token, tokens kept


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
        self._crossed = {name: engine.profiles[0][name] for name in CROSSED if name in engine.inputs}
        self._launch = self._capture_step()

    def prefill(self, inputs_embeds: NDArray[np.float32], **further: Array) -> int:
        """See `Decoder`. What is in `further` stays on the GPU for the steps."""
        length = inputs_embeds.shape[1]
        crossed = {name: further[name].shape for name in self._crossed}
        if crossed != self._crossed:  # a question of another length: a graph's shapes are fixed
            self._crossed = crossed
            self._launch = self._capture_step()
        given = {"position_ids": np.arange(length)[None], **further, "inputs_embeds": inputs_embeds}
        given |= {"input_ids": np.full((1, length), -1), "logits_index": np.array([length - 1])}
        if "position_offset" in self._engine.inputs:
            given["position_offset"] = np.array([given["position_ids"].max() + 1 - length])
        dtypes = self._engine.dtypes
        uploads = {self._addresses[name]: np.ascontiguousarray(a, dtypes[name]) for name, a in given.items()}
        uploads[self._state] = np.zeros(3 * SLOT, np.int8)
        for address, array in uploads.items():
            self._gpu.upload(address, array)
        self._prefill.use_profile(self._profile_for(length), self._shapes(length))
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
        """The decode step as one CUDA graph. It reads token and position where the kernel before left them; of several
        positions the engine works out its own. What else a prompt gave stays (a prefix is what a step sees anyway)."""
        inputs = self._engine.inputs
        step = {"input_ids": self._state + SLOT, "write_index": self._state, "logits_index": self._zero}
        if "position_offset" not in inputs:
            step["position_ids"] = self._state
        self._step.use_profile(0, self._shapes(1))
        self._step.bind(self._addresses | step)

        def enqueue() -> None:
            self._step.enqueue()
            self._after(1)

        start = np.zeros(3 * SLOT, np.int8)
        self._gpu.upload(self._state, start)
        enqueue()  # TensorRT sets itself up in a first run, which must not be captured
        self._gpu.wait()
        return self._gpu.capture(enqueue)

    def _profile_for(self, length: int) -> int:
        """The first whose range of prompts holds the length; the step's own is taken by its context."""
        lengths = [largest["inputs_embeds"][1] for largest in self._engine.profiles]
        return next(i for i, most in enumerate(lengths) if most >= length and (i or len(lengths) == 1))

    def _shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """The inputs' shapes for that many positions: an axis that is 1 in a step and more in a prompt is the length.
        What the decoder looks at has the size that the prompt gave it."""
        engine, shapes = self._engine, {}
        for name in engine.inputs:
            pairs = zip(engine.smallest(name, 0), engine.profiles[-1][name], strict=True)
            shapes[name] = self._crossed.get(name) or tuple(length if one != many else one for one, many in pairs)
        return shapes

    def _shape_of(self, name: str) -> tuple[int, ...]:
        return self._prefill.shape(name)
