"""Engines for ONNX Runtime's CUDA provider: the canonical graph in float16, GroupQueryAttention, packed weights.

Building is lowering alone, so it needs no GPU, and an engine that was built under one Python runs under another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...artifact import KvContract
from ...profiles.device import Device
from ..passes import group_query_attention, half_norms, half_precision, matmul_nbits, weight_of
from . import MODEL, Built, Job, block_bits
from .onnxruntime import ATTENTION, FLOATING, OPSET_24

PACKAGES = ()  # the graph is standard: ONNX Runtime's version, and whether it is there at all, change nothing of it
FLOAT = "fp16"


def unavailable() -> str:
    return ""


def refuses(component: str, precision: str, device: Device) -> str:
    if component == "embed_tokens":
        return "a look-up needs no GPU; NumPy does it"
    if precision != FLOAT and not block_bits(precision):
        return (
            "ONNX Runtime on CUDA has no int8 product for Q/DQ: it would turn both back into floats and multiply those"
        )
    return ""


def build(model: ir.Model, job: Job) -> Built:
    kv = job.kv
    attentions = group_query_attention.apply(model, kv)
    matmul_nbits.apply(model)
    half_precision.apply(model)
    half_norms.apply(model)
    if not any(node.op_type in OPSET_24 for node in model.graph):
        model.graph.opset_imports[""] = 23  # Squeeze and Shape of 24 have no kernel on CUDA and would run on the CPU
    ir.save(model, job.folder / MODEL, external_data=f"{MODEL}.data")
    form = "shared" if attentions else "scatter"  # as for the CPU (`onnxruntime`)
    cached = job.component == "decoder"
    contract = KvContract(form, kv.layers, kv.kv_heads, kv.head_dim, kv.capacity, "float16") if cached else None
    return Built(MODEL, kv=contract)


def products(path: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Counted in the graph: its types are those that CUDA's kernels compute in."""
    counts: dict[str, int] = {}
    for node in ir.load(path).graph:
        kind, number = "", 1
        if node.op_type == "MatMulNBits":
            kind = f"w{node.attributes['bits'].as_int()}"
        elif node.op_type in ATTENTION:
            kind, number = f"{_type(node)} attention", 2  # queries by keys, and scores by values
        elif node.op_type in FLOATING:
            kind = _type(node) + ("" if weight_of(node) is not None else " attention")
        if kind:
            counts[kind] = counts.get(kind, 0) + number
    return counts


def _type(node: ir.Node) -> str:
    value = node.inputs[0]
    assert value is not None and value.dtype is not None
    return str(value.dtype.numpy().name)
