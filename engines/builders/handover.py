"""For devices whose builder is not on this machine: the quantised canonical graph, to be built on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...artifact import KvSpec
from . import MODEL, Built

PACKAGES = ()


def unavailable() -> str:
    return ""


def refuses(component: str) -> str:
    return ""


def build(model: ir.Model, kv: KvSpec, folder: Path) -> Built:
    ir.save(model, folder / MODEL, external_data=f"{MODEL}.data")
    return Built(MODEL)


def products(path: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Nothing runs here, so nothing is counted."""
    return {}
