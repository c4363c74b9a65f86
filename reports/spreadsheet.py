"""The report as long-form CSV: one line per variant, metric and statistic, for a spreadsheet or pandas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from .document import Number, Report, Score, Statistics, Variant
from .tables import STATISTICS

FORMULA = ("=", "+", "-", "@", "\t", "\r")
COLUMNS = ("model", "weights", "device", "variant", "kind", "recipe", "metric", "statistic", "value", "unit", "note")

Line = tuple[str, str, Number, str]  # metric, statistic, value or reason, unit
_JOULES = ("joules_per_image", "joules_per_token", "joules_per_pair")
_ENERGY_UNITS = dict.fromkeys([*_JOULES, *(f"{name}_above_idle" for name in _JOULES)], "J") | {"watts": "W"}


def render(report: Report) -> str:
    """The CSV text, header first. Where there is no number, `value` is empty and `note` gives the reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    weights = "random" if report.artifact.random_weights else "trained"
    for variant in report.variants:
        start = (report.artifact.name, weights, report.device_name, variant.name, variant.kind, variant.recipe)
        for metric, statistic, value, unit in [*_lines(report, variant), *_speedups(report, variant)]:
            number, note = ("", value) if isinstance(value, str) else (repr(value), "")
            before = map(_plain, (*start, metric, statistic))
            writer.writerow((*before, number, unit, _plain(note)))
    return text.getvalue()


def _plain(text: str) -> str:
    """Names are anybody's, and a spreadsheet computes what begins as a formula does (OWASP, CSV Injection)."""
    return f"'{text}" if text.startswith(FORMULA) else text


def _lines(report: Report, variant: Variant) -> Iterator[Line]:
    yield from _group("latency", variant.latency_ms, "ms")
    yield from _statistics(report.terms.rate[0], report.rate(variant), "1/s")
    yield from _group("memory", variant.memory, "bytes")
    yield from _group("energy", variant.energy, "")
    yield from _rooflines(variant)
    yield from _products(variant)
    yield from _accuracy(variant)
    if isinstance(variant.agreement, str):
        yield "agreement", "equal", variant.agreement, "cases"
    else:
        yield "agreement", "equal", variant.agreement.equal, "cases"
        yield "agreement", "count", variant.agreement.cases, "cases"


def _group(name: str, group: dict[str, Statistics | str] | dict[str, Number] | str, unit: str) -> Iterator[Line]:
    if isinstance(group, str):
        yield name, "value", group, unit
        return
    for key, entry in group.items():
        yield from _statistics(f"{name}.{key}", entry, unit or _ENERGY_UNITS.get(key, ""))


def _statistics(metric: str, entry: Statistics | Number, unit: str) -> Iterator[Line]:
    if isinstance(entry, Statistics):
        yield from ((metric, name, getattr(entry, name), "" if name == "count" else unit) for name in STATISTICS)
    else:
        yield metric, "value", entry, unit


def _rooflines(variant: Variant) -> Iterator[Line]:
    if isinstance(variant.roofline, str):
        yield "roofline", "share", variant.roofline, ""
        return
    for name, entry in variant.roofline.items():
        if isinstance(entry, str):
            yield f"roofline.{name}", "share", entry, ""
            continue
        yield f"roofline.{name}", "measured", entry.measured_ms, "ms"
        yield f"roofline.{name}", "limit", entry.limit_ms, "ms"
        yield f"roofline.{name}", "share", entry.share, ""
        yield f"roofline.{name}", "operations", entry.flops, "operations"
        yield f"roofline.{name}", "bytes", entry.bytes, "bytes"


def _products(variant: Variant) -> Iterator[Line]:
    if isinstance(variant.products, str):
        yield "products", "count", variant.products, ""
        return
    for name, counts in variant.products.items():
        if isinstance(counts, str):
            yield f"products.{name}", "count", counts, ""
        else:
            yield from ((f"products.{name}", kind, count, "matrix products") for kind, count in counts.items())


def _accuracy(variant: Variant) -> Iterator[Line]:
    if isinstance(variant.accuracy, str):
        yield "accuracy", "value", variant.accuracy, ""
        return
    entries: dict[str, Score] = {"accuracy": variant.accuracy.overall}
    entries |= {f"accuracy.{task}": entry for task, entry in variant.accuracy.tasks.items()}
    for metric, entry in entries.items():
        yield from ((metric, name, getattr(entry, name), "") for name in ("value", "low", "high"))
        yield metric, "score", entry.score, "questions"
        yield metric, "total", entry.total, "questions"


def _speedups(report: Report, variant: Variant) -> Iterator[Line]:
    for entry in report.speedups:
        if entry.of == variant.name:
            for part in report.terms.parts:
                yield f"speedup.{part}", f"over {entry.over}", getattr(entry, part), "×"
