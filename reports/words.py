"""Numbers and findings as a person reads them: three digits that matter, a unit, whole sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..evaluation.matching import RECALL, ZERO_SHOT
from ..evaluation.tasks import TASKS
from .document import ABSENT, Agreement, Comparison, Report, Score, Speedup

RANDOM_WEIGHTS = "Random weights: the speeds are real, the answers mean nothing and no accuracy is given."
UNCLEAR = "no clear difference"
FAR = 2.0  # where turns lie further apart their median is nothing to lead with

_COMPONENTS = {
    "embed_tokens": "token embeddings",
    "decoder_prefill": "decoder, prefill",
    "decoder_step": "decoder, a step",
}
_MATCHING = {ZERO_SHOT: "Label of a picture (zero-shot)", RECALL: "Picture of a label (recall@1)"}


def component(name: str) -> str:
    return _COMPONENTS.get(name, name.replace("_", " "))


def task(name: str) -> str:
    return (TASKS | _MATCHING).get(name, name.replace("_", " "))


def number(value: float) -> str:
    """Three significant digits: 0.0123, 1.20, 517, 1,190, 2.5e+12."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.2e}"
    rounded = float(f"{value:.3g}") if abs(value) < 1000 else value
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def ratio(value: float) -> str:
    """How many times as fast: 0.98×, 3.48×, 15.2×, 140×."""
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}×"


def size(count: float) -> str:
    """Bytes in decimal units, as disks and memory bandwidths are given."""
    return _scaled(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "bytes")


def operations(count: float) -> str:
    """Arithmetic operations in thousands, millions, thousands of millions."""
    return _scaled(count, (("G", 1e9), ("M", 1e6), ("k", 1e3)), "")


def _scaled(count: float, units: Iterable[tuple[str, float]], rest: str) -> str:
    name, scale = next(((name, scale) for name, scale in units if abs(count) >= scale), (rest, 1.0))
    return f"{number(count / scale) if scale > 1 else f'{count:g}'} {name}".rstrip()


def score(entry: Score) -> str:
    """Value and 95 % interval in per cent: "94.2 (91.8–96.0)"."""
    return f"{100 * entry.value:.1f} ({interval(entry)})"


def interval(entry: Score) -> str:
    return f"{100 * entry.low:.1f}–{100 * entry.high:.1f}"


def subject(report: Report) -> str:
    """What was measured, in a sentence."""
    count, total = len(report.variants), sum(report.artifact.parameters.values())
    told = f"{count} variant{'s' * (count > 1)} of {report.artifact.name}"
    told += f" ({number(total / 1e6)} million parameters)" if total else ""
    processor = "gpu" if isinstance(report.device.get("sm"), int) else "cpu"
    machine = [str(report.machine.get(key, ABSENT)) for key in (processor, "date")]
    known = [text for text in machine if not text.startswith("unavailable")]
    return ", ".join([told, *(["measured on " + ", ".join(known)] if known else [])]) + "."


def lead(report: Report) -> str:
    """The outcome in a sentence or two: what is kept, how much faster it is, and whether its answers suffer."""
    kept = report.kept
    if kept is None:
        return f"{len(report.variants)} measured; none of them is what `vlmc build` kept."
    told_of = [(faster(entry, "end_to_end"), entry.over) for entry in report.speedups_of(kept)]
    quicker = [f"{said} {'to' if said == UNCLEAR else 'as'} {over}" for said, over in told_of if said]
    told = f"{kept.name} is kept" + (f": {', '.join(quicker[:3])}." if quicker else ".")
    compared = [c for c in report.comparisons if c.of == kept.name and not report.artifact.random_weights]
    worse = [result.over for result in compared if result.significant and result.lost > result.won]
    if worse:
        return f"{told} Its answers are significantly worse than those of {' and '.join(worse)}."
    if not compared:
        return told
    return f"{told} On {min(c.total for c in compared)} questions its answers are not significantly worse."


def faster(entry: Speedup, part: str) -> str:
    """How much faster that part is: "3.48× as fast", at least, where turns lie far apart; where they disagree on who is
    faster, that is said; "" where it is not known."""
    value, found = getattr(entry, part), entry.ranges.get(part)
    if found is not None and found.low < 1 < found.high:
        return UNCLEAR
    if found is not None and 1 <= found.low < found.high / FAR:
        return f"at least {ratio(found.low)} as fast"
    return "" if isinstance(value, str) else f"{ratio(value)} as fast"


def comparison(result: Comparison) -> str:
    if result.won == result.lost == 0:
        return f"{result.of} and {result.over} score alike on each of {result.total} questions."
    judged = "a significant difference" if result.significant else "no significant difference"
    chance = f"p = {result.p_value:.2g}" if result.p_value >= 0.001 else "p < 0.001"
    return (
        f"Against {result.over}, {result.of} lost {result.lost} and won {result.won} of {result.total} questions: "
        f"{judged} (exact test, the questions about a picture taken together, {chance})."
    )


def agreement(result: Agreement) -> str:
    """How many golden cases are met, and the earliest token that differs: "15 of 16 (token 6)"."""
    text = f"{result.equal} of {result.cases}"
    positions = [position for position in result.first_divergence if position is not None]
    return f"{text} (token {min(positions)})" if positions else text


def findings(report: Report) -> list[str]:
    """The verdict in words, what holds for every number first."""
    said = [RANDOM_WEIGHTS] if report.artifact.random_weights else []
    return [*said, *report.verdict.sentences, *map(comparison, report.comparisons)]
