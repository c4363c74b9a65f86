"""What weak typing tells a network's layers, on the network that TensorRT-RTX's parser makes of the lowered graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import tensorrt_rtx as trt
from vlmc.artifact import Artifact
from vlmc.calibration.plan import read_plan
from vlmc.engines import tensorrt_network, tensorrt_typing
from vlmc.engines.passes import float_weights, opset17, quantize, two_segment_attention

FLOAT, HALF = trt.float32, trt.float16


class Told:
    """A layer of the parsed network that writes down what it is told; RTX itself takes no such word."""

    def __init__(self, layer: Any) -> None:
        self.name, self.type, self.num_inputs, self.num_outputs = (
            layer.name,
            layer.type,
            layer.num_inputs,
            layer.num_outputs,
        )
        self.get_input, self.get_output = layer.get_input, layer.get_output
        self.precision: Any = None
        self.outputs: dict[int, Any] = {}

    def set_output_type(self, index: int, kind: Any) -> None:
        self.outputs[index] = kind

    def reset_precision(self) -> None:
        self.precision = None

    def reset_output_type(self, index: int) -> None:
        self.outputs.pop(index, None)


class Tensor:
    def __init__(self, tensor: Any) -> None:
        self.name, self.dtype = tensor.name, tensor.dtype


class Network:
    def __init__(self, network: Any) -> None:
        self.layers = [Told(network.get_layer(i)) for i in range(network.num_layers)]
        self.inputs = [Tensor(network.get_input(i)) for i in range(network.num_inputs)]
        self.outputs = [Tensor(network.get_output(i)) for i in range(network.num_outputs)]
        self.num_layers, self.num_inputs, self.num_outputs = map(len, (self.layers, self.inputs, self.outputs))
        self.told_more: list[Any] = []
        self.get_layer = self.layers.__getitem__
        self.get_input, self.get_output = self.inputs.__getitem__, self.outputs.__getitem__

    def told(self, ending: str) -> set[Any]:
        return {layer.precision for layer in self.layers if layer.name.endswith(ending)}


def network(artifact: Artifact, component: str, folder: Path) -> Network:
    model = ir.load(artifact.graph(component))
    quantize.apply(model, read_plan(artifact, "int8"), component)
    if component == "decoder":
        two_segment_attention.apply(model, artifact.manifest.kv)
    opset17.apply(model)
    float_weights.apply(model)
    ir.save(model, folder / "lowered.onnx", external_data="lowered.onnx.data")
    parsed = tensorrt_network.parse(trt, folder / "lowered.onnx", component)
    found = Network(parsed.network)
    found.told_more = tensorrt_typing.apply(trt, found, decoder=component == "decoder")
    found.parsed = parsed  # type: ignore[attr-defined]  # owns the layers
    return found


@pytest.fixture(scope="module")
def decoder(planned: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Network:
    return network(planned, "decoder", tmp_path_factory.mktemp("decoder"))


def test_norms_stay_float32(decoder: Network) -> None:
    for part in tensorrt_typing.NORM_PARTS:
        assert decoder.told(part) == {FLOAT}


def test_what_follows_from_positions_alone_stays_float32(decoder: Network) -> None:
    """FP16 cannot tell 2049 from 2048, and turns far positions by the wrong angle."""
    angles = [layer for layer in decoder.layers if layer.type.name == "UNARY" and "cos" in layer.name.lower()]
    assert angles and {layer.precision for layer in angles} == {FLOAT}
    assert decoder.told(".cos.table") <= {FLOAT}


def test_attention_and_activations_become_fp16(decoder: Network) -> None:
    for part in (".past.columns", ".new.scores", ".past.power", ".past.sum", ".past.values", ".new.values"):
        assert decoder.told(part) == {HALF}, part


def test_products_of_int8_are_not_told_for_that_would_make_them_fp16(decoder: Network) -> None:
    products = [layer for layer in decoder.layers if layer.type.name == "MATRIX_MULTIPLY" and "proj" in layer.name]
    assert len(products) == 14
    assert {layer.precision for layer in products} == {None}


def test_the_cache_is_fp16_and_the_border_float32(decoder: Network) -> None:
    kinds = {tensor.name: tensor.dtype for tensor in decoder.inputs + decoder.outputs}
    states = {name for name in kinds if name.startswith(tensorrt_typing.STATES)}
    assert states and {kinds[name] for name in states} == {HALF}
    assert (kinds["inputs_embeds"], kinds["logits"]) == (FLOAT, FLOAT)
    makers = [layer for layer in decoder.layers if layer.get_output(0).name == "logits"]
    assert [layer.precision for layer in makers] == [None]


def test_integers_are_told_nothing(decoder: Network) -> None:
    for layer in decoder.layers:
        for index in layer.outputs:
            assert layer.get_output(index).dtype in (FLOAT, HALF)


def test_what_was_told_can_be_taken_back_but_for_norms(planned: Artifact, tmp_path: Path) -> None:
    found = network(planned, "decoder", tmp_path)
    tensorrt_typing.release(found.told_more)
    told = [layer for layer in found.layers if layer.precision is not None or layer.outputs]
    assert told and all(layer.name.endswith(tensorrt_typing.NORM_PARTS) for layer in told)


def test_of_an_encoder_only_the_norms_are_told(planned: Artifact, tmp_path: Path) -> None:
    told = network(planned, "vision_encoder", tmp_path)
    assert {layer.precision for layer in told.layers if not layer.name.endswith(tensorrt_typing.NORM_PARTS)} == {None}
