"""`vlmc profile` as one function: what to measure, on what, and the description that the report begins with."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..artifact import Artifact, BuildSpec, EngineSpec
from ..console import Report
from ..errors import VlmcError
from ..evaluation import goldens
from ..files import writing
from ..records import SCHEMA
from ..runtime import backends
from ..runtime.images import open_image
from . import harness, limits, machine, power, questions
from .device import Device, load_device
from .harness import Measurement, Settings
from .matching import labels_of
from .questions import Question
from .variants import Variant, Variants, engine_specs, variants

EXAMPLES = 6


def profile(
    artifact: Artifact,
    build: BuildSpec,
    device: Device,
    settings: Settings,
    asked: list[Question] | str,
    progress: Report,
    baselines: bool = True,
    torch_python: str = "",
) -> Path:
    """Measures every variant that can run here and leaves finished samples in the folder that it returns.

    `asked` is the evaluation set or "unavailable: reason". An interrupted measurement with the same settings goes on.
    A `torch_python` that is no executable and a question that cannot be asked are VlmcErrors before anything is
    measured.
    """
    if torch_python and not shutil.which(torch_python):
        raise VlmcError(
            "--torch-python names no interpreter",
            found=torch_python,
            expected="the path of an executable file",
            fix="check the path, or leave the option out",
        )
    found = variants(artifact, build, settings.threads, baselines, torch_python)
    if not any(variant.kind == "engine" for variant in found.measured):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.skipped.items())
        raise VlmcError(
            f"No engine of {artifact.root} for {device.name!r} can run here",
            found=reasons or "no engine of the build is complete",
            fix=device.handover.rstrip("."),
        )
    folder = artifact.root / "profile" / device.name
    here = machine.describe(settings.threads)
    where = power.Where(device.power_rails)
    measurement = Measurement(
        artifact=artifact.root.resolve(),
        variants=found.measured,
        settings=settings,
        questions=asked if isinstance(asked, list) else [],
        cases=len(goldens.cases(artifact)),
        power_source=power.choose(device.power_sources, where),
        power_rails=device.power_rails,
        device_memory="none" if device.sm is None else "unified" if device.unified_memory else "nvml",
        labels=labels_of(asked) if artifact.manifest.matching is not None and isinstance(asked, list) else (),
    )
    key = measurement.key(here)
    run = harness.unfinished(folder, key)
    if run is None:
        count = len(measurement.questions)
        questions.refuse_unaskable(
            artifact, measurement.questions, lambda done: progress("checking the questions", done, count)
        )
        progress("measuring the machine's limits", 0, 1)
        run = _description(artifact, build, device, measurement, found, here) | {"schema": SCHEMA, "key": key}
        run["no_accuracy"] = asked if isinstance(asked, str) else "unavailable: the questions were not asked"
        run["examples"] = _examples(harness.fresh(folder), measurement.questions)
        harness.begin(folder, run)
    run["failures"] = harness.measure(folder, measurement, progress)
    run["limits"] = limits.best(run["limits"], _limits(device, settings.threads))
    run["machine"]["after"] = machine.state()
    harness.finish(folder, run)
    return folder


def choose_build(artifact: Artifact, device: str, recipe: str) -> tuple[BuildSpec, Device]:
    """The build to measure: of those for the device and recipe, where given, and for this machine the newest; as for
    `vlmc run`, one whose backends can run here comes before one whose cannot."""
    if not device:
        for build in sorted(artifact.builds(), key=lambda build: not backends.can_run(build)):
            if recipe in ("", build.recipe) and not machine.other_than(target := load_device(build.device)):
                return build, target
    build = artifact.build(device, recipe)
    target = load_device(build.device)
    if other := machine.other_than(target):
        raise VlmcError(
            f"The device {target.name!r} ({target.title}) is not this machine, so nothing can be measured here",
            found=other,
            fix=target.handover.rstrip("."),
        )
    return build, target


def _description(
    artifact: Artifact,
    build: BuildSpec,
    device: Device,
    measurement: Measurement,
    found: Variants,
    here: dict[str, Any],
) -> dict[str, Any]:
    """All of run.json that is known before the first run."""
    manifest, settings = artifact.manifest, measurement.settings
    specs = engine_specs(artifact, build)
    return {
        "artifact": {
            "name": manifest.name,
            "family": manifest.family,
            "random_weights": manifest.source.random_weights,
            "matching": manifest.matching is not None,
            "parameters": {name: spec.parameters for name, spec in manifest.components.items()},
        },
        "device": {
            name: "unavailable: not known of this device" if value is None else value
            for name, value in asdict(device).items()
        },
        "machine": here
        | {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["vlmc", *sys.argv[1:]]),
        },
        "limits": _limits(device, settings.threads),
        "power": {"source": measurement.power_source, "idle_watts": _idle(measurement)},
        "settings": asdict(settings) | {"turns": harness.TURNS, "questions": len(measurement.questions)},
        "variants": [_variant(variant, specs) for variant in found.measured],
        "skipped": found.skipped,
        "choices": {name: asdict(choice) for name, choice in build.choices.items()},
        "labels": list(measurement.labels),
    }


def _variant(variant: Variant, specs: Mapping[tuple[str, str], EngineSpec]) -> dict[str, Any]:
    """The variant with what its engines' build reports say."""
    reports = {part: specs[part, engine].report for part, engine in variant.engines.items()}
    none = "unavailable: PyTorch runs the checkpoint, nothing is built"
    return {
        "name": variant.name,
        "kind": variant.kind,
        "recipe": variant.recipe,
        "engines": dict(variant.engines),
        "disk_bytes": sum(report.size_bytes for report in reports.values()) if reports else none,
        "build_peak_bytes": max(report.peak_memory_bytes for report in reports.values()) if reports else none,
        "component_bytes": {part: report.size_bytes for part, report in reports.items()} or none,
        "products": {part: report.products for part, report in reports.items()} or none,
        "work": {part: report.work for part, report in reports.items()},
    }


def _limits(device: Device, threads: int) -> dict[str, Any]:
    """Measured, where the processor runs the engines; the data sheet's for a GPU, which numpy cannot reach."""
    return limits.measure(threads) if device.sm is None else limits.from_data_sheet(device)


def _idle(measurement: Measurement) -> float | str:
    if measurement.power_source.startswith("unavailable"):
        return measurement.power_source
    meter = power.open_meter(measurement.power_source, power.Where(measurement.power_rails))
    try:
        return power.idle_watts(meter)
    except (OSError, ValueError) as error:
        return f"unavailable: {error}"
    finally:
        meter.close()


def _examples(folder: Path, asked: Sequence[Question]) -> list[dict[str, Any]]:
    """The pictures of the answers that the report will show, kept with the samples."""
    kept = []
    with writing(folder):
        for number, row in enumerate(questions.examples(asked, EXAMPLES)):
            name = f"examples/{number:02d}.png"
            (folder / "examples").mkdir(exist_ok=True)
            image = open_image(asked[row].image)
            image.thumbnail((512, 512))
            image.save(folder / name)
            kept.append({"row": row, "image": name})
    return kept
