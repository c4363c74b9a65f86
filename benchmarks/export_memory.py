"""What an export takes: the peak of its resident memory against the float32 weights, and seconds.

    python benchmarks/export_memory.py --output benchmarks/results/cpu-export.json MODEL…

MODEL: a preset, exported with random weights, or a folder with a checkpoint. One picture is the golden. Each export is
a process of its own, in a temporary folder under --work, and is removed once it is measured. What was swapped out at
the peak is not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlmc.artifact import Artifact
from vlmc.profiles import machine


def measure(model: str, work: Path) -> dict[str, Any]:
    """{"parameters", "weight_bytes", "peak_bytes", "ratio", "seconds"} of one export."""
    with TemporaryDirectory(dir=work) as folder:
        random = [] if Path(model).is_dir() else ["--random-weights"]
        command = [sys.executable, "-m", "vlmc", "export", model, *random, "--cases", "1", "-o", f"{folder}/made"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        manifest = Artifact(Path(folder) / "made").manifest
    weights = sum(file.bytes for name, file in manifest.files.items() if name.endswith(".data"))
    peak = manifest.peak_memory_bytes
    assert peak is not None
    return {
        "parameters": sum(spec.parameters for spec in manifest.components.values()),
        "weight_bytes": weights,
        "peak_bytes": peak,
        "ratio": round(peak / weights, 2),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for model in arguments.models:
        name = Path(model).name
        found[name] = measure(model, arguments.work)
        print(name, found[name], flush=True)
    record = {
        "what": "vlmc export --cases 1, one process a model",
        "date": date.today().isoformat(),
        "command": f"python benchmarks/export_memory.py --output {arguments.output} {' '.join(arguments.models)}",
        "machine": machine.describe(0),
        "exports": found,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
