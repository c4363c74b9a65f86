"""The embeddings of every token, computed once from embed_tokens and written as a table (see the backend)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...errors import VlmcError
from ...profiles.device import Device
from . import Built, Job

PACKAGES = ("numpy",)
FLOAT = "fp32"
TABLE = "table.npy"


def unavailable() -> str:
    return ""


def refuses(component: str, precision: str, device: Device) -> str:
    return "" if component == "embed_tokens" else "NumPy is for the look-up of embeddings alone"


def build(model: ir.Model, job: Job) -> Built:
    """Kept as float16 where that is exact, as it is for a checkpoint in float16."""
    table = _table(model)
    with np.errstate(over="ignore"):
        half = table.astype(np.float16)
    np.save(job.folder / TABLE, half if np.array_equal(half, table) else table)
    return Built(TABLE)


def _table(model: ir.Model) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Embeddings (vocabulary, hidden): one Gather, perhaps times a constant."""
    gather, *rest = model.graph
    if gather.op_type == "Gather" and gather.inputs[0] is not None and gather.inputs[0].const_value is not None:
        table = np.asarray(gather.inputs[0].const_value.numpy(), np.float32)
        if not rest:
            return table
        factor = next((v.const_value for v in rest[0].inputs if v is not None and v.const_value is not None), None)
        if len(rest) == 1 and rest[0].op_type == "Mul" and factor is not None:
            return np.asarray(table * factor.numpy(), np.float32)
    operators = ", ".join(node.op_type for node in model.graph)
    raise VlmcError("The embeddings of this model are no table", found=f"a graph of {operators}", expected="Gather")


def products(path: Path, settings: dict[str, Any]) -> dict[str, int]:
    return {}
