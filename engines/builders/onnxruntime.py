"""Engines for ONNX Runtime: the canonical graph with GroupQueryAttention, integer products and packed weights."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir

from ...artifact import KvContract
from ...profiles.device import Device
from ...runtime.backends import onnxruntime as backend
from ..passes import (
    MICROSOFT,
    float_outputs,
    group_query_attention,
    integer_matmul,
    joined_products,
    matmul_nbits,
    producer,
)
from . import MODEL, Built, Job

PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # one or the other
FLOAT = "fp32"
OPSET_24 = ("TensorScatter", "Swish")
INTEGER = ("MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QLinearConv")
FLOATING = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "NhwcFusedConv")
ATTENTION = ("Attention", "MultiHeadAttention", "GroupQueryAttention")


def unavailable() -> str:
    return backend.unavailable()


def refuses(component: str, precision: str, device: Device) -> str:
    return ""


def build(model: ir.Model, job: Job) -> Built:
    kv = job.kv
    float_outputs.apply(model)  # Attention multiplies floats
    attentions = group_query_attention.apply(model, kv)
    integer_matmul.apply(model)
    matmul_nbits.apply(model)
    if job.component == "decoder":  # a picture has rows enough for a product's own cost not to show
        joined_products.apply(model)
    _for_older_runtimes(model)
    ir.save(model, job.folder / MODEL, external_data=f"{MODEL}.data")
    form = "shared" if attentions else "scatter"  # what GroupQueryAttention cannot say stays canonical
    cached = job.component == "decoder"
    contract = KvContract(form, kv.layers, kv.kv_heads, kv.head_dim, kv.capacity) if cached else None
    return Built(MODEL, kv=contract)


def _for_older_runtimes(model: ir.Model) -> None:
    """ONNX Runtime 1.23, the newest for JetPack 6's Python 3.10, refuses opset 24, of which a lowered graph has nothing
    left, and has no kernel of QuantizeLinear-23; the one of its own domain is the same."""
    if any(node.op_type in OPSET_24 for node in model.graph):
        return
    model.graph.opset_imports[""] = 23
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            node.domain = MICROSOFT
            model.graph.opset_imports[MICROSOFT] = 1


def products(path: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Counted in the graph that ONNX Runtime writes after its own optimisations."""
    with TemporaryDirectory(dir=path.parent) as folder:  # on the disk that has room for the engine
        optimised = Path(folder) / "optimised.onnx"
        backend.session(path, {}, optimised=optimised)
        graph = ir.load(optimised).graph
    counts: dict[str, int] = {}
    for node in graph:
        kind, number = "", 1 + str(node.name).count(joined_products.AND)
        if node.op_type in INTEGER:
            kind = "int8"
        elif node.op_type == "MatMulNBits":
            kind = f"w{node.attributes['bits'].as_int()}"
        elif node.op_type in ATTENTION:
            kind, number = "float32 attention", 2  # queries by keys, and scores by values
        elif node.op_type in FLOATING:
            kind = "float32" if "Conv" in node.op_type or _is_weight(node.inputs[1]) else "float32 attention"
        if kind:
            counts[kind] = counts.get(kind, 0) + number
    return counts


def _is_weight(value: ir.Value | None) -> bool:
    """A constant, be it a quantised one that is turned into floats at every run."""
    dequantize = producer(value, "DequantizeLinear")
    source = dequantize.inputs[0] if dequantize else value
    return source is not None and source.const_value is not None
