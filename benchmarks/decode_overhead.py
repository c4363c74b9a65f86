"""What the host adds to a decode step on a GPU: the time from one step's start to the next, less the time on the GPU.

    python benchmarks/decode_overhead.py ARTEFACT     writes ARTEFACT/overhead.json

Each launch of the step's CUDA graph lies between two events of the stream. Busy is the sum of the times between a
step's own two, period is the wall clock of `decode()` over its steps, tokens brought to the host included.
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
from vlmc.runtime import backends
from vlmc.runtime.cuda import checked

STEPS, ROUNDS = 64, 9


def overhead(artifact: Artifact, engine: str) -> dict[str, float]:
    from cuda.bindings import driver

    embed = backends.load_runner(artifact, "h100", "embed_tokens", "numpy-fp32", threads=1)
    decoder: Any = backends.load_decoder(artifact, "h100", engine, embed, threads=0)
    with np.load(artifact.path_of("golden/golden.npz"), allow_pickle=False) as file:
        prompt = file["0.inputs_embeds"]
    events = [checked(driver.cuEventCreate(0)) for _ in range(2 * STEPS)]
    launch, stream = decoder._launch, decoder._gpu.stream
    periods, busy = [], []
    for _ in range(ROUNDS):
        decoder.prefill(prompt)
        decoder.decode(2)
        start = time.perf_counter()
        decoder.decode(STEPS)
        periods.append((time.perf_counter() - start) * 1000 / STEPS)
        decoder.prefill(prompt)
        decoder.decode(2)
        for step in range(STEPS):
            checked(driver.cuEventRecord(events[2 * step], stream))
            launch()
            checked(driver.cuEventRecord(events[2 * step + 1], stream))
        decoder._gpu.wait()
        pairs = zip(events[::2], events[1::2], strict=True)
        busy.append(sum(checked(driver.cuEventElapsedTime(before, after)) for before, after in pairs) / STEPS)
    period, on_gpu = statistics.median(periods), statistics.median(busy)
    return {"period_ms": period, "busy_ms": on_gpu, "overhead_percent": 100 * (period - on_gpu) / period}


def main() -> None:
    artifact = Artifact(Path(sys.argv[1]))
    folder = artifact.root / "engines" / "h100" / "decoder"
    engines = sorted(path.name for path in folder.glob("tensorrt-*"))
    found = {engine: overhead(artifact, engine) for engine in engines}
    print(json.dumps(found, indent=1))
    (artifact.root / "overhead.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
