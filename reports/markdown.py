"""The report as Markdown: the verdict, every table, and where the numbers come from."""

from __future__ import annotations

import re
from collections.abc import Iterator

from . import provenance, tables, words
from .document import Report

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def render(report: Report) -> str:
    """The whole document; all text of the report is escaped, for names and reasons are not ours."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"# {escape(report.artifact.name)} on {escape(report.device_name)}"
    yield from ("", f"**{escape(words.lead(report))}**", "")
    for sentence in words.findings(report):
        yield f"- {escape(sentence)}"
    sections = {
        "The numbers to choose by": tables.headline(report),
        "Speed-ups": tables.speedups(report),
        "Accuracy": tables.accuracy(report),
        "All times": tables.times(report),
        "Memory, energy, precision": tables.footprint(report),
        "Distance to the machine's limit": tables.rooflines(report),
    }
    for title, table in sections.items():
        yield from _section(f"## {title}", table)
    yield from ("", "## Why these engines were kept")
    for name, choice in report.verdict.choices.items():
        yield from (
            "",
            f"### {escape(words.component(name))}: {escape(choice.engine)}",
            "",
            f"{escape(choice.reason)}.",
            "",
        )
        yield from _grid(tables.candidates(report, name))
    yield from ("", "## Where the numbers come from")
    for heading, facts in provenance.facts(report).items():
        yield from ("", f"### {escape(heading)}", "")
        yield from (f"- {escape(name)}: {escape(value)}" for name, value in facts)


def _section(heading: str, table: tables.Table) -> Iterator[str]:
    yield from ("", heading, "", f"{escape(table.title)}.", "")
    yield from _grid(table)


def _grid(table: tables.Table) -> Iterator[str]:
    if not table.rows:
        return
    yield "| " + " | ".join(map(escape, table.columns)) + " |"
    yield "|" + " --- |" * table.names + " ---: |" * (len(table.columns) - table.names)
    for i, row in enumerate(table.rows):
        name = f"**{escape(row[0])}** (kept)" if i in table.kept else escape(row[0])
        yield "| " + " | ".join([name, *map(escape, row[1:])]) + " |"
    if table.notes:
        yield ""
        yield from (f"- \\[{i + 1}\\] {escape(note)}" for i, note in enumerate(table.notes))


def escape(text: str) -> str:
    """The text on one line, with no character that Markdown or HTML would read."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("&", "&amp;")
