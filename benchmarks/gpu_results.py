"""One JSON file of what gpu_host.py, or the scripts that it calls, left on the GPU host (brought here as a folder with
`data` and, of gpu_host.py, `logs`).

    python benchmarks/gpu_results.py FOLDER benchmarks/results/h100-DATE.json

Figures are taken from the records that `vlmc build`, `vlmc profile` and the scripts beside this one wrote; a figure
that is not there is missing here too.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

from gpu_steps import DEVICE


def main(folder: Path, output: Path) -> None:
    data, logs = folder / "data", folder / "logs"
    models = {path.parent.name: model(path.parent) for path in sorted(data.glob("*/manifest.json"))}
    steps = (logs / "steps.txt").read_text().splitlines() if (logs / "steps.txt").is_file() else []
    record = {
        "what": f"TensorRT 8.6.0 and PyTorch on an {DEVICE.upper()}; random weights but for the demo; batch 1",
        "device": DEVICE,
        "command": f"{'benchmarks/gpu_host.py' if steps else 'by hand'} (benchmarks/README.md says how)",
        "steps": {line.split()[2]: [float(line.split()[3]), line.split()[7]] for line in steps if "GPU" in line},
        "models": models,
    }
    if (logs / "vit2-time.log").is_file():
        text = (logs / "vit2-time.log").read_text()
        record["vit2"] = json.loads(text[text.index("{") :])
    profiled = {path.stem.replace("-kernels-", " "): kernels(path) for path in sorted(logs.glob("*-kernels-*.log"))}
    record["kernels"] = {name: found for name, found in profiled.items() if found}
    output.write_text(json.dumps(record, indent=1) + "\n")


def model(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "manifest.json").read_text())
    found: dict[str, Any] = {
        "parameters": {name: spec["parameters"] for name, spec in manifest["components"].items()},
        "kv": manifest["kv"],
        "random_weights": manifest["source"]["kind"] == "random",
    }
    for path in sorted((folder / "engines" / DEVICE).glob("*.json")):
        record = json.loads(path.read_text())
        found.setdefault("choices", {})[record["recipe"]] = {
            part: {"kept": choice["engine"], "why": choice["reason"], "candidates": choice["candidates"]}
            for part, choice in record["choices"].items()
        }
    for path in sorted(folder.glob(f"engines/{DEVICE}/*/*/engine.json")) if "choices" in found else ():
        engine = json.loads(path.read_text())
        report = engine["report"] | {"scratch_bytes": engine["settings"].get("scratch_bytes")}
        found.setdefault("built", {}).setdefault(engine["component"], {})[path.parent.name] = report
    for name in ("torch", "overhead", "graph-times"):
        if (folder / f"{name}.json").is_file():
            found[name] = json.loads((folder / f"{name}.json").read_text())
    for path in sorted(folder.glob("times/*.json")):
        part, form, _ = path.name.rsplit(".", 2)
        if timed := json.loads(path.read_text()):
            found.setdefault("engines", {}).setdefault(part, {})[form] = timed
    report = folder / "profile" / DEVICE / "report.json"
    if report.is_file():
        found["profile"] = profile(json.loads(report.read_text()))
    return found


def profile(report: dict[str, Any]) -> dict[str, Any]:
    variants = {}
    for variant in report["variants"]:
        latency = {part: {k: v[k] for k in ("median", "p90", "count")} for part, v in variant["latency_ms"].items()}
        accuracy = variant["accuracy"]
        variants[variant["name"]] = {
            "latency_ms": latency,
            "rate": next(variant[rate] for rate in ("tokens_per_s", "pairs_per_s") if rate in variant),
            "memory": variant["memory"],
            "energy": variant["energy"],
            "roofline": variant["roofline"],
            "accuracy": accuracy if isinstance(accuracy, str) else accuracy.get("overall", accuracy),
            "agreement": variant["agreement"],
        }
    kept = ("machine", "limits", "power", "settings", "not_measured", "speedups")
    return {name: report[name] for name in kept} | {"variants": variants, "verdict": report["verdict"]["sentences"]}


def kernels(log: Path) -> dict[str, Any]:
    """Each kernel of the second of two runs with its count and microseconds, from ncu's CSV."""
    rows = list(csv.reader(line for line in log.read_text().splitlines() if re.match(r'^"\d+"', line)))
    found: dict[str, list[float]] = {}
    for row in rows[len(rows) // 2 :]:
        found.setdefault(row[4], []).append(float(row[-1].replace(",", "")) / 1000)
    return {name: {"count": len(times), "us": round(sum(times), 1)} for name, times in found.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
