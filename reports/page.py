"""The report as one HTML page that works offline: no script, no font, no picture is loaded from anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import gallery, plots, provenance, style, tables, words
from .document import Number, Report, look

_SHOWN, _SHOWN_COMPACT = 4, 12  # pictures of the gallery that are open from the start


def render(report: Report) -> str:
    """The whole page. Every text of the report is escaped: what a model says is not to be trusted."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = gallery.pictures(report)
    compact = all(len(picture.questions) == 1 for picture in pictures)
    shown = _SHOWN_COMPACT if compact else _SHOWN
    return environment.get_template("page.html.jinja").render(
        report=report,
        subject=words.subject(report),
        lead=words.lead(report),
        findings=words.findings(report),
        figures=key_figures(report),
        compact=compact,
        shown=pictures[:shown],
        folded=pictures[shown:],
        headline=tables.headline(report),
        details={
            "Speed-ups": tables.speedups(report),
            "Accuracy by task": tables.accuracy(report),
            "Memory, energy, precision": tables.footprint(report),
            "All times": tables.times(report),
        },
        rooflines=tables.rooflines(report),
        plots=plots.draw(report),
        candidates={name: tables.candidates(report, name) for name in report.verdict.choices},
        component=words.component,
        provenance=provenance.facts(report),
        colours=style.variant_colours(report),
        light=Markup(style.css(style.LIGHT)),
        dark=Markup(style.css(style.DARK)),
        drawn=Markup,
    )


class Figure(NamedTuple):
    """A number set in large type: what it is, the number, and what it is to be compared with."""

    name: str
    text: str
    note: str


def key_figures(report: Report) -> list[Figure]:
    """What matters most of the variant that was kept; nothing where none of the measured ones was."""
    kept = report.kept
    if kept is None:
        return []
    against = next((entry for entry in report.speedups_of(kept) if entry.over == report.reference.name), None)
    vision = words.faster(against, "vision") if against else ""
    rate = words.faster(against, "end_to_end" if report.artifact.matching else "decode") if against else ""
    terms = report.terms
    first, right = tables.statistics(kept, terms.first[0]), kept.accuracy
    slowest = "" if isinstance(first, str) else f"99 % within {words.number(first.p99)} ms"
    disk, peak = look(kept.memory, "disk_bytes"), look(kept.memory, report.scarce[0])
    resident = "" if isinstance(peak, str) else f"{words.size(peak)} of {report.scarce[1]}"
    accuracy = right if isinstance(right, str) else right.overall.value
    interval = "" if isinstance(right, str) else f"95 % interval {words.interval(right.overall)}"
    return [
        _figure("vision", tables.median(tables.statistics(kept, "vision")), lambda x: f"{words.number(x)} ms", vision),
        _figure(terms.first[1], tables.median(first), lambda x: f"{words.number(x)} ms", slowest),
        _figure(terms.rate[1], tables.median(report.rate(kept)), words.number, rate),
        _figure("on disk", disk, words.size, resident),
        _figure("right answers", accuracy, words.percent, interval),
    ]


def _figure(name: str, value: Number, text: Callable[[float], str], note: str) -> Figure:
    return Figure(name, "n/a", value) if isinstance(value, str) else Figure(name, text(value), note)
