"""What the host adds to a decode step on a GPU: the time from one step's start to the next, less the time on the GPU.

    python benchmarks/decode_overhead.py ARTEFACT     writes ARTEFACT/overhead.json

Each launch of the step's CUDA graph lies between two events of the stream. Busy is the sum of the times between a
step's own two, period is the wall clock over the steps as a session takes them, `Decoder.stride` at a time with their
tokens brought to the host. They begin in the middle of the cache, with no prompt read, so an engine that has no profile
for prompts will do.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from gpu_steps import DEVICE
from vlmc.artifact import Artifact, EngineSpec
from vlmc.records import read_record
from vlmc.runtime.cuda import Gpu, checked
from vlmc.runtime.tensorrt_decoder import SLOT, TensorrtDecoder
from vlmc.runtime.tensorrt_engine import Engine

STEPS, ROUNDS = 64, 9  # whole strides


def overhead(path: Path) -> dict[str, float]:
    import tensorrt as trt
    from cuda.bindings import driver

    spec = read_record(EngineSpec, path)
    assert spec.kv is not None
    engine: Any = Engine(trt, Gpu(), spec, path.with_name(spec.file))
    context = engine.context()
    engine.context = lambda: context  # a single profile serves one context only
    decoder: Any = TensorrtDecoder(engine, spec.kv)
    state = np.zeros(3 * SLOT, np.int8)
    state[:4] = np.array([spec.kv.capacity // 2], np.int32).view(np.int8)

    def restart() -> None:
        decoder._gpu.upload(decoder._state, state)
        decoder._kept, decoder._position = 0, spec.kv.capacity // 2
        decoder.decode(2)

    events = [checked(driver.cuEventCreate(0)) for _ in range(2 * STEPS)]
    launch, stream = decoder._launch, decoder._gpu.stream
    periods, busy = [], []
    for _ in range(ROUNDS):
        restart()
        start = time.perf_counter()
        for _ in range(STEPS // decoder.stride):
            decoder.decode(decoder.stride)
        periods.append((time.perf_counter() - start) * 1000 / STEPS)
        restart()
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
    records = sorted(artifact.root.glob("engines/*/decoder/tensorrt-*/engine.json"))
    steps = [path for path in records if path.parts[-4] in (DEVICE, "single")]
    found = {path.parent.name: overhead(path) for path in steps}
    print(json.dumps(found, indent=1))
    (artifact.root / "overhead.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
