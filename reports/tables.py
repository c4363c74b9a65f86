"""What the tables say, once for the terminal, Markdown and the page.

A cell whose number could not be had reads "n/a [1]", and note 1 under the table gives the reason in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..artifact import ASKED, ASKED_MEANS
from ..profiles import verdict
from . import words
from .document import ABSENT, Number, Report, Roofline, Score, Statistics, Variant, look

STATISTICS = ("mean", "std", "min", "max", "median", "p90", "p99", "count")
_TRIED = {  # keys of a candidate
    "run": "ms",
    "prefill": "prefill ms",
    "decode": "ms a token",
    "judged_by": "judged by, ms",
    "agreement": "cosine with PyTorch",
}
_UNTRIED = "unavailable: not tried on this machine, as said above"


@dataclass
class Table:
    """`rows` hold one text per column, the first `names` of them naming the row; `kept` are the rows of what the
    verdict kept."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)
    names: int = 1

    def cell(self, value: Number | None, text: Callable[[float], str] = words.number) -> str:
        """The number as text, or a mark that leads to the note with the reason why there is none."""
        if isinstance(value, (int, float)):
            return text(value)
        return f"n/a {self.mark(value or ABSENT)}"

    def mark(self, note: str) -> str:
        """What leads to the note, which stands below the table once."""
        if note not in self.notes:
            self.notes.append(note)
        return f"[{self.notes.index(note) + 1}]"

    def add(self, row: list[str], *, kept: bool = False) -> None:
        if kept:
            self.kept.add(len(self.rows))
        self.rows.append(row)


def statistics(variant: Variant, time: str) -> Statistics | str:
    return look(variant.latency_ms, time)


def median(entry: Statistics | str) -> Number:
    return entry if isinstance(entry, str) else entry.median


def headline(report: Report) -> Table:
    """A row per variant: the numbers to choose by."""
    terms = report.terms
    energy, joules = next(iter(terms.energies.items()))
    columns = ["variant", "vision ms", f"{terms.first[1]} ms", terms.rate[1]]
    key, memory, place = report.scarce
    columns += [memory, joules, "accuracy %", "speed-up"]
    cost = "joules of a picture with a text" if report.artifact.matching else "joules to the first token"
    title = f"Medians; peak {place}; {cost}; accuracy with its 95 % interval; speed-up end to end"
    table = Table(f"{title} over {report.reference.name}", columns)
    for variant in report.variants:
        table.add(
            [
                variant.name,
                table.cell(median(statistics(variant, "vision"))),
                table.cell(median(statistics(variant, terms.first[0]))),
                table.cell(median(report.rate(variant))),
                table.cell(look(variant.memory, key), words.size),
                table.cell(look(variant.energy, energy)),
                _score(a if isinstance(a := variant.accuracy, str) else a.overall, table),
                "1"
                if variant is report.reference
                else table.cell(_times_as_fast(variant, report.reference), words.ratio),
            ],
            kept=variant is report.kept,
        )
    return table


def _times_as_fast(variant: Variant, reference: Variant) -> Number:
    """The ratio of the medians end to end."""
    mine, other = median(statistics(variant, "end_to_end")), median(statistics(reference, "end_to_end"))
    if isinstance(mine, str) or isinstance(other, str):
        return mine if isinstance(mine, str) else other
    return other / mine if mine > 0 else "unavailable: the clock was too coarse"


def speedups(report: Report) -> Table:
    parts = report.terms.parts
    table = Table("How many times as fast", ["variant", "over", *parts.values()], names=2)
    for entry in report.speedups:
        values = [getattr(entry, part) for part in parts]
        row = [entry.of, entry.over, *(table.cell(value, words.ratio) for value in values)]
        table.add(row, kept=report.kept is not None and entry.of == report.kept.name)
    return table


def accuracy(report: Report) -> Table:
    """Share of right answers in per cent (captions: of facts) by task, and how many golden answers are met."""
    found = {v.name: v.accuracy if isinstance(v.accuracy, str) else v.accuracy.tasks for v in report.variants}
    names = list(dict.fromkeys(name for tasks in found.values() if not isinstance(tasks, str) for name in tasks))
    met = "golden choices met" if report.artifact.matching else "golden answers met (first difference)"
    columns = ["variant", *map(words.task, names), *([] if report.artifact.matching else ["all questions"]), met]
    table = Table("Right answers in %, with 95 % interval", columns)
    for variant in report.variants:
        overall, agreed = variant.accuracy, variant.agreement
        row = [_score(look(found[variant.name], name), table) for name in names]
        if report.artifact.matching:
            met = table.cell(agreed) if isinstance(agreed, str) else f"{agreed.equal} of {agreed.cases}"
        else:
            row.append(_score(overall if isinstance(overall, str) else overall.overall, table))
            met = table.cell(agreed) if isinstance(agreed, str) else words.agreement(agreed)
        row.append(met)
        table.add([variant.name, *row], kept=variant is report.kept)
    return table


def _score(entry: Score | str, table: Table) -> str:
    return table.cell(entry) if isinstance(entry, str) else words.score(entry)


def times(report: Report) -> Table:
    """Every statistic of every time, and of the rate."""
    rate = report.terms.rate[1]
    table = Table(f"All times in milliseconds, rates in {rate}", ["variant", "part", *STATISTICS], names=2)
    for variant in report.variants:
        measured = {title: statistics(variant, time) for time, title in report.terms.times.items()}
        for title, entry in (measured | {rate: report.rate(variant)}).items():
            cells = [table.cell(entry if isinstance(entry, str) else getattr(entry, name)) for name in STATISTICS[:-1]]
            count = table.cell(entry if isinstance(entry, str) else entry.count, str)
            table.add([variant.name, title, *cells, count], kept=variant is report.kept)
    return table


def footprint(report: Report) -> Table:
    """Memory, disk, energy, and in what precision the matrix products really run."""
    sizes = ("peak_rss_bytes", "peak_device_bytes", "disk_bytes", "build_peak_bytes")
    energies = report.terms.energies
    columns = ["variant", "peak resident", "peak on device", "on disk", "while building", *energies.values()]
    table = Table(
        "Memory and size, energy, and the precision that matrix products really run in", [*columns, "matrix products"]
    )
    for variant in report.variants:
        row = [variant.name]
        row += [table.cell(look(variant.memory, key), words.size) for key in sizes]
        row += [table.cell(look(variant.energy, key)) for key in energies]
        table.add([*row, _products(variant, table)], kept=variant is report.kept)
    return table


def _products(variant: Variant, table: Table) -> str:
    if isinstance(variant.products, str):
        return table.cell(variant.products)
    texts = []
    for name, counts in variant.products.items():
        told = table.cell(counts) if isinstance(counts, str) else _counts(counts, table)
        texts.append(f"{words.component(name)}: {told}")
    return "; ".join(texts)


def _counts(counts: Mapping[str, int], table: Table) -> str:
    texts = []
    for kind, count in counts.items():
        asked = f" {table.mark(ASKED_MEANS)}" if kind.endswith(ASKED) else ""
        texts.append(f"{count} {kind.removesuffix(ASKED)}{asked}")
    return ", ".join(texts) or "none"


def rooflines(report: Report) -> Table:
    """Measured time against the least that the machine's bandwidth and arithmetic allow."""
    columns = ["variant", "component", "measured ms", "limit ms", "share of limit", "bound by", "operations", "bytes"]
    title = "Medians against the least time that the machine's bandwidth and arithmetic allow"
    table = Table(title + (f". {verdict.PASSED}" if passes(report) else ""), columns, names=2)
    for variant in report.variants:
        kept = variant is report.kept
        if isinstance(variant.roofline, str):
            table.add([variant.name, "all", table.cell(variant.roofline), *[""] * 5], kept=kept)
            continue
        for name, entry in variant.roofline.items():
            table.add([variant.name, words.component(name), *_roofline(entry, table)], kept=kept)
    return table


def passes(report: Report) -> bool:
    """Whether something is said to have been faster than the machine's limit."""
    lines = [entry for v in report.variants if not isinstance(v.roofline, str) for entry in v.roofline.values()]
    return any(not isinstance(line, str) and not isinstance(line.share, str) and line.share > 1 for line in lines)


def _roofline(entry: Roofline | str, table: Table) -> list[str]:
    if isinstance(entry, str):
        return [table.cell(entry), *[""] * 5]
    return [
        table.cell(entry.measured_ms),
        table.cell(entry.limit_ms),
        table.cell(entry.share, words.percent),
        "arithmetic" if entry.bound == "compute" else "cache bandwidth" if entry.in_cache else "memory bandwidth",
        table.cell(entry.flops, words.operations),
        table.cell(entry.bytes, words.size),
    ]


def candidates(report: Report, component: str) -> Table:
    """What was tried for a component, and which of it was kept; no rows where there was no choice."""
    choice = report.verdict.choices[component]
    shown = [entry for entry in choice.candidates.values() if not isinstance(entry, str)]
    keys = list(dict.fromkeys(key for entry in shown for key in entry)) or ["run"]
    table = Table("", ["engine", *(_TRIED.get(key, key.replace("_", " ")) for key in keys)])
    for name, entry in choice.candidates.items():
        cells = (
            table.cell(look(entry or _UNTRIED, key), "{:.5f}".format if key == "agreement" else words.number)
            for key in keys
        )
        table.add([name, *cells], kept=name == choice.engine)
    return table
