"""The tables of results/h100.md and h200.md, from files that gpu_results.py wrote, the later one's figures first.

    python benchmarks/gpu_table.py benchmarks/results/h100-DATE.json benchmarks/results/h100-LATER.json

A record's `mark` stands behind what its decoders' engines took. A step's limit is the time in which the memory delivers
what it reads at least once: the decoder's weights (2 bytes each in FP16, 1 in int8) and a full KV cache in FP16. Its
bandwidth is the one in profiles/devices/, of the device that the record names.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tomllib

DEVICES = Path(__file__).resolve().parent.parent / "profiles" / "devices"
TOKENS = 64  # of an answer
CUT_TOWER = "smolvlm-2.2b-8of24"  # one layer of vision, for its decoder alone is looked at
COLUMNS = (
    ("PyTorch eager", "eager"),
    ("CUDA graph", "graph"),
    ("torch.compile", "compile"),
    ("fake-quant", "fake-quant"),
)
PARTS = (  # of an answer
    ("vision_encoder", "single", "vision_encoder_ms"),
    ("decoder", "prefill", "prefill_ms"),
    ("decoder", "single", "decode_ms"),
)
TABLES = {
    "Vision, one tile": PARTS[0],
    "A text of a model that matches": ("text_encoder", "single", "text_encoder_ms"),
    "A fusion of a picture's features and the question": ("fusion", "single", "fusion_ms"),
    "A prompt (its length in brackets)": PARTS[1],
    "A decode step, a full cache (1,024 places, BLIP 512)": PARTS[2],
}
MIXED, MISSING = "TensorRT mixed", "–"
AS_BUILT = ("level-0", "maxima", "single+pieces-18+half-norms")  # names of forms that are what `vlmc build` makes since


def main(*paths: str) -> None:
    models = read(paths)
    header = [name for name, _ in COLUMNS] + ["ONNX Runtime CUDA", "TensorRT FP16", "TensorRT int8"]
    for what, (part, form, key) in TABLES.items():
        steps = part == "decoder" and form == "single"
        last = "share of the limit, FP16 and int8" if steps else "cosine with the golden, FP16 and int8"
        rows = []
        for name, model in sorted((models if part == "decoder" else whole_towers(models)).items()):
            cells = row(model, part, form, key)
            if any(ms is not None for ms, _ in cells):
                given = model.get("torch", {}).get("eager", {})
                title = f"{name} ({given['prompt']})" if form == "prefill" and "prompt" in given else name
                rows.append([title, *map(shown, cells), shares(model, cells) if steps else cosines(model, part, form)])
        if rows:
            print(f"{what}, milliseconds:\n")
            print(line(["model", *header, last]))
            print(line(["---"] * (2 + len(header))))
            print("\n".join(map(line, rows)) + "\n")
    print(f"An answer of {TOKENS} tokens to one tile, milliseconds to the first and to the last, sums of the above:\n")
    print(line(["model", *header, MIXED]))
    print(line(["---"] * (2 + len(header))))
    for name, model in sorted(models.items()):
        cells = answers(model)
        if any(cell != MISSING for cell in cells[len(COLUMNS) + 1 :]):  # of TensorRT
            print(line([name, *cells]))
    for name, model in models.items():
        if "profile" in model:
            profiled(name, model["profile"])


def profiled(model: str, profile: dict[str, Any]) -> None:
    """Of `vlmc profile`, every variant in a line."""
    settings, variants = profile["settings"], profile["variants"]
    first: dict[str, Any] = next(iter(variants.values()))
    generates = "prefill" in first["latency_ms"]
    what = f"answers of {settings['tokens']} tokens" if generates else "pictures, each with a text"
    print(f"\n{model} by `vlmc profile`, medians of {settings['runs']} {what}, milliseconds:\n")
    digits = {"vision": 2, "text": 2, "prefill": 2, "time_to_first_token": 2, "decode_per_token": 3, "end_to_end": 1}
    parts = [part for part in digits if part in first["latency_ms"]]
    joules = "joules_per_token" if generates else "joules_per_pair"
    named = [part.replace("_", " ") for part in parts]
    print(line(["variant", *named, "J a token" if generates else "J a pair", "score", "golden answers equal"]))
    print(line(["---"] * (4 + len(parts))))
    for name, found in variants.items():
        times = [f"{found['latency_ms'][part]['median']:.{digits[part]}f}" for part in parts]
        score, equal = found["accuracy"], found["agreement"]
        right = "random weights" if isinstance(score, str) else f"{score['score']:.0f} of {score['total']}"
        print(line([name, *times, f"{found['energy'][joules]:.3f}", right, f"{equal['equal']} of {equal['cases']}"]))


def answers(model: dict[str, Any]) -> list[str]:
    """A picture, a prompt and the further steps, column by column; last FP16 vision beside an int8 decoder."""
    rows = [row(model, part, form, key) for part, form, key in PARTS]
    for cells in rows:
        cells.append(cells[-2 if cells is rows[0] else -1])
    found = []
    for cells in zip(*rows, strict=True):
        (vision, _), (prompt, mark), (step, other) = cells
        if vision is None or prompt is None or step is None:
            found.append(MISSING)
        else:
            first = vision + prompt
            found.append(f"{first:.2f}{mark}, {first + (TOKENS - 1) * step:.1f}{mark or other}")
    return found


def read(paths: Iterable[str]) -> dict[str, Any]:
    """The models of the files, the later one's figures first; a file's mark goes to its decoders' engines."""
    models: dict[str, Any] = {}
    for path in paths:
        record = json.loads(Path(path).read_text())
        for name, model in record["models"].items():
            for form in model.get("engines", {}).get("decoder", {}).values():
                for engine in form.values():
                    engine["mark"] = record.get("mark", "")
            merge(models.setdefault(name, {}), model | {"device": record.get("device", "h100")})
    return models


def merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            merge(into[name], value)
        else:
            into[name] = value


def whole_towers(models: dict[str, Any]) -> dict[str, Any]:
    """By the model's own name: where its decoder was cut (`-8of24`) its vision encoder was not."""
    found: dict[str, Any] = {}
    for name in sorted(models, reverse=True):
        if name != CUT_TOWER:
            merge(found.setdefault(whole(name), {}), copy.deepcopy(models[name]))
    return found


def whole(name: str) -> str:
    """The model's own name."""
    return re.sub(r"-\d+of\d+$", "", name)


Cell = tuple[float | None, str]  # milliseconds and a mark


def row(model: dict[str, Any], part: str, form: str, key: str) -> list[Cell]:
    torch, forms = model.get("torch", {}), model.get("engines", {}).get(part, {})
    modes = [torch.get(mode, {}) for mode in (*(mode for _, mode in COLUMNS), "onnxruntime")]
    found: list[Cell] = [(mode.get(key) if isinstance(mode, dict) else None, "") for mode in modes]
    for engine, other in engines(forms, form):
        found.append((engine.get("ms"), f" ({other})" if other else engine.get("mark", "")))
    return found


def engines(forms: dict[str, Any], form: str) -> Iterator[tuple[dict[str, Any], str]]:
    """FP16 and int8 of that form, or of the form that is built, whose name then is the other of the pair."""
    for precision in ("fp16", "int8"):
        engine, other = forms.get(form, {}).get(f"tensorrt-{precision}", {}), ""
        if form == "single" and not engine:
            other = next((name for name in AS_BUILT if f"tensorrt-{precision}" in forms.get(name, {})), "")
            engine = forms[other][f"tensorrt-{precision}"] if other else {}
        yield engine, other


def cosines(model: dict[str, Any], part: str, form: str) -> str:
    """What engine_times.py found; of tiles that have to do with one another, or of other weights, there is none."""
    found = [engine.get("agreement") for engine, _ in engines(model.get("engines", {}).get(part, {}), form)]
    return ", ".join(MISSING if near is None else f"{near:.4f}" for near in found)


def shares(model: dict[str, Any], cells: list[Cell]) -> str:
    kv = model["kv"]
    cache = 2 * kv["layers"] * kv["kv_heads"] * kv["capacity"] * kv["head_dim"] * 2
    limits = [(model["parameters"]["decoder"] * size + cache) / bandwidth(model["device"]) * 1000 for size in (2, 1)]
    pairs = zip(limits, cells[-2:], strict=True)
    return ", ".join(MISSING if ms is None else f"{100 * limit / ms:.0f} %" for limit, (ms, _) in pairs)


def bandwidth(device: str) -> float:
    """Bytes a second, by the maker's data sheet."""
    return float(tomllib.loads((DEVICES / f"{device}.toml").read_text())["dram_gb_per_s"]) * 1e9


def shown(cell: Cell) -> str:
    ms, mark = cell
    return MISSING if ms is None else f"{ms:.2f}{mark}"


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(*sys.argv[1:])
