"""What is measured side by side: backend × precision on one device, and the PyTorch baselines.

A variant is opened by name ("module:function") in a process of its own, so nothing here imports a backend or torch.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..artifact import FLOATS, Artifact, BuildSpec, EngineSpec
from ..files import sha256_of
from ..records import read_record
from ..runtime import backends
from . import plans
from .device import load_device

ASK = """\
import sys
from vlmc.runtime import backends
print(next(filter(None, map(backends.unavailable, sys.argv[1:])), ""))"""
EAGER = "PyTorch eager"
GPU_FLOATS = {"eager": "PyTorch eager FP16", "graph": "PyTorch CUDA graph FP16", "compile": "torch.compile FP16"}


@dataclass(frozen=True)
class Variant:
    """`opener(artifact, **arguments)` gives its session. `engines`: BACKEND-PRECISION by component, empty for a
    baseline. `identity` changes when its weights or scales do, so that samples of two builds are never mixed.
    `python` is the interpreter that it runs under, empty for our own."""

    name: str
    kind: str  # "engine" or "baseline"
    opener: str
    arguments: Mapping[str, Any]
    engines: Mapping[str, str]
    recipe: str
    identity: str = ""
    python: str = ""


@dataclass
class Variants:
    """Those that can run here, and by name why the others cannot."""

    measured: list[Variant] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def variants(
    artifact: Artifact, build: BuildSpec, threads: int = 0, baselines: bool = True, torch_python: str = ""
) -> Variants:
    """The float engines, the recipe's quantised engines and the kept mix (where it is neither), then the PyTorch
    baselines: float, and fake-quant with the same scales. For a device with a GPU they run there in float16, the float
    one eagerly, in a CUDA graph and through torch.compile; `torch_python` is the interpreter that has PyTorch, where
    that is not ours. Engines whose backend is there and not here run there too."""
    found = Variants()
    specs = engine_specs(artifact, build)
    for name, recipe, engines in _mixes(artifact.components, build, specs):
        used = tuple(dict.fromkeys(specs[part, engine].backend for part, engine in engines.items()))
        python = ""
        if reason := next(filter(None, map(backends.unavailable, used)), ""):
            elsewhere = _unavailable_under(torch_python, used) if torch_python else reason
            if elsewhere:
                found.skipped[name] = f"{reason}; under {torch_python}: {elsewhere}" if torch_python else reason
                continue
            python = torch_python
        arguments = {"device": build.device, "engines": engines, "threads": threads}
        identity = " ".join(specs[part, engine].key for part, engine in sorted(engines.items()))
        opener = f"vlmc.runtime.{'matching:open_matcher' if artifact.manifest.matching else 'session:open_session'}"
        found.measured.append(Variant(name, "engine", opener, arguments, engines, recipe, identity, python))
    if baselines:
        _add_baselines(found, artifact, build, threads, torch_python)
    return found


@functools.cache
def _unavailable_under(python: str, names: tuple[str, ...]) -> str:
    """Why one of these backends cannot run under that interpreter; empty where all can."""
    try:
        asked = subprocess.run([python, "-c", ASK, *names], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it does not start ({error})"
    if asked.returncode:
        return (asked.stderr.strip().splitlines() or ["no message"])[-1]
    return asked.stdout.strip()


def engine_specs(artifact: Artifact, build: BuildSpec) -> dict[tuple[str, str], EngineSpec]:
    """The record of every engine that the build kept or tried and that is still there, by component and name."""
    specs = {}
    for component, choice in build.choices.items():
        for engine in {choice.engine, *choice.candidates}:
            record = artifact.engine_folder(build.device, component, engine) / "engine.json"
            if record.is_file():
                specs[component, engine] = read_record(EngineSpec, record)
    return specs


def _mixes(
    components: Sequence[str], build: BuildSpec, specs: Mapping[tuple[str, str], EngineSpec]
) -> list[tuple[str, str, dict[str, str]]]:
    """Name, recipe and engines of each mix; a backend has one where it has an engine for every component, the look-up
    of embeddings aside, which may be another's. What a recipe leaves alone stays float in its mix."""
    kept = {component: choice.engine for component, choice in build.choices.items()}
    mixes: list[tuple[str, str, dict[str, str]]] = []
    for backend in dict.fromkeys(spec.backend for spec in specs.values()):
        title = backends.title(backend)
        here = {part: _of_backend(specs, part, backend) for part in components}
        plain = {part: next((here[part][name] for name in FLOATS if name in here[part]), "") for part in components}
        if "embed_tokens" in plain:
            plain["embed_tokens"] = plain["embed_tokens"] or kept.get("embed_tokens", "")
        if not all(plain.values()):
            continue
        mixes.append((f"{title} float", "fp32", plain))
        quantised = {part: here[part].get(build.recipe, plain[part]) for part in components}
        if quantised != plain:
            mixes.append((f"{title} {build.recipe}", build.recipe, quantised))
    if kept and kept.items() <= specs.keys() and all(kept != engines for _, _, engines in mixes):
        used = {specs[choice].backend for choice in kept.items() if choice[0] != "embed_tokens"}
        name = f"{backends.title(used.pop())} mixed" if len(used) == 1 else "Mixed backends"
        mixes.append((f"{name} ({build.recipe})", build.recipe, kept))
    return mixes


def _of_backend(specs: Mapping[tuple[str, str], EngineSpec], component: str, backend: str) -> dict[str, str]:
    """The backend's engines of a component, by precision."""
    return {
        spec.precision: engine for (part, engine), spec in specs.items() if (part, spec.backend) == (component, backend)
    }


def _add_baselines(found: Variants, artifact: Artifact, build: BuildSpec, threads: int, python: str) -> None:
    """PyTorch with the float weights, and with the plan that the quantised engines were made from."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    path, plan = artifact.plan_path(build.recipe), plans.read(artifact, build.recipe)
    on_gpu = load_device(build.device).sm is not None
    opener = f"vlmc.calibration.{'cuda_baseline' if on_gpu else 'baseline'}:open_session"
    wanted = [(name, "fp32", {"mode": mode}) for mode, name in GPU_FLOATS.items()] if on_gpu else [(EAGER, "fp32", {})]
    if build.recipe != "fp32":
        wanted.append((f"PyTorch fake-quant {build.recipe}", build.recipe, {"mode": "eager"} if on_gpu else {}))
    for name, recipe, mode in wanted:
        if missing and not python:
            found.skipped[name] = f"{' and '.join(missing)} not installed (`pip install vlm-compile[export]`)"
        elif recipe != "fp32" and plan is None:
            found.skipped[name] = f"no plan {path} (`vlmc calibrate {artifact.root} --recipe {recipe}`)"
        elif recipe != "fp32" and plan and plan.samples:
            found.skipped[name] = "the plan has no scales: TensorRT found them itself"
        else:
            identity = artifact.manifest.source.sha256 + (sha256_of(path) if recipe != "fp32" else "")
            arguments = {"recipe": recipe, "threads": threads, **mode}
            found.measured.append(Variant(name, "baseline", opener, arguments, {}, recipe, identity, python))
