"""Engines for OpenVINO on CPUs: the canonical graph as it is, Q/DQ and all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...profiles.device import Device
from ...runtime.backends import openvino as backend
from . import MODEL, Built, Job, block_bits

PACKAGES = ("openvino",)
FLOAT = "fp32"
PRODUCTS = ("FullyConnected", "MatMul", "Convolution")
KEYS = ("layerType", "runtimePrecision", "originalLayersNames")
WIDTHS = {"i8": "int8", "u8": "int8", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def unavailable() -> str:
    return backend.unavailable()


def refuses(component: str, precision: str, device: Device) -> str:
    if component == "decoder":
        return "OpenVINO copies a KV cache that is passed in and out, and lost to ONNX Runtime (docs/experiments.md)"
    if block_bits(precision):
        return "OpenVINO 2026.4 does not read ONNX weights in blocks"
    return "a table look-up gains nothing there" if component == "embed_tokens" else ""


def build(model: ir.Model, job: Job) -> Built:
    ir.save(model, job.folder / MODEL, external_data=f"{MODEL}.data")
    return Built(MODEL)


def products(path: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Counted in the runtime model, where every layer names the precision that it runs in. Attention is one layer for
    two products; where its queries and keys are int8, scores by values are float32, for no recipe rounds values."""
    counts: Counter[str] = Counter()
    for layer in backend.compile_model(path).get_runtime_model().get_ordered_ops():
        info = layer.get_rt_info()
        layer_type, width, fused = (str(info[key].astype(str)) for key in KEYS)
        kind = WIDTHS.get(width, width)
        if layer_type in PRODUCTS:
            counts[kind] += 1
        elif layer_type == "ScaledDotProductAttention" or (layer_type == "Subgraph" and "Softmax" in fused):
            counts.update([f"{kind} attention", f"{'float32' if kind == 'int8' else kind} attention"])
    return dict(counts)
