"""TensorRT engines alone, each run one launch of a CUDA graph: milliseconds, joules and memory.

    python benchmarks/engine_times.py build ARTEFACT COMPONENT PRECISION   on the GPU: an engine for the golden's size
    python benchmarks/engine_times.py time ARTEFACT…                       prints and writes ARTEFACT/engines.json

For sizes at which `vlmc build` takes longer than the GPU can be had: an engine has one profile, of one picture or one
decode step at the cache's end, so no prompt can be read and nothing is compared with the golden.
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


def build(folder: Path, component: str, precision: str) -> None:
    from vlmc.engines.builders import tensorrt

    every = tensorrt.profiles
    tensorrt.profiles = lambda *given: every(*given)[:1]  # its first is the step, or the single picture
    build_engine(Artifact(folder), Candidate("h100", component, "tensorrt", precision))


def measure(folder: Path) -> dict[str, Any]:
    """{"COMPONENT ENGINE": {"ms", "least_ms", "joules", "watts", "device_bytes", "build_seconds", "bytes", …}}."""
    import pynvml
    import tensorrt as trt
    from vlmc.profiles import nvidia
    from vlmc.runtime.cuda import Gpu
    from vlmc.runtime.tensorrt_engine import Engine

    pynvml.nvmlInit()
    meter = nvidia.handle(pynvml)
    artifact, found = Artifact(folder), {}
    gpu, launches = Gpu(), {}
    for path in sorted(folder.glob("engines/h100/*/tensorrt-*/engine.json")):
        spec, free = read_record(EngineSpec, path), gpu.free_bytes()
        engine = Engine(trt, gpu, spec, path.with_name(spec.file))
        context = engine.context()
        addresses = engine.allocate(context)
        if spec.component == "decoder":  # all of the cache is filled, which takes longest
            place = write(gpu, [artifact.manifest.kv.capacity - 1])
            addresses |= {"position_ids": place, "write_index": place, "input_ids": write(gpu, [1])}
        context.use_profile(0, engine.profiles[0])
        context.bind(addresses)
        context.enqueue()
        gpu.wait()
        name = f"{spec.component} {path.parent.name}"
        launches[name] = (gpu.capture(context.enqueue), engine, context)
        report = spec.report
        found[name] = {
            "device_bytes": free - gpu.free_bytes(),
            "scratch_bytes": spec.settings["scratch_bytes"],
            "build_seconds": report.seconds,
            "build_peak_bytes": report.peak_memory_bytes,
            "bytes": report.size_bytes,
            "products": report.products,
            "work": report.work,
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


def write(gpu: Any, numbers: list[int]) -> int:
    """The address of int32 numbers on the GPU."""
    import numpy as np

    address = gpu.allocate(4 * len(numbers))
    gpu.upload(address, np.array(numbers, np.int32))
    gpu.wait()
    return int(address)


def main() -> None:
    command, *arguments = sys.argv[1:]
    if command == "build":
        build(Path(arguments[0]), *arguments[1:])
        return
    for folder in map(Path, arguments):
        found = measure(folder)
        (folder / "engines.json").write_text(json.dumps(found, indent=1))
        print(folder, json.dumps({name: entry["ms"] for name, entry in found.items()}), flush=True)


if __name__ == "__main__":
    main()
