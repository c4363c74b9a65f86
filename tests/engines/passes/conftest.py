"""Decoders driven through numpy alone, whatever becomes of their cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from vlmc.artifact import KvSpec


class Steps:
    """A decoder and its cache. steps(embeds, ids) appends these positions and returns the outputs by name; the cache's
    unwritten places hold what `fill` makes of a shape. `further` are inputs by name."""

    def __init__(self, session: ort.InferenceSession, kv: KvSpec, fill: Callable[..., np.ndarray] = np.zeros) -> None:
        self._session, self._kv = session, kv
        self._types = {value.name: value.type for value in session.get_inputs()}
        self.restart(fill)

    def restart(self, fill: Callable[..., np.ndarray] = np.zeros) -> None:
        shape = (1, self._kv.kv_heads, self._kv.capacity, self._kv.head_dim)
        pasts = [name for name in self._types if name.startswith("past_key_values.")]
        self._cache = {name: fill(shape).astype(np.float32) for name in pasts}
        self.place = 0

    def __call__(
        self, embeds: np.ndarray, ids: np.ndarray | None = None, shift: int = 0, **further: np.ndarray
    ) -> dict[str, np.ndarray]:
        length = embeds.shape[1]
        feeds: dict[str, Any] = {
            "inputs_embeds": embeds,
            "position_ids": np.arange(self.place, self.place + length)[None] + shift,
            "write_index": np.array([self.place]),
            "logits_index": np.array([length - 1]),
            "input_ids": np.full((1, length), -1) if ids is None else ids,
            **self._cache,
            **further,
        }
        kinds = {"tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(float)": np.float32}
        names = [value.name for value in self._session.get_outputs()]
        typed = {name: feeds[name].astype(kinds[kind]) for name, kind in self._types.items()}
        outputs = dict(zip(names, self._session.run(None, typed), strict=True))
        for name, past in self._cache.items():
            new = outputs[name.replace("past_key_values", "present")]
            if new.shape == past.shape:
                self._cache[name] = new
            else:
                past[:, :, self.place : self.place + length] = new
        self.place += length
        return outputs


@pytest.fixture(scope="session")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Steps]:
    """steps(model, kv): the decoder, checked by ONNX and run node for node."""

    def make(model: ir.Model, kv: KvSpec) -> Steps:
        path = tmp_path_factory.mktemp("decoder") / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        onnx.checker.check_model(path, full_check=True)
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return Steps(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), kv)

    return make


@pytest.fixture(scope="session")
def close() -> Callable[[np.ndarray, np.ndarray], None]:
    """close(found, expected): within 1e-5 of the largest expected number, which float32 sums in another order are."""

    def check(found: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    return check
