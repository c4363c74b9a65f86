"""The tables of benchmarks/results/h100.md, from a file that gpu_results.py wrote.

    python benchmarks/gpu_table.py benchmarks/results/h100-2026-11-22-sizes.json

A step's limit is the time in which the memory delivers what it reads at least once: the decoder's weights (2 bytes each
in FP16, 1 in int8) and a full KV cache in FP16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BANDWIDTH = 3.35e12  # bytes a second: NVIDIA's data sheet of the H100 SXM
COLUMNS = (
    ("PyTorch eager", "eager"),
    ("CUDA graph", "graph"),
    ("torch.compile", "compile"),
    ("fake-quant", "fake-quant"),
)


def main(path: Path) -> None:
    models = json.loads(path.read_text())["models"]
    header = [name for name, _ in COLUMNS] + ["ONNX Runtime CUDA", "TensorRT FP16", "TensorRT int8"]
    for what, part, form, key in (
        ("Vision, one tile", "vision_encoder", "single", "vision_encoder_ms"),
        ("A prompt (its length in brackets)", "decoder", "prefill", "prefill_ms"),
        ("A decode step, cache of 1,024 full", "decoder", "single", "decode_ms"),
    ):
        rows = {name: row(model, part, form, key) for name, model in models.items()}
        limit = ["share of the limit, FP16 and int8"] if key == "decode_ms" else []
        print(f"{what}, milliseconds:\n")
        print(line(["model", *header, *limit]))
        print(line(["---"] * (1 + len(header) + len(limit))))
        for name, cells in rows.items():
            if any(cells):
                given = models[name].get("torch", {}).get("eager", {})
                title = f"{name} ({given['prompt']})" if form == "prefill" and "prompt" in given else name
                print(line([title, *map(shown, cells), *(shares(models[name], cells) if limit else [])]))
        print()


def row(model: dict[str, Any], part: str, form: str, key: str) -> list[float | None]:
    torch, engines = model.get("torch", {}), model.get("engines", {}).get(part, {}).get(form, {})
    found = [torch.get(mode, {}).get(key) for mode in (*(mode for _, mode in COLUMNS), "onnxruntime")]
    return found + [engines.get(f"tensorrt-{precision}", {}).get("ms") for precision in ("fp16", "int8")]


def shares(model: dict[str, Any], cells: list[float | None]) -> list[str]:
    kv = model["kv"]
    cache = 2 * kv["layers"] * kv["kv_heads"] * kv["capacity"] * kv["head_dim"] * 2
    limits = [(model["parameters"]["decoder"] * size + cache) / BANDWIDTH * 1000 for size in (2, 1)]
    pairs = zip(limits, cells[-2:], strict=True)
    return [", ".join("–" if ms is None else f"{100 * limit / ms:.0f} %" for limit, ms in pairs)]


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
