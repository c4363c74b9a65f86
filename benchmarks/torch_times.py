"""PyTorch in float16 on a GPU, and ONNX Runtime's CUDA provider: the vision encoder, a prompt and a decode step.

    python benchmarks/torch_times.py ARTEFACT MODE…       writes ARTEFACT/torch.json: medians in milliseconds

MODE: eager, graph, compile, fake-quant (int8's plan, eager), onnxruntime (engines that `vlmc build` made). Weights are
loaded at once and the file ARTEFACT/loaded says so; the timing begins when ARTEFACT/go is there, with the GPU's number.
The golden inputs are those of engine_times.py (a single tile or text) and the loop that of `vlmc build`'s trial.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_steps import DEVICE
from vlmc.artifact import Artifact
from vlmc.calibration.cuda_baseline import GpuDecoder, GpuRunner, halved
from vlmc.calibration.fake_quant import apply_plan
from vlmc.calibration.plan import read_plan
from vlmc.engines import trial
from vlmc.exporter.checkpoint import load_components
from vlmc.profiles import nvidia
from vlmc.runtime import backends
from vlmc.runtime.tensorrt_engine import APART

ENGINE, LOOKUP = "onnxruntime_gpu-fp16", "numpy-fp32"
SECONDS = 2.0  # of runs, to see their energy


def times(artifact: Artifact, runners: dict[str, Any], decoder: Any, golden: dict[str, Any]) -> dict[str, float]:
    """Milliseconds and joules by component."""
    found = {}
    for name, runner in runners.items():
        arrays = {}
        for tensor in artifact.manifest.components[name].inputs:
            one = tuple(slice(1) if size in APART else slice(None) for size in tensor.shape)
            arrays[tensor.name] = golden[f"0.{tensor.name}"][one]
        found[f"{name}_ms"] = statistics.median(trial.timed(lambda: runner.run(arrays)))  # noqa: B023
        found[f"{name}_joules"] = joules(lambda: runner.run(arrays))  # noqa: B023
    if decoder is None:
        return found
    prompt = golden["0.inputs_embeds"][:, : decoder.capacity - 1]
    further = trial.further_of(artifact, golden, "0", prompt.shape[1])
    found["prompt"] = prompt.shape[1]
    found["prefill_ms"] = statistics.median(trial.timed(lambda: decoder.prefill(prompt, **further)))
    room, steps = min(4 * trial.ANSWER, decoder.capacity - prompt.shape[1]), []

    def answer() -> None:
        decoder.prefill(prompt, **further)
        start = time.perf_counter()
        decoder.decode(room)
        steps.append((time.perf_counter() - start) * 1000 / room)

    trial.timed(answer)
    decoder.prefill(prompt, **further)
    found["decode_ms"] = statistics.median(steps[1:])
    found["answer_joules"] = joules(answer)  # a prompt and `room` steps
    return found | {"answer_tokens": room}


def joules(run: Callable[[], Any]) -> float:
    """Of one run, the GPU's idle power included; NVML's counter moves every 20 to 100 ms, so of many."""
    import pynvml

    pynvml.nvmlInit()
    meter = nvidia.handle(pynvml)
    torch.cuda.synchronize()
    before, start, runs = pynvml.nvmlDeviceGetTotalEnergyConsumption(meter), time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        run()
        runs += 1
    torch.cuda.synchronize()
    return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(meter) - before) / 1000 / runs


def pytorch(artifact: Artifact, parts: Any, mode: str, golden: dict[str, Any]) -> dict[str, float]:
    specs, kv = artifact.manifest.components, artifact.manifest.kv
    parts = parts.map(lambda _, module: module.to("cuda"))
    torch.cuda.reset_peak_memory_stats()
    runners = {n: GpuRunner(m, specs[n], mode, "cuda") for n, m in parts.items() if n.endswith("_encoder")}
    decoder = GpuDecoder(parts, specs, kv, mode, "cuda") if "decoder" in specs else None
    found = times(artifact, runners, decoder, golden)
    return found | {"peak_bytes": torch.cuda.max_memory_allocated()}


def onnxruntime(artifact: Artifact, golden: dict[str, Any]) -> dict[str, float]:
    names = [name for name in artifact.manifest.components if name.endswith("_encoder")]
    runners = {name: backends.load_runner(artifact, DEVICE, name, ENGINE, threads=0) for name in names}
    embed = backends.load_runner(artifact, DEVICE, "embed_tokens", LOOKUP, threads=0)
    return times(artifact, runners, backends.load_decoder(artifact, DEVICE, ENGINE, embed, threads=0), golden)


def main() -> None:
    artifact, modes = Artifact(Path(sys.argv[1])), sys.argv[2:]
    with np.load(artifact.path_of("golden/golden.npz"), allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    parts = load_components(artifact).map(lambda _, module: halved(module))
    fake = None
    if "fake-quant" in modes:
        plan, fake = read_plan(artifact, "int8"), load_components(artifact)
        fake = fake.map(lambda name, module: halved(apply_plan(module, plan, name)))
    (artifact.root / "loaded").touch()
    while not (artifact.root / "go").exists():
        time.sleep(0.1)
    os.environ["CUDA_VISIBLE_DEVICES"] = (artifact.root / "go").read_text()
    found: dict[str, Any] = {}
    for mode in modes:
        try:
            if mode == "onnxruntime":
                found[mode] = onnxruntime(artifact, golden)
            elif mode == "fake-quant":
                parts = None
                gc.collect()
                found[mode] = pytorch(artifact, fake, "eager", golden)
            else:
                found[mode] = pytorch(artifact, parts, mode, golden)
        except Exception as error:  # one that fails must not lose the others' times
            found[mode] = f"{type(error).__name__}: {str(error)[:300]}"
        print(mode, found[mode], flush=True)
        (artifact.root / "torch.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
