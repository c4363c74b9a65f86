"""float16 arithmetic gives what float32 does, and float32 stays where float16 could not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from vlmc.artifact import Artifact
from vlmc.calibration.plan import ModulePlan, read_plan
from vlmc.engines.passes import half_precision, quantize
from vlmc.engines.trial import cosine
from vlmc.exporter import golden

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def lowered(artifact: Artifact, component: str, recipe: str = "") -> ir.Model:
    model = ir.load(artifact.graph(component))
    if recipe:
        quantize.apply(model, read_plan(artifact, recipe), component)
    assert half_precision.apply(model) > 0
    return model


def prefill(artifact: Artifact, load: Any, model: ir.Model, case: str) -> np.ndarray:
    """The decoder's logits after the golden prompt."""
    session, embeds, kv = load(model), golden.read(artifact)[1][f"{case}.inputs_embeds"], artifact.manifest.kv
    length = embeds.shape[1]
    past = np.zeros((1, kv.kv_heads, kv.capacity, kv.head_dim), np.float16)
    feeds = {value.name: past for value in session.get_inputs() if value.name.startswith("past_key_values.")}
    feeds |= {"inputs_embeds": embeds, "position_ids": np.arange(length)[None]}
    feeds |= {"write_index": np.zeros(1, np.int64), "logits_index": np.array([length - 1])}
    logits: np.ndarray = session.run(["logits"], feeds)[0]
    return logits


def types(model: ir.Model, *operators: str) -> set[ir.DataType | None]:
    """Of the inputs and outputs that are floats, over all nodes of these operators."""
    nodes = [node for node in model.graph if node.op_type in operators]
    assert nodes
    values = [value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None]
    return {value.dtype for value in values} & {FLOAT, HALF}


@pytest.mark.parametrize("recipe", ["", "int8"])
def test_vision_agrees_with_pytorch(recipe: str, planned: Artifact, load: Any) -> None:
    session, arrays = load(lowered(planned, "vision_encoder", recipe)), golden.read(planned)[1]
    for case in ("0", "1"):
        features = session.run(None, {"pixel_values": arrays[f"{case}.pixel_values"]})[0]
        assert cosine(features, arrays[f"{case}.image_features"]) > (0.999 if recipe else 0.99999)


@pytest.mark.parametrize(("recipe", "near"), [("", 0.9999), ("int8", 0.9), ("w4", 0.9)])
def test_the_decoder_agrees_with_pytorch(recipe: str, near: float, planned: Artifact, load: Any) -> None:
    model = lowered(planned, "decoder", recipe)
    for case in ("0", "1"):
        assert cosine(prefill(planned, load, model, case), golden.read(planned)[1][f"{case}.prefill_logits"]) > near


def test_a_weight_that_was_converted_is_let_go(planned: Artifact) -> None:
    model = ir.load(planned.graph("vision_encoder"))
    read = [value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)]
    half_precision.apply(model)
    left = {id(value) for value in model.graph.initializers.values()}
    gone = [value for value in read if id(value) not in left]
    assert gone and not any(value.const_value for value in gone), "what was read of the file stays in memory"


def test_quantised_graphs_agree_with_themselves_in_float32(planned: Artifact, load: Any) -> None:
    """So what float16 costs is known apart from what int8 costs. Tolerance: an activation that lies between two int8
    steps may be rounded the other way."""
    exact = ir.load(planned.graph("vision_encoder"))
    quantize.apply(exact, read_plan(planned, "int8"), "vision_encoder")
    pixels = {"pixel_values": golden.read(planned)[1]["0.pixel_values"]}
    halves = load(lowered(planned, "vision_encoder", "int8")).run(None, pixels)[0]
    assert cosine(halves, load(exact).run(None, pixels)[0]) > 0.9995


def test_products_and_the_cache_are_float16_and_the_border_stays(planned: Artifact) -> None:
    for component in ("vision_encoder", "decoder"):
        model = lowered(planned, component)
        assert types(model, "MatMul", "Attention") == {HALF}
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.dtype in (FLOAT, HALF):
                assert (value.dtype == HALF) == (value.name or "").startswith(("past_key_values.", "present."))


def test_norms_and_rotary_tables_stay_float32(planned: Artifact) -> None:
    decoder = lowered(planned, "decoder")
    assert types(decoder, "RMSNormalization") == types(decoder, "Cos", "Sin") == {FLOAT}
    assert types(decoder, "RotaryEmbedding") == {HALF}
    assert types(lowered(planned, "vision_encoder"), "LayerNormalization") == {FLOAT}


def test_a_table_is_looked_up_in_float16(planned: Artifact, load: Any) -> None:
    model = lowered(planned, "embed_tokens")
    assert [value.dtype for value in model.graph.initializers.values()] == [HALF]
    exact = load(ir.load(planned.graph("embed_tokens")))
    ids = {"input_ids": np.array([[3, 7, 300]])}
    np.testing.assert_allclose(load(model).run(None, ids)[0], exact.run(None, ids)[0], rtol=2**-11)


def test_one_cast_serves_all_that_read_a_value(planned: Artifact) -> None:
    model = lowered(planned, "decoder")
    casts = [node.inputs[0] for node in model.graph if node.op_type == "Cast" and node.attributes["to"].as_int() == 10]
    assert len(casts) == len(set(casts))


def test_a_length_is_read_off_the_input_itself(planned: Artifact) -> None:
    """A piece of a decoder (engines/pieces.py) then needs no other piece for it."""
    model = lowered(planned, "decoder")
    sizes = [node.inputs[0] for node in model.graph if node.op_type == "Shape"]
    assert sizes and all(value is not None and value.is_graph_input() for value in sizes)


def test_a_weight_beyond_float16_keeps_its_product_in_float32(linear: Callable[..., ir.Model], run: Any) -> None:
    weight = np.array([[1e6, 0.5], [-3.0, 2.0]], np.float32)
    model = linear(weight)
    assert half_precision.apply(model) == 0
    x = np.array([[0.0, 1.0], [1e-2, 0.0]], np.float32)
    np.testing.assert_allclose(run(model, x), x @ weight, rtol=1e-6)


def test_infinities_fit_but_hide_nothing_beside_them(linear: Callable[..., ir.Model]) -> None:
    assert half_precision.apply(linear(np.array([[-np.inf, 1.0]], np.float32))) == 1
    assert half_precision.apply(linear(np.array([[-np.inf, 1e5]], np.float32))) == 0


@pytest.mark.parametrize(("size", "kept"), [(1e-2, HALF), (1e-4, FLOAT)])  # scales of 8e-5 and 8e-7
def test_a_scale_that_float16_would_round_away_stays(
    size: float, kept: ir.DataType, linear: Any, plan_of: Any, run: Any
) -> None:
    weight = np.random.default_rng(0).uniform(-size, size, (8, 4)).astype(np.float32)
    model = linear(weight)
    quantize.apply(model, plan_of(fc=ModulePlan(8, 0)), "part")
    exact = run(model, np.eye(8, dtype=np.float32))
    half_precision.apply(model)
    assert types(model, "DequantizeLinear") == {kept}
    assert types(model, "MatMul") == {HALF}
    np.testing.assert_allclose(run(model, np.eye(8, dtype=np.float32)), exact, rtol=2e-3, atol=2**-25)


def test_the_smallest_scale_of_a_weight_decides(linear: Any, plan_of: Any) -> None:
    weight = np.random.default_rng(0).uniform(-1, 1, (8, 4)).astype(np.float32) * np.float32([1e-2, 1e-2, 1e-2, 1e-4])
    model = linear(weight)
    quantize.apply(model, plan_of(fc=ModulePlan(8, 0)), "part")
    half_precision.apply(model)
    assert types(model, "DequantizeLinear") == {FLOAT}


def test_a_cast_that_was_there_follows(linear: Any, run: Any) -> None:
    model = linear(np.eye(4, dtype=np.float32))
    node = next(iter(model.graph))
    cast = ir.node("Cast", [node.inputs[0]], attributes={"to": FLOAT.value}, name="cast")
    cast.outputs[0].name = "cast"
    model.graph.insert_before(node, cast)
    node.replace_input_with(0, cast.outputs[0])
    assert half_precision.apply(model) == 2
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(run(model, x), x)


def test_before_opset_19_scales_stay_float32(linear: Any, plan_of: Any) -> None:
    model = linear(np.ones((8, 4), np.float32))
    model.graph.opset_imports[""] = 17
    quantize.apply(model, plan_of(fc=ModulePlan(8, 0, 0.1)), "part")
    half_precision.apply(model)
    assert types(model, "QuantizeLinear", "DequantizeLinear") == {FLOAT}
    assert types(model, "MatMul") == {HALF}


def test_a_norm_that_was_spelt_out_stays_float32(load: Any) -> None:
    """As decompositions.py writes it: 300² is more than float16 holds."""
    x = ir.Value(name="x", shape=ir.Shape([2, 4]), type=ir.TensorType(FLOAT))
    numbers = {name: ir.tensor(np.float32(number), name=name) for name, number in {"two": 2, "epsilon": 1e-5}.items()}
    two, epsilon = (
        ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(FLOAT), const_value=tensor)
        for name, tensor in numbers.items()
    )
    square = ir.node("Pow", [x, two], name="norm.square")
    mean = ir.node("ReduceMean", square.outputs, attributes={"axes": [-1], "keepdims": 1}, name="norm.mean")
    shifted = ir.node("Add", [mean.outputs[0], epsilon], name="norm.shifted")
    root = ir.node("Sqrt", shifted.outputs, name="norm.root")
    normal = ir.node("Div", [x, root.outputs[0]], name="norm.normal")
    double = ir.node("Add", [normal.outputs[0], normal.outputs[0]], name="double")
    y = double.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([2, 4]), ir.TensorType(FLOAT)
    nodes = [square, mean, shifted, root, normal, double]
    graph = ir.Graph([x], [y], nodes=nodes, initializers=[two, epsilon], opset_imports={"": 17}, name="norm")
    model = ir.Model(graph, ir_version=8)
    assert half_precision.apply(model) == 1
    given = np.array([[300, -300, 300, -300], [1, 2, 3, 4]], np.float32)
    expected = 2 * given / np.sqrt((given**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(load(model).run(None, {"x": given})[0], expected, rtol=2e-3)
