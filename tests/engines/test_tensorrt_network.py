"""With TensorRT-RTX's own parser and builder, which need no GPU: what they take, and what they say when they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tensorrt_rtx as trt
from vlmc.calibration.plan import ModulePlan
from vlmc.engines import tensorrt_network
from vlmc.engines.passes import float_weights, half_precision, quantize
from vlmc.errors import VlmcError

Parse = Callable[[ir.Model], tensorrt_network.Parsed]


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    """parse(model): its network, of the component that is called `part`."""

    def save_and_parse(model: ir.Model) -> tensorrt_network.Parsed:
        ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
        return tensorrt_network.parse(trt, tmp_path / "model.onnx", "part")

    return save_and_parse


def layers(
    nodes: list[ir.Node], inputs: dict[str, tuple[Any, ...]], dtype: ir.DataType, *weights: ir.Value
) -> ir.Model:
    """A graph of these nodes from these inputs, which are looked for by name; the last node's output is `y`."""
    values = {
        name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)) for name, shape in inputs.items()
    }
    for node in nodes:
        for position, value in enumerate(node.inputs):
            if value is not None and value.name in values:
                node.replace_input_with(position, values[value.name])
    y = nodes[-1].outputs[0]
    y.name, y.type = "y", ir.TensorType(dtype)
    graph = ir.Graph(values.values(), [y], nodes=nodes, initializers=weights, opset_imports={"": 24}, name="small")
    return ir.Model(graph, ir_version=10)


def attention(dtype: ir.DataType) -> ir.Model:
    given = dict.fromkeys(("q", "k", "v"), (1, 2, "length", 64))
    node = ir.node("Attention", [ir.Value(name=name) for name in given], name="attend")
    return layers([node], given, dtype)


def target(config: Any) -> None:
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM121, 0)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (None, "float16"),
        (ModulePlan(8, 0, 0.1), "int8"),
        (ModulePlan(8, 0), "w8"),
        (ModulePlan(8, 32), "w8"),
        (ModulePlan(4, 32), "w4"),
    ],
)
def test_products_are_told_by_what_is_multiplied(
    plan: ModulePlan | None, expected: str, linear: Any, plan_of: Any, parse: Parse
) -> None:
    model = linear(np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32), np.ones(32, np.float32))
    if plan is not None:
        quantize.apply(model, plan_of(fc=plan), "part")
    half_precision.apply(model)
    assert tensorrt_network.products(parse(model)) == {expected: 1}


def test_weights_that_are_quantised_in_the_engine_count_as_int8(linear: Any, plan_of: Any, parse: Parse) -> None:
    model = linear(np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32), np.ones(32, np.float32))
    quantize.apply(model, plan_of(fc=ModulePlan(8, 0, 0.1)), "part")
    assert float_weights.apply(model) == 1
    assert tensorrt_network.products(parse(model)) == {"int8": 1}


def test_a_scale_in_float32_hides_no_product(linear: Any, plan_of: Any, parse: Parse) -> None:
    """Then a Cast lies between the weight and its product."""
    model = linear(np.full((64, 32), 1e-7, np.float32))
    quantize.apply(model, plan_of(fc=ModulePlan(8, 0, 0.1)), "part")
    half_precision.apply(model)
    assert tensorrt_network.products(parse(model)) == {"int8": 1}


def test_convolutions_are_products_too(parse: Parse, plan_of: Any) -> None:
    def convolution() -> ir.Model:
        tensor = ir.tensor(np.ones((4, 3, 2, 2), np.float32), name="w")
        weight = ir.Value(name="w", shape=tensor.shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
        node = ir.node("Conv", [ir.Value(name="x"), weight], name="conv", attributes={"kernel_shape": [2, 2]})
        return layers([node], {"x": (1, 3, 8, 8)}, ir.DataType.FLOAT, weight)

    assert tensorrt_network.products(parse(convolution())) == {"float32": 1}
    quantised = convolution()
    quantize.apply(quantised, plan_of(conv=ModulePlan(8, 0, 0.1)), "part")
    assert tensorrt_network.products(parse(quantised)) == {"int8": 1}


def test_products_of_two_activations_are_attention(parse: Parse) -> None:
    half = ir.DataType.FLOAT16
    scale = ir.tensor(np.array(0.1, np.float16), name="scale")
    step = ir.Value(name="scale", shape=scale.shape, type=ir.TensorType(half), const_value=scale)
    integers = [ir.node("QuantizeLinear", [ir.Value(name=name), step], name=f"{name}.int8") for name in ("a", "b")]
    floats = [ir.node("DequantizeLinear", [*node.outputs, step], name=f"{node.name}.half") for node in integers]
    product = ir.node("MatMul", [node.outputs[0] for node in floats], name="scores")
    quantised = layers([*integers, *floats, product], {"a": (4, 8), "b": (8, 4)}, half, step)
    for node in integers:  # without a zero point this says that it is int8
        node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", ir.DataType.INT8.value)
    assert tensorrt_network.products(parse(quantised)) == {"int8 attention": 1}
    product = ir.node("MatMul", [ir.Value(name="a"), ir.Value(name="b")], name="scores")
    assert tensorrt_network.products(parse(layers([product], {"a": (4, 8), "b": (8, 4)}, half))) == {
        "float16 attention": 1
    }
    assert tensorrt_network.products(parse(attention(half))) == {"float16 attention": 2}


def test_what_the_parser_refuses_is_named_with_its_operator(
    linear: Any, plan_of: Any, parse: Parse, capfd: pytest.CaptureFixture[str]
) -> None:
    model = linear(np.ones((8, 4), np.float32))
    quantize.apply(model, plan_of(fc=ModulePlan(8, 0, 0.1)), "part")
    zero = ir.tensor(np.array(128, np.uint8), name="fc.input.zero")
    value = model.graph.initializers["fc.input.zero"]
    value.const_value, value.type = zero, ir.TensorType(zero.dtype)
    with pytest.raises(VlmcError) as caught:
        parse(model)
    error = caught.value
    assert error.what == f"The parser of TensorRT-RTX {trt.__version__} refuses the part"
    assert error.found == "QuantizeLinear 'fc.input.quantize' (Non-zero zero point is not supported)"
    assert error.fix
    assert capfd.readouterr() == ("", "")


def test_a_cache_of_free_length_is_refused_and_the_missing_gpu_is_not_mentioned(parse: Parse) -> None:
    given = {"past": (1, 2, "capacity", 64), "new": (1, 2, "length", 64)}
    index = ir.Value(name="index", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    inputs = [ir.Value(name="past"), ir.Value(name="new"), index]
    scatter = ir.node("TensorScatter", inputs, name="write", attributes={"axis": 2})
    model = layers([scatter], given, ir.DataType.FLOAT16)
    model.graph.inputs.append(index)
    with pytest.raises(VlmcError) as caught:
        parse(model)
    said = "write: The KV cache tensor must have a static sequence length dimension"
    assert caught.value.found == f"TensorScatter 'write' ({said})"
    tensorrt_network.fix_dimension(model, "capacity", 32)
    assert tensorrt_network.products(parse(model)) == {}


def test_a_file_that_is_no_onnx_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(VlmcError, match="refuses the part") as caught:
        tensorrt_network.parse(trt, path, "part")
    assert caught.value.found


def test_a_parser_that_knows_a_nodes_number_only() -> None:
    """TensorRT 8's errors have no names and its networks no strong typing."""

    class Old:
        __name__, __version__ = "tensorrt", "8.6.0"
        NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0)
        ILogger = type("ILogger", (), {})

        def __init__(self) -> None:
            self.created: list[int] = []

        def Builder(self, logger: Any) -> Any:
            return SimpleNamespace(create_network=self.created.append)

        def OnnxParser(self, network: Any, logger: Any) -> Any:
            error = SimpleNamespace(node=lambda: 7, desc=lambda: "In node 7: no importer for Attention")
            return SimpleNamespace(parse_from_file=lambda path: False, num_errors=1, get_error=lambda index: error)

    old = Old()
    with pytest.raises(VlmcError, match=r"TensorRT 8\.6\.0 refuses the decoder") as caught:
        tensorrt_network.parse(old, Path("model.onnx"), "decoder", ("EXPLICIT_BATCH", "STRONGLY_TYPED"))
    assert caught.value.found == "'node 7' (In node 7: no importer for Attention)"
    assert old.created == [1]


@pytest.mark.parametrize(
    ("said", "found"),
    [  # both as TensorRT 8.6.0 wrote them: without a driver, and with a library that was tampered with (H100)
        (
            "CUDA initialization failure with error: 35. Please check your CUDA installation:  http://docs.nvidia.com/cuda",
            "CUDA initialization failure with error: 35",
        ),
        (
            "2: [builder.cpp::createCaskKernelLibraryImpl::182] Error Code 2: Internal Error (Assertion "
            "validateCaskKLibDigest(sha256sum) failed. )",
            "validateCaskKLibDigest",
        ),
    ],
)
def test_a_tensorrt_that_does_not_start_is_a_sentence(said: str, found: str) -> None:
    class Broken:
        __name__, __version__ = "tensorrt", "8.6.0"
        ILogger = type("ILogger", (), {"ERROR": 1, "WARNING": 2})

        def Builder(self, logger: Any) -> Any:
            logger.log(1, said)
            raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(VlmcError, match=r"TensorRT 8\.6\.0 does not start") as caught:
        tensorrt_network.parse(Broken(), Path("model.onnx"), "decoder")
    assert found in caught.value.found


def why_a_build_failed(*said: str) -> str:
    """What is told as found of these errors of TensorRT's."""
    old: Any = SimpleNamespace(__name__="tensorrt", __version__="8.6.0")
    failing = SimpleNamespace(create_builder_config=lambda: None, build_serialized_network=lambda network, config: None)
    parsed = tensorrt_network.Parsed(old, "vision_encoder", failing, None, None, errors=list(said))
    with pytest.raises(VlmcError, match=r"TensorRT 8\.6\.0 does not build the vision_encoder") as caught:
        tensorrt_network.serialise(parsed, [], lambda config: None)
    return caught.value.found


def test_a_build_that_fails_repeats_what_tensorrt_said() -> None:
    """The words of TensorRT 8.6.0 on an H100 for int8 constants behind DequantizeLinear."""
    said = (
        "2: [graphOptimizer.cpp::convertMyelinWeightsToFp32::7903] Error Code 2: Internal Error (Assertion "
        "params.weights.type() != DataType::kINT8 failed. )"
    )
    assert "DataType::kINT8" in why_a_build_failed(said)


def test_of_a_long_message_300_characters_are_told() -> None:
    assert why_a_build_failed("a" * 300, "b" * 301, "c") == f"{'a' * 300}; {'b' * 300}; c"


def test_attention_builds_in_float16_and_says_in_a_sentence_why_not_in_float32(parse: Parse) -> None:
    shapes = dict.fromkeys(("q", "k", "v"), ((1, 2, 1, 64), (1, 2, 8, 64), (1, 2, 16, 64)))
    engine = tensorrt_network.serialise(parse(attention(ir.DataType.FLOAT16)), [shapes], target)
    assert len(bytes(engine)) > 1000
    with pytest.raises(VlmcError) as caught:
        tensorrt_network.serialise(parse(attention(ir.DataType.FLOAT)), [shapes], target)
    assert caught.value.what == f"TensorRT-RTX {trt.__version__} does not build the part"
    assert caught.value.found == "Attention operation was not supported by a dedicated kernel"


def test_shapes_that_do_not_fit_are_refused_in_a_sentence(parse: Parse) -> None:
    model = attention(ir.DataType.FLOAT16)
    with pytest.raises(VlmcError) as caught:
        tensorrt_network.serialise(parse(model), [{}], target)
    assert caught.value.found == "Dynamic input tensor q is missing dimensions in profile 0"


def test_a_free_dimension_gets_its_number_everywhere() -> None:
    model = attention(ir.DataType.FLOAT16)
    model.graph.inputs[1].shape = ir.Shape([1, 2, "capacity", 64])
    model.graph.inputs[2].shape = ir.Shape([1, 2, "capacity", 64])
    tensorrt_network.fix_dimension(model, "capacity", 32)
    assert [list(value.shape or ())[2] for value in model.graph.inputs] == [ir.SymbolicDim("length"), 32, 32]
