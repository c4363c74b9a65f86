"""What the numbers mean, in sentences that hold only what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from . import power

NOISY = 0.1  # a standard deviation above this share of the mean is worth a sentence
BUSY = 0.1  # so is waiting for a processor for more than this share of the time
PASSED = "No engine passes its limit: above 100 % it was measured too low, as while the machine was busier"

Group = Mapping[str, Any]


def kept_name(variants: Sequence[Group], choices: Group) -> str:
    """The variant that runs what `vlmc build` kept; where none does, the last engine, else the first variant."""
    engines = [variant["name"] for variant in variants if variant["kind"] == "engine"]
    same = [variant["name"] for variant in variants if _runs_the_choices(variant, choices)]
    name: str = (same or engines[-1:] or [variants[0]["name"]])[0]
    return name


def _runs_the_choices(variant: Group, choices: Group) -> bool:
    chosen = {component: choice["engine"] for component, choice in choices.items()}
    return bool(chosen) and variant["engines"] == chosen


def sentences(report: Group, choices: Group) -> list[str]:
    """On the kept variant: speed, its parts, accuracy, memory, energy, distance to the machine's limits, budgets. Then
    what makes the numbers less certain than they look, and what was not measured."""
    variants = report["variants"]
    kept = next(variant for variant in variants if variant["name"] == kept_name(variants, choices))
    others = [variant for variant in variants if variant is not kept]
    speedups = [entry for entry in report["speedups"] if entry["of"] == kept["name"]]
    return [
        _speed(kept, speedups),
        *parts(speedups, variants, ("vision", "prefill", "decode")),
        *beaten(kept, report, choices),
        *_level(kept, report, choices),
        *accuracy(kept, others),
        memory(kept, others),
        _energy(kept, report["power"]),
        *limits(kept),
        *_budgets(kept, report),
        *doubts(report),
        *(f"{name} was not measured: {reason.rstrip('.')}." for name, reason in report["not_measured"].items()),
    ]


def _speed(kept: Group, speedups: Sequence[Group]) -> str:
    latency, tokens = kept["latency_ms"], round(kept["tokens"]["median"])
    said = (
        f"{kept['name']} takes {figure(latency['end_to_end']['median'])} ms from the picture to {tokens} tokens, "
        f"{figure(latency['time_to_first_token']['median'])} ms of them to the first, "
        f"then {figure(kept['tokens_per_s']['median'])} tokens/s"
    )
    if not speedups:
        return said + "."
    return said + ": " + ", ".join(ratio(entry) for entry in speedups) + "."


def ratio(entry: Group) -> str:
    """A ratio and how far it moved between turns; where turns disagree on who is faster, that is what they show."""
    if not _several(entry):
        return f"{entry['end_to_end']:.2f} times as fast as {entry['over']}"
    if not _clear(entry, "end_to_end"):
        return f"no clear difference to {entry['over']} ({_range(entry, ' times')})"
    return f"{entry['end_to_end']:.2f} times as fast as {entry['over']} ({_range(entry)})"


def _several(entry: Group) -> bool:
    """Whether there are turns that could disagree."""
    several: bool = entry["turns"] > 1
    return several


def _clear(entry: Group, part: str) -> bool:
    return not _several(entry) or not entry["ranges"][part]["low"] < 1 < entry["ranges"][part]["high"]


def _range(entry: Group, unit: str = "") -> str:
    ends = entry["ranges"]["end_to_end"]
    return f"{ends['low']:.2f} to {ends['high']:.2f}{unit} over {entry['turns']} turns"


def parts(speedups: Sequence[Group], variants: Sequence[Group], names: Sequence[str]) -> Iterator[str]:
    """Where the float engine loses and where it wins; a part that got slower is said plainly, but not where turns
    disagree."""
    engines = {variant["name"] for variant in variants if variant["kind"] == "engine"}
    for entry in speedups:
        if entry["over"] in engines:
            told = ", ".join(f"{name} {entry[name]:.2f}" for name in names)
            slower = [name for name in names if _clear(entry, name) and entry[name] < 0.98]
            but = f"; its {' and '.join(slower)} got slower" if slower else ""
            yield f"Part by part against {entry['over']}, times as fast: {told}{but}."


def beaten(kept: Group, report: Group, choices: Group) -> Iterator[str]:
    """The engines that were faster than what was kept, in each of several turns; none where that was not measured."""
    for entry in report["speedups"] if _runs_the_choices(kept, choices) else ():
        if entry["over"] == kept["name"] and _several(entry) and entry["ranges"]["end_to_end"]["low"] > 1:
            times = f"{entry['end_to_end']:.2f} times ({_range(entry)})"
            yield (
                f"{entry['of']} was faster here than what was kept, {times}: `vlmc build` had found otherwise in its "
                f"own trials, or had left it out for computing something else, as its table says. To have it choose "
                f"anew, remove engines/{report['device']['name']} from the artefact and build on a quiet machine."
            )


def _level(kept: Group, report: Group, choices: Group) -> Iterator[str]:
    """The engines that turns do not tell from what was kept, but those that its own ratios name."""
    named = {entry["over"] for entry in report["speedups"] if entry["of"] == kept["name"]}
    for entry in report["speedups"] if _runs_the_choices(kept, choices) else ():
        if entry["over"] == kept["name"] and entry["of"] not in named and not _clear(entry, "end_to_end"):
            yield f"{entry['of']} was as fast as {kept['name']}, as far as turns tell ({_range(entry, ' times')})."


def accuracy(kept: Group, others: Sequence[Group]) -> Iterator[str]:
    found = kept["accuracy"]
    if isinstance(found, str):
        yield f"Accuracy: {found}."
        return
    yield (
        f"It scores {_score(found)} on {found['overall']['total']} questions"
        + "".join(
            f", {other['name']} {_score(other['accuracy'])}"
            for other in others
            if not isinstance(other["accuracy"], str)
        )
        + " (95 % intervals; questions about one picture count as one where they go right or wrong together)."
    )


def _score(accuracy: Group) -> str:
    entry = accuracy["overall"]
    return f"{100 * entry['value']:.1f} % ({100 * entry['low']:.1f}–{100 * entry['high']:.1f})"


def memory(kept: Group, others: Sequence[Group]) -> str:
    key, _, what = scarce(variant["memory"] for variant in (kept, *others))
    told = ", ".join(
        f"{other['name']} {_megabytes(other['memory'][key])}"
        for other in others
        if not isinstance(other["memory"][key], str)
    )
    peak = kept["memory"][key]
    said = f"Peak {what}: {peak if isinstance(peak, str) else _megabytes(peak)}"
    return said + (f" ({told})" if told else "") + "."


def scarce(memories: Iterable[Group | str]) -> tuple[str, str, str]:
    """The memory that runs out first, the accelerator's where every variant used one of its own: its key, and its name
    in a table and in a sentence. `memories`: of every variant, the sizes or the reason why there are none."""
    for memory in memories:
        if isinstance(memory, str) or isinstance(memory.get("peak_device_bytes", ""), str):
            return "peak_rss_bytes", "memory", "resident memory"
    return "peak_device_bytes", "GPU memory", "memory of the GPU"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def _energy(kept: Group, source: Group) -> str:
    energy = kept["energy"]
    if isinstance(energy["joules_per_image"], str):
        return f"Energy: {energy['joules_per_image']}."
    idle = source["idle_watts"]
    above = f"{joules(energy['joules_per_image_above_idle'])} and {joules(energy['joules_per_token_above_idle'])}"
    told = idle if isinstance(idle, str) else f"{above} without {idle:.3g} W of idle power"
    return (
        f"A picture to its first token costs {joules(energy['joules_per_image'])} and each further token "
        f"{joules(energy['joules_per_token'])}, at {energy['watts']:.3g} W ({told}; {metered(source)})."
    )


def joules(amount: float | str) -> str:
    """With its unit, or why there are none."""
    return amount.removeprefix("unavailable: ") if isinstance(amount, str) else f"{amount:.3g} J"


def metered(source: Group) -> str:
    """The meter, and what it counts."""
    name: str = source["source"]
    return f"{name} counts only {what}" if (what := power.counts(name)) else name


def limits(kept: Group) -> Iterator[str]:
    if isinstance(kept["roofline"], str):
        return
    names = {"vision_encoder": "vision", "decoder_prefill": "prefill", "decoder_step": "a decode step"}
    told = []
    for phase, line in kept["roofline"].items():
        what = "cache bandwidth" if line["in_cache"] else "memory bandwidth"
        of = "arithmetic" if line["bound"] == "compute" else what
        told.append(f"{names.get(phase, phase)} {share(line['share'])} of its limit ({of})")
    doubt = f" {PASSED}." if any(line["share"] > 1 for line in kept["roofline"].values()) else ""
    yield f"Distance to this machine's limits: {', '.join(told)}.{doubt}"


def _budgets(kept: Group, report: Group) -> Iterator[str]:
    key, _, memory = scarce(variant["memory"] for variant in report["variants"])
    for budget, value, scale, unit, what in (
        ("latency_budget_ms", kept["latency_ms"]["time_to_first_token"]["median"], 1, "ms", "The first token"),
        ("memory_budget_gb", kept["memory"][key], 1e9, "GB", f"Peak {memory}"),
    ):
        allowed = report["device"].get(budget)
        if isinstance(allowed, int | float) and not isinstance(value, str):
            kind = "within" if value / scale <= allowed else "over"
            yield f"{what} is {kind} the device's budget: {value / scale:.3g} of {allowed:g} {unit}."


def doubts(report: Group) -> Iterator[str]:
    machine = report["machine"]
    waited = [v["waited_share"] for v in report["variants"] if not isinstance(v["waited_share"], str)]
    if waited and max(waited) > BUSY:
        yield (
            f"{_crowd(machine)}: the variants waited for a processor {100 * min(waited):.0f} to "
            f"{100 * max(waited):.0f} % of the time. Every time is longer than with a processor for each thread, and "
            "ratios are no surer than their range over the turns."
        )
    noisy = []
    for variant in report["variants"]:
        times = variant["latency_ms"]["end_to_end"]
        if times["std"] > NOISY * times["mean"]:
            noisy.append(f"{variant['name']} by {100 * times['std'] / times['mean']:.0f} %")
    if noisy:
        yield f"The runs vary (standard deviation): {', '.join(noisy)}; more --runs narrow it."
    before, after = machine.get("throttled"), machine.get("after", {}).get("throttled")
    told = not any(str(state).startswith("unavailable") for state in (before, after))
    if after is not None and told and (before != after or _held_back(after)):
        yield f"The machine throttled while it measured, or was short of power (before: {before}; after: {after})."


def _held_back(state: str) -> bool:
    """Whether a Raspberry Pi is, now: bits 0 to 3 of `vcgencmd get_throttled`; 16 to 19 are since its start."""
    found = re.fullmatch("throttled=0x([0-9a-f]{1,8})", state)
    return found is not None and bool(int(found[1], 16) & 0xF)


def _crowd(machine: Group) -> str:
    """For what reason threads waited for a processor, as far as that is known."""
    threads, cores = machine.get("threads", 0), machine.get("cores", 0)
    if threads > cores:
        return f"{threads} threads shared {cores} processors"
    return "Other programs were running, or a container's share of the processors was used up"


def share(value: float) -> str:
    """Per cent of a limit: 0.3 %, 2.6 %, 42 %."""
    return f"{100 * value:.{0 if value >= 0.1 else 1}f} %"


def figure(value: float) -> str:
    """Three significant digits, and no exponent where there are more before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
