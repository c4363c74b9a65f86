"""The plots: each answers one question, and says why where it cannot.

Bars carry their values, which are medians as in the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..profiles import verdict
from . import tables, words
from .canvas import WIDTH, Canvas, settings, short, tagged, to_svg
from .document import Number, Report, Score, Statistics, Variant, look
from .style import LIGHT, variant_colours
from .tables import median, statistics

# parts of an answer, in the order of time, with the colours of their bars and of the text in them
PARTS = {
    "preprocess": ("preprocessing", "part1", "dark_text"),
    "vision": ("vision", "part2", "dark_text"),
    "text": ("text", "part3", "light_text"),
    "prefill": ("prefill", "part3", "light_text"),
    "decode": ("decoding", "part4", "light_text"),
}


@dataclass
class Plot:
    """`question` is what it answers, `caption` how to read it, `told` the same in words for who cannot see it;
    `svg` is empty where nothing could be drawn; `reasons` say what is missing in it."""

    name: str
    question: str
    caption: str
    svg: str = ""
    told: list[str] = field(default_factory=list)
    reasons: dict[str, list[str]] = field(default_factory=dict)  # each with what it holds for

    def number(self, who: str, value: Number) -> float | None:
        """The number, or None and its reason noted."""
        if isinstance(value, str):
            holds_for = self.reasons.setdefault(value, [])
            if who not in holds_for:
                holds_for.append(who)
            return None
        return value


def draw(report: Report) -> list[Plot]:
    """All plots of the report, in the order in which the page shows them."""
    with settings():
        return [plot(report) for plot in (latency, rate, memory, energy, accuracy, limits)]


def latency(report: Report) -> Plot:
    question, caption = "Where does the time of an answer go?", "Milliseconds from picture to end of text, medians."
    if report.artifact.matching:
        question, caption = "Where does the time go?", "Milliseconds to match a picture with a text, medians."
    plot = Plot("latency", question, caption)
    rows = {}
    for variant in report.variants:
        parts = _parts(report, variant, plot)
        rows[variant.name] = parts
        if parts:
            told = ", ".join(f"{PARTS[part][0]} {words.number(ms)}" for part, ms in parts.items())
            plot.told.append(f"{variant.name}: {words.number(sum(parts.values()))} ms ({told})")
    longest = max((sum(parts.values()) for parts in rows.values()), default=0)
    if not longest:
        return plot
    shown = filter(None, (*report.terms.bars, report.terms.rest))
    canvas = Canvas(report, len(rows), legend=[PARTS[part][:2] for part in shown])
    for name, parts in rows.items():
        canvas.row(name)
        left = 0.0
        for part, ms in parts.items():
            _, colour, text = PARTS[part]
            canvas.bar(left, ms / longest, colour)
            canvas.inside(left, ms / longest, words.number(ms), text)
            left += ms / longest
        more = f" = {' + '.join(map(words.number, parts.values()))}"
        canvas.value(left, f"{words.number(sum(parts.values()))} ms" if parts else "n/a", more if parts else "")
    plot.svg = canvas.svg(plot.name)
    return plot


def _parts(report: Report, variant: Variant, plot: Plot) -> dict[str, float]:
    """Milliseconds per part; the rest is what the end-to-end median leaves. Empty where a part is missing."""
    entries = {part: median(statistics(variant, part)) for part in (*report.terms.bars, "end_to_end")}
    found = {part: plot.number(variant.name, entry) for part, entry in entries.items()}
    known = {part: ms for part, ms in found.items() if ms is not None}
    if len(known) < len(found):
        return {}
    total, rest = known.pop("end_to_end"), report.terms.rest
    return known | ({rest: max(0.0, total - sum(known.values()))} if rest else {})


def rate(report: Report) -> Plot:
    caption = "Tokens per second while decoding: the median (slowest–fastest run)."
    plot = Plot("rate", "How fast does the text come?", caption)
    if report.artifact.matching:
        caption = "Pictures matched with a text each, in a second: the median (slowest–fastest run)."
        plot = Plot("rate", "How many pairs in a second?", caption)
    spans = {v.name: report.rate(v) for v in report.variants}
    found = {name: median(entry) for name, entry in spans.items()}
    _bars(report, plot, found, words.number, {n: (e.min, e.max) for n, e in spans.items() if isinstance(e, Statistics)})
    return plot


def memory(report: Report) -> Plot:
    plot = Plot("memory", "How much memory does it take?", "Peak memory of the process; size on disk.")
    kinds = {"resident": "peak_rss_bytes", "on device": "peak_device_bytes", "on disk": "disk_bytes"}
    found: dict[str, dict[str, float | None]] = {}
    for variant in report.variants:
        values = {kind: look(variant.memory, key) for kind, key in kinds.items()}
        told = {kind: f"{kind}: {value}" if isinstance(value, str) else value for kind, value in values.items()}
        found[variant.name] = {kind: plot.number(variant.name, value) for kind, value in told.items()}
    sizes = [size for row in found.values() for size in row.values() if size]
    if not sizes:
        return plot
    shown = [kind for kind in kinds if any(row[kind] is not None for row in found.values())]
    canvas = Canvas(report, len(found), bars=len(shown), values=110)
    for name, row in found.items():
        canvas.row(name)
        for kind in shown:
            size = row[kind]
            text = "n/a" if size is None else f"{words.size(size)} {kind}"
            canvas.bar(0, (size or 0) / max(sizes), canvas.colours[name], faint=kind != "resident")
            canvas.value((size or 0) / max(sizes), text)
            canvas.down()
        plot.told.append(f"{name}: " + ", ".join(f"{words.size(s)} {k}" for k, s in row.items() if s is not None))
    plot.svg = canvas.svg(plot.name)
    return plot


def energy(report: Report) -> Plot:
    plot = Plot(
        "energy", "What energy does a picture cost?", "Joules from the picture to the first token, idle power included."
    )
    if report.artifact.matching:
        plot = Plot("energy", "What energy does a pair cost?", "Joules of a picture and a text, idle power included.")
    found = {v.name: look(v.energy, next(iter(report.terms.energies))) for v in report.variants}
    _bars(report, plot, found, lambda joules: f"{words.number(joules)} J")
    return plot


def limits(report: Report) -> Plot:
    caption = "A full bar would be the least time that the machine's bandwidth and arithmetic allow."
    caption += f" {verdict.PASSED}." if tables.passes(report) else ""
    plot = Plot("limits", "How far from the machine's limit?", caption)
    rows: list[tuple[str, str, float]] = []
    for variant in report.variants:
        if isinstance(variant.roofline, str):
            plot.number(variant.name, variant.roofline)
            continue
        for key, entry in variant.roofline.items():
            name = words.component(key)
            share = plot.number(f"{variant.name}, {name}", entry if isinstance(entry, str) else entry.share)
            if share is not None:
                rows.append((variant.name, name, share))
                plot.told.append(f"{variant.name}, {name}: {verdict.share(share)} of the limit")
    if not rows:
        return plot
    canvas = Canvas(report, len(rows))
    for variant_name, name, share in rows:
        canvas.row(variant_name, f": {name}")
        canvas.bar(0, 1, "track")
        canvas.bar(0, min(1.0, max(0.0, share)), canvas.colours[variant_name])
        canvas.value(1, verdict.share(share))
    plot.svg = canvas.svg(plot.name)
    return plot


def accuracy(report: Report) -> Plot:
    caption = "Up and left is better. Lines: 95 % intervals. A ring: no other variant is both faster and more accurate."
    plot = Plot("accuracy", "What does speed cost in accuracy?", caption)
    points: dict[str, tuple[float, Score]] = {}
    for variant in report.variants:
        entry = variant.accuracy
        ms = plot.number(variant.name, median(statistics(variant, "end_to_end")))
        if isinstance(entry, str):
            plot.number(variant.name, entry)
        elif ms is not None and ms > 0:
            points[variant.name] = (ms, entry.overall)
            plot.told.append(f"{variant.name}: {words.score(entry.overall)} % right, {words.number(ms)} ms")
    if points:
        plot.svg = _scatter(report, points, plot.name)
    return plot


def frontier(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names that no other point beats in one of (milliseconds, accuracy) without losing in the other."""

    def beaten(ms: float, right: float) -> bool:
        return any(m <= ms and r >= right and (m, r) != (ms, right) for m, r in points.values())

    return [name for name, (ms, right) in points.items() if not beaten(ms, right)]


def _scatter(report: Report, points: dict[str, tuple[float, Score]], name: str) -> str:
    from matplotlib.figure import Figure

    legend = 18 * len(points)
    height = 250 + legend
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes((44 / WIDTH, (legend + 46) / height, (WIDTH - 60) / WIDTH, 192 / height))
    axes.set_facecolor("none")
    best = frontier({who: (ms, entry.value) for who, (ms, entry) in points.items()})
    edge = sorted((points[who][0], 100 * points[who][1].value) for who in best)
    axes.step(
        *zip(*edge, strict=True), where="post", color=LIGHT["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=1
    )
    colours = variant_colours(report)
    for i, (who, (ms, entry)) in enumerate(points.items(), 1):
        colour = LIGHT[colours[who]]
        axes.plot([ms, ms], [100 * entry.low, 100 * entry.high], color=colour, linewidth=2, zorder=2)
        if who in best:
            axes.plot(ms, 100 * entry.value, "o", ms=21, mfc="none", mec=LIGHT["ink"], mew=1.2, zorder=4, clip_on=False)
        axes.plot(ms, 100 * entry.value, "o", ms=16, color=LIGHT["paper"], mec=colour, mew=2, zorder=3, clip_on=False)
        axes.annotate(str(i), (ms, 100 * entry.value), ha="center", va="center_baseline", zorder=5)
        at = (20 / WIDTH, (legend - 18 * i + 10) / height)
        figure.text(*at, f"{i}", ha="right", va="baseline", fontweight="bold")
        figure.text(26 / WIDTH, at[1], short(tagged(report, who)), va="baseline")
    _scales(axes, [ms for ms, _ in points.values()], [entry for _, entry in points.values()])
    return to_svg(figure, name)


def _scales(axes: Any, times: list[float], scores: list[Score]) -> None:
    """Time on a logarithmic axis where it spans much; accuracy from the lowest to the highest interval."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    low, high = 100 * min(entry.low for entry in scores), 100 * max(entry.high for entry in scores)
    axes.set_ylim(max(-2.0, low - 3), min(102.0, high + 3))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylabel("right answers, %")
    axes.set_xlabel("end to end, ms" + (" (logarithmic)" if max(times) > 8 * min(times) else ""))
    if max(times) > 8 * min(times):
        axes.set_xscale("log")
        axes.set_xlim(min(times) / 1.5, max(times) * 1.5)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.minorticks_off()
    else:
        axes.set_xlim(0, max(times) * 1.12)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.6)
    axes.set_axisbelow(True)


def _bars(
    report: Report,
    plot: Plot,
    found: dict[str, Number],
    text: Callable[[float], str],
    spans: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> None:
    """One bar per variant, as long as its number, with its span as a line; without any number only reasons remain."""
    numbers = {name: plot.number(name, value) for name, value in found.items()}
    ends = [high for _, high in spans.values()] + [value for value in numbers.values() if value is not None]
    longest = max(ends, default=0)
    if longest <= 0:
        return
    canvas = Canvas(report, len(found))
    for name, value in numbers.items():
        canvas.row(name)
        if value is None:
            canvas.value(0, "n/a")
            continue
        canvas.bar(0, value / longest, canvas.colours[name])
        low, high = spans.get(name, (value, value))
        if low < high:
            canvas.whisker(low / longest, high / longest)
        canvas.value(max(value, high) / longest, text(value), f" ({text(low)}–{text(high)})" if low < high else "")
        plot.told.append(f"{name}: {text(value)}")
    plot.svg = canvas.svg(plot.name)
