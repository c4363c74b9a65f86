"""From raw samples to the report: `samples/run.json` and `samples/*.jsonl` in, the contents of report.json out.

Nothing but these files is read, so that the report can be made again anywhere. A number that was not measured is
"unavailable: reason".
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import VlmcError, mended_by, reason
from ..evaluation import accuracy, agreement, tasks
from ..evaluation import matching as score_matches
from ..files import inside, read_json
from ..records import SCHEMA
from . import matching, roofline, samples, statistics, verdict
from .harness import slug
from .samples import Row

# The parts of a run, each with the milliseconds that one run gives for it.
PARTS: dict[str, Callable[[Row], list[float]]] = {
    "preprocess": lambda row: [row["preprocess_s"] * 1e3],
    "vision": lambda row: [row["vision_s"] * 1e3],
    "text": lambda row: [row["text_s"] * 1e3],
    "prefill": lambda row: [row["prefill_s"] * 1e3],
    "time_to_first_token": lambda row: [(row["preprocess_s"] + row["vision_s"] + row["prefill_s"]) * 1e3],
    "decode_per_token": lambda row: [seconds * 1e3 for seconds in row["decode_s"]],
    "end_to_end": lambda row: [row["wall_s"] * 1e3],
}
GENERATING = ("preprocess", "vision", "prefill", "time_to_first_token", "decode_per_token", "end_to_end")
MATCHING = ("preprocess", "vision", "text", "end_to_end")
COMPARED = {"vision": "vision", "prefill": "prefill", "decode": "decode_per_token", "end_to_end": "end_to_end"}
COMPARED_MATCHING = {"vision": "vision", "text": "text", "end_to_end": "end_to_end"}


def summarize(folder: Path) -> dict[str, Any]:
    """report.json of the finished measurement in `profile/DEVICE`; a VlmcError where there is none, or where what is
    there is not what this version writes."""
    at = folder / "samples"
    if not (at / "run.json").is_file():
        started = (folder / "unfinished").is_dir()
        raise VlmcError(
            f"{folder} holds no finished measurement",
            found="one that was interrupted" if started else "no samples",
            fix="run the same `vlmc profile` again, it goes on where it stopped" if started else "run `vlmc profile`",
        )
    try:
        with mended_by(_AGAIN):
            report = _report(at, read_json(at / "run.json"))
        json.dumps(report, allow_nan=False)  # Python reads NaN and infinity, which are no JSON
        return report
    except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        found = f"{type(error).__name__} {reason(error)}"
        raise VlmcError(f"{at} is damaged or of another version", found=found, fix=_AGAIN) from None


_AGAIN = "measure again with `vlmc profile`"


def _report(at: Path, run: dict[str, Any]) -> dict[str, Any]:
    if run["schema"] != SCHEMA:
        raise VlmcError(f"{at} has another schema", found=str(run["schema"]), expected=str(SCHEMA), fix=_AGAIN)
    rows = {info["name"]: samples.read(at / f"{slug(info['name'])}.jsonl") for info in run["variants"]}
    measured = [info for info in run["variants"] if samples.of_kind(rows[info["name"]], "run")]
    if not measured:
        reasons = "; ".join(f"{name}: {why}" for name, why in run["failures"].items())
        raise VlmcError("No variant could be measured", found=reasons or "no runs", fix="see `vlmc doctor`")
    report = {
        "schema": SCHEMA,
        "artifact": run["artifact"],
        "device": run["device"],
        "machine": run["machine"],
        "limits": run["limits"],
        "power": run["power"],
        "settings": run["settings"],
        "variants": [_variant(info, rows[info["name"]], run, at) for info in measured],
        "not_measured": run["skipped"] | run["failures"],
        "speedups": _speedups(measured, rows, run),
        "comparisons": _comparisons(measured, rows, run),
    }
    sentences = matching.sentences if _matches(run) else verdict.sentences
    return report | {"verdict": {"sentences": sentences(report, run["choices"]), "choices": run["choices"]}}


def _matches(run: dict[str, Any]) -> bool:
    """Whether the model matches pictures with texts and generates nothing."""
    return bool(run["artifact"].get("matching"))


def _variant(info: dict[str, Any], rows: list[Row], run: dict[str, Any], at: Path) -> dict[str, Any]:
    runs, matches = samples.of_kind(rows, "run"), _matches(run)
    parts = MATCHING if matches else GENERATING
    latency = {part: statistics.summarize([ms for row in runs for ms in PARTS[part](row)]) for part in parts}
    latency["load"] = statistics.summarize([row["load_s"] * 1e3 for row in samples.of_kind(rows, "open")])
    agreed = [(row["tokens"], row["golden"]) for row in samples.of_kind(rows, "agreement")]
    return {
        "name": info["name"],
        "kind": info["kind"],
        "recipe": info["recipe"],
        "engines": info["engines"],
        "latency_ms": latency,
        "waited_share": _waited(runs, run["machine"]),
        **_rate(runs, matches),
        "tokens": "unavailable: a model that matches writes nothing" if matches else _made(runs),
        "memory": _memory(info, rows),
        "energy": _energy(rows, run["power"], matches),
        "roofline": roofline.table(info["work"], info["engines"], run["limits"], latency)
        or "unavailable: the build did not count this variant's operations and bytes",
        "products": info["products"],
        "component_bytes": info["component_bytes"],
        "answer_tokens": _answer_tokens(rows) if not matches else "unavailable: a model that matches writes nothing",
        "accuracy": _accuracy(info, rows, run),
        "agreement": agreement.summarize(agreed) if agreed else "unavailable: the golden cases were not run",
        "answers": _answers(rows, run, at),
    }


def _waited(runs: list[Row], machine: dict[str, Any]) -> float | str:
    """The share of its processors' time that the variant had to leave to other programs."""
    counted = [row for row in runs if row["waited_s"] is not None]
    if not counted:
        return "unavailable: the kernel does not count it"
    whole = sum(row["wall_s"] for row in counted) * min(machine["threads"], machine["cores"])
    return float(min(1.0, max(0.0, sum(row["waited_s"] for row in counted) / whole)))


def _memory(info: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    def highest(key: str, why: str) -> int | str:
        values = [row[key] for row in rows if row.get(key) is not None]
        numbers = [value for value in values if isinstance(value, int)]
        return max(numbers) if numbers else next(iter(values), f"unavailable: {why}")

    return {
        "peak_rss_bytes": highest("peak_rss_bytes", "the kernel tells no VmHWM"),
        "peak_device_bytes": highest("device_bytes", "no accelerator with a memory of its own"),
        "available_drop_bytes": highest("available_drop_bytes", "the kernel tells no MemAvailable"),
        "disk_bytes": info["disk_bytes"],
        "build_peak_bytes": info["build_peak_bytes"],
    }


def _rate(runs: list[Row], matches: bool) -> dict[str, Any]:
    """How many tokens follow the first in a second, or how many pictures are matched with a text each."""
    if matches:
        return {"pairs_per_s": statistics.summarize([1 / row["wall_s"] for row in runs])}
    return {"tokens_per_s": statistics.summarize([len(row["decode_s"]) / sum(row["decode_s"]) for row in runs])}


def _energy(rows: list[Row], power: dict[str, Any], matches: bool) -> dict[str, Any]:
    """joules_per_image: from the picture to the first token; joules_per_token: each further one; idle power included
    in both, and without it in those …_above_idle. A picture with n tokens costs joules_per_image + (n - 1)
    joules_per_token. Of a model that matches joules_per_pair, of a picture and a text. A difference that is not above
    zero is not energy but the meter's error."""
    spent = sorted(samples.of_kind(rows, "energy"), key=lambda row: float(row["tokens"]))
    costs = ("joules_per_pair",) if matches else ("joules_per_image", "joules_per_token")
    if len(spent) < len(costs) or min(row["joules"] for row in spent) <= 0:
        faults, source = samples.of_kind(rows, "power"), str(power["source"])
        silent = "the meter did not move" if spent else f"{source} gave no reading"
        why = (
            source if source.startswith("unavailable") else f"unavailable: {faults[0]['reason'] if faults else silent}"
        )
        above = [f"{name}_above_idle" for name in costs]
        return dict.fromkeys((*costs, *above, "watts", *(() if matches else ("tokens_per_s_per_watt",))), why)
    idle = power["idle_watts"]
    joules = dict(zip(costs, _costs(spent, 0.0), strict=True))
    if not isinstance(idle, str):
        joules |= dict(zip((f"{name}_above_idle" for name in costs), _costs(spent, idle), strict=True))
    if not matches:
        joules["tokens_per_s_per_watt"] = 1 / joules["joules_per_token"] if joules["joules_per_token"] else 0.0
    found: dict[str, Any] = {f"{name}_above_idle": idle for name in costs}
    found |= {name: cost if cost > 0 else "unavailable: less than the meter resolves" for name, cost in joules.items()}
    return found | {"watts": spent[-1]["joules"] / spent[-1]["seconds"]}


def _costs(spent: list[Row], watts: float) -> list[float]:
    """Joules of a run to its first token, and of each further token, less so many watts all the while."""
    each = [(row["joules"] - watts * row["seconds"]) / row["runs"] for row in spent]
    steps = [row["tokens"] - spent[0]["tokens"] for row in spent[1:]]
    return each[:1] + [(cost - each[0]) / count for cost, count in zip(each[1:], steps, strict=True)]


def _accuracy(info: dict[str, Any], rows: list[Row], run: dict[str, Any]) -> dict[str, Any] | str:
    answers = _answered(info, rows, run)
    if not answers:
        failure = run["failures"].get(info["name"])
        return f"unavailable: {failure}" if failure and run["settings"]["questions"] else str(run["no_accuracy"])
    if _matches(run):
        return score_matches.summarize(answers, run["labels"])
    return accuracy.summarize(_scored(info, rows, run))


def _answered(info: dict[str, Any], rows: list[Row], run: dict[str, Any]) -> list[Row]:
    """The answers to the evaluation set; none of a variant that failed before the last, for some are no accuracy."""
    return [] if info["name"] in run["failures"] else samples.of_kind(rows, "answer")


def _scored(info: dict[str, Any], rows: list[Row], run: dict[str, Any]) -> list[Row]:
    """The answers as evaluation wants them: image, task, prompt and score."""
    answers = _answered(info, rows, run)
    if _matches(run):
        return score_matches.zero_shot(answers)
    return [
        {
            "image": row["file"],
            "task": row["task"],
            "prompt": row["prompt"],
            "score": _score(row),
        }
        for row in answers
    ]


def _score(row: Row) -> float:
    return tasks.score(row["task"], row["answer"], row["gold"], row["facts"])


def _made(runs: list[Row]) -> dict[str, float | int]:
    """Tokens of a run: as many as were asked for, unless the KV cache was full before."""
    return statistics.summarize([row["tokens"] for row in runs])


def _answer_tokens(rows: list[Row]) -> dict[str, float | int] | str:
    """How long the answers to the evaluation set are: a model that talks more is slower, whatever its tokens/s."""
    counts = [row["tokens"] for row in samples.of_kind(rows, "answer")]
    return statistics.summarize(counts) if counts else "unavailable: no questions were asked"


def _answers(rows: list[Row], run: dict[str, Any], at: Path) -> list[dict[str, Any]]:
    """The answers to the few questions that the report shows, with their pictures."""
    by_row = {row["row"]: row for row in samples.of_kind(rows, "answer")}
    shown = []
    for example in run["examples"]:
        row, picture = by_row.get(example["row"]), inside(at, example["image"])
        if row is None:
            continue
        score = float(row["answer"] in row["facts"]) if _matches(run) else _score(row)
        data = base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else ""
        shown.append(
            {
                "image": f"samples/{example['image']}",
                "image_data": f"data:image/png;base64,{data}" if data else "",
                "task": row["task"],
                "prompt": row["prompt"],
                "gold": ", ".join(row["facts"]) if _matches(run) else row["gold"],
                "answer": row["answer"],
                "right": score == 1.0,
                "score": score,
            }
        )
    return shown


def _speedups(measured: list[dict[str, Any]], rows: dict[str, list[Row]], run: dict[str, Any]) -> list[dict[str, Any]]:
    """Every engine over every baseline, the float engines and what was kept: ratios of medians, part by part, and the
    lowest and highest of any turn."""
    compared, kept = COMPARED_MATCHING if _matches(run) else COMPARED, verdict.kept_name(measured, run["choices"])
    references = [i for i in measured if i["kind"] == "baseline" or i["recipe"] == "fp32" or i["name"] == kept]
    found = []
    for info in measured:
        for over in references:
            if info["kind"] == "engine" and over is not info:
                a, b = (samples.of_kind(rows[one["name"]], "run") for one in (info, over))
                ratios = {name: _median(b, part) / _median(a, part) for name, part in compared.items()}
                turns = sorted({row["turn"] for row in a} & {row["turn"] for row in b})
                by_turn = {
                    name: [_median(b, part, turn) / _median(a, part, turn) for turn in turns]
                    for name, part in compared.items()
                }
                ranges = {name: spread(by_turn[name], ratios[name]) for name in compared} if turns else {}
                entry = {"of": info["name"], "over": over["name"]} | ratios
                found.append(entry | {"ranges": ranges, "turns": len(turns)})
    return found


def spread(by_turn: list[float], whole: float) -> dict[str, float]:
    """The lowest and the highest ratio of any turn; where a busy machine puts that of all outside, it counts as one."""
    return {"low": min(*by_turn, whole), "high": max(*by_turn, whole)}


def _median(runs: list[Row], part: str, turn: int | None = None) -> float:
    values = [ms for row in runs if turn in (None, row["turn"]) for ms in PARTS[part](row)]
    return float(statistics.summarize(values)["median"])


def _comparisons(
    measured: list[dict[str, Any]], rows: dict[str, list[Row]], run: dict[str, Any]
) -> list[dict[str, Any]]:
    """Whether the kept engines really answer otherwise than each float variant, on the same questions."""
    kept = verdict.kept_name(measured, run["choices"])
    answers = {info["name"]: _scored(info, rows[info["name"]], run) for info in measured}
    return [
        {"of": kept, "over": info["name"]} | accuracy.paired(answers[kept], answers[info["name"]])
        for info in measured
        if info["name"] != kept and info["recipe"] == "fp32" and answers[kept] and answers[info["name"]]
    ]
