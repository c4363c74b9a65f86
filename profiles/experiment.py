"""`vlmc profile` as one function: what to measure, on what, and the description that the report begins with."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..artifact import Artifact, BuildSpec, EngineSpec
from ..errors import VlmcError
from ..files import read_json, writing
from ..runtime.images import open_image
from . import harness, limits, machine, memory, power, questions
from .device import Device
from .harness import Measurement, Progress, Settings
from .questions import Question
from .variants import Variant, Variants, engine_specs, variants

EXAMPLES = 6
ARCHITECTURES = {"arm64": "aarch64", "AMD64": "x86_64"}


def profile(
    artifact: Artifact,
    build: BuildSpec,
    device: Device,
    settings: Settings,
    asked: list[Question] | str,
    progress: Progress,
    baselines: bool = True,
) -> Path:
    """Measures every variant that can run here and leaves finished samples in the folder that it returns.

    `asked` is the evaluation set or "unavailable: reason". An interrupted measurement with the same settings goes on.
    """
    _same_machine(device)
    found = variants(artifact, build, settings.threads, baselines)
    if not any(variant.kind == "engine" for variant in found.measured):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.skipped.items())
        raise VlmcError(
            f"No engine of {artifact.root} for {device.name!r} can run here",
            found=reasons or "no engine of the build is complete",
            fix=device.handover,
        )
    folder = artifact.root / "profile" / device.name
    here = machine.describe(settings.threads)
    where = power.Where(device.power_rails)
    measurement = Measurement(
        artifact=artifact.root.resolve(),
        variants=found.measured,
        settings=settings,
        questions=asked if isinstance(asked, list) else [],
        cases=len(read_json(artifact.path_of("golden/golden.json"))["cases"]),
        power_source=power.choose(device.power_sources, where),
        power_rails=device.power_rails,
        device_memory="none" if device.sm is None else "unified" if device.unified_memory else "nvml",
    )
    key = measurement.key(here)
    run = harness.unfinished(folder, key)
    if run is None:
        progress("measuring the machine's limits", 0, 1)
        run = {"key": key} | _description(artifact, build, device, measurement, found, here)
        run["no_accuracy"] = asked if isinstance(asked, str) else "unavailable: the questions were not asked"
        harness.begin(folder, run)
        run["examples"] = _examples(folder / "unfinished", measurement.questions)
    run["failures"] = harness.measure(folder, measurement, progress)
    run["limits"] = limits.best(run["limits"], _limits(device, settings.threads))
    run["machine"]["after"] = machine.state()
    harness.finish(folder, run)
    return folder
