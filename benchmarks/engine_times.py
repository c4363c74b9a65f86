"""TensorRT engines alone, each run one launch of a CUDA graph: milliseconds, joules and memory.

    python benchmarks/engine_times.py build ARTEFACT COMPONENT FORM PRECISION     on the GPU, a process an engine
    python benchmarks/engine_times.py time ARTEFACT COMPONENT FORM        there: into ARTEFACT/times/PART.FORM.json
    ncu … python benchmarks/engine_times.py launch ARTEFACT COMPONENT FORM ENGINE one run, for the names of its kernels

For sizes at which `vlmc build` takes longer than the GPU can be had: an engine has one profile of one shape, a single
tile or text, or one decode step at the cache's end. FORM is `single`, or words joined by `+`: `prefill` for a prompt of
the golden one's length, `whole` for the profiles that `vlmc build` gives, CHANGES of graph_forms.py, `told-half`,
`told-float` or `told-left` for its `tell`, `level-N` for TensorRT's optimisation level, `threads-N` for the threads
that it may build with, `pieces-N` for a decoder in about N pieces, AT_ONCE of which (from the environment) are built
at once, and `half-norms` where norms that the graph spells out may be FP16. The engines lie in ARTEFACT/engines/FORM.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import skeleton
from gpu_steps import DEVICE
from vlmc.artifact import Artifact, EngineSpec
from vlmc.engines.candidate import Candidate
from vlmc.engines.candidate import build as build_engine
from vlmc.records import read_record

ROUNDS, RUNS, SECONDS = 5, 40, 2.0
TOLD, THREADS = "told-", "threads-"
LEVEL, PIECES = NUMBERED = "level-", "pieces-"
AT_ONCE = int(os.environ.get("AT_ONCE", "4"))


def build(folder: Path, component: str, form: str, precision: str) -> None:
    from graph_forms import CHANGES, tell
    from vlmc.engines import tensorrt_network
    from vlmc.engines.builders import tensorrt
    from vlmc.engines.tensorrt_profiles import Range, profile
    from vlmc.runtime.tensorrt_engine import APART

    words, lower, serialise, usual = form.split("+"), tensorrt.lower, tensorrt_network.serialise, tensorrt.profiles

    def profiles(model: Any, job: Any) -> Any:
        if "whole" in words:
            return usual(model, job)
        single = Range(1, 1, 1)
        sizes = {name: Range(*(one.usual,) * 3) for name, one in job.sizes.items()} | dict.fromkeys(APART, single)
        if component == "decoder" and "prefill" not in words:
            sizes["length"] = single
        return [one for one in [profile(model, sizes)] if one]  # none where nothing is free

    def lowered(model: Any, job: Any) -> str:
        made = lower(model, job)
        for word in words:
            if word in CHANGES:
                print(word, CHANGES[word](model), flush=True)
        return made

    def serialised(parsed: Any, shapes: Any, configure: Any) -> Any:
        for word in words:
            if word.startswith(TOLD):
                print(word, tell(parsed.trt, parsed.network, word.removeprefix(TOLD)), flush=True)
            if word.startswith(THREADS):
                parsed.builder.max_threads = int(word.removeprefix(THREADS))
        return serialise(parsed, shapes, configure)

    tensorrt.profiles, tensorrt.lower, tensorrt_network.serialise = profiles, lowered, serialised
    numbers = {start: int(word.removeprefix(start)) for word in words for start in NUMBERED if word.startswith(start)}
    if LEVEL in numbers:
        tensorrt.optimization_level = lambda model, device: numbers[LEVEL]
    if PIECES in numbers:
        tensorrt.piece_bytes = lambda size, precision: size / numbers[PIECES]
        tensorrt.AT_ONCE = AT_ONCE
    if "half-norms" in words:
        tensorrt.norms.apply = lambda model: 0
    place = folder / "engines" / form / component / f"tensorrt-{precision}"
    # Engines of several forms stand side by side in one artefact.
    Candidate.folder = lambda self, artifact: place
    build_engine(Artifact(folder), Candidate(DEVICE, component, "tensorrt", precision))


def ready(trt: Any, gpu: Any, artifact: Artifact, spec: EngineSpec, path: Path) -> tuple[Any, Any, Any]:
    """The engine, a context and its buffers; a step is the cache's last, which takes longest."""
    import numpy as np
    from vlmc.runtime.tensorrt_engine import Engine

    engine = Engine(trt, gpu, spec, path)
    context = engine.context()
    addresses, shapes = engine.allocate(context), engine.profiles[0]
    if spec.component == "decoder":
        length = shapes["inputs_embeds"][1]
        start = artifact.manifest.kv.capacity - 1 if length == 1 else 0
        known = {
            "position_ids": np.arange(start, start + length),
            "write_index": np.array([start]),
            "logits_index": np.array([length - 1]),
            "input_ids": np.full(length, skeleton.TOKEN if length == 1 else -1),  # -1: taken from inputs_embeds
        }
        for name in engine.inputs:
            if np.issubdtype(engine.dtypes[name], np.integer):
                values = np.broadcast_to(known.get(name, np.zeros(1)), shapes[name])
                gpu.upload(addresses[name], np.ascontiguousarray(values, engine.dtypes[name]))
        gpu.wait()
    context.use_profile(0, shapes)
    context.bind(addresses)
    context.enqueue()
    gpu.wait()
    return engine, context, addresses


def agreement(gpu: Any, artifact: Artifact, engine: Any, context: Any, addresses: Any, name: str) -> float | None:
    """The cosine of what the engine makes of the golden inputs with the golden outputs, of a step with what skeleton.py
    kept; None where there is nothing of the same weights."""
    import numpy as np
    from vlmc.evaluation.agreement import cosine

    given, wanted = expected(artifact, engine, name)
    if not wanted:
        return None
    for part, array in given.items():
        gpu.upload(addresses[part], np.ascontiguousarray(array, engine.dtypes[part]))
    context.enqueue()
    near = 1.0
    for part, array in wanted.items():
        found = np.empty(context.shape(part), engine.dtypes[part])
        gpu.download(found, addresses[part])
        gpu.wait()
        near = min(near, cosine(array.ravel()[: found.size], found.ravel()))
    return near


def expected(artifact: Artifact, engine: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs by name as the engine's shapes take them, and what should come out: nothing where nobody knows. A step's
    inputs are there already (`ready`)."""
    import numpy as np
    from vlmc.runtime.tensorrt_engine import batch_dimension

    spec, shapes = artifact.manifest.components[name], engine.profiles[0]
    if name == "decoder" and shapes["inputs_embeds"][1] == 1:
        kept = artifact.root / skeleton.STEP
        return {}, dict(np.load(kept, allow_pickle=False)) if kept.is_file() else {}
    other = artifact.root / skeleton.OTHER
    if other.is_file() and {name, *["embed_tokens"] * (name == "decoder")} & set(json.loads(other.read_text())):
        return {}, {}
    with np.load(artifact.path_of("golden/golden.npz"), allow_pickle=False) as file:
        golden = {key: file[key] for key in file.files}
    if not golden:
        return {}, {}
    given = {part: golden[f"0.{part}"] for part in engine.inputs if f"0.{part}" in golden}
    if name == "decoder":
        given.pop("input_ids", None)  # a prompt is in its embeddings
        wanted = {"logits": golden["0.prefill_logits"]}
    else:
        wanted = {tensor.name: golden[key] for tensor in spec.outputs if (key := f"0.{tensor.name}") in golden}
        apart = batch_dimension([tensor.shape for tensor in (*spec.inputs, *spec.outputs)])
        if not apart and any(array.shape != shapes[part] for part, array in given.items()):
            return {}, {}  # tiles that have to do with one another, and only one of them
    return {part: array[: shapes[part][0]] for part, array in given.items()}, wanted


def measure(folder: Path, component: str, form: str) -> dict[str, Any]:
    """{ENGINE: {"ms", "least_ms", "joules", "watts", "device_bytes", "build_seconds", "bytes", …}} of the engines that
    are there; gpu_host.py deletes those that were timed, and their records stay."""
    import pynvml
    import tensorrt as trt
    from vlmc.profiles import nvidia
    from vlmc.runtime.cuda import Gpu

    pynvml.nvmlInit()
    meter = nvidia.handle(pynvml)
    artifact, found = Artifact(folder), {}
    gpu, launches = Gpu(), {}
    for path in sorted(folder.glob(f"engines/{form}/{component}/tensorrt-*/engine.json")):
        spec, free = read_record(EngineSpec, path), gpu.free_bytes()
        if not path.with_name(spec.file).is_file():
            continue
        engine, context, addresses = ready(trt, gpu, artifact, spec, path.with_name(spec.file))
        name = path.parent.name
        near = agreement(gpu, artifact, engine, context, addresses, component)
        launches[name] = (gpu.capture(context.enqueue), engine, context)
        report = spec.report
        found[name] = {
            "shapes": {tensor: list(shape) for tensor, shape in engine.profiles[0].items() if "past_" not in tensor},
            "device_bytes": free - gpu.free_bytes(),
            "scratch_bytes": spec.settings["scratch_bytes"],
            "agreement": near,
            "build_seconds": report.seconds,
            "build_peak_bytes": report.peak_memory_bytes,
            "bytes": report.size_bytes,
            "layers": spec.settings["layers"],
            "products": report.products,
        }
    samples = in_rounds(gpu, launches)
    for name, (launch, *_rest) in launches.items():
        before, start, runs = pynvml.nvmlDeviceGetTotalEnergyConsumption(meter), time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            for _ in range(RUNS):
                launch()
            gpu.wait()
            runs += RUNS
        joules = (pynvml.nvmlDeviceGetTotalEnergyConsumption(meter) - before) / 1000
        seconds = time.perf_counter() - start
        times = {"ms": round(statistics.median(samples[name]), 4), "least_ms": round(min(samples[name]), 4)}
        found[name] |= times | {"joules": joules / runs, "watts": joules / seconds}
    return found


def in_rounds(gpu: Any, launches: dict[str, tuple[Any, ...]]) -> dict[str, list[float]]:
    """Milliseconds of each name's launch, the first of its tuple, in turns with the others: a mean of RUNS a round."""
    samples: dict[str, list[float]] = {name: [] for name in launches}
    for _ in range(ROUNDS):
        for name, (launch, *_rest) in launches.items():
            launch()
            gpu.wait()
            start = time.perf_counter()
            for _ in range(RUNS):
                launch()
            gpu.wait()
            samples[name].append((time.perf_counter() - start) * 1000 / RUNS)
    return samples


def launch(folder: Path, component: str, form: str, name: str) -> None:
    """Runs the engine twice, the first time to set itself up."""
    import tensorrt as trt
    from vlmc.runtime.cuda import Gpu

    path = folder / "engines" / form / component / name / "engine.json"
    spec, gpu = read_record(EngineSpec, path), Gpu()
    _engine, context, _ = ready(trt, gpu, Artifact(folder), spec, path.with_name(spec.file))
    context.enqueue()
    gpu.wait()


def main() -> None:
    command, root, component, form, *rest = sys.argv[1:]
    folder = Path(root)
    if command == "build":
        build(folder, component, form, *rest)
    elif command == "launch":
        launch(folder, component, form, *rest)
    else:
        found = measure(folder, component, form)
        output = folder / "times" / f"{component}.{form}.json"
        output.parent.mkdir(exist_ok=True)
        known = json.loads(output.read_text()) if output.is_file() else {}
        output.write_text(json.dumps(known | found, indent=1))
        print(folder, component, form, json.dumps({name: entry["ms"] for name, entry in found.items()}), flush=True)


if __name__ == "__main__":
    main()
