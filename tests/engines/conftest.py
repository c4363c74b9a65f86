"""Graphs small enough to read, and ways to run a graph as it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from vlmc.artifact import Artifact
from vlmc.calibration.plan import ModulePlan, Plan
from vlmc.calibration.recipes import Recipe
from vlmc.engines import child, trial
from vlmc.records import SCHEMA

Load = Callable[..., ort.InferenceSession]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load(model, optimised=False): the model in ONNX Runtime, node for node unless optimised."""

    def session(model: ir.Model, optimised: bool = False) -> ort.InferenceSession:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
        ir.save(model, path, external_data=f"{path.name}.data")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        if not optimised:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    return session


@pytest.fixture
def run(load: Load) -> Callable[..., np.ndarray]:
    """run(model, x): the first output for the only input."""
    return lambda model, x: load(model).run(None, {model.graph.inputs[0].name: x})[0]


@pytest.fixture(scope="session")
def linear() -> Callable[..., ir.Model]:
    """linear(weight (in, out), bias=None): a MatMul named `fc` and an Add, canonical as the exporter writes them."""

    def make(weight: np.ndarray, bias: np.ndarray | None = None) -> ir.Model:
        def constant(name: str, array: np.ndarray) -> ir.Value:
            tensor = ir.tensor(array, name=name)
            shape = ir.Shape(array.shape)
            return ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)

        float32 = ir.TensorType(ir.DataType.FLOAT)
        x = ir.Value(name="x", shape=ir.Shape(["rows", weight.shape[0]]), type=float32)
        weights = [constant("fc.weight", weight)] + ([] if bias is None else [constant("fc.bias", bias)])
        nodes = [ir.node("MatMul", [x, weights[0]], name="fc")]
        if bias is not None:
            nodes.append(ir.node("Add", [nodes[0].outputs[0], weights[1]], name="add"))
        y = nodes[-1].outputs[0]
        y.name, y.shape, y.type = "y", ir.Shape(["rows", weight.shape[1]]), float32
        graph = ir.Graph([x], [y], nodes=nodes, initializers=weights, opset_imports={"": 24}, name="small")
        return ir.Model(graph, ir_version=10)

    return make


@pytest.fixture(scope="session")
def written() -> Callable[..., ir.Model]:
    """written(text, constants, opset=17): ONNX's textual form as a model, its shapes inferred, with those of the
    constants that it reads; its nodes are node0, node1 and so on."""

    def make(text: str, constants: dict[str, np.ndarray], opset: int = 17) -> ir.Model:
        proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> g {text}')
        read = {name for node in proto.graph.node for name in node.input}
        tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items() if name in read]
        proto.graph.initializer.extend(tensors)
        for index, node in enumerate(proto.graph.node):
            node.name = f"node{index}"
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto))

    return make


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., Plan]:
    """plan_of(absorbers={}, PATH=ModulePlan(…)): a plan for these modules of the component `part`."""

    def make(absorbers: dict[str, tuple[float, ...]] | None = None, **modules: ModulePlan) -> Plan:
        named = {f"part/{path}": module for path, module in modules.items()}
        divided = {f"part/{path}": values for path, values in (absorbers or {}).items()}
        return Plan(SCHEMA, Recipe("r", "", {}), "", None, named, divided)

    return make


@pytest.fixture
def artifact(planned: Artifact, tmp_path: Path) -> Artifact:
    """A copy of `planned` that may be changed."""
    return Artifact(Path(shutil.copytree(planned.root, tmp_path / "tiny")))


@pytest.fixture
def in_process(step_here: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Steps of a build run in this process; the list gets the module and the arguments of each."""
    done: list[tuple[str, ...]] = []

    def step(module: str, what: str, *arguments: str, **_: Any) -> str:
        done.append((module, *arguments[1:]))
        return step_here(module, what, *arguments)

    monkeypatch.setattr(child, "run", step)
    return done


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, in_process: list[tuple[str, ...]]) -> Callable[..., None]:
    """recorded(mix, single, agreement=1): trials find these milliseconds instead of measuring. By themselves OpenVINO's
    int8 vision and ONNX Runtime's int8 decoder win, both with that agreement; whole answers take `mix` and `single`."""

    def found(mix: float, single: float, agreement: float = 1.0) -> None:
        vision = {"onnxruntime-fp32": 40.0, "openvino-fp32": 30.0, "onnxruntime-int8": 13.0, "openvino-int8": 12.0}

        def trials(
            artifact: Any, device: str, component: str, engines: list[str], embed: str
        ) -> dict[str, dict[str, Any]]:
            if component == trial.WHOLE:
                one = "onnxruntime-int8+onnxruntime-fp32+onnxruntime-int8"
                times = {engine: {"run": single if engine == one else mix} for engine in engines}
            elif component == "decoder":
                times = {e: {"prefill": 5.0, "decode": 2.0 if e.endswith("fp32") else 1.0} for e in engines}
            else:
                times = {engine: {"run": vision[engine]} for engine in engines}
            near = {engine: agreement if engine.endswith("int8") else 1.0 for engine in engines}
            return {engine: {"latency_ms": times[engine], "agreement": near[engine]} for engine in engines}

        monkeypatch.setattr(trial, "try_component", trials)

    return found


def operators(model: ir.Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in model.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


@pytest.fixture(name="operators")
def _operators() -> Callable[[ir.Model], dict[str, int]]:
    """operators(model): how many nodes there are of each operator."""
    return operators
