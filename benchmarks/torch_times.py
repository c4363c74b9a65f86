"""PyTorch in float16 on a GPU: the vision encoder and a decode step, eager, in CUDA graphs, and fake-quant with a plan.

    python benchmarks/torch_times.py ARTEFACT [compile]        writes ARTEFACT/torch.json: medians in milliseconds

The same golden inputs and the same loop as the trial of `vlmc build` (engines/trial.py), so both stand side by side.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from vlmc.artifact import Artifact
from vlmc.calibration.cuda_baseline import GpuDecoder, GpuRunner
from vlmc.calibration.fake_quant import apply_plan
from vlmc.calibration.plan import read_plan
from vlmc.engines import trial
from vlmc.exporter.checkpoint import load_components

MODES = ("eager", "graph")


def times(artifact: Artifact, parts: Any, mode: str, golden: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name, module in parts.items():
        if name.endswith("_encoder"):
            spec = artifact.manifest.components[name]
            runner = GpuRunner(module, spec, mode, "cuda")
            inputs = {tensor.name: golden[f"0.{tensor.name}"] for tensor in spec.inputs}
            found[f"{name}_ms"] = statistics.median(trial.timed(lambda: runner.run(inputs)))  # noqa: B023
    if "decoder" not in artifact.manifest.components:
        return found
    decoder, steps = GpuDecoder(parts, artifact.manifest.components, artifact.manifest.kv, mode, "cuda"), []
    prompt = golden["0.inputs_embeds"][:, : decoder.capacity - 1]
    further = trial.further_of(artifact, golden, "0", prompt.shape[1])
    found["prefill_ms"] = statistics.median(trial.timed(lambda: decoder.prefill(prompt, **further)))
    room = min(trial.ANSWER, decoder.capacity - prompt.shape[1])

    def answer() -> None:
        decoder.prefill(prompt, **further)
        start = time.perf_counter()
        decoder.decode(room)
        steps.append((time.perf_counter() - start) * 1000 / room)

    trial.timed(answer)
    return found | {"decode_ms": statistics.median(steps[1:])}


def main() -> None:
    artifact = Artifact(Path(sys.argv[1]))
    with np.load(artifact.path_of("golden/golden.npz"), allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    parts = load_components(artifact)
    variants = {mode: (mode, parts.map(lambda _, module: module.half())) for mode in (*MODES, *sys.argv[2:])}
    if (artifact.root / "plans" / "int8.json").is_file():
        plan, fake = read_plan(artifact, "int8"), load_components(artifact)
        variants["fake-quant"] = ("eager", fake.map(lambda name, module: apply_plan(module, plan, name).half()))
    found: dict[str, Any] = {}
    for name, (mode, made) in variants.items():
        try:
            found[name] = times(artifact, made.map(lambda _, module: module.to("cuda")), mode, golden)
        except Exception as error:  # one that fails must not lose the others' times
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
        print(name, found[name], flush=True)
        (artifact.root / "torch.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
