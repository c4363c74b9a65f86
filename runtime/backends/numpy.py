"""Token embeddings as a table on disk: a look-up needs no engine, and a mapped file only memory for the rows read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...artifact import EngineSpec
from ...errors import VlmcError
from ..runner import Array, Decoder, Runner

TITLE = "NumPy"


def unavailable() -> str:
    return ""


def load_runner(spec: EngineSpec, path: Path, threads: int) -> TableRunner:
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise VlmcError(f"{path} is no table of embeddings", found=str(error), fix="build the engine again") from None
    return TableRunner(table)


def load_decoder(spec: EngineSpec, path: Path, embed: Runner, threads: int) -> Decoder:
    raise VlmcError("The NumPy backend has no decoder", fix="build the decoder for another backend")


class TableRunner:
    """embed_tokens from a table (vocabulary, hidden) of float16 or float32."""

    def __init__(self, table: Array) -> None:
        self._table = table

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"inputs_embeds": self._table[inputs["input_ids"]].astype(np.float32)}
