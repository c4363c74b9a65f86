"""`vlmc calibrate`: a recipe and a set become a plan.

A first pass over the set keeps the largest magnitude of every channel: all that smoothing and min-max ranges need.
Other observers need histograms of the smoothed activations, hence a second pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..artifact import Artifact
from ..console import Report
from ..errors import VlmcError
from ..exporter.checkpoint import load_components
from ..exporter.family import Components
from ..exporter.matching import Encoders, torch_matcher
from ..exporter.torch_runner import torch_session
from ..records import SCHEMA
from ..runtime.matching import Matcher
from ..runtime.session import Session
from . import samples
from .observation import Layer, Observation, Place, layers_of
from .observers import LEVELS, RANGES
from .plan import ModulePlan, Plan, SetRecord
from .recipes import Precision, Recipe
from .sets import CalibrationSet
from .smoothing import Group, divisors


def calibrate(artifact: Artifact, recipe: Recipe, data: CalibrationSet | None, report: Report) -> Plan:
    """The plan of the recipe for the artefact's weights. `data` may be None only for a recipe that needs none."""
    components = load_components(artifact)
    if isinstance(components, Encoders):
        return plan_for(torch_matcher(artifact, components), components, recipe, data, report)
    return plan_for(torch_session(artifact, components), components, recipe, data, report)


def plan_for(
    session: Session | Matcher,
    components: Components | Encoders,
    recipe: Recipe,
    data: CalibrationSet | None,
    report: Report,
) -> Plan:
    """`calibrate`, for a session that runs these components in PyTorch. What TensorRT is to calibrate itself is written
    to the session's artefact, ahead of the plan that names it."""
    if not recipe.needs_data:
        rules = {path: recipe.precision(path) for path in layers_of(components)}
        modules = {path: ModulePlan(rule.weight_bits, rule.block) for path, rule in rules.items() if rule.weight_bits}
        return Plan(SCHEMA, recipe, session.artifact.manifest.source.sha256, None, modules, {})
    if data is None:
        raise VlmcError(f"The recipe {recipe.name!r} needs a calibration set", fix="give one with --set")
    return _sampled(session, recipe, data) if recipe.implicit else _observed(session, components, recipe, data, report)


def _observed(
    session: Session | Matcher,
    components: Components | Encoders,
    recipe: Recipe,
    data: CalibrationSet,
    report: Report,
) -> Plan:
    """The plan of a recipe whose scales are found here, from what the layers get of the set."""
    layers = layers_of(components)
    rules = {path: recipe.precision(path) for path in layers}
    rounded = [path for path, rule in rules.items() if rule.weight_bits and rule.output_bits]
    observation = Observation(session, components, data, report, outputs=rounded)
    groups = observation.groups()
    channels = observation.peaks()
    absorbers = _absorbers(recipe, layers, groups, channels)
    smoothing = {
        path: (group.producer, absorbers[group.producer][made])
        for group in groups
        if group.producer in absorbers
        for path, made in group.consumers.items()
    }
    factors: dict[Place, NDArray[np.float32]] = {(path, "input"): values for path, (_, values) in smoothing.items()}
    factors |= {(path, "output"): values for path, values in absorbers.items()}
    peaks = {
        place: {phase: _number((values / factors.get(place, np.float32(1))).max()) for phase, values in phases.items()}
        for place, phases in channels.items()
    }
    ranges = peaks
    if recipe.observer != "minmax":
        choose = RANGES[recipe.observer]
        seen = observation.histograms(factors)
        ranges = {place: {phase: choose(one) for phase, one in phases.items()} for place, phases in seen.items()}

    modules = {}
    for path, rule in rules.items():
        taken: Place = (path, "input")
        made: Place = (path, "output")
        if taken not in peaks or not (rule.weight_bits or path in smoothing):
            continue
        producer, values = smoothing.get(path, (None, None))
        modules[path] = ModulePlan(
            weight_bits=rule.weight_bits,
            block=rule.block,
            activation_scale=_scale(ranges[taken]) if rule.activation_bits else None,
            peaks=peaks[taken],
            ranges=ranges[taken],
            smoothing=None if values is None else _numbers(values),
            absorbed_by=producer,
            output_scale=_scale(ranges[made]) if made in ranges else None,
        )
    return Plan(
        schema=SCHEMA,
        recipe=recipe,
        source_sha256=session.artifact.manifest.source.sha256,
        calibrated_on=SetRecord(data.name, data.sha256, len(data.rows), data.pictures),
        modules=modules,
        absorbers={path: _numbers(values) for path, values in absorbers.items()},
        notes=tuple(_notes(rules, modules)),
    )


def _sampled(session: Session | Matcher, recipe: Recipe, data: CalibrationSet) -> Plan:
    """The plan of a recipe whose scales TensorRT finds: no numbers, but the inputs to find them from."""
    if recipe.observer not in samples.OBSERVERS:
        raise VlmcError(
            "TensorRT has no calibrator of that kind",
            found=recipe.observer,
            expected=" or ".join(samples.OBSERVERS),
            fix="leave --observer out",
        )
    kept = {component: samples.keep(session, recipe.name, component, data) for component in recipe.implicit}
    rows = min(len(data.rows), samples.MOST)
    seen = SetRecord(data.name, data.sha256, rows, data.pictures)
    return Plan(SCHEMA, recipe, session.artifact.manifest.source.sha256, seen, {}, {}, samples=kept)


def _absorbers(
    recipe: Recipe,
    layers: Mapping[str, Layer],
    groups: Sequence[Group],
    channels: Mapping[Place, Mapping[str, NDArray[np.float32]]],
) -> dict[str, NDArray[np.float32]]:
    """What the output channels of each module that smooths for others are divided by."""
    found = {}
    for group in groups:
        alpha = max(recipe.precision(path).smooth for path in group.consumers)
        if alpha:
            peaks = {path: np.max(list(channels[path, "input"].values()), axis=0) for path in group.consumers}
            columns = {path: layers[path].weight.detach().abs().amax(dim=0).numpy() for path in group.consumers}
            found[group.producer] = divisors(group, peaks, columns, alpha)
    return found


def _scale(ranges: Mapping[str, float]) -> float:
    """The 8-bit scale of the largest phase's range; where only zeros were ever seen it is 1."""
    return _number(np.float32(max(ranges.values()) / LEVELS)) or 1.0


def _number(value: np.float32) -> float:
    """The shortest decimal that is this float32."""
    return float(str(value))


def _numbers(values: NDArray[np.float32]) -> tuple[float, ...]:
    return tuple(_number(value) for value in values)


def _notes(rules: Mapping[str, Precision], modules: Mapping[str, ModulePlan]) -> Iterator[str]:
    """What a reader of the plan should know."""
    never = [path for path, rule in rules.items() if rule.weight_bits and path not in modules]
    if never:
        yield f"{_listed(never)} never ran and stay float."
    silent = [path for path in modules if path.startswith("decoder/") and "decode" not in modules[path].peaks]
    if silent:
        yield "No decode step was observed: the set has no answers and the model gave none, so prefill alone counts."
    clipped = [path for path, one in modules.items() if _clipped(one, "decode") and not _clipped(one, "prefill")]
    if clipped:
        yield f"Values that only decoding showed are clipped in {_listed(clipped)}."


def _clipped(module: ModulePlan, phase: str) -> bool:
    limit = (module.activation_scale or float("inf")) * LEVELS * (1 + 1e-6)
    return module.peaks.get(phase, 0.0) > limit


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more
