"""One engine: a component for a backend and a precision, built in a process of its own and kept by its key."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .. import __version__
from ..artifact import FLOATS, Artifact, BuildReport, EngineSpec
from ..calibration import samples
from ..calibration.plan import Plan, read_plan
from ..errors import VlmcError
from ..files import staged_folder, write_json
from ..profiles import machine
from ..profiles.device import load_device
from ..profiles.memory import peak_rss_bytes
from ..records import SCHEMA, describe_files, read_record, to_json, write_record
from . import builders, child, tensorrt_profiles
from .passes import quantize


@dataclass(frozen=True)
class Candidate:
    """What is to be built. `precision` is one of FLOATS or the name of the recipe whose plan it follows."""

    device: str
    component: str
    backend: str
    precision: str

    @property
    def engine(self) -> str:
        return f"{self.backend}-{self.precision}"

    def folder(self, artifact: Artifact) -> Path:
        return artifact.engine_folder(self.device, self.component, self.engine)


def key(artifact: Artifact, candidate: Candidate) -> str:
    """The hash of all that goes into the engine: graphs, plan, sizes, device, backend and versions."""
    plan = None if candidate.precision in FLOATS else to_json(read_plan(artifact, candidate.precision))
    specs, known = artifact.manifest.components, artifact.manifest.files
    looked_up = ["embed_tokens"] if candidate.component == "decoder" else []  # a decoder may hold the table (Job.embed)
    files = [specs[name].file for name in (candidate.component, *looked_up)] + ["golden/golden.npz"]
    parts = [known[name].sha256 for file in files for name in (file, f"{file}.data") if name in known]
    device = load_device(candidate.device)
    dialect = [device.sm, device.tensorrt, device.opset, device.typing]
    sizes = [vars(artifact.manifest.kv), artifact.manifest.preprocessing]  # and those of the golden inputs
    values = [SCHEMA, vars(candidate), plan, parts, dialect, sizes, _versions(candidate.backend)]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def cached(artifact: Artifact, candidate: Candidate) -> EngineSpec | None:
    """The engine as it was built before from the same inputs, its files checked; None where it has to be built."""
    path = candidate.folder(artifact) / "engine.json"
    if not path.is_file():
        return None
    try:
        spec, _ = artifact.engine(candidate.device, candidate.component, candidate.engine)
    except VlmcError:  # damaged or of an older schema: built again
        return None
    return spec if spec.key == key(artifact, candidate) else None


def build(artifact: Artifact, candidate: Candidate) -> EngineSpec:
    """Builds the engine into the artefact, whole or not at all. Runs in a process of its own: see `main`."""
    start = time.perf_counter()
    builder = builders.load(candidate.backend)
    spec = artifact.manifest.components[candidate.component]
    graph = artifact.graph(candidate.component)
    with staged_folder(candidate.folder(artifact)) as folder:
        model = ir.load(graph)
        calibration = None
        if candidate.precision not in FLOATS:
            plan = read_plan(artifact, candidate.precision)
            quantize.apply(model, plan, candidate.component)
            if candidate.component in plan.samples:
                calibration = _calibration(artifact, candidate, plan)
        job = builders.Job(
            component=candidate.component,
            precision=candidate.precision,
            device=load_device(candidate.device),
            kv=artifact.manifest.kv,
            folder=folder,
            embed=lambda: ir.load(artifact.graph("embed_tokens")),
            sizes=tensorrt_profiles.ranges(artifact, candidate.component),
            cache=candidate.folder(artifact).parent.parent / "timing.cache",
            key=key(artifact, candidate),
            calibration=calibration,
        )
        built = builder.build(model, job)
        files = describe_files(folder)
        products = builder.products(folder / built.file, built.settings)
        report = BuildReport(
            seconds=round(time.perf_counter() - start, 3),
            peak_memory_bytes=(peak_rss_bytes() or 0) + built.others_bytes,
            size_bytes=sum(known.bytes for known in files.values()),
            products=products,
        )
        engine = EngineSpec(
            schema=SCHEMA,
            component=candidate.component,
            backend=candidate.backend,
            precision=candidate.precision,
            device=candidate.device,
            file=built.file,
            key=job.key,
            source_sha256=artifact.manifest.source.sha256,
            inputs=spec.inputs,
            outputs=spec.outputs,
            files=files,
            report=report,
            versions=_versions(candidate.backend),
            kv=built.kv,
            settings=built.settings,
        )
        write_record(folder / "engine.json", engine)
    return engine


def _calibration(artifact: Artifact, candidate: Candidate, plan: Plan) -> builders.Calibration:
    """Its cache outlives a build that was killed, and counts only while all that goes into the engine is the same."""
    name = f"calibration-{candidate.component}-{key(artifact, candidate)[:12]}.cache"
    batches = samples.read(artifact, plan, candidate.component)
    return builders.Calibration(plan.recipe.observer, batches, candidate.folder(artifact).parent.parent / name)


def record_trial(artifact: Artifact, candidate: Candidate, trial: dict[str, Any]) -> EngineSpec:
    """Adds what the trial measured to the engine's report."""
    path = candidate.folder(artifact) / "engine.json"
    data = to_json(read_record(EngineSpec, path))
    data["report"] |= trial
    write_json(path, data)
    return read_record(EngineSpec, path)


def _versions(backend: str) -> dict[str, str]:
    """Of a backend that is not here there is none, so its engines are other ones."""
    return {"vlmc": __version__} | machine.versions(("onnx-ir", *builders.load(backend).PACKAGES))


def main(root: str, device: str, component: str, backend: str, precision: str) -> str:
    """`child.run("candidate", …, ARTEFACT, DEVICE, COMPONENT, BACKEND, PRECISION)`; it answers nothing, for the engine
    is in the artefact."""
    build(Artifact(Path(root)), Candidate(device, component, backend, precision))
    return ""


if __name__ == "__main__":
    child.main(main)
