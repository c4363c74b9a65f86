"""Cosines and sines of positions → tables of them, looked up by position.

Where a builder may compute in float16 what it likes (TensorRT's weak typing), it may compute angles so, and there the
product of a position and a frequency has 11 bits: of position 1000 it is off by tenths of a radian. A table holds what
float32 gives. ONNX's reference evaluator fills it, and older ones know no opset 24, so this goes behind `opset17`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from . import constant, insert, producer, prune, replace

INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


def apply(model: ir.Model, capacity: int) -> int:
    """Replaces every Cos and Sin of floats (…, length, dim) that follow from integers (…, length, 1) one by one, all
    of them below `capacity`; others stay. Returns how many."""
    changed = 0
    for node in [node for node in model.graph if node.op_type in ("Cos", "Sin")]:
        unsqueeze = _positions(node)
        table = None if unsqueeze is None else _table(model, unsqueeze, node.outputs[0], capacity)
        if unsqueeze is None or table is None:
            continue
        inputs = [constant(model.graph, f"{node.name}.table", table), unsqueeze.inputs[0]]
        replace(node, insert(node, "Gather", inputs, f"{node.name}.row", axis=0).outputs[0])
        changed += 1
    prune(model)
    return changed


def _positions(node: ir.Node) -> ir.Node | None:
    """The Unsqueeze of integers that the node's floats are cast from, if they follow from these and constants alone."""
    found: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        for value in waiting.pop().inputs:
            maker = None if value is None else value.producer()
            if value is None or value.const_value is not None:
                continue
            if maker is None:
                return None
            unsqueeze = producer(maker.inputs[0], "Unsqueeze") if maker.op_type == "Cast" else None
            if unsqueeze is not None and unsqueeze.outputs[0].dtype in INTEGERS:
                found.add(unsqueeze)
            else:
                waiting.append(maker)
    return found.pop() if len(found) == 1 else None


def _table(model: ir.Model, unsqueeze: ir.Node, made: ir.Value, capacity: int) -> NDArray[Any] | None:
    """(capacity, dim) float32: what is made of each position, or None where it depends on the others too, or where
    positions (…, length) did not become (…, length, 1)."""
    positions, rows = unsqueeze.outputs[0], unsqueeze.inputs[0]
    assert rows is not None
    shape = [] if positions.shape is None else [*positions.shape]
    last = len(shape) > 1 and shape[-1] == 1 and rows.shape is not None and [*rows.shape] == shape[:-1]
    if not last or not all(isinstance(size, int) for size in shape[:-2]):
        return None
    part = ir.Model(ir.convenience.extract(model.graph, [positions], [made]), ir_version=model.ir_version)
    evaluator = ReferenceEvaluator(ir.to_proto(ir.external_data.load_to_model(part)))  # it reads no files
    assert positions.dtype is not None
    kind = positions.dtype.numpy()

    def of(numbers: NDArray[Any]) -> NDArray[Any]:
        given = np.broadcast_to(numbers.astype(kind)[:, None], [*shape[:-2], len(numbers), 1])
        results: Any = evaluator.run(None, {str(positions.name): np.ascontiguousarray(given)})
        return np.asarray(results[0])

    everything = of(np.arange(capacity))
    if everything.ndim != len(shape) or everything.shape[-2] != capacity:
        return None
    table = everything.reshape(-1, *everything.shape[-2:])[0]
    shuffled = np.random.default_rng(0).permutation(capacity)
    alone = all((of(some) == table[some]).all() for some in (shuffled, shuffled[:1]))
    return np.ascontiguousarray(table, np.float32) if alone else None
