"""TensorRT engines alone, each run one launch of a CUDA graph: milliseconds, joules and memory.

    python benchmarks/engine_times.py build ARTEFACT COMPONENT PRECISION [FORM]   on the GPU, a process an engine
    python benchmarks/engine_times.py time ARTEFACT COMPONENT   there: prints, writes ARTEFACT/COMPONENT.times.json
    ncu … python benchmarks/engine_times.py launch ARTEFACT COMPONENT ENGINE      one run, for the names of its kernels

For sizes at which `vlmc build` takes longer than the GPU can be had: an engine has one profile, of one picture or one
decode step at the cache's end, so no prompt can be read. FORMS are ways to build that differ from vlmc's own.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from vlmc.artifact import Artifact, EngineSpec, read_record
from vlmc.engines.candidate import Candidate
from vlmc.engines.candidate import build as build_engine

ROUNDS, RUNS, SECONDS = 5, 40, 2.0
FORMS: dict[str, dict[str, Any]] = {
    "step": {},
    "whole": {"whole": True},  # as `vlmc build` makes it
    "whole-level-1": {"whole": True, "prompts": (), "level": 1},  # two profiles: a step, and any prompt
    "level-1": {"level": 1},
    "level-2": {"level": 2},
    "level-5": {"level": 5},
    "merged": {"merge": True},
    "merged-level-5": {"merge": True, "level": 5},
    "typed": {"half": True},
    "merged-typed": {"merge": True, "half": True},
}


def build(
    folder: Path,
    component: str,
    precision: str,
    *,
    whole: bool = False,
    prompts: tuple[int, ...] = (256,),
    level: int = 3,
    merge: bool = False,
    half: bool = False,
) -> None:
    from vlmc.engines import tensorrt_network
    from vlmc.engines.builders import tensorrt
    from vlmc.engines.passes import half_precision

    profiles, lower, serialise = tensorrt.profiles, tensorrt.lower, tensorrt_network.serialise
    tensorrt.PROMPTS = prompts
    if not whole:
        tensorrt.profiles = lambda *given: profiles(*given)[:1]  # its first is the step, or the single picture

    def lowered(model: Any, job: Any) -> str:
        if merge:
            from tensorrt_variants import merge_products

            print("merged", merge_products(model), flush=True)
        form = lower(model, job)
        if half:
            half_precision.apply(model)
        return form

    def serialised(parsed: Any, shapes: Any, configure: Any) -> Any:
        def configured(config: Any) -> None:
            configure(config)
            config.builder_optimization_level = level

        return serialise(parsed, shapes, configured)

    tensorrt.lower, tensorrt_network.serialise = lowered, serialised
    build_engine(Artifact(folder), Candidate("h100", component, "tensorrt", precision))


def ready(trt: Any, gpu: Any, artifact: Artifact, spec: EngineSpec, path: Path) -> tuple[Any, Any]:
    """The engine with a context whose buffers are there; a decoder's cache is full, which takes longest."""
    from vlmc.runtime.tensorrt_engine import Engine

    engine = Engine(trt, gpu, spec, path)
    context = engine.context()
    addresses = engine.allocate(context)
    if spec.component == "decoder":
        place = write(gpu, [artifact.manifest.kv.capacity - 1])
        addresses |= {"position_ids": place, "write_index": place, "input_ids": write(gpu, [1])}
    context.use_profile(0, engine.profiles[0])
    context.bind(addresses)
    context.enqueue()
    gpu.wait()
    return engine, context


def measure(folder: Path, component: str) -> dict[str, Any]:
    """{ENGINE: {"ms", "least_ms", "joules", "watts", "device_bytes", "build_seconds", "bytes", …}}."""
    import pynvml
    import tensorrt as trt
    from vlmc.profiles import nvidia
    from vlmc.runtime.cuda import Gpu

    pynvml.nvmlInit()
    meter = nvidia.handle(pynvml)
    artifact, found = Artifact(folder), {}
    gpu, launches = Gpu(), {}
    for path in sorted(folder.glob(f"engines/h100/{component}/tensorrt-*/engine.json")):
        spec, free = read_record(EngineSpec, path), gpu.free_bytes()
        engine, context = ready(trt, gpu, artifact, spec, path.with_name(spec.file))
        name = path.parent.name
        launches[name] = (gpu.capture(context.enqueue), engine, context)
        report = spec.report
        found[name] = {
            "device_bytes": free - gpu.free_bytes(),
            "scratch_bytes": spec.settings["scratch_bytes"],
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


def launch(folder: Path, component: str, name: str) -> None:
    """Runs the engine twice, the first time to set itself up."""
    import tensorrt as trt
    from vlmc.runtime.cuda import Gpu

    path = folder / "engines" / "h100" / component / name / "engine.json"
    spec, gpu = read_record(EngineSpec, path), Gpu()
    _engine, context = ready(trt, gpu, Artifact(folder), spec, path.with_name(spec.file))
    context.enqueue()
    gpu.wait()


def write(gpu: Any, numbers: list[int]) -> int:
    """The address of int32 numbers on the GPU."""
    import numpy as np

    address = gpu.allocate(4 * len(numbers))
    gpu.upload(address, np.array(numbers, np.int32))
    gpu.wait()
    return int(address)


def main() -> None:
    command, folder, component, *rest = sys.argv[1:]
    if command == "build":
        precision, *form = rest
        build(Path(folder), component, precision, **FORMS[form[0] if form else "step"])
    elif command == "launch":
        launch(Path(folder), component, *rest)
    else:
        found = measure(Path(folder), component)
        (Path(folder) / f"{component}.times.json").write_text(json.dumps(found, indent=1))
        print(folder, component, json.dumps({name: entry["ms"] for name, entry in found.items()}), flush=True)


if __name__ == "__main__":
    main()
