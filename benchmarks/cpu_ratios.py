"""INT8 vision and INT4 decoding against float, at true size with random weights, on this CPU.

    python benchmarks/cpu_ratios.py --work out/ratios --output benchmarks/results/cpu.json

Exports SmolVLM-256M (random weights), builds fp32, int8 and w4, then times in rounds, one engine loaded at a time:
the vision encoder on one 512×512 tile, and decode steps at a KV length of 512. Prints and writes medians of the rounds
and of the ratios within a round, which a slow minute of the machine changes least.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from vlmc.artifact import Artifact
from vlmc.exporter.parity import canonical_session
from vlmc.profiles import machine
from vlmc.runtime import backends

PRESET = "smolvlm-256m"
KV_LENGTH, STEPS, ROUNDS = 512, 24, 12
EXPORTED = "as exported"  # the canonical float graph in a default session of ONNX Runtime
RECIPES = ("int8", "w8", "w4")


def prepare(folder: Path) -> Artifact:
    """The artefact with its engines; each step is a cache hit where it was done before."""
    vlmc = [sys.executable, "-m", "vlmc"]
    subprocess.run([*vlmc, "export", PRESET, "--random-weights", "-o", str(folder)], check=True)
    for recipe in RECIPES:
        subprocess.run([*vlmc, "build", str(folder), "--device", "cpu", "--recipe", recipe], check=True)
    return Artifact(folder)


def vision(artifact: Artifact, engine: str) -> Callable[[], float]:
    """Milliseconds of one run on one tile."""
    if engine == EXPORTED:
        runner: Any = canonical_session(artifact).vision
    else:
        runner = backends.load_runner(artifact, "cpu", "vision_encoder", engine, threads=0)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 512, 512)).astype(np.float32)

    def once() -> float:
        start = time.perf_counter()
        runner.run({"pixel_values": pixels})
        return (time.perf_counter() - start) * 1000

    return once


def decoding(artifact: Artifact, engine: str) -> Callable[[], float]:
    """Tokens a second over STEPS steps after a prompt of KV_LENGTH."""
    if engine == EXPORTED:
        decoder: Any = canonical_session(artifact).decoder
    else:
        embed = backends.load_runner(artifact, "cpu", "embed_tokens", "onnxruntime-fp32", threads=0)
        decoder = backends.load_decoder(artifact, "cpu", engine, embed, threads=0)
    hidden = artifact.manifest.hidden_size
    prompt = np.random.default_rng(0).standard_normal((1, KV_LENGTH, hidden)).astype(np.float32) * 0.05

    def once() -> float:
        decoder.prefill(prompt)
        decoder.decode(2)
        start = time.perf_counter()
        decoder.decode(STEPS)
        return STEPS / (time.perf_counter() - start)

    return once


def measure(open_one: Callable[[Artifact, str], Callable[[], float]], artifact: Artifact, engines: list[str]) -> Any:
    """Samples by engine; each round loads every engine in turn, warms it up and takes two samples."""
    samples: dict[str, list[float]] = {engine: [] for engine in engines}
    for _ in range(ROUNDS):
        for engine in engines:
            once = open_one(artifact, engine)
            once()
            samples[engine] += [once(), once()]
            del once
            gc.collect()
    return samples


def gain(what: str, base: list[float], samples: list[float]) -> float:
    """How many times as fast as the base: the median over the rounds, which have two samples each."""
    sums = [(sum(base[i : i + 2]), sum(samples[i : i + 2])) for i in range(0, len(samples), 2)]
    return statistics.median(old / new if what == "vision_ms" else new / old for old, new in sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/ratios"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu.json"))
    arguments = parser.parse_args()
    artifact = prepare(arguments.work)
    openvino = [] if backends.unavailable("openvino") else ["openvino-fp32", "openvino-int8"]
    results: dict[str, Any] = {
        "vision_ms": measure(vision, artifact, [EXPORTED, "onnxruntime-fp32", "onnxruntime-int8", *openvino]),
        "decode_tokens_per_s": measure(
            decoding, artifact, [EXPORTED, "onnxruntime-fp32", *(f"onnxruntime-{r}" for r in RECIPES)]
        ),
    }
    medians = {what: {e: statistics.median(s) for e, s in by.items()} for what, by in results.items()}
    ratios: dict[str, Any] = {}
    for what, by in results.items():
        for engine, samples in by.items():
            found = {base: gain(what, by[base], samples) for base in (EXPORTED, "onnxruntime-fp32")}
            ratios.setdefault(what, {})[engine] = found
            shown = "  ".join(f"{ratio:5.2f}× {base}" for base, ratio in found.items())
            print(f"{what:20s} {engine:20s} {medians[what][engine]:8.1f}  {shown}")
    record = {
        "what": f"{PRESET}, random weights, batch 1",
        "date": date.today().isoformat(),
        "command": "python benchmarks/cpu_ratios.py",
        "machine": machine.describe(0),
        "median": medians,
        "ratio": ratios,
        "samples": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
