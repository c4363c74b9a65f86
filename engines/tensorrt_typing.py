"""Weak typing: which layers of a TensorRT network compute in FP16 and which in float32, where flags only allow it.

Left to itself TensorRT 8.6 mixes badly. Beside int8 products it computes all else in float32, and a KV cache that is
FP16 outside of the network becomes float32 inside, a copy of the whole cache at each step. So a decoder's layers are
told; what this gains stands in docs/experiments.md ("The decoder's layers told to be FP16"). Encoders are not told:
theirs gain nothing, for TensorRT 8.6 then misses its fused attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

STATES = ("past_key_values.", "present.")
NORM_PARTS = (".square", ".mean", ".shifted", ".root", ".normal")  # layers of a spelt-out norm (passes/decompositions)
# Layers whose types are no choice, and norms and the choice of a token, which stay as exact as they were.
UNTOLD = ("QUANTIZE", "DEQUANTIZE", "CONSTANT", "SHAPE", "CAST", "NORMALIZATION", "TOPK")


def apply(trt: Any, network: Any, decoder: bool) -> list[Any]:
    """Types the network in place. Norms stay float32, for squares leave FP16's range, and so does what is computed
    from positions alone, which FP16 cannot tell apart; the KV cache and the rest of a decoder become FP16. Returns the
    layers that were told more than they must be, for `release`."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for layer in layers:
        if layer.name.endswith(NORM_PARTS):
            _tell(layer, trt.float32, trt)
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for tensor in tensors + outputs:
        if tensor.name.startswith(STATES):
            tensor.dtype = trt.float16
    told: list[Any] = []
    if not decoder:
        return told
    border = {tensor.name for tensor in outputs if not tensor.name.startswith(STATES)}
    constants, exact = _origins(trt, layers)
    dequantised = {_output(layer).name for layer in layers if layer.type.name == "DEQUANTIZE"}
    for layer in layers:
        made = _output(layer).name
        product = layer.type.name == "MATRIX_MULTIPLY" and layer.get_input(0).name in dequantised
        if product or layer.type.name in UNTOLD or layer.name.endswith(NORM_PARTS) or made in border | constants:
            continue
        _tell(layer, trt.float32 if made in exact else trt.float16, trt)
        told.append(layer)
    return told


def release(told: Iterable[Any]) -> None:
    """Leaves these layers to TensorRT again, which for some mixtures of types says that it has no implementation."""
    for layer in told:
        layer.reset_precision()
        for index in range(layer.num_outputs):
            layer.reset_output_type(index)


def _tell(layer: Any, kind: Any, trt: Any) -> None:
    """Layers of integers stay what they are."""
    floats = [i for i in range(layer.num_outputs) if layer.get_output(i).dtype in (trt.float32, trt.float16)]
    for index in floats:
        layer.precision = kind
        layer.set_output_type(index, kind)


def _output(layer: Any) -> Any:
    return layer.get_output(0)


def _origins(trt: Any, layers: list[Any]) -> tuple[set[str], set[str]]:
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
