"""What a CUDA graph for each shape saves an encoder that `vlmc build` made: milliseconds of a run, copies included.

    python benchmarks/encoder_graphs.py ARTEFACT…     on the GPU, for every TensorRT engine that is no decoder

The same engine is loaded with graphs and without, and both run the first golden input in turns. `alone` is the graph
by itself, without copies; `first` and `second` are the first two runs of a shape, the second of which captures.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt
from gpu_steps import DEVICE
from vlmc.artifact import Artifact
from vlmc.runtime.backends.tensorrt import TensorrtRunner, runner

ROUNDS, RUNS = 9, 50


def measure(artifact: Artifact, component: str, engine: str) -> dict[str, Any]:
    with np.load(artifact.path_of("golden/golden.npz"), allow_pickle=False) as file:
        inputs = {name.name: file[f"0.{name.name}"] for name in artifact.manifest.components[component].inputs}
    spec, path = artifact.engine(DEVICE, component, engine)
    ways = {"kernels": runner(tensorrt, spec, path, graphs=False), "graph": runner(tensorrt, spec, path)}
    found: dict[str, Any] = {"shapes": {name: list(array.shape) for name, array in inputs.items()}}
    results = {}
    for way, made in ways.items():
        for turn in ("first", "second", "third"):
            start = time.perf_counter()
            results[way] = made.run(inputs)
            found[f"{way}_{turn}_ms"] = (time.perf_counter() - start) * 1000
    found["equal"] = all(np.array_equal(array, results["graph"][name]) for name, array in results["kernels"].items())
    samples: dict[str, list[float]] = {way: [] for way in (*ways, "alone")}
    for _ in range(ROUNDS):
        for way, made in ways.items():
            samples[way].append(mean(lambda made=made: made.run(inputs)))
        samples["alone"].append(alone(ways["graph"]))
    return found | {f"{way}_ms": round(statistics.median(times), 4) for way, times in samples.items()}


def mean(run: Any) -> float:
    start = time.perf_counter()
    for _ in range(RUNS):
        run()
    return (time.perf_counter() - start) * 1000 / RUNS


def alone(made: TensorrtRunner) -> float:
    launch: Any = made._launch

    def run() -> None:
        launch()
        made._engine.gpu.wait()

    return mean(run)


for root in sys.argv[1:]:
    artifact = Artifact(Path(root))
    output = artifact.root / "graph-times.json"
    times = {}
    for component in artifact.manifest.components:
        for path in sorted(artifact.root.glob(f"engines/{DEVICE}/{component}/tensorrt-*/engine.json")):
            if component != "decoder":
                name = f"{component}/{path.parent.name}"
                times[name] = measure(artifact, component, path.parent.name)
                print(root, name, json.dumps(times[name]), flush=True)
    output.write_text(json.dumps(times, indent=1))
