"""One component as a canonical ONNX graph: opset 24, standard operators, nodes named by their PyTorch modules.

The name of a weight product (MatMul, Gemm, Conv) or norm is its module's path in the component, which is what the
quantisation plan is keyed by; its constants are called PATH.weight and PATH.bias. Where a module is called again the
nodes are PATH#2, PATH#3, …, each with constants of its own.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from onnxscript import rewriter
from torch import Tensor, nn

from ..artifact import DECODER_INPUTS, ComponentSpec, KvSpec, TensorSpec
from .family import VisionInput
from .onnx_ops import canonical_operators

OPSET = 24
NAMED = ("MatMul", "Gemm", "Conv", "LayerNormalization", "RMSNormalization")
PARAMETER_NAMES = {1: "weight", 2: "bias"}  # by input position, for every operator in NAMED
_OTHERS = """<ir_version: 10, opset_import: ["": 24]>
others (float[4, 4] x, int64[1] a, int64[1] b) => (float[m, 4] y, float[n, 4] z)
{ xx = MatMul(x, x)  y = Slice(xx, a, b)  z = Slice(xx, b, a) }"""  # one rule looks at two slices of one value
_LARGE = 1 << 16  # bytes from which on it matters how a weight is written


@dataclass(frozen=True)
class Signature:
    """A component's inputs and outputs by name; inputs as its `forward` takes them, to trace with (of plausible shape,
    with sizes that differ from one another, so that none is mistaken); and their free dimensions, as torch.export wants
    them."""

    inputs: list[str]
    outputs: list[str]
    example: tuple[object, ...]
    free: tuple[object, ...]


def export_component(name: str, component: nn.Module, signature: Signature) -> ir.Model:
    """The component's canonical float graph, whose weights are PyTorch's own and no copy."""
    # The exporter prints its progress and logs what it skips; neither is for vlmc's user.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    quiet = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
    with quiet[0], quiet[1], warnings.catch_warnings(), torch.no_grad(), canonical_operators(component):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            component,
            signature.example,
            dynamo=True,
            opset_version=OPSET,
            input_names=signature.inputs,
            output_names=signature.outputs,
            dynamic_shapes=signature.free,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return canonicalise(program.model)


def forget() -> None:
    """Lets go of the last exported graph and with it of PyTorch's weights: each of the exporter's rewriting rules keeps
    the last nodes that it looked at, and these their whole graph, until it looks at others."""
    rewriter.rewrite(ir.from_onnx_text(_OTHERS))
    gc.collect()


def vision_signature(inputs: Mapping[str, VisionInput]) -> Signature:
    """Of the vision encoder, from `Family.vision_inputs`."""
    sizes = {name: torch.export.Dim(name) for value in inputs.values() for name in value.free.values()}
    free = tuple({axis: sizes[name] for axis, name in value.free.items()} or None for value in inputs.values())
    return Signature(list(inputs), ["image_features"], tuple(value.example for value in inputs.values()), free)


def embed_signature(component: nn.Module) -> Signature:
    """Of embed_tokens."""
    outputs = getattr(component, "outputs", ("inputs_embeds",))
    return Signature(["input_ids"], list(outputs), (torch.zeros(1, 7, dtype=torch.long),), ({1: _length()},))


def fusion_signature(component: nn.Module, vision: ComponentSpec, hidden: int) -> Signature:
    """Of the fusion, behind the vision encoder (see `Components`)."""
    shape = vision.outputs[0].shape
    free = {
        axis: size if size.isidentifier() else "image_tokens"
        for axis, size in enumerate(shape)
        if isinstance(size, str)
    }
    features = torch.zeros([5 if axis in free else int(size) for axis, size in enumerate(shape)])
    pictures = {axis: torch.export.Dim(name) for axis, name in free.items()} or None
    if "question_ids" in inspect.signature(component.forward).parameters:
        ids, length = torch.zeros(1, 7, dtype=torch.long), {1: torch.export.Dim("question_length")}
        return Signature(
            ["image_features", "question_ids"], ["fused_image_features"], (features, ids), (pictures, length)
        )
    return Signature(
        ["image_features", "text_embeds"],
        ["fused_image_features", "fused_text_embeds"],
        (features, torch.zeros(1, 7, hidden)),
        (pictures, {1: torch.export.Dim("text_length")}),
    )


def decoder_signature(
    component: nn.Module, embed: ComponentSpec, kv: KvSpec, crossed: ComponentSpec | None = None
) -> Signature:
    """Of the decoder, behind embed_tokens and, where it has cross-attention, the vision encoder or the fusion (see
    `Components`)."""
    known = {tensor.name: tensor for tensor in (*embed.outputs, *(crossed.outputs if crossed else ()))}
    behind = list(inspect.signature(component.forward).parameters)
    further = behind[behind.index("past") + 1 :]
    states = [f"{layer}.{part}" for layer in range(kv.layers) for part in ("key", "value")]
    length, size, capacity = _length(), 7, torch.export.Dim("capacity")
    positions, embeds = torch.arange(size)[None], _example(known["inputs_embeds"], size)
    if rows := getattr(component, "positions", 0):
        positions = positions.repeat(rows, 1, 1)
    past = [torch.zeros(1, kv.kv_heads, 24, kv.head_dim) for _ in states]
    one = torch.zeros(1, dtype=torch.long)
    more = [_example(known[name], size) if name in known else one + 3 for name in further]
    sizes = {"length": length}
    free = [_free(known[name], sizes) if name in known else None for name in further]
    return Signature(
        [*DECODER_INPUTS, *(f"past_key_values.{state}" for state in states), *further],
        ["logits", *(f"present.{state}" for state in states)],
        (embeds, positions, one, torch.tensor([size - 1]), past, *more),
        ({1: length}, {2 if rows else 1: length}, None, None, [{2: capacity} for _ in states], *free),
    )


def _length() -> torch.export.Dim:
    return torch.export.Dim("length")


def _free(tensor: TensorSpec, sizes: dict[str, torch.export.Dim]) -> dict[int, torch.export.Dim] | None:
    """The tensor's free axes; `sizes` holds those that other inputs have too, by name."""
    found = {
        axis: sizes.setdefault(n, torch.export.Dim(n)) for axis, n in enumerate(tensor.shape) if isinstance(n, str)
    }
    return found or None


def _example(tensor: TensorSpec, length: int) -> Tensor:
    """Zeros of the tensor's shape and type, whose size `length` is given; any other free one is 5."""
    sizes = [size if isinstance(size, int) else length if size == "length" else 5 for size in tensor.shape]
    return torch.zeros(sizes, dtype=getattr(torch, tensor.dtype))


def canonicalise(model: ir.Model) -> ir.Model:
    """Names nodes and their constants by module path, gives each its own constants, and drops the exporter's notes."""
    graph = model.graph
    _spell_out_gemm(graph)
    calls = Counter[str]()
    for node in graph:
        path = _module_path(node)
        if node.op_type in NAMED and path and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            calls[path] += 1
            node.name = path if calls[path] == 1 else f"{path}#{calls[path]}"
            for position, parameter in PARAMETER_NAMES.items():
                if len(node.inputs) > position and node.inputs[position] is not None:
                    _own_constant(graph, node, position, f"{node.name}.{parameter}")
        elif node.op_type == "Add" and path:
            for position, value in enumerate(node.inputs):
                if value is not None and value.const_value is not None and value.const_value.shape.rank() == 1:
                    _own_constant(graph, node, position, f"{path}.bias")
    for node in graph:
        node.metadata_props.clear()
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "vlmc", "", ""
    return model


def _spell_out_gemm(graph: ir.Graph) -> None:
    """A linear layer of a matrix becomes MatMul and Add, as that of a batch of matrices is: one form for all, with the
    weight as (in, out)."""
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "Gemm" else None
        factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")] if weight is not None else []
        turned = [name for name in ("transA", "transB") if name in node.attributes and node.attributes[name].as_int()]
        if weight is None or weight.const_value is None or factors != [1, 1] or "transA" in turned:
            continue
        array = weight.const_value.numpy()
        tensor = ir.tensor(array.T if turned else array, name=f"{weight.name}.turned")
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.initializers[str(tensor.name)] = value
        scopes = dict(node.metadata_props)
        made = [ir.node("MatMul", [node.inputs[0], value], metadata_props=scopes)]
        made[0].outputs[0].shape, made[0].outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            made.append(ir.node("Add", [*made[0].outputs, node.inputs[2]], metadata_props=dict(scopes)))
        ir.convenience.replace_nodes_and_values(graph, node, [node], made, node.outputs, made[-1].outputs)
        if not weight.uses() and not weight.is_graph_output():
            graph.initializers.pop(str(weight.name))


def _module_path(node: ir.Node) -> str:
    """The PyTorch module that the node came from, read from the exporter's name scopes."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    names = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    return names[-2] if len(names) > 1 else ""


def _own_constant(graph: ir.Graph, node: ir.Node, position: int, name: str) -> None:
    """Gives the node a constant of its own under that name (the exporter shares equal ones)."""
    value = node.inputs[position]
    assert value is not None
    if value.name == name or value.const_value is None or name in graph.initializers:
        return
    own = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
    graph.initializers[name] = own
    node.replace_input_with(position, own)
    if not value.uses() and value.name in graph.initializers:
        graph.initializers.pop(str(value.name))


def save(model: ir.Model, path: Path, report: Callable[[int, int], None]) -> None:
    """Writes the graph with its weights beside it in `NAME.onnx.data`, one after the other, so that no second copy of
    them all is ever in memory. `report` hears how many bytes were written and of how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = [value.const_value for value in model.graph.initializers.values()]
    total, written = sum(weight.nbytes for weight in weights if weight is not None), 0

    def count(tensor: ir.TensorProtocol, _: object) -> None:
        nonlocal written
        report(written, total)
        written += tensor.nbytes

    for value, weight in zip(model.graph.initializers.values(), weights, strict=True):
        if weight is not None and weight.nbytes >= _LARGE and not weight.numpy().flags.c_contiguous:
            value.const_value = _rows(weight)
    ir.save(model, path, external_data=path.name + ".data", callback=count)
    report(total, total)


def _rows(weight: ir.TensorProtocol) -> ir.LazyTensor:
    """The same weight, which is a turned view of PyTorch's, but laid out row by row when it is written: numpy would
    write the view number by number, at 50 MB/s, and turns it slower than PyTorch does."""

    def turned() -> ir.TensorProtocol:
        return ir.tensor(torch.from_numpy(weight.numpy()).contiguous().numpy(), name=weight.name)

    return ir.LazyTensor(turned, dtype=weight.dtype, shape=ir.Shape(weight.shape.numpy()), name=weight.name)


def tensor_specs(values: list[ir.Value]) -> tuple[TensorSpec, ...]:
    """Name, numpy dtype and shape of the graph's inputs or outputs."""
    return tuple(
        TensorSpec(
            value.name or "",
            value.dtype.numpy().name if value.dtype is not None else "",
            tuple(d if isinstance(d, int) else str(d) for d in (value.shape or ())),
        )
        for value in values
    )


def count_parameters(component: nn.Module) -> int:
    """Distinct weights of the component (a tied one once)."""
    weights: dict[int, Tensor] = {id(weight): weight for weight in component.parameters()}
    return sum(weight.numel() for weight in weights.values())
