"""One component as a canonical ONNX graph: opset 24, standard operators, nodes named by their PyTorch modules.

The name of a weight product (MatMul, Gemm, Conv) or norm is its module's path in the component, which is what the
quantisation plan is keyed by; its constants are called PATH.weight and PATH.bias.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..artifact import KvSpec, TensorSpec
from .onnx_ops import canonical_operators

OPSET = 24
NAMED = ("MatMul", "Gemm", "Conv", "LayerNormalization", "RMSNormalization")
PARAMETER_NAMES = {1: "weight", 2: "bias"}  # by input position, for every operator in NAMED


def export_component(name: str, component: nn.Module, example: tuple[object, ...], kv: KvSpec) -> ir.Model:
    """The component's canonical float graph; `example` are inputs as `forward` takes them (example_inputs)."""
    # The exporter prints its progress and logs what it skips; neither is for vlmc's user.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    quiet = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
    with quiet[0], quiet[1], warnings.catch_warnings(), torch.no_grad(), canonical_operators(component):
        warnings.simplefilter("ignore")
        inputs, outputs = io_names(name, kv)
        program = torch.onnx.export(
            component,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=_dynamic_shapes(name, kv),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return canonicalise(program.model)


def io_names(name: str, kv: KvSpec) -> tuple[list[str], list[str]]:
    """Names of the component's inputs and outputs, in order."""
    if name == "vision_encoder":
        return ["pixel_values"], ["image_features"]
    if name == "embed_tokens":
        return ["input_ids"], ["inputs_embeds"]
    states = [f"{layer}.{part}" for layer in range(kv.layers) for part in ("key", "value")]
    return (
        ["inputs_embeds", "position_ids", "write_index", "logits_index", *(f"past_key_values.{s}" for s in states)],
        ["logits", *(f"present.{s}" for s in states)],
    )


def example_inputs(name: str, hidden: int, image_size: tuple[int, int], kv: KvSpec) -> tuple[object, ...]:
    """Inputs of plausible shape to trace with; sizes that differ from one another, so that none is mistaken."""
    if name == "vision_encoder":
        return (torch.zeros(2, 3, *image_size),)
    if name == "embed_tokens":
        return (torch.zeros(1, 7, dtype=torch.long),)
    length = 7
    past = [torch.zeros(1, kv.kv_heads, 24, kv.head_dim) for _ in range(2 * kv.layers)]
    return (
        torch.zeros(1, length, hidden),
        torch.arange(length)[None],
        torch.zeros(1, dtype=torch.long),
        torch.tensor([length - 1]),
        past,
    )


def _dynamic_shapes(name: str, kv: KvSpec) -> tuple[object, ...]:
    if name == "vision_encoder":
        return ({0: torch.export.Dim("tiles")},)
    length = torch.export.Dim("length")
    if name == "embed_tokens":
        return ({1: length},)
    capacity = torch.export.Dim("capacity")
    return ({1: length}, {1: length}, None, None, [{2: capacity} for _ in range(2 * kv.layers)])


def canonicalise(model: ir.Model) -> ir.Model:
    """Names nodes and their constants by module path, gives each its own constants, and drops the exporter's notes."""
    graph = model.graph
    taken: set[str] = set()
    for node in graph:
        path = _module_path(node)
        if node.op_type in NAMED and path and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            node.name = path if path not in taken else f"{path}#{len(taken)}"
            taken.add(path)
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


def save(model: ir.Model, path: Path) -> None:
    """Writes the graph with its weights beside it in `NAME.onnx.data`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=path.name + ".data")


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
