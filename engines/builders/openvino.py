"""Engines for OpenVINO on CPUs: the canonical graph as it is, Q/DQ and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...profiles.device import Device
from ...runtime.backends import openvino as backend
from . import MODEL, Built, Job

PACKAGES = ("openvino",)
FLOAT = "fp32"
PRODUCTS = ("FullyConnected", "MatMul", "Convolution", "ScaledDotProductAttention")
WIDTHS = {"i8": "int8", "u8": "int8", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def unavailable() -> str:
    return backend.unavailable()


def refuses(component: str, precision: str, device: Device) -> str:
    if component == "decoder":
        return "OpenVINO copies a KV cache that is passed in and out, and lost to ONNX Runtime (docs/experiments.md)"
    return "a table look-up gains nothing there" if component == "embed_tokens" else ""


def build(model: ir.Model, job: Job) -> Built:
    ir.save(model, job.folder / MODEL, external_data=f"{MODEL}.data")
    return Built(MODEL)


def products(path: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Counted in the runtime model, where every layer names the precision that it runs in."""
    counts: dict[str, int] = {}
    for layer in backend.compile_model(path, settings).get_runtime_model().get_ordered_ops():
        info = layer.get_rt_info()
        if str(info["layerType"].astype(str)) in PRODUCTS:
            width = str(info["runtimePrecision"].astype(str))
            kind = WIDTHS.get(width, width)
            counts[kind] = counts.get(kind, 0) + 1
    return counts
