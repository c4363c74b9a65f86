"""What builders of TensorRT and its relatives share: an ONNX file becomes a network, and a network an engine.

`trt` is the imported module, `tensorrt` or `tensorrt_rtx`: both have one API. Nothing here needs a GPU; whether the
build does is the module's affair. Both steps end in one sentence where TensorRT refuses, with the nodes it refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..errors import VlmcError
from ..runtime.tensorrt_engine import logger, title
from .tensorrt_profiles import Profile

WEIGHT_ONLY = {"INT4": "w4", "INT8": "w8"}
FLOATS = {"HALF": "float16", "FLOAT": "float32", "BF16": "bfloat16", "FP8": "float8"}
PASSED_ON = ("SHUFFLE", "CAST", "IDENTITY", "UNSQUEEZE", "SQUEEZE")  # layers that leave a product's operand what it is
NOISE = (  # what stands before the sentence in TensorRT's messages
    r"^[\w:]+: Error Code \d+: ",
    r"^[A-Z]\w*( \w+)* \(",  # the kind of error, with the rest in brackets
    r"^\[[^\]]*\] ",  # file:line: function
    r"^\w+Exception: \S+ ",
    r"^CHECK\(.*?\) failed\. ",
    r"^Assertion failed: .*?: ",
)


@dataclass
class Parsed:
    """A network with what has to live as long as it: its builder, the parser that owns its weights, and the messages
    (warnings and errors, in order) that TensorRT wrote meanwhile."""

    trt: Any
    what: str
    builder: Any
    network: Any
    parser: Any
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def fix_dimension(model: ir.Model, name: str, size: int) -> None:
    """Gives the free dimension of that name its number throughout: TensorRT updates caches of static length only."""
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.shape is not None:
            dimensions = [size if isinstance(d, ir.SymbolicDim) and d.value == name else d for d in value.shape]
            value.shape = ir.Shape(dimensions)


def parse(trt: Any, path: Path, what: str, flags: Sequence[str] = ("STRONGLY_TYPED",)) -> Parsed:
    """The network of an ONNX file whose weights lie beside it; both may go afterwards, which halves the disk that a
    build needs (seen with TensorRT 8.6 and RTX 1.7). `what` names it in errors, which name the nodes that the parser
    refuses (it stops at the first). `flags` are names of NetworkDefinitionCreationFlag; those that this version of
    TensorRT does not have are left out."""
    log = logger(trt)
    errors: list[str] = []
    warnings: list[str] = []
    log.errors, log.warnings = errors, warnings
    try:
        builder = trt.Builder(log)
    except TypeError:  # pybind11's word for a constructor that returned nothing
        raise VlmcError(
            f"{title(trt)} does not start",
            found="; ".join(_sentences(errors + warnings)) or "no message",
            fix="see `nvidia-smi` for the driver and the GPU; a damaged installation of TensorRT has to be made again",
        ) from None
    known = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(sum(1 << int(getattr(known, flag)) for flag in flags if hasattr(known, flag)))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        refused = [_refusal(parser.get_error(index)) for index in range(parser.num_errors)] or _sentences(errors)
        raise VlmcError(
            f"The parser of {title(trt)} refuses the {what}",
            found="; ".join(refused),
            expected="standard ONNX operators and symmetric int8 or int4",
            fix="build it for another backend or with another recipe",
        )
    return Parsed(trt, what, builder, network, parser, errors, warnings)


def products(parsed: Parsed) -> dict[str, int]:
    """The network's matrix products by the types of their operands: `int8` where both were quantised, `w8` and `w4`
    where the weight alone was, else the float type, with ` attention` where no weight takes part. Strong typing keeps
    to these types; which kernels are chosen shows on the device only."""
    made = {layer.get_output(i).name: layer for layer in _layers(parsed) for i in range(layer.num_outputs)}
    counts: dict[str, int] = {}
    for layer in _layers(parsed):
        kind, number = "", 1
        if layer.type.name == "ATTENTION_INPUT":
            kind, number = f"{_float(layer.get_input(0))} attention", 2  # queries by keys, and scores by values
        elif layer.type.name in ("MATRIX_MULTIPLY", "CONVOLUTION"):
            kind = _product(layer, made)
        if kind:
            counts[kind] = counts.get(kind, 0) + number
    return counts


def serialise(parsed: Parsed, profiles: Sequence[Profile], configure: Callable[[Any], None]) -> Any:
    """The engine as a buffer of bytes. `configure` gets the builder's configuration; `profiles` are the shapes that the
    engine is made for, an execution context each."""
    config = parsed.builder.create_builder_config()
    configure(config)
    for shapes in profiles:
        made = parsed.builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            made.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(made)
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    if engine is None:
        raise VlmcError(
            f"{title(parsed.trt)} does not build the {parsed.what}",
            found="; ".join(_sentences(parsed.errors)) or "no message",
            fix="build it for another backend or with another recipe",
        )
    return engine


def _layers(parsed: Parsed) -> Iterator[Any]:
    return (parsed.network.get_layer(index) for index in range(parsed.network.num_layers))


def _product(layer: Any, made: Mapping[str, Any]) -> str:
    # A convolution's weight is an input only where it is quantised; as a constant it belongs to the layer.
    operands = [layer.get_input(index) for index in range(2) if index < layer.num_inputs and layer.get_input(index)]
    sources = [_source(tensor, made) for tensor in operands]
    constant = layer.type.name == "CONVOLUTION" or any(_is_constant(source, made) for source in sources)
    stored = [_stored(source, made) for source in sources]
    weight = next((WEIGHT_ONLY[name] for name in stored[1:] if name in WEIGHT_ONLY), "")
    kind = "int8" if stored == ["INT8", "INT8"] else weight or _float(operands[0])
    return kind + ("" if constant else " attention")


def _source(tensor: Any, made: Mapping[str, Any]) -> Any:
    """The layer that computes the operand, behind those that only move or cast it; None for an input."""
    layer = made.get(tensor.name)
    while layer is not None and layer.type.name in PASSED_ON:
        layer = made.get(layer.get_input(0).name)
    return layer


def _stored(source: Any, made: Mapping[str, Any]) -> str:
    """The type that an operand is dequantised from, empty where it is not."""
    if not _is(source, "DEQUANTIZE"):
        return ""
    if _is(_source(source.get_input(0), made), "QUANTIZE") and source.get_input(0).dtype.name in FLOATS:
        return "INT8"  # TensorRT 8 types a quantised tensor only when it builds
    name: str = source.get_input(0).dtype.name
    return name


def _is_constant(layer: Any, made: Mapping[str, Any]) -> bool:
    for kind in ("DEQUANTIZE", "QUANTIZE"):
        if _is(layer, kind):
            layer = _source(layer.get_input(0), made)
    return _is(layer, "CONSTANT")


def _is(layer: Any, kind: str) -> bool:
    return layer is not None and layer.type.name == kind


def _float(tensor: Any) -> str:
    name: str = tensor.dtype.name
    return FLOATS.get(name, name.lower())


def _refusal(error: Any) -> str:
    """`GroupQueryAttention 'model.layers.0.attn' (reason)`. TensorRT 8 knows the node's number only."""
    number = f"node {error.node()}"
    name = error.node_name() if hasattr(error, "node_name") else number
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    why = next(iter(_sentences(error.desc().splitlines())), "no reason given")
    return f"{operator} {name or number!r} ({why})".strip()


def _sentences(messages: Sequence[str]) -> list[str]:
    """The first sentence of what TensorRT says each time, less its own source and the missing GPU, each one once."""
    found: dict[str, None] = {}
    for message in messages:
        text = message.splitlines()[0] if message else ""
        for noise in NOISE:
            text = re.sub(noise, "", text)
        text = text.split(". ")[0].strip(" .)")
        if text and not re.search(r"cudaError|^Invalid Node|^While parsing|Begin node|End node", text):
            found.setdefault(text[:300])
    return list(found)
