"""`vlmc report`: makes table, CSV, Markdown and page again from the raw samples that `vlmc profile` took.

Where only report.json was handed on, without the samples, it is drawn as it is.
"""

from __future__ import annotations

import webbrowser
from pathlib import Path

import click

from .. import console
from ..errors import VlmcError
from ..files import refuse_links_out, write_json
from ..profiles import summarize
from . import document, terminal, words, write_all


@click.command()
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--device", default="", help="The profiled device, where there are several.")
@click.option("--open", "show", is_flag=True, help="Open the page in the browser.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written and found as JSON.")
def report(artefact: Path, device: str, show: bool, as_json: bool) -> None:
    """Make table, CSV, Markdown and HTML page again from what was measured.

    Example: vlmc report out/demo --open
    """
    folder = profile_folder(artefact, device)
    if (folder / "samples" / "run.json").is_file():
        write_json(folder / "report.json", summarize(folder))
    paths = write_all(folder)
    found = document.read(folder)
    if as_json:
        console.print_json({"files": [str(path) for path in paths], "findings": words.findings(found)})
    else:
        out = console.output()
        terminal.show(found, out)
        out.print()
        for path in paths:
            click.echo(path)
    page = folder / "report.html"
    if show and not (page in paths and webbrowser.open(page.resolve().as_uri())):
        console.note(f"No browser could be opened; the page is {page.resolve()}")


def profile_folder(root: Path, device: str) -> Path:
    """The folder of the device's profile in the artefact; without a device, of the only one there."""
    if not root.is_dir():
        raise VlmcError(f"There is no artefact {root}", fix=f"check the path, or run `vlmc export MODEL -o {root}`")
    refuse_links_out(root, "profile")
    made = [*root.glob("profile/*/report.json"), *(path.parent for path in root.glob("profile/*/samples/run.json"))]
    have = {path.parent.name: path.parent for path in sorted(made)}
    if not device and len(have) == 1:
        return next(iter(have.values()))
    if device in have:
        return have[device]
    names = ", ".join(have) or "none"
    if have and not device:
        raise VlmcError(f"{root} holds profiles of several devices", found=names, fix="choose one with --device")
    what = f"{root} holds no profile" + (f" for device {device!r}" if device else "")
    measure = f"run `vlmc profile {root}` on the device"
    raise VlmcError(what, found=names, fix=f"choose one of these, or {measure}" if have else measure)
