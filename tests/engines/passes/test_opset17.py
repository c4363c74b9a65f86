"""What opset 17 computes is what the newer operators compute, and what it cannot say is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common
from vlmc.artifact import Artifact
from vlmc.calibration.plan import read_plan
from vlmc.engines.passes import opset17, patches_as_matmul, quantize, token_loop, two_segment_attention
from vlmc.errors import VlmcError
from vlmc.exporter import golden

DTYPES = {"float": np.float32, "int64": np.int64, "int32": np.int32, "bool": np.bool_, "int8": np.int8}


def graph(text: str) -> ir.Model:
    """A model of opset 24 from ONNX's textual form, its shapes inferred, its constants where the exporter has them."""
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": 24, "com.microsoft": 1]> g {text}')
    for index, node in enumerate(proto.graph.node):
        node.name = f"node{index}"
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    """Random inputs; a free dimension is 3, indices are 0 and 1."""
    random, values = np.random.default_rng(0), {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None
        shape = [size if isinstance(size, int) else 3 for size in value.shape]
        numbers = random.normal(size=shape) * 3 if value.dtype == ir.DataType.FLOAT else random.integers(0, 2, shape)
        values[str(value.name)] = numbers.astype(value.dtype.numpy())
    return values


@pytest.fixture
def lower(load: Any, tmp_path: Path) -> Callable[[ir.Model, dict[str, np.ndarray]], np.ndarray]:
    """lower(model, inputs): its first output in ONNX Runtime after the pass, which ONNX's checker has looked at."""

    def run(model: ir.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
        opset17.apply(model)
        session = load(model)
        onnx.checker.check_model(tmp_path / "0.onnx", full_check=True)
        kinds = {value.name: DTYPES[value.type[7:-1]] for value in session.get_inputs()}
        return np.asarray(session.run(None, {name: inputs[name].astype(kind) for name, kind in kinds.items()})[0])

    return run


# Single operators, against ONNX's own definition of them

OPERATORS = [
    "(float[2,N,8] x, float[8] w) => (float[2,N,8] y) { y = RMSNormalization<epsilon = 0.01>(x, w) }",
    "(float[2,5,8] x, float[5,8] w) => (float[2,5,8] y) { y = RMSNormalization<axis = 1>(x, w) }",
    "(float[1,2,N,8] x, float[1,N,4] c, float[1,N,4] s) => (float[1,2,N,8] y) { y = RotaryEmbedding(x, c, s) }",
    """(float[1,2,N,8] x, float[1,N,2] c, float[1,N,2] s) => (float[1,2,N,8] y)
       { y = RotaryEmbedding<rotary_embedding_dim = 4>(x, c, s) }""",
    "(float[3,9] x) => (float[3,9] y) { y = Gelu(x) }",
    '(float[3,9] x) => (float[3,9] y) { y = Gelu<approximate = "tanh">(x) }',
    "(float[3,9] x) => (float[3,9] y) { y = Swish(x) }",
    "(float[3,9] x) => (float[3,9] y) { y = Swish<alpha = 1.7>(x) }",
    """(float[B,4,N,8] q, float[B,4,7,8] k, float[B,4,7,6] v) => (float[B,4,N,6] y) { y = Attention(q, k, v) }""",
    """(float[B,4,5,8] q, float[B,4,7,8] k, float[B,4,7,8] v, float[5,7] m) => (float[B,4,5,8] y)
       { y = Attention<scale = 0.3>(q, k, v, m) }""",
    """(float[B,6,N,8] q, float[B,2,7,8] k, float[B,2,7,8] v) => (float[B,6,N,8] y) { y = Attention(q, k, v) }""",
    """(float[B,6,5,8] q, float[B,2,7,8] k, float[B,2,7,8] v, float[B,6,5,7] m) => (float[B,6,5,8] y)
       { y = Attention(q, k, v, m) }""",
    "(float[2,3,4] x) => (float[2,1,1] y) { a = Constant<value = int64[2] {1, 2}>() y = ReduceMean(x, a) }",
    "(float[2,3,4] x) => (float[3] y) { a = Constant<value = int64[2] {0, -1}>() y = ReduceMax<keepdims = 0>(x, a) }",
    "(float[2,3,4] x) => (float[2,1,4] y) { a = Constant<value = int64[1] {1}>() y = ReduceSum(x, a) }",
    "(float[2,3,4] x) => (float y) { y = ReduceMean<keepdims = 0>(x) }",
    "(float[2,3,4] x) => (float[2,4] y) { a = Constant<value = int64[1] {1}>() y = ReduceL2<keepdims = 0>(x, a) }",
    "(float[2,3,4] x) => (float[1,1,1] y) { y = ReduceL2(x) }",
    "(float[2,6] x) => (float[2,3] y) { a, b = Split<num_outputs = 2, axis = 1>(x) y = Sub(a, b) }",
    "(float[2,N,4] x) => (float[1] y) { s = Shape<start = -2, end = 2>(x) y = Cast<to = 1, saturate = 1>(s) }",
    "(float[2,N,4] x) => (float[2] y) { s = Shape<start = 1>(x) y = Cast<to = 1>(s) }",
    "(float[2,N,4,5,6,7] x) => (float[5] y) { s = Shape<start = 1>(x) y = Cast<to = 1>(s) }",
    """(float[1,2,3,4] x) => (float[1,2,6,8] y) <float[4] s = {1, 1, 2, 2}>
       { y = Resize<mode = "nearest", keep_aspect_ratio_policy = "stretch", antialias = 0>(x, , s) }""",
    # Indices: int64 as inputs, from shapes, and where the two meet
    """(float[5,4] x, int64[N] i) => (float[N,4] y)
       { one = Constant<value_int = 1>() j = Sub(one, i) y = Gather(x, j) }""",
    """(float[1,N,4] x, int64[1] i) => (float[N] y)
       { s = Shape(x) one = Constant<value_int = 1>() zero = Constant<value_int = 0>() n = Gather(s, one)
         r = Range(zero, n, one) t = Add(r, i) u = Max(t, one) y = Cast<to = 1>(u) }""",
    """(float[6] x, int64[1] i) => (float[N] y)
       { end = Constant<value_ints = [9223372036854775807]>() y = Slice(x, i, end) }""",
    """(float[4] x, int64[2] i) => (float[N, M] y)
       { one = Constant<value_ints = [1]>() j = Add(i, one) y = Expand(one_f, j) }""".replace("one_f", "z").replace(
        "{ one", "{ z = Constant<value_float = 2.0>() one"
    ),
    "(float[3] x) => (float[3] y) { i = Cast<to = 7>(x) z = Cast<to = 7>(i) y = Cast<to = 1>(z) }",
]


@pytest.mark.parametrize("text", OPERATORS)
def test_an_operator_computes_what_it_did(text: str, lower: Any, close: Any) -> None:
    model = graph(text)
    inputs = feeds(model)
    expected = ReferenceEvaluator(ir.to_proto(model)).run(None, inputs)[0]
    close(lower(model, inputs), expected)
    assert model.graph.opset_imports[""] == 17


def test_a_boolean_mask_hides_keys(lower: Any, close: Any) -> None:
    model = graph("""(float[1,2,5,8] q, float[1,2,7,8] k, float[1,2,7,8] v, bool[1,1,5,7] m) => (float[1,2,5,8] y)
                     { y = Attention(q, k, v, m) }""")
    inputs = feeds(model)
    inputs["m"] = np.tri(5, 7, 2, dtype=bool)[None, None]
    expected = ReferenceEvaluator(ir.to_proto(model)).run(None, inputs)[0]
    close(lower(model, inputs), expected)


def test_tables_of_the_rotation_are_made_once(operators: Any) -> None:
    model = graph("""(float[1,2,N,8] x, float[1,N,4] c, float[1,N,4] s) => (float[1,2,N,8] y)
                     { a = RotaryEmbedding(x, c, s) y = RotaryEmbedding(a, c, s) }""")
    assert opset17.apply(model) == 2
    assert operators(model) == {"Unsqueeze": 2, "Neg": 1, "Concat": 4, "Split": 2, "Mul": 4, "Add": 2}


def test_a_cast_from_int32_to_int32_goes(operators: Any) -> None:
    model = graph("(int64[3] x) => (float[3] y) { i = Cast<to = 7>(x) y = Cast<to = 1>(i) }")
    opset17.apply(model)
    assert operators(model) == {"Cast": 1}


def test_zero_points_are_written_out_in_the_scales_shape(lower: Any, close: Any) -> None:
    """The parser of TensorRT 8.6 reads three inputs and wants as many zero points as scales."""
    model = graph("""(float[2,3] x) => (float[2,4] y)
        <int8[3,4] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float[4] s = {1,2,3,4}, float t = {0.5}>
        { q = QuantizeLinear<output_dtype = 3>(x, t) d = DequantizeLinear(q, t)
          e = DequantizeLinear<axis = 1, block_size = 0>(w, s) y = MatMul(d, e) }""")
    x = np.array([[1, -2, 3], [0.5, 70, 0]], np.float32)
    expected = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0]
    close(lower(model, {"x": x}), expected)
    for node in model.graph:
        if "Linear" in node.op_type:
            scale, zero = node.inputs[1], node.inputs[2]
            assert scale is not None and zero is not None and zero.dtype == ir.DataType.INT8
            assert zero.shape == scale.shape
            assert node.attributes.keys() <= {"axis"}


# What opset 17 cannot say

REFUSED = [
    ("(float[2,3] x) => (float[2,3] y) { y = com.microsoft.FastGelu(x) }", "FastGelu.*com.microsoft"),
    ("(float[1,2,9,4] x, float[1,2,1,4] u) => (float[1,2,9,4] y) { y = TensorScatter(x, u) }", "TensorScatter"),
    ("(float[2,4] x) => (float[2,4] y) { y = LpNormalization<unknown = 1>(x) }", "LpNormalization.*unknown"),
    ("(float[2,4] x) => (float[2,4] y) { y = ReduceMean<noop_with_empty_axes = 1>(x) }", "noop_with_empty_axes"),
    ("(float[2,4] x, int64[1] a) => (float[2,1] y) { y = ReduceMean(x, a) }", "axes that are computed"),
    ("(float[5] x) => (float[2] y) { a, y = Split<num_outputs = 2>(x) }", "a split of 5 into 2 parts"),
    (
        "(float[1,2,3,8] x, float[1,3,4] c, float[1,3,4] s) => (float[1,2,3,8] y) "
        "{ y = RotaryEmbedding<interleaved = 1>(x, c, s) }",
        "RotaryEmbedding.*interleaved",
    ),
    (
        "(float[1,4,5,8] q, float[1,4,5,8] k, float[1,4,5,8] v) => (float[1,4,5,8] y) "
        "{ y = Attention<is_causal = 1>(q, k, v) }",
        "Attention.*an attribute other than scale",
    ),
    ("(float[4] x) => (float16[4] y) { y = Cast<to = 10, saturate = 0>(x) }", "Cast.*the attribute saturate"),
    (
        "(uint8[4] x) => (float[4] y) <float s = {1}> { y = DequantizeLinear(x, s) }",
        "DequantizeLinear.*UINT8.*recipe int8",
    ),
    (
        "(float[4] x) => (uint8[4] y) <float s = {1}> { y = QuantizeLinear(x, s) }",
        "QuantizeLinear.*UINT8.*recipe int8",
    ),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_cannot_be_said_is_refused_by_node_and_operator(text: str, message: str) -> None:
    with pytest.raises(VlmcError, match=message) as caught:
        opset17.apply(graph(text))
    assert "node0" in caught.value.what


@pytest.mark.parametrize("recipe", ["w8", "w4"])
def test_blocks_of_weights_are_refused_with_the_way_out(recipe: str, planned: Artifact) -> None:
    model = ir.load(planned.graph("decoder"))
    quantize.apply(model, read_plan(planned, recipe), "decoder")
    two_segment_attention.apply(model, planned.manifest.kv)
    with pytest.raises(VlmcError, match=r"DequantizeLinear.*q_proj\.weight.*recipe int8, or TensorRT 10"):
        opset17.apply(model)


# Whole components


@pytest.mark.parametrize("recipe", ["", "int8"])
def test_the_vision_encoder(recipe: str, planned: Artifact, run: Any, lower: Any, close: Any) -> None:
    canonical, model = (ir.load(planned.graph("vision_encoder")) for _ in range(2))
    x = golden.read(planned)[1]
    for graph in (canonical, model) if recipe else ():
        quantize.apply(graph, read_plan(planned, recipe), "vision_encoder")
    patches_as_matmul.apply(model)
    features = lower(model, {"pixel_values": x["0.pixel_values"]})
    close(features, run(canonical, x["0.pixel_values"]))
    if not recipe:
        np.testing.assert_allclose(features, x["0.image_features"], atol=1e-3)


@pytest.mark.parametrize("recipe", ["", "int8"])
def test_the_decoder_with_all_its_passes(recipe: str, planned: Artifact, steps: Any, close: Any) -> None:
    """Prompts and steps at several places of the cache, by embeddings and by ids."""
    canonical, model = (ir.load(planned.graph("decoder")) for _ in range(2))
    for graph in (canonical, model) if recipe else ():
        quantize.apply(graph, read_plan(planned, recipe), "decoder")
    two_segment_attention.apply(model, planned.manifest.kv)
    token_loop.apply(model, ir.load(planned.graph("embed_tokens")))
    opset17.apply(model)
    types = {value.name: value.dtype for value in [*model.graph.inputs, *model.graph.outputs]}
    integers = {"input_ids", "position_ids", "write_index", "logits_index", "next_token"}
    assert {name for name, dtype in types.items() if dtype == ir.DataType.INT32} == integers
    assert set(types.values()) == {ir.DataType.INT32, ir.DataType.FLOAT}
    assert (model.ir_version, model.graph.opset_imports) == (8, {"": 17})

    before, after = steps(canonical, planned.manifest.kv), steps(model, planned.manifest.kv)
    embed = ReferenceEvaluator(str(planned.graph("embed_tokens")))
    random, token = np.random.default_rng(0), None
    for length in (19, 1, 1, 6, 1, 1):
        rows = random.normal(size=(1, length, 64)).astype(np.float32)
        if length == 1:
            (rows,) = embed.run(None, {"input_ids": token.astype(np.int64)})
        expected = before(rows)["logits"]
        found = after(np.zeros_like(rows), token) if length == 1 else after(rows)
        close(found["logits"], expected)
        token = found["next_token"]
        assert token == expected.argmax()
