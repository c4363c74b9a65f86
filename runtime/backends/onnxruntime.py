"""ONNX Runtime on every CPU. What `onnxruntime_gpu` runs on NVIDIA GPUs is here too, for it differs in little.

The decoder's buffers are bound once: keys and values are read and written in place, whatever the KV contract's form.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifact import EngineSpec, KvContract
from ...errors import VlmcError, reason
from ...records import REMAKE
from ..runner import Array, HostDecoder, Runner
from . import processors

TITLE = "ONNX Runtime"


def unavailable() -> str:
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return f"onnxruntime is not installed ({error}); pip install onnxruntime"
    return ""


def load_runner(spec: EngineSpec, path: Path, threads: int) -> OnnxRunner:
    return OnnxRunner(session(path, {}, threads))


def load_decoder(spec: EngineSpec, path: Path, embed: Runner, threads: int) -> OnnxDecoder:
    assert spec.kv is not None
    return OnnxDecoder(session(path, {}, threads), spec.kv, embed)


def session(path: Path, settings: Mapping[str, Any], threads: int = 0, optimised: Path | None = None) -> Any:
    """An InferenceSession. settings: `session_config` (dict of strings) and `providers` (list), none of them from an
    engine's record, where one could name a file to write to; `optimised`: where to write the graph that is really
    executed."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or processors()
    options.log_severity_level = 3
    # A model is several sessions, each with threads that spin after a run: on few cores they starve the next session,
    # which halved decoding (docs/experiments.md).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        for key, value in settings.get("session_config", {}).items():
            options.add_session_config_entry(key, value)
        return ort.InferenceSession(
            str(path),
            options,
            providers=settings.get("providers", ["CPUExecutionProvider"]),
        )
    except Exception as error:  # onnxruntime's own exceptions share no base class of their own
        raise VlmcError(
            f"ONNX Runtime {ort.__version__} cannot load {path}",
            found=reason(error),
            fix="build the engine again with this version of ONNX Runtime, its folder removed first",
        ) from None


class OnnxRunner:
    """A component without state."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            values = self._session.run(self._outputs, dict(inputs))
        except Exception as error:  # a graph that takes less than the manifest promises, texts as long among others
            what, fix = "ONNX Runtime cannot run a graph of this artefact", f"{REMAKE} and `vlmc build`"
            raise VlmcError(what, found=reason(error), fix=fix) from None
        return dict(zip(self._outputs, values, strict=True))


_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)"}


class OnnxDecoder(HostDecoder):
    """A decoder whose past and present are the same buffers (forms `scatter` and `shared`), which lie on the device
    `where`, as ONNX Runtime names it."""

    def __init__(self, session: Any, kv: KvContract, embed: Runner, where: str = "cpu") -> None:
        import onnxruntime as ort

        super().__init__(kv.capacity, embed)
        self._session = session
        self._binding = session.io_binding()
        shape = (1, kv.kv_heads, kv.capacity, kv.head_dim)
        self._states = []
        for index in range(2 * kv.layers):
            state = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, kv.dtype), where, 0)
            name = f"{index // 2}.{('key', 'value')[index % 2]}"
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", state)
            self._binding.bind_ortvalue_output(f"present.{name}", state)
            self._states.append(state)
        self._binding.bind_output("logits", "cpu")
        types = {value.name: value.type for value in session.get_inputs()}
        self._wanted = types.keys()
        if types.get("past_key_values.0.key") != _TYPES[kv.dtype]:
            raise VlmcError(f"The decoder's KV cache is not of {kv.dtype}", fix="remove the engine and build it again")

    def forward(self, inputs_embeds: NDArray[np.float32], start: int, **further: Array) -> NDArray[np.float32]:
        length = inputs_embeds.shape[1]
        total = start + length
        feeds = {
            "inputs_embeds": np.ascontiguousarray(inputs_embeds, np.float32),
            "position_ids": np.arange(start, total, dtype=np.int64)[None],
            "logits_index": np.array([length - 1], np.int64),
            "write_index": np.array([start], np.int64),
            "seqlens_k": np.array([total - 1], np.int32),  # GroupQueryAttention wants the last position, not the count
            "total_sequence_length": np.array(total, np.int32),
            **{name: np.ascontiguousarray(array) for name, array in further.items()},
        }
        for name in self._wanted & feeds.keys():
            self._binding.bind_cpu_input(name, feeds[name])
        self._session.run_with_iobinding(self._binding)
        logits: NDArray[np.float32] = self._binding.get_outputs()[-1].numpy()[0]
        return logits.copy()  # the binding's own buffer is written again by the next step
