"""Ways to write a decoder for TensorRT 8.6: changes to the graph that `vlmc build` lowers, and to its types.

engine_times.py builds and times them; docs/experiments.md says what they gained. Each changes no value (`check`):

    python benchmarks/graph_forms.py check ARTEFACT    here, with ONNX Runtime: a step in every form
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from vlmc.engines.passes import (
    array_of,
    constant,
    insert,
    producer,
    prune,
    replace,
    reshaped,
)

TURNED = [0, 1, 3, 2]
PIECES = 4
# Layers whose types are no choice, and norms and the choice of a token, which stay as exact as they are.
UNTOLD = ("QUANTIZE", "DEQUANTIZE", "CONSTANT", "SHAPE", "CAST", "NORMALIZATION", "TOPK")


def gather(model: ir.Model) -> int:
    """The rotation's halves swapped by a Gather, for a Split becomes copies."""
    found = [node for node in model.graph if node.op_type == "Concat" and str(node.name).endswith(".swapped")]
    for node in found:
        halves = producer(node.inputs[0], "Split")
        assert halves is not None
        half = int(array_of(halves.inputs[1])[0])
        order = constant(model.graph, f"swapped.{half}", np.array([*range(half, 2 * half), *range(half)], np.int64))
        replace(node, insert(node, "Gather", [halves.inputs[0], order], f"{node.name}.gathered", axis=3).outputs[0])
    prune(model)
    return len(found)


def left(model: ir.Model) -> int:
    """The cached keys as a product's left operand, for as the right one they are turned at each step."""
    found = ending(model, "MatMul", ".past.scores")
    for node in found:
        keys = producer(node.inputs[1], "Transpose")
        assert keys is not None
        column = insert(node, "Transpose", [node.inputs[0]], f"{node.name}.column", perm=TURNED).outputs[0]
        made = insert(node, "MatMul", [keys.inputs[0], column], f"{node.name}.columns").outputs[0]
        replace(node, insert(node, "Transpose", [made], f"{node.name}.turned", perm=TURNED).outputs[0])
    prune(model)
    return len(found)


def joined(model: ir.Model) -> int:
    """The segments' scores joined in maximum and sum of the softmax, for Concat and Slice become copies."""
    graph = model.graph
    last = constant(graph, "joined.axis", np.array([3], np.int64))
    masks: dict[ir.Value, list[ir.Value]] = {}
    found = ending(model, "Softmax", ".weights")
    for node in found:
        seen = producer(node.inputs[0], "Where")
        shares = [use.node for use in node.outputs[0].uses()]
        assert seen is not None and [share.op_type for share in shares] == ["Slice", "Slice"]
        hidden, fill = seen.inputs[0], seen.inputs[1]
        segments = producer(seen.inputs[2], "Concat")
        assert hidden is not None and segments is not None
        scores = segments.inputs
        if hidden not in masks:
            less = producer(hidden, "Less")
            assert less is not None
            parts = [
                insert(less, "Slice", [less.inputs[0], *share.inputs[1:4]], f"{less.name}.{i}.keys").outputs[0]
                for i, share in enumerate(shares)
            ]
            masks[hidden] = [
                insert(less, "Less", [part, less.inputs[1]], f"{less.name}.{i}").outputs[0]
                for i, part in enumerate(parts)
            ]

        def add(part: str, operator: str, *inputs: Any, node: ir.Node = node, **attributes: Any) -> ir.Value:
            return insert(node, operator, list(inputs), f"{node.name}.{part}", **attributes).outputs[0]

        chosen = [add(f"{i}.seen", "Where", masks[hidden][i], fill, score) for i, score in enumerate(scores)]
        top = add("top", "Max", *(add(f"{i}.top", "ReduceMax", part, axes=[3]) for i, part in enumerate(chosen)))
        powers = [add(f"{i}.power", "Exp", add(f"{i}.less", "Sub", part, top)) for i, part in enumerate(chosen)]
        total = add("sum", "Add", *(add(f"{i}.sum", "ReduceSum", part, last) for i, part in enumerate(powers)))
        for i, (share, part) in enumerate(zip(shares, powers, strict=True)):
            replace(share, add(f"{i}.share", "Div", part, total))
    prune(model)
    return len(found)


def static(model: ir.Model) -> int:
    """A step's length as no free size: an engine for steps alone."""
    from vlmc.engines import tensorrt_network

    tensorrt_network.fix_dimension(model, "length", 1)
    return 1


def element(model: ir.Model) -> int:
    """The new token's score and share by element and not as products; right where the length is 1."""
    graph = model.graph
    last = constant(graph, "joined.axis", np.array([3], np.int64))
    for node in ending(model, "MatMul", ".new.scores"):
        keys = producer(node.inputs[1], "Transpose")
        assert keys is not None
        product = insert(node, "Mul", [node.inputs[0], keys.inputs[0]], f"{node.name}.product").outputs[0]
        replace(node, insert(node, "ReduceSum", [product, last], f"{node.name}.sum").outputs[0])
    values = ending(model, "MatMul", ".new.values")
    for node in values:
        replace(node, insert(node, "Mul", list(node.inputs), f"{node.name}.product").outputs[0])
    prune(model)
    return len(values)


def pieces(model: ir.Model) -> int:
    """o_proj and down_proj as PIECES products of a batch, added: 32 blocks of threads do not fill 132 multiprocessors.
    Right where the length is 1."""
    graph, found = model.graph, [*ending(model, "MatMul", "o_proj"), *ending(model, "MatMul", "down_proj")]
    axis = constant(graph, "pieces.axis", np.array([0], np.int64))
    for node in found:
        name, x, scaled = node.name, node.inputs[0], producer(node.inputs[1], "DequantizeLinear")
        quantised = producer(scaled.inputs[0], "QuantizeLinear") if scaled else None
        source = quantised.inputs[0] if quantised else node.inputs[1]
        rows, columns = array_of(source).shape
        shape = (PIECES, -1, rows // PIECES)
        weight = constant(graph, f"{name}.pieces", array_of(source).reshape(PIECES, rows // PIECES, columns))
        if scaled is not None and quantised is not None:
            back = producer(x, "DequantizeLinear")
            assert back is not None
            forth = producer(back.inputs[0], "QuantizeLinear")
            assert forth is not None
            x = reshaped(node, forth.inputs[0], shape, f"{name}.parts")
            x = insert(node, "QuantizeLinear", [x, *forth.inputs[1:]], f"{name}.forth").outputs[0]
            x = insert(node, "DequantizeLinear", [x, *back.inputs[1:]], f"{name}.back").outputs[0]
            there = insert(node, "QuantizeLinear", [weight, *quantised.inputs[1:]], f"{name}.there", axis=2)
            weight = insert(
                node, "DequantizeLinear", [there.outputs[0], *scaled.inputs[1:]], f"{name}.whole", axis=2
            ).outputs[0]
        else:
            x = reshaped(node, x, shape, f"{name}.parts")
        made = insert(node, "MatMul", [x, weight], f"{name}.product").outputs[0]
        replace(node, insert(node, "ReduceSum", [made, axis], f"{name}.added", keepdims=1).outputs[0])
    prune(model)
    return len(found)


CHANGES: dict[str, Callable[[ir.Model], int]] = {
    change.__name__: change for change in (gather, left, joined, static, element, pieces)
}


def ending(model: ir.Model, operator: str, name: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == operator and str(node.name).endswith(name)]


def tell(trt: Any, network: Any, angles: str = "left", endings: tuple[str, ...] = ("",)) -> int:
    """Tells every float layer whose name has one of the endings to be FP16, but norms, int8 products and network
    outputs; what follows from positions alone is told `angles`: half, float, or left. Returns how many became FP16."""
    from vlmc.engines.builders.tensorrt import STATES
    from vlmc.engines.passes import norms

    layers = [network.get_layer(index) for index in range(network.num_layers)]
    outputs = [network.get_output(index).name for index in range(network.num_outputs)]
    constants, exact = origins(trt, layers)
    kept = (
        constants | {name for name in outputs if not name.startswith(STATES)} | (exact if angles == "left" else set())
    )
    dequantised = {layer.get_output(0).name for layer in layers if layer.type.name == "DEQUANTIZE"}
    told = 0
    for layer in layers:
        made = layer.get_output(0).name
        product = layer.type.name == "MATRIX_MULTIPLY" and layer.get_input(0).name in dequantised
        told_so = layer.name.endswith(endings) and not layer.name.endswith(norms.PARTS)
        if product or not told_so or layer.type.name in UNTOLD or made in kept:
            continue
        kind = trt.float32 if made in exact and angles == "float" else trt.float16
        for index in range(layer.num_outputs):
            if layer.get_output(index).dtype in (trt.float32, trt.float16):
                layer.precision = kind
                layer.set_output_type(index, kind)
                told += kind == trt.float16
    return told


def origins(trt: Any, layers: list[Any]) -> tuple[set[str], set[str]]:
    """The names of tensors that are constants, whatever was done to them, and of floats that are computed from integers
    and constants alone, as passes/half_precision has it."""
    constants: set[str] = set()
    exact: set[str] = set()
    for layer in layers:
        made = {layer.get_output(index).name for index in range(layer.num_outputs)}
        inputs = [tensor for index in range(layer.num_inputs) if (tensor := layer.get_input(index)) is not None]
        floats = {tensor.name for tensor in inputs if tensor.dtype in (trt.float32, trt.float16)}
        variable = floats - constants
        if constants.issuperset(tensor.name for tensor in inputs):
            constants |= made
        elif not floats or (variable and variable <= exact):
            exact |= made
    return constants, exact


def check(root: Path) -> None:
    """Prints for every change, and all of them, how far a step's logits in the middle of a random cache move."""
    from vlmc.artifact import Artifact

    artifact, random = Artifact(root), np.random.default_rng(0)
    place = artifact.manifest.kv.capacity // 2
    known = {"position_ids": place, "write_index": place, "logits_index": 0, "input_ids": 7}
    forms = [[], *([name] for name in ("gather", "left", "joined", "element")), [*CHANGES]]
    feeds: dict[str, Any] = {}
    wanted = np.empty(0)
    for changes in forms:
        session, counts = lowered(artifact, changes)
        for value in session.get_inputs():
            shape = [size if isinstance(size, int) else 1 for size in value.shape]
            kind = np.float32 if value.type == "tensor(float)" else np.int32
            drawn = random.standard_normal(shape) if kind == np.float32 else np.full(shape, known.get(value.name, 0))
            feeds.setdefault(value.name, drawn.astype(kind))
        found = session.run(["logits"], feeds)[0]
        wanted = found if not changes else wanted
        print("+".join(changes) or "lowered", counts, float(np.abs(found - wanted).max()))


def lowered(artifact: Any, changes: list[str]) -> tuple[Any, dict[str, int]]:
    """The decoder as ONNX Runtime takes it, and how many places each change changed."""
    from tempfile import TemporaryDirectory

    import onnxruntime as ort
    from vlmc.engines.builders import Job
    from vlmc.engines.builders.tensorrt import lower
    from vlmc.profiles.device import load_device

    model, embed = ir.load(artifact.graph("decoder")), lambda: ir.load(artifact.graph("embed_tokens"))
    root, kv = artifact.root, artifact.manifest.kv
    lower(model, Job("decoder", "fp16", load_device("h100"), kv, root, embed, {}, root))
    counts = {name: CHANGES[name](model) for name in changes}
    with TemporaryDirectory() as folder:
        ir.save(model, f"{folder}/m.onnx", external_data="m.data")
        return ort.InferenceSession(f"{folder}/m.onnx"), counts


if __name__ == "__main__":
    {"check": check}[sys.argv[1]](Path(sys.argv[2]))
