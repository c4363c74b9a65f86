"""What a family's small checkpoint can be made into, found by doing it; the README's table is held against this.

Every engine is built by the real builders and tried on the golden inputs. On the CPU it runs itself; of TensorRT-RTX,
as no GPU is here, the graph that its parser was given runs in ONNX Runtime.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from vlmc.artifact import Artifact, EngineSpec, parts_of
from vlmc.calibration import recipes
from vlmc.calibration.command import make_plan
from vlmc.calibration.fake_quant import apply_plan
from vlmc.calibration.plan import read_plan, write_plan
from vlmc.engines import build, builders, candidate, tensorrt_network, trial
from vlmc.errors import VlmcError
from vlmc.evaluation import goldens
from vlmc.exporter.checkpoint import load_components
from vlmc.exporter.torch_runner import TorchDecoder, TorchRunner
from vlmc.profiles.device import load_device
from vlmc.runtime import backends
from vlmc.runtime.backends import tensorrt_rtx
from vlmc.runtime.backends.onnxruntime import OnnxDecoder, OnnxRunner
from vlmc.runtime.runner import Array, Runner

README = Path(__file__).parents[3] / "README.md"
COLUMNS = (
    ("cpu", "onnxruntime", "int8"),
    ("cpu", "onnxruntime", "w4"),
    ("gb10", "tensorrt_rtx", "int8"),
    ("gb10", "tensorrt_rtx", "w4"),
)
# The least cosine with the golden outputs; a decoder's is the worst of a prompt and its steps. What a recipe costs a
# small model of random weights is its own affair, so a quantised engine is held to the fake-quant model of its plan.
NEAR = {"fp32": 0.99999, "fp16": 0.9999}
FAKE, LESS = "fake-quant", 0.01


def row(artifact: Artifact, pictures: Path) -> list[str]:
    """For each of COLUMNS `yes`, or `no: ` and the reason that vlmc gives."""
    for recipe in ("int8", "w4"):
        write_plan(artifact, make_plan(artifact, recipes.load(recipe), pictures))
    with pytest.MonkeyPatch.context() as patch:
        for name, least in {"ROUNDS": 1, "SECONDS": 0.0, "MINIMUM": 1, "ANSWER": 1}.items():  # nothing is timed
            patch.setattr(trial, name, least)
        patch.setattr(tensorrt_network, "parse", _keeping_the_graph(tensorrt_network.parse))
        patch.setattr(tensorrt_rtx, "unavailable", lambda: "")
        patch.setattr(tensorrt_rtx, "load_runner", lambda spec, path, threads: OnnxRunner(_graph_of(path)))
        patch.setattr(tensorrt_rtx, "load_decoder", _decoder_of)
        _offer_fake_quant(artifact, patch)
        return [_outcome(artifact, *column) for column in COLUMNS]


def _outcome(artifact: Artifact, device: str, backend: str, recipe: str) -> str:
    target, builder = load_device(device), builders.load(backend)
    made: dict[str, list[str]] = {}
    quantised = [component for component in artifact.components if build.quantises(artifact, component, recipe)]
    assert quantised, f"{recipe} names nothing"
    for component in artifact.components:
        for precision in (builder.FLOAT, recipe) if component in quantised else (builder.FLOAT,):
            if why := build.refuses(builder, component, precision, target):
                return f"no: {component}: {why}"
            one = candidate.Candidate(device, component, backend, precision)
            try:
                products = (candidate.cached(artifact, one) or candidate.build(artifact, one)).report.products
            except VlmcError as error:
                return f"no: {component}: {error.found or error.what}"
            assert precision != recipe or products.get(recipe), f"{component} {one.engine} has none of {recipe}"
            made.setdefault(component, []).append(one.engine)
    for component, engines in made.items():
        if component == "embed_tokens":
            _require_rows(artifact, device, *engines)
        else:
            tried = [*engines, *([f"{FAKE}-{recipe}"] if component in quantised else [])]
            outcome = trial.try_component(artifact, device, component, tried, *made.get("embed_tokens", [""]))
            for engine in engines:
                precision = parts_of(engine)[1]
                near = NEAR.get(precision) or outcome[f"{FAKE}-{precision}"]["agreement"] - LESS
                assert outcome[engine]["agreement"] > near, f"{component} {engine}: {outcome}"
    return "yes"


def _offer_fake_quant(artifact: Artifact, patch: pytest.MonkeyPatch) -> None:
    """FAKE-RECIPE is an engine too, for a trial: PyTorch with the recipe's plan."""
    float_parts, specs = dict(load_components(artifact).items()), artifact.manifest.components
    runner, decoder = backends.load_runner, backends.load_decoder

    def part(component: str, engine: str) -> Any:
        recipe = engine.removeprefix(f"{FAKE}-")
        return apply_plan(float_parts[component], read_plan(artifact, recipe), component)

    def load_runner(a: Artifact, device: str, component: str, engine: str, threads: int) -> Runner:
        if engine.startswith(FAKE):
            return TorchRunner(part(component, engine), specs[component])
        return runner(a, device, component, engine, threads)

    def load_decoder(a: Artifact, device: str, engine: str, embed: Runner, threads: int) -> Any:
        if engine.startswith(FAKE):
            return TorchDecoder(part("decoder", engine), a.manifest.kv, embed)
        return decoder(a, device, engine, embed, threads)

    patch.setattr(backends, "load_runner", load_runner)
    patch.setattr(backends, "load_decoder", load_decoder)


def _require_rows(artifact: Artifact, device: str, engine: str) -> None:
    """The look-up has no trial: whatever it finds for the golden ids is what the canonical graph finds."""
    ids = {"input_ids": goldens.arrays(artifact)["0.input_ids"][None]}
    found = backends.load_runner(artifact, device, "embed_tokens", engine, threads=1).run(ids)
    for name, rows in OnnxRunner(_session(artifact.graph("embed_tokens"))).run(ids).items():
        assert trial.cosine(rows, found[name]) > NEAR["fp32"], f"{name} of {engine}"


def _keeping_the_graph(parse: Callable[..., Any]) -> Callable[..., Any]:
    """TensorRT-RTX's parser; what it reads stays beside the engine."""

    def keep(trt: Any, path: Path, *further: Any) -> Any:
        for file in path.parent.iterdir():
            shutil.copy(file, path.parent.parent)
        return parse(trt, path, *further)

    return keep


def _graph_of(engine: Path) -> ort.InferenceSession:
    return _session(engine.with_name(builders.MODEL))


def _session(path: Path) -> ort.InferenceSession:
    """The graph node for node."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _decoder_of(spec: EngineSpec, path: Path, embed: Runner, threads: int) -> OnnxDecoder:
    assert spec.kv is not None
    return LookingUp(_graph_of(path), spec.kv, OnlyIds(embed))


class OnlyIds:
    """A look-up that leaves it to the decoder: it finds zeros, and passes the ids on."""

    def __init__(self, embed: Runner) -> None:
        self._embed = embed

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        zeros = {name: np.zeros_like(array) for name, array in self._embed.run(inputs).items()}
        return zeros | {"input_ids": inputs["input_ids"].astype(np.int32)}


class LookingUp(OnnxDecoder):
    """A decoder that looks tokens up: in a prompt there are none, and positions go on where the prompt's end."""

    def forward(self, inputs_embeds: Any, start: int, **further: Array) -> Any:
        given = {
            "position_offset": np.array([self._ahead]),
            "input_ids": np.full(inputs_embeds.shape[:2], -1, np.int32),
        }
        return super().forward(inputs_embeds, start, **(given | further))


def promised(family: str) -> list[str]:
    """The README's row of the family, without the first three columns; empty where it has none."""
    found = re.search(rf"^\| `{family}` \|.*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    return [cell.strip() for cell in found.group().strip("|").split("|")][3:] if found else []
