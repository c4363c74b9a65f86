"""The report in the terminal: one table within the console's width, its notes, and the verdict in words."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from . import tables, words
from .document import Report


def show(report: Report, console: Console) -> None:
    """Prints the headline table; names too long for the console are folded, never the numbers."""
    content = tables.headline(report)
    grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, title in enumerate(content.columns):
        grid.add_column(
            Text("\n".join(title.rsplit(" ", 1))), justify="right" if i else "left", overflow="fold", no_wrap=bool(i)
        )
    for i, row in enumerate(content.rows):
        name = Text(row[0]) + Text(" (kept)") if i in content.kept else Text(row[0])
        grid.add_row(name, *map(Text, row[1:]), style="bold" if i in content.kept else "")
    model, where = report.artifact.name, report.device_name
    console.print(Text(f"\n{model} on {where}. {content.title}.\n"))
    console.print(grid)
    for i, note in enumerate(content.notes):
        console.print(Text(f"[{i + 1}] {note}", style="dim"))
    console.print()
    for sentence in words.findings(report):
        console.print(Text(sentence))
