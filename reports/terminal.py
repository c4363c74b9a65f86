"""The report in the terminal: one table within the console's width, its notes, and the verdict in words."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from . import tables, words
from .document import Report

NAME, GAP = 12, 2  # characters of a name, at least, and what a column takes beside its cells


def show(report: Report, console: Console) -> None:
    """Prints the headline table; names too long for the console are folded, never the numbers: columns that do not fit
    are left out from the right, and named."""
    content = tables.headline(report)
    titles = [title.rsplit(" ", 1) for title in content.columns]
    cells = [[titles[i], [row[i] for row in content.rows]] for i in range(len(titles))]
    widths = [NAME, *(max(len(cell) for group in column for cell in group) for column in cells[1:])]
    fitting = next(n for n in range(len(titles), 0, -1) if sum(widths[:n]) + GAP * n <= console.width or n == 1)
    grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, title in enumerate(titles[:fitting]):
        grid.add_column(Text("\n".join(title)), justify="right" if i else "left", overflow="fold", min_width=widths[i])
    for i, row in enumerate(content.rows):
        name = Text(row[0]) + Text(" (kept)") if i in content.kept else Text(row[0])
        grid.add_row(name, *map(Text, row[1:fitting]), style="bold" if i in content.kept else "")
    model, where = report.artifact.name, report.device_name
    console.print(Text(f"\n{model} on {where}. {content.title}.\n"))
    console.print(grid)
    if fitting < len(titles):
        left = ", ".join(content.columns[fitting:])
        console.print(Text(f"The terminal is too narrow for {left}; report.md has them.", style="dim"))
    for i, note in enumerate(content.notes):
        console.print(Text(f"[{i + 1}] {note}", style="dim"))
    console.print()
    for sentence in words.findings(report):
        console.print(Text(sentence))
