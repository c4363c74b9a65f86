"""A plan in the graph is the same arithmetic as the plan in PyTorch."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from vlmc.artifact import Artifact, KvContract
from vlmc.calibration.fake_quant import apply_plan
from vlmc.calibration.plan import ModulePlan, read_plan
from vlmc.calibration.weights import dequantize_weight, quantize_weight
from vlmc.engines.passes import constant, quantize
from vlmc.errors import VlmcError
from vlmc.exporter import golden, graph
from vlmc.exporter.family import Components
from vlmc.exporter.torch_runner import torch_session
from vlmc.runtime.backends.onnxruntime import OnnxDecoder, OnnxRunner
from vlmc.runtime.runner import HostDecoder, Runner

WEIGHT = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)
BIAS = np.random.default_rng(1).normal(size=24).astype(np.float32)
INPUT = np.random.default_rng(2).normal(size=(5, 40)).astype(np.float32)


# One layer


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (8, 32), (8, 7), (4, 32), (4, 5)])
def test_weights_are_the_shared_definition_to_the_last_bit(
    bits: int, block: int, linear: Any, plan_of: Any, run: Any
) -> None:
    model = linear(WEIGHT)
    assert quantize.apply(model, plan_of(fc=ModulePlan(bits, block)), "part") == 1
    exact = dequantize_weight(*quantize_weight(WEIGHT.T.copy(), bits, block), block).T
    np.testing.assert_array_equal(run(model, np.eye(40, dtype=np.float32)), exact)


def test_inputs_are_rounded_half_to_even_and_clipped_at_eight_bits(linear: Any, plan_of: Any, run: Any) -> None:
    model = linear(np.eye(1, dtype=np.float32))
    quantize.apply(model, plan_of(fc=ModulePlan(8, 0, activation_scale=0.5)), "part")
    x = np.array([0.0, 0.25, 0.26, -0.25, 0.75, -1.0, 63.5, 80.0, -64.0, -80.0], np.float32)[:, None]
    expected = [0.0, 0.0, 0.5, 0.0, 1.0, -1.0, 63.5, 63.5, -64.0, -64.0]
    np.testing.assert_allclose(run(model, x)[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(("scales", "pairs"), [((0.5, 0.5), 1), ((0.5, 0.25), 2)])
def test_layers_share_the_rounding_of_an_input_where_they_have_one_scale(
    scales: tuple[float, float], pairs: int, linear: Any, plan_of: Any
) -> None:
    model = linear(np.eye(4, dtype=np.float32))
    first = next(iter(model.graph))
    weight = constant(model.graph, "other.weight", 2 * np.eye(4, dtype=np.float32))
    other = ir.node("MatMul", [first.inputs[0], weight], name="other")
    model.graph.insert_after(first, other)
    model.graph.outputs.append(other.outputs[0])
    modules = {
        name: ModulePlan(8, 0, activation_scale=scale) for name, scale in zip(("fc", "other"), scales, strict=True)
    }
    quantize.apply(model, plan_of(**modules), "part")
    rounded = [node.inputs[1] for node in model.graph if node.op_type == "QuantizeLinear"]
    assert len(rounded) == pairs
    assert {float(scale.const_value.numpy()) for scale in rounded} == set(scales)


def test_a_module_that_is_called_again_is_quantised_in_every_call(plan_of: Any, run: Any) -> None:
    class Thrice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.tanh(self.fc(torch.tanh(self.fc(x)))))

    torch.manual_seed(0)
    part, x = Thrice().eval().requires_grad_(False), torch.randn(5, 8)
    rows = torch.export.Dim("rows")
    signature = graph.Signature(["x"], ["y"], (torch.zeros(3, 8),), ({0: rows},))
    model = graph.export_component("x", part, signature)
    assert [node.name for node in model.graph if node.op_type == "MatMul"] == ["fc", "fc#2", "fc#3"]
    plan = plan_of(fc=ModulePlan(4, 0, activation_scale=0.02))
    quantize.apply(model, plan, "part")
    np.testing.assert_allclose(run(model, x.numpy()), apply_plan(part, plan, "part")(x).numpy(), atol=1e-5)


@pytest.mark.parametrize("bits", [0, 8])
def test_smoothing_multiplies_input_channels_even_of_a_layer_that_stays_float(
    bits: int, linear: Any, plan_of: Any, run: Any
) -> None:
    model, factors = linear(WEIGHT, BIAS), np.linspace(0.5, 2, 40, dtype=np.float32)
    quantize.apply(model, plan_of(fc=ModulePlan(bits, 0, smoothing=tuple(factors.tolist()))), "part")
    tolerance = 1e-5 if bits == 0 else 0.5
    np.testing.assert_allclose(run(model, INPUT), INPUT * factors @ WEIGHT + BIAS, atol=tolerance)


def test_it_takes_the_memory_of_the_integers_and_not_of_the_floats(tmp_path: Path, plan_of: Any) -> None:
    layers, side = 32, 256
    weight = np.ones((side, side), np.float32)
    values = [ir.Value(name="x", shape=ir.Shape([1, side]), type=ir.TensorType(ir.DataType.FLOAT))]
    graph = ir.Graph(values, [], nodes=[], opset_imports={"": 24}, name="deep")
    for index in range(layers):
        node = ir.node("MatMul", [values[-1], constant(graph, f"fc{index}.weight", weight * index)], name=f"fc{index}")
        graph.append(node)
        values.append(node.outputs[0])
    values[-1].name = "y"
    graph.outputs.append(values[-1])
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    smoothed = ModulePlan(8, 0, smoothing=(1.0,) * side)
    tracemalloc.start()
    quantize.apply(model, plan_of(**{f"fc{index}": smoothed for index in range(layers)}), "part")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < layers * weight.nbytes / 2, "a quarter are the integers, the rest is one weight at work"


def test_an_absorber_divides_its_outputs_bias_and_all(linear: Any, plan_of: Any, run: Any) -> None:
    model, divisors = linear(WEIGHT, BIAS), np.linspace(0.5, 2, 24, dtype=np.float32)
    quantize.apply(model, plan_of({"fc": tuple(divisors.tolist())}), "part")
    np.testing.assert_allclose(run(model, INPUT), (INPUT @ WEIGHT + BIAS) / divisors, atol=1e-5)


@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
def test_outputs_are_rounded_with_their_bias_also_behind_an_absorber(
    bias: np.ndarray | None, linear: Any, plan_of: Any, run: Any, operators: Any
) -> None:
    model, divisors = linear(WEIGHT, bias), np.linspace(0.5, 2, 24, dtype=np.float32)
    plan = plan_of({"fc": tuple(divisors.tolist())}, fc=ModulePlan(0, 0, output_scale=0.25))
    quantize.apply(model, plan, "part")
    exact = (INPUT @ WEIGHT + (0 if bias is None else bias)) / divisors
    found = run(model, INPUT)
    np.testing.assert_array_equal(found, np.rint(found / 0.25) * 0.25)
    np.testing.assert_allclose(found, exact, atol=0.1251)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert model.graph.outputs[0].shape == ir.Shape(["rows", 24])
    assert operators(model)["QuantizeLinear"] == 1


def test_all_that_use_an_output_get_it_rounded(linear: Any, plan_of: Any, load: Any) -> None:
    model = linear(WEIGHT, BIAS)
    made = model.graph.outputs[0]
    negative = ir.node("Neg", [made], name="neg")
    negative.outputs[0].name, negative.outputs[0].type = "negative", made.type
    model.graph.append(negative)
    model.graph.outputs.append(negative.outputs[0])
    quantize.apply(model, plan_of(fc=ModulePlan(8, 0, output_scale=0.25)), "part")
    found, turned = load(model).run(None, {"x": INPUT})
    np.testing.assert_array_equal(turned, -found)


def test_queries_and_keys_of_vision_are_rounded_behind_their_bias(planned: Artifact) -> None:
    model, plan = ir.load(planned.graph("vision_encoder")), read_plan(planned, "int8")
    quantize.apply(model, plan, "vision_encoder")
    biases = [pair.inputs[0].producer() for pair in model.graph if (pair.name or "").endswith(".output.quantize")]
    assert [node.op_type for node in biases] == ["Add"] * 4
    rounded = {path for path, module in plan.modules.items() if module.output_scale is not None}
    assert {path.rpartition(".")[2] for path in rounded} == {"q_proj", "k_proj"}
    assert len(rounded) == 4


def test_layers_with_one_input_and_scale_share_the_quantised_input(
    planned: Artifact, operators: Callable[..., dict[str, int]]
) -> None:
    model, plan = ir.load(planned.graph("decoder")), read_plan(planned, "int8")
    assert quantize.apply(model, plan, "decoder") == 15
    layers = 2
    assert operators(model)["QuantizeLinear"] == 4 * layers + 1  # q, k and v; o; gate and up; down; the head
    assert operators(model)["DequantizeLinear"] == 15 + 4 * layers + 1


@pytest.mark.parametrize("recipe", ["int8", "int8-minmax", "w8", "w4"])
@pytest.mark.parametrize("component", ["vision_encoder", "decoder"])
def test_the_graph_stays_valid_onnx_of_standard_operators(
    recipe: str, component: str, planned: Artifact, tmp_path: Path
) -> None:
    """Nodes in order, above all: the modules of a plan are not in the graph's order."""
    model = ir.load(planned.graph(component))
    quantize.apply(model, read_plan(planned, recipe), component)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    assert dict(model.opset_imports) == {"": 24}


def test_what_the_plan_does_not_name_stays_as_it_is(linear: Any, plan_of: Any, run: Any) -> None:
    model = linear(WEIGHT, BIAS)
    assert quantize.apply(model, replace(plan_of(), modules={"other/fc": ModulePlan(8, 0)}), "part") == 0
    np.testing.assert_allclose(run(model, INPUT), INPUT @ WEIGHT + BIAS, atol=1e-5)


def test_a_plan_for_another_graph_is_refused(linear: Any, plan_of: Any) -> None:
    for plan in (plan_of(other=ModulePlan(8, 0)), plan_of({"other": (1.0,)})):
        says = r"'r' names modules that the graph of part does not have. Found: other.* has as arithmetic"
        with pytest.raises(VlmcError, match=says):
            quantize.apply(linear(WEIGHT), plan, "part")


# The whole model


def probed(model: ir.Model, modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Makes every module's input, before it is rounded, and its output, bias and rounding included, outputs of
    the graph."""
    names = {}
    for node in list(model.graph):
        if node.name not in modules:
            continue
        source, result = node.inputs[0], node.outputs[0]
        while source.producer() is not None and source.producer().op_type in ("QuantizeLinear", "DequantizeLinear"):
            source = source.producer().inputs[0]
        for use in list(result.uses()):
            if use.node.op_type == "Add" and any(v.name.startswith(f"{node.name}.bias") for v in use.node.inputs):
                result = use.node.outputs[0]
        for use in list(result.uses()):
            if use.node.name == f"{node.name}.output.quantize":
                (use,) = use.node.outputs[0].uses()
                result = use.node.outputs[0]
        for value in (source, result):
            if value not in model.graph.outputs and value not in model.graph.inputs:
                value.type = ir.TensorType(ir.DataType.FLOAT)
                model.graph.outputs.append(value)
        names[node.name] = (source.name, result.name)
    return names


def feeds(planned: Artifact, component: str) -> dict[str, np.ndarray]:
    """The golden inputs of the second case, for a prefill where it is the decoder."""
    arrays, kv = golden.read(planned)[1], planned.manifest.kv
    if component == "vision_encoder":
        return {"pixel_values": arrays["1.pixel_values"]}
    embeds = arrays["1.inputs_embeds"]
    names = [tensor.name for tensor in planned.manifest.components["decoder"].inputs[4:]]
    return {
        "inputs_embeds": embeds,
        "position_ids": np.arange(embeds.shape[1])[None],
        "write_index": np.zeros(1, np.int64),
        "logits_index": np.array([embeds.shape[1] - 1]),
        **{name: np.zeros((1, kv.kv_heads, kv.capacity, kv.head_dim), np.float32) for name in names},
    }


@pytest.mark.parametrize("recipe", ["int8", "int8-minmax", "w8", "w4"])
@pytest.mark.parametrize("component", ["vision_encoder", "decoder"])
def test_every_layer_computes_what_it_does_in_the_fake_quant_model(
    component: str, recipe: str, planned: Artifact, tiny_components: Components, load: Any
) -> None:
    """Given the same input. Tolerance: float32 sums in another order (1e-5); and PyTorch multiplies by 1 / scale where
    ONNX divides, so a value within a last bit of the middle between two steps, one in some 100,000, may round the
    other way, which the row that it is in shows."""
    plan = read_plan(planned, recipe)
    model = ir.load(planned.graph(component))
    count = quantize.apply(model, plan, component)
    fake = apply_plan(dict(tiny_components.items())[component], plan, component)
    names = probed(model, {path.partition("/")[2] for path in plan.modules})
    assert len(names) == count
    if not count:
        return
    session, values = load(model), feeds(planned, component)
    wanted = [value.name for value in model.graph.outputs]
    values |= dict(zip(wanted, session.run(wanted, values), strict=True))
    for path, (source, result) in names.items():
        with torch.inference_mode():
            expected = fake.get_submodule(path)(torch.from_numpy(values[source])).numpy()
        found = values[result]
        near = np.abs(found - expected) <= 1e-4 * np.abs(expected).max()
        assert near.all(axis=-1).mean() > 0.97, path
        np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max(), err_msg=path)


@pytest.mark.parametrize("recipe", ["int8", "int8-minmax", "w8", "w4"])
def test_so_does_the_whole(recipe: str, planned: Artifact, tiny_components: Components, load: Any) -> None:
    """Image features, and the logits of a prompt and of steps fed with the golden tokens. Tolerance: half of what
    quantising changes where inputs are rounded, for one value that rounds the other way brings others with it layer by
    layer; a hundredth where only weights are."""
    plan, arrays = read_plan(planned, recipe), golden.read(planned)[1]
    sessions = {}
    for name in ("vision_encoder", "decoder"):
        model = ir.load(planned.graph(name))
        quantize.apply(model, plan, name)
        sessions[name] = load(model)
    fake = Components(*(apply_plan(module, plan, name) for name, module in tiny_components.items()))
    exact, eager = torch_session(planned, tiny_components), torch_session(planned, fake)
    kv = planned.manifest.kv
    contract = KvContract("scatter", kv.layers, kv.kv_heads, kv.head_dim, kv.capacity)
    decoder = OnnxDecoder(sessions["decoder"], contract, exact.embed)
    found = outputs(OnnxRunner(sessions["vision_encoder"]), decoder, arrays)
    expected = outputs(eager.vision, eager.decoder, arrays)
    changed = outputs(exact.vision, exact.decoder, arrays)
    share = 0.5 if recipe.startswith("int8") else 0.01
    for part in (0, 1):
        difference = np.linalg.norm(found[part] - expected[part])
        assert difference <= max(share * np.linalg.norm(expected[part] - changed[part]), 1e-3)
    assert np.linalg.norm(expected[1] - changed[1]) > 0.1


def outputs(vision: Runner, decoder: HostDecoder, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    decoder.prefill(arrays["1.inputs_embeds"])
    logits = [decoder.logits()]
    for token in arrays["1.step_tokens"]:
        decoder.feed(int(token))
        logits.append(decoder.logits())
    return vision.run({"pixel_values": arrays["1.pixel_values"]})["image_features"], np.stack(logits)


@pytest.mark.parametrize(
    ("path", "divisors", "module"),
    [
        ("fc", None, ModulePlan(8, 0, smoothing=(2.0,))),  # which would be stretched over all channels
        ("fc", None, ModulePlan(8, 0, smoothing=(2.0,) * 39)),
        ("fc", (2.0,), None),
        ("add", None, ModulePlan(8, 0)),
        ("add", (2.0,) * 24, None),
    ],
)
def test_a_plan_for_another_layer_is_refused(
    path: str, divisors: tuple[float, ...] | None, module: ModulePlan | None, linear: Any, plan_of: Any
) -> None:
    plan = plan_of({path: divisors} if divisors else {}, **({path: module} if module else {}))
    with pytest.raises(VlmcError, match=f"does not fit the layer {path} of the graph.*vlmc calibrate"):
        quantize.apply(linear(WEIGHT, BIAS), plan, "part")
