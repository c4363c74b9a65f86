"""The contract of a canonical graph: standard operators, and names that the quantisation plan can be keyed by."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn
from vlmc.artifact import COMPONENTS, Artifact
from vlmc.exporter import graph
from vlmc.exporter.family import Components

SHAPES = {"Shape", "Squeeze", "Unsqueeze", "Range", "Reshape", "Transpose", "Concat", "Slice", "Gather", "Cast"}
OPERATORS = {
    "vision_encoder": {"Conv", "MatMul", "Add", "LayerNormalization", "Attention", "Gelu"},
    "embed_tokens": set(),
    "decoder": {"MatMul", "Add", "Mul", "Sigmoid", "RMSNormalization", "RotaryEmbedding", "Attention", "TensorScatter"}
    | {"Cos", "Sin", "LessOrEqual"},
}
WEIGHTED = (nn.Linear, nn.Conv2d, nn.LayerNorm)  # and RMS norms, which every family has its own class of


@pytest.fixture(scope="module")
def models(tiny: Artifact) -> dict[str, ir.Model]:
    return {name: ir.load(tiny.graph(name)) for name in COMPONENTS}


def modules(component: nn.Module) -> dict[str, nn.Module]:
    """Every layer with weights that is not a table, by path."""
    return {
        path: module
        for path, module in component.named_modules()
        if isinstance(module, WEIGHTED) or type(module).__name__.endswith("RMSNorm")
    }


def constants(node: ir.Node) -> dict[str, np.ndarray]:
    return {value.name: value.const_value.numpy() for value in node.inputs if value is not None and value.const_value}


@pytest.mark.parametrize("name", COMPONENTS)
def test_it_is_valid_onnx_of_opset_24_in_standard_operators(name: str, tiny: Artifact, models: dict) -> None:
    onnx.checker.check_model(tiny.graph(name), full_check=True)
    model = models[name]
    assert dict(model.opset_imports) == {"": 24}
    assert not model.functions
    assert {node.domain for node in model.graph} == {""}
    assert {node.op_type for node in model.graph} - SHAPES == OPERATORS[name]


def test_attention_and_the_cache_are_one_operator_each_a_layer(models: dict) -> None:
    counts = {name: [node.op_type for node in models[name].graph] for name in COMPONENTS}
    assert counts["vision_encoder"].count("Attention") == 2
    assert counts["decoder"].count("Attention") == 2
    assert counts["decoder"].count("TensorScatter") == 4
    assert counts["decoder"].count("RotaryEmbedding") == 4
    assert counts["decoder"].count("RMSNormalization") == 5


@pytest.mark.parametrize("name", ["vision_encoder", "decoder"])
def test_every_weight_product_and_norm_carries_its_modules_path(
    name: str, models: dict, components: Components
) -> None:
    nodes = {node.name: node for node in models[name].graph if node.op_type in graph.NAMED}
    layers = modules(dict(components.items())[name])
    assert nodes.keys() == layers.keys()
    for path, module in layers.items():
        weight = module.weight.numpy()
        found = constants(nodes[path])[f"{path}.weight"]
        np.testing.assert_array_equal(found.T if isinstance(module, nn.Linear) else found, weight)


@pytest.mark.parametrize("name", ["vision_encoder", "decoder"])
def test_every_bias_is_a_constant_of_that_name_behind_its_module(
    name: str, models: dict, components: Components
) -> None:
    layers = modules(dict(components.items())[name])
    expected = {
        f"{path}.bias": module.bias for path, module in layers.items() if getattr(module, "bias", None) is not None
    }
    model = models[name]
    found = {key: value for key, value in model.graph.initializers.items() if key.endswith(".bias")}
    assert found.keys() == expected.keys()
    for key, value in found.items():
        np.testing.assert_array_equal(value.const_value.numpy(), expected[key].numpy())
        (use,) = value.uses()
        path = key.removesuffix(".bias")
        assert use.node.name == path or use.node.inputs[1 - use.idx].producer().name == path


def test_no_two_layers_share_a_constant(models: dict) -> None:
    for name in COMPONENTS:
        for key, value in models[name].graph.initializers.items():
            if key.endswith((".weight", ".bias")):
                assert len(list(value.uses())) == 1


@pytest.mark.parametrize("name", COMPONENTS)
def test_nothing_is_left_of_the_exporters_notes(name: str, tiny: Artifact, models: dict) -> None:
    model = models[name]
    assert (model.producer_name, model.producer_version, model.doc_string) == ("vlmc", None, None)
    assert not model.metadata_props
    assert not model.graph.metadata_props
    for node in model.graph:
        assert not node.metadata_props
        assert not node.doc_string
    raw = tiny.graph(name).read_bytes()
    for word in (b"torch", b".py", b"forward"):
        assert word not in raw


def test_inputs_and_outputs_are_as_the_manifest_says(tiny: Artifact, models: dict) -> None:
    for name in COMPONENTS:
        spec, model = tiny.manifest.components[name], models[name]
        assert [tensor.name for tensor in spec.inputs] == [value.name for value in model.graph.inputs]
        assert [tensor.name for tensor in spec.outputs] == [value.name for value in model.graph.outputs]
    states = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    spec = tiny.manifest.components["decoder"]
    assert [tensor.name for tensor in spec.inputs[4:]] == [f"past_key_values.{state}" for state in states]
    assert [tensor.name for tensor in spec.outputs] == ["logits", *(f"present.{state}" for state in states)]
    assert spec.further_inputs() == ()
    decoder = {t.name: (t.dtype, t.shape) for t in tiny.manifest.components["decoder"].inputs}
    assert decoder["inputs_embeds"] == ("float32", (1, "length", 64))
    assert decoder["write_index"] == ("int64", (1,))
    assert decoder["past_key_values.1.value"] == ("float32", (1, 2, "capacity", 16))
    vision = tiny.manifest.components["vision_encoder"]
    assert vision.inputs[0].shape == ("tiles", 3, 32, 32)
    assert vision.outputs[0].shape == ("tiles", 4, 64)


def test_a_linear_layer_of_a_matrix_is_in_the_form_of_every_other(tmp_path: Path) -> None:
    """torch writes it as Gemm with the weight turned, and passes know MatMul's (in, out)."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4, bias=False)).eval()
    rows = torch.export.Dim("rows")
    made = graph.export_component("x", layers, graph.Signature(["x"], ["y"], (torch.zeros(3, 6),), ({0: rows},)))
    assert [node.op_type for node in made.graph] == ["MatMul", "Add", "MatMul"]
    assert [node.name for node in made.graph if node.op_type == "MatMul"] == ["0", "1"]
    assert {name: list(value.shape) for name, value in made.graph.initializers.items()} == {  # type: ignore[arg-type]
        "0.weight": [6, 4],
        "0.bias": [4],
        "1.weight": [4, 4],
    }
    graph.save(made, tmp_path / "x.onnx", lambda *_: None)
    x = torch.randn(5, 6)
    (found,) = ort.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, layers(x).detach().numpy(), atol=1e-6)


class Rotated(nn.Module):
    """Two slices of one value, as rotary embeddings have them, and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return torch.cat((-y[..., 32:], y[..., :32]), dim=-1)


def test_an_exported_graph_shares_its_weights_with_pytorch_and_lets_go_of_them() -> None:
    component = Rotated().eval().requires_grad_(False)
    signature = graph.Signature(["x"], ["y"], (torch.zeros(1, 3, 64),), ({1: torch.export.Dim("length")},))
    made = graph.export_component("x", component, signature)
    weight = component.layer.weight
    assert np.shares_memory(made.graph.initializers["layer.weight"].const_value.numpy(), weight.numpy())
    kept = weakref.ref(weight)
    del component, made, weight
    graph.forget()
    assert kept() is None


def test_weights_are_written_as_they_are_one_after_the_other(tmp_path: Path) -> None:
    component = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 200)).eval().requires_grad_(False)
    signature = graph.Signature(["x"], ["y"], (torch.zeros(1, 3, 200),), ({1: torch.export.Dim("length")},))
    told: list[tuple[int, int]] = []
    graph.save(graph.export_component("x", component, signature), tmp_path / "x.onnx", lambda *step: told.append(step))
    saved = ir.load(tmp_path / "x.onnx").graph.initializers
    for name in ("0", "1"):
        np.testing.assert_array_equal(
            saved[f"{name}.weight"].const_value.numpy(), component.get_parameter(f"{name}.weight").numpy().T
        )
    total = 4 * (2 * 200 * 300 + 200 + 300)
    assert told[-1] == (total, total)
    assert [step[0] for step in told] == sorted({step[0] for step in told})
    assert (tmp_path / "x.onnx.data").stat().st_size == total


def test_the_weights_lie_beside_the_graph(tiny: Artifact) -> None:
    for name in COMPONENTS:
        path = tiny.graph(name)
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            for entry in tensor.external_data:
                assert entry.key != "location" or entry.value == f"{path.name}.data"
        assert f"onnx/{path.name}.data" in tiny.manifest.files


def test_parameters_are_counted_once(components: Components) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
            self.b.weight = self.a.weight

    assert graph.count_parameters(Tied()) == 12
    assert graph.count_parameters(components.embed_tokens) == 336 * 64
