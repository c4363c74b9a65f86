"""What people look at: tables, CSV, Markdown, plots and the page, all drawn from `report.json`."""

from __future__ import annotations

from pathlib import Path

from ..console import note
from ..files import write_text
from . import document, markdown, page, spreadsheet


def write_all(folder: Path) -> list[Path]:
    """Reads folder/report.json and writes report.csv, report.md and report.html beside it, each in one step.

    All are drawn before the first is written. The page needs the extra `report`; where that is not installed, as on a
    small device, the page is left out with a note. A report.json that cannot be read is a VlmcError.
    """
    report = document.read(folder)
    drawn = {"report.csv": spreadsheet.render(report), "report.md": markdown.render(report)}
    try:
        drawn["report.html"] = page.render(report)
    except ImportError as error:
        note(f"report.html is left out: {error.name} is missing; `pip install matplotlib jinja2` brings all it needs")
    for name, text in drawn.items():
        write_text(folder / name, text)
    return [folder / name for name in drawn]
