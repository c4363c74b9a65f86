"""`vlmc build`: every candidate of every component, tried where the device is this machine, and the verdict."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir

from ..artifact import FLOATS, AnswerTrial, Artifact, BuildReport, BuildSpec, Choice, EngineSpec
from ..calibration import recipes
from ..calibration.plan import read_plan
from ..console import Report
from ..errors import VlmcError
from ..evaluation import goldens
from ..files import remove_leftovers
from ..profiles import machine
from ..profiles.device import Device
from ..records import SCHEMA, read_record, write_record
from ..runtime import backends, cuda
from . import builders, child, trial, verdict, work
from .candidate import Candidate, cached, record_trial

TURNS = 3  # of each mix, so that a slow minute falls on all of them


def build(
    artifact: Artifact, device: Device, recipe: str, report: Report, only: Collection[str] = ()
) -> tuple[BuildSpec, list[str]]:
    """Builds, tries and chooses; returns the record, which is also written, and the engines that were in the cache.
    `only`: as for `candidates`."""
    start = time.perf_counter()
    specs, hits = _build_all(artifact, list(candidates(artifact, device, recipe, only)), report)
    elsewhere = reason_not_here(device)
    choices: dict[str, Choice] = {}
    for component in artifact.components:
        if not elsewhere and component != "embed_tokens":
            report(f"trying {component}", len(specs), len(specs))
        choices[component] = _choice(artifact, device, recipe, component, specs, elsewhere)
    path = artifact.root / "engines" / device.name / f"{recipe}.json"
    answers: tuple[AnswerTrial, ...] = ()
    mixes = verdict.mixes(choices, artifact.manifest.source.random_weights)
    if mixes and not elsewhere and artifact.manifest.matching is None:
        report("trying whole answers", len(specs), len(specs))
        keys = {(candidate.component, candidate.engine): spec.key for candidate, spec in specs.items()}
        answers = _answers(artifact, device, mixes, keys, _earlier(path))
        choices = verdict.together(choices, answers)
    record = BuildSpec(
        schema=SCHEMA,
        device=device.name,
        recipe=recipe,
        choices=choices,
        seconds=round(time.perf_counter() - start, 3),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds"),
        remaining=device.handover if elsewhere else "",
        answers=answers,
    )
    write_record(path, record)
    return record, hits


def candidates(artifact: Artifact, device: Device, recipe: str, only: Collection[str] = ()) -> Iterator[Candidate]:
    """What is built, component by component: float and the recipe's precision on every backend that offers them; of
    those in `only` where one of them does. The first of a component is float on the backend that the device prefers."""
    known = {name: builders.load(name) for name in device.backends}
    wanted = set(only)
    if device.sm is not None and (reason := known[device.backends[0]].unavailable()):
        if device.ahead_of_time or not reason_not_here(device):
            what = f"Engines for {device.title} cannot be built here"
            raise VlmcError(what, found=reason, fix="install what is missing; `vlmc doctor` shows what can run here")
        del known[device.backends[0]]
        known = {"handover": builders.load("handover")} | known  # TensorRT builds on the device
        wanted |= {"handover"} if device.backends[0] in only else set()
    for component in artifact.components:
        yield from _candidates_of(artifact, device, component, recipe, known, wanted)


def _candidates_of(
    artifact: Artifact,
    device: Device,
    component: str,
    recipe: str,
    known: Mapping[str, ModuleType],
    wanted: Collection[str],
) -> Iterator[Candidate]:
    """`candidates` of one component, by the builders `known`."""

    def offered(name: str, precision: str) -> bool:
        if known[name].unavailable() and not cached(artifact, Candidate(device.name, component, name, precision)):
            return False  # an engine that was built elsewhere needs no builder here
        return not refuses(known[name], component, precision, device)

    floats = {name: builder.FLOAT for name, builder in known.items() if offered(name, builder.FLOAT)}
    if not floats:
        reasons = [
            f"{name}: {builder.unavailable() or refuses(builder, component, builder.FLOAT, device)}"
            for name, builder in known.items()
        ]
        what = f"No backend of the device {device.name!r} can build the {component} here"
        raise VlmcError(what, found="; ".join(reasons), fix="see `vlmc doctor`")
    floats = {name: precision for name, precision in floats.items() if name in wanted} or floats
    yield from (Candidate(device.name, component, name, precision) for name, precision in floats.items())
    if quantises(artifact, component, recipe):
        yield from (Candidate(device.name, component, name, recipe) for name in floats if offered(name, recipe))


def refuses(builder: ModuleType, component: str, precision: str, device: Device) -> str:
    """Why the builder does not offer this component; empty where it does."""
    if precision not in FLOATS and recipes.load(precision).implicit and builder is not builders.load("tensorrt"):
        return "its INT8 scales are found by TensorRT (up to 10.11) while it builds on the device"
    return str(builder.refuses(component, precision, device))


def quantises(artifact: Artifact, component: str, recipe: str) -> bool:
    """Whether the recipe's plan names anything of the component, or leaves it to TensorRT to quantise it."""
    if recipe in FLOATS:
        return False
    plan = read_plan(artifact, recipe)
    return component in plan.samples or any(path.startswith(f"{component}/") for path in plan.modules)


def reason_not_here(device: Device) -> str:
    """Empty where this machine is of the device's kind, so that what is measured here counts there."""
    if device.sm is not None:
        found = cuda.architecture()
        if found == device.sm:
            return ""
        if isinstance(found, str):  # also where a package is missing, and a Jetson cannot tell that it is one
            return f"this machine shows no GPU of {device.title}: {found}"
        return f"this machine is no {device.title} (its GPU is SM {found})"
    return machine.other_than(device)


def _build_all(
    artifact: Artifact, todo: Sequence[Candidate], report: Report
) -> tuple[dict[Candidate, EngineSpec], list[str]]:
    """The engine of every candidate, and the names of those that were in the cache."""
    specs, hits = {}, []
    for index, candidate in enumerate(todo):
        report(f"building {candidate.component} {candidate.engine}", index, len(todo))
        spec = cached(artifact, candidate)
        if spec is None:
            _build(artifact, candidate, report, index, len(todo))
            spec = cached(artifact, candidate)
            assert spec is not None, "the builder's process ended well and left its engine"
        else:
            hits.append(f"{candidate.component} {candidate.engine}")
        specs[candidate] = spec
    return specs, hits


def _choice(
    artifact: Artifact,
    device: Device,
    recipe: str,
    component: str,
    specs: Mapping[Candidate, EngineSpec],
    elsewhere: str,
) -> Choice:
    """The component's choice by trials, or without any where the device is elsewhere (the reason, else empty); and why
    its first backend does not offer the recipe, where no engine has it."""
    own = {candidate: spec for candidate, spec in specs.items() if candidate.component == component}
    first, refused = next(iter(own)).backend, ""
    if quantises(artifact, component, recipe):
        why = refuses(builders.load(first), component, recipe, device)
        refused = f"; {recipe} is not offered: {why}" if why else ""
    if elsewhere:
        preferred = [candidate.engine for candidate in own if candidate.backend == first]
        return verdict.unmeasured(preferred[-1], elsewhere + refused, [candidate.engine for candidate in own])
    embed = next((candidate.engine for candidate in specs if candidate.component == "embed_tokens"), "")
    choice = _verdict(artifact, device, component, own, embed)
    if any(candidate.precision == recipe for candidate in own):
        return choice
    return dataclasses.replace(choice, reason=choice.reason + refused)


def _verdict(
    artifact: Artifact, device: Device, component: str, own: dict[Candidate, EngineSpec], embed: str
) -> Choice:
    """The choice among those that this interpreter can run; of the others it says why they were not tried."""
    untried = {candidate: why for candidate in own if (why := backends.unavailable(candidate.backend))}
    tried = {candidate: spec for candidate, spec in own.items() if candidate not in untried}
    if component == "embed_tokens" and len(tried) == 1:  # a look-up, which cannot be wrong by degrees
        choice = Choice(next(iter(tried)).engine, "nothing else is offered for it", {})
    else:
        reports = _try(artifact, device, component, tried, embed)
        choice = verdict.choose(component, reports, artifact.manifest.source.random_weights)
    for candidate, why in untried.items():
        record_trial(artifact, candidate, {"work": _work(artifact, candidate, own[candidate])})
        reason = f"{choice.reason}; {candidate.engine} was not tried here: {why}"
        choice = Choice(choice.engine, reason, choice.candidates | {candidate.engine: {}})
    return choice


def _try(
    artifact: Artifact, device: Device, component: str, own: dict[Candidate, EngineSpec], embed: str
) -> dict[str, BuildReport]:
    """Trials, unless every engine was tried before; each engine's report gets its numbers and its work."""
    timed = {"prefill", "decode"} if component == "decoder" else {"run"}
    known = [spec.report.latency_ms for spec in own.values()]
    if not all(times.keys() == timed and min(times.values()) > 0 for times in known):
        what, engines = f"Trying {component} on this machine", [c.engine for c in own]
        trials = json.loads(child.run("trial", what, str(artifact.root), device.name, component, embed, *engines))
        for candidate, spec in own.items():
            counted = {"work": _work(artifact, candidate, spec), "timed_on": machine.title(device.sm is not None)}
            own[candidate] = record_trial(artifact, candidate, trials[candidate.engine] | counted)
    return {candidate.engine: spec.report for candidate, spec in own.items()}


def _answers(
    artifact: Artifact,
    device: Device,
    mixes: list[dict[str, str]],
    keys: Mapping[tuple[str, str], str],
    earlier: tuple[AnswerTrial, ...],
) -> tuple[AnswerTrial, ...]:
    """Whole answers of every mix, unless all were tried before. `keys`: the engines', by component and name.

    Each mix has a process of its own, as it will have in use, and its turns: in one process with others a mix was
    found faster that was slower by itself (docs/experiments.md)."""
    known = {answer.key: answer for answer in earlier if answer.engines in mixes and answer.milliseconds > 0}
    names = {}
    for mix in mixes:
        made_of = " ".join(keys[part, mix[part]] for part in artifact.components)
        names[hashlib.sha256(made_of.encode()).hexdigest()] = "+".join(mix[part] for part in artifact.components)
    if not names.keys() <= known.keys():  # numbers of two hours are not compared
        found: dict[str, list[Any]] = {name: [] for name in names.values()}
        what, arguments = "Trying whole answers on this machine", (str(artifact.root), device.name, trial.WHOLE, "")
        for _, name in product(range(TURNS), found):
            found[name].append(json.loads(child.run("trial", what, *arguments, name))[name])
        for (key, name), mix in zip(names.items(), mixes, strict=True):
            turns = tuple(turn["latency_ms"]["run"] for turn in found[name])
            agreement = min(turn["agreement"] for turn in found[name])
            known[key] = AnswerTrial(mix, round(statistics.median(turns), 4), agreement, key, turns)
    return tuple(known[key] for key in names)


def _earlier(path: Path) -> tuple[AnswerTrial, ...]:
    """The whole answers of the build whose record that is."""
    try:
        return read_record(BuildSpec, path).answers
    except VlmcError:  # none yet, damaged or of an older schema: tried again
        return ()


def _work(artifact: Artifact, candidate: Candidate, spec: EngineSpec) -> dict[str, float]:
    """Operations and bytes of the golden run that trials are timed on (see `work`); `int8_…` are those of the
    operations that the plan quantised, or all where TensorRT is to choose."""
    model = ir.load(artifact.graph(candidate.component))
    kv, prefix = artifact.manifest.kv, f"{candidate.component}/"
    plan = None if candidate.precision in FLOATS else read_plan(artifact, candidate.precision)
    modules = plan.modules if plan else {}
    bits = {path.removeprefix(prefix): one.weight_bits for path, one in modules.items() if path.startswith(prefix)}
    bits = {name: count for name, count in bits.items() if count}
    width = work.WIDTHS[candidate.precision if plan is None else builders.load(candidate.backend).FLOAT]
    quantised: Collection[str] | None = bits
    if plan is not None and candidate.component in plan.samples:
        quantised, width = None, 1
    component = artifact.manifest.components[candidate.component]
    golden = goldens.arrays(artifact)
    case = {t.name: golden[f"0.{t.name}"] for t in component.inputs if f"0.{t.name}" in golden}

    weights = {"weight_bytes": work.weight_bytes(model, bits, width)}

    def both(name: str, sizes: dict[str, int], keys: float = 0) -> dict[str, float]:
        return {name: work.flops(model, sizes, keys), f"int8_{name}": work.flops(model, sizes, keys, quantised)}

    sizes = work.free_sizes(component, case)
    if candidate.component != "decoder":
        counts = {name: float(size) for name, size in sizes.items() if name == "tiles"}
        return both("flops", sizes) | {"io_bytes": work.io_bytes(model, sizes)} | counts | weights
    length = sizes["length"]
    # A position has to see itself and those before it. More is masked, or a prefix that sees all of itself.
    sizes |= {"capacity": kv.capacity}
    prefill = both("prefill_flops", sizes, (length + 1) / 2)
    step = both("decode_flops", sizes | {"length": 1}, length)
    cached_bytes = work.kv_bytes(kv, length, np.dtype(spec.kv.dtype if spec.kv else np.float32).itemsize)
    return prefill | step | {"decode_kv_bytes": cached_bytes, "length": float(length)} | weights


def _build(artifact: Artifact, candidate: Candidate, report: Report, done: int, total: int) -> None:
    what = f"Building {candidate.component} as {candidate.engine} for {candidate.device}"

    def listen(more: str) -> None:
        report(f"building {candidate.component} {candidate.engine}, {more}", done, total)

    try:
        child.run("candidate", what, str(artifact.root), *dataclasses.astuple(candidate), listen=listen)
    finally:  # where it was killed it could not tidy up
        remove_leftovers(candidate.folder(artifact))


def results(artifact: Artifact, record: BuildSpec) -> list[dict[str, Any]]:
    """One row an engine of the build, for the table and for --json."""
    rows = []
    for component, choice in record.choices.items():
        folder = artifact.root / "engines" / record.device / component
        for engine in choice.candidates or {choice.engine: {}}:
            spec, _ = artifact.engine(record.device, component, engine)
            report = spec.report
            rows.append(
                {
                    "component": component,
                    "engine": engine,
                    "kept": engine == choice.engine,
                    "latency_ms": report.latency_ms,
                    "agreement": report.agreement,
                    "products": report.products,
                    "size_bytes": report.size_bytes,
                    "build_seconds": report.seconds,
                    "peak_memory_bytes": report.peak_memory_bytes,
                    "reason": choice.reason if engine == choice.engine else "",
                    "folder": str((folder / engine).relative_to(artifact.root)),
                }
            )
    return rows
