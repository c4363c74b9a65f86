"""How much a component has to do, counted from its canonical graph: the ground of the roofline."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from ..artifact import ComponentSpec, KvSpec
from .passes import module_of, weight_of

WIDTHS = {"fp32": 4, "fp16": 2}  # bytes of a number


def flops(model: ir.Model, sizes: Mapping[str, int], keys: float = 0, only: Collection[str] | None = None) -> float:
    """Operations of one run, a multiply-add counted as two: weight products and attention; the rest is below 2 %.

    sizes: the free dimensions by name (tiles, length). keys: how many of the cache's positions each one attends to, in
    the mean. only: the modules whose products to count, all of them and attention where it is None.
    """
    total = 0.0
    for node in model.graph:
        if only is not None and module_of(node) not in only:
            continue
        if node.op_type == "Attention":
            query = _dims(node.inputs[0], sizes)
            there = _dims(node.inputs[1], sizes)[2]  # of a cross attention, what it was given
            total += 4.0 * prod(query) * (keys if keys and there == sizes["capacity"] else there)
        elif (weight := weight_of(node)) is not None:
            output = _dims(node.outputs[0], sizes)
            total += 2.0 * prod(output) * weight.size / (weight.shape[0] if node.op_type == "Conv" else weight.shape[1])
    return total


def weight_bytes(model: ir.Model, bits: Mapping[str, int], other: int) -> float:
    """Bytes of the products' weights, which one run reads at least once: `bits` a number for the products of these
    modules, `other` bytes for the rest. An engine's file may hold more: a look-up table, weights in two layouts,
    scales."""
    read = {
        str(node.inputs[1].name): weight.size * (bits[name] / 8 if (name := module_of(node)) in bits else other)
        for node in model.graph
        if (weight := weight_of(node)) is not None and node.inputs[1] is not None
    }
    return float(sum(read.values()))


def free_sizes(spec: ComponentSpec, inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """The component's free dimensions by name, as these inputs have them."""
    return {
        size: length
        for tensor in spec.inputs
        if tensor.name in inputs
        for size, length in zip(tensor.shape, inputs[tensor.name].shape, strict=True)
        if isinstance(size, str)
    }


def kv_bytes(kv: KvSpec, positions: int, itemsize: int) -> float:
    """Bytes of keys and values that a decode step at that position reads."""
    return 2.0 * kv.layers * kv.kv_heads * kv.head_dim * positions * itemsize


def io_bytes(model: ir.Model, sizes: Mapping[str, int]) -> float:
    """Bytes of inputs and outputs of one run, each once, all counted as float32."""
    return float(sum(WIDTHS["fp32"] * prod(_dims(v, sizes)) for v in (*model.graph.inputs, *model.graph.outputs)))


def _dims(value: ir.Value | None, sizes: Mapping[str, int]) -> list[int]:
    assert value is not None and value.shape is not None, "the exporter records every shape"
    found = [d if isinstance(d, int) else d.evaluate(sizes) for d in value.shape]
    whole = [size for size in found if isinstance(size, int)]
    assert len(whole) == len(found), f"no size: {value.shape}"
    return whole
