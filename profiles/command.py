"""`vlmc profile`, `vlmc devices` and `vlmc doctor`."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .. import console
from ..artifact import Artifact
from ..errors import VlmcError
from ..files import alone, write_json
from .device import device_names, load_device
from .questions import Question

ANSWER_TOKENS = 128  # as the SAGE benchmark limits its answers
DEVICES = console.completing(device_names)


@click.command()
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--device", default="", shell_complete=DEVICES, help="Of which build (the newest for this machine).")
@click.option("--recipe", default="", help="The recipe of the build (the newest build's).")
@click.option("--runs", type=click.IntRange(1), default=20, show_default=True, help="Timed runs of each variant.")
@click.option("--seconds", type=click.FloatRange(0), default=0.0, help="Time no variant longer than that (no limit).")
@click.option("--tokens", type=click.IntRange(2), default=32, show_default=True, help="Tokens of each timed run.")
@click.option("--set", "set_file", type=click.Path(path_type=Path), help="Evaluation set, JSONL (the demo's own).")
@click.option("--samples", type=click.IntRange(0), default=40, show_default=True, help="Pictures for the accuracy.")
@click.option("--no-baselines", is_flag=True, help="Leave out the PyTorch baselines.")
@click.option("--torch-python", default="", help="The interpreter that has PyTorch, where it is another one.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="Threads of every variant (one a core).")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def profile(
    artefact: Path,
    device: str,
    recipe: str,
    runs: int,
    seconds: float,
    tokens: int,
    set_file: Path | None,
    samples: int,
    no_baselines: bool,
    torch_python: str,
    threads: int,
    as_json: bool,
) -> None:
    """Measure ARTEFACT's engines and the PyTorch baselines side by side, and say what the engines gained.

    An interrupted measurement goes on where it stopped when the same command is run again.

    Example: vlmc profile out/demo --device cpu --runs 20
    """
    from . import summarize
    from .experiment import choose_build
    from .experiment import profile as run
    from .harness import Settings

    opened = Artifact(artefact)
    build, target = choose_build(opened, device, recipe)
    settings = Settings(runs, seconds, tokens, ANSWER_TOKENS, threads)
    with alone(opened.root), console.reporting("measuring") as progress:
        asked = _questions(opened, build.recipe, set_file, samples)
        folder = run(
            opened, build, target, settings, asked, progress, baselines=not no_baselines, torch_python=torch_python
        )
    report = summarize(folder)
    write_json(folder / "report.json", report)
    files = _drawn(folder, quiet=as_json)
    if as_json:
        console.print_json(report)
    else:
        for path in files:
            click.echo(path)


def _questions(artifact: Artifact, recipe: str, set_file: Path | None, pictures: int) -> list[Question] | str:
    """The evaluation set, or why there is no accuracy."""
    from .matching import read_labels
    from .questions import demo_set, read_set, refuse_calibrated

    if artifact.manifest.source.random_weights:
        return "unavailable: random weights"
    if not pictures:
        return "unavailable: not asked for (--samples 0)"
    if set_file is None and artifact.manifest.source.kind != "demo":
        return "unavailable: no evaluation set was given (--set FILE)"
    if artifact.manifest.matching is not None and set_file is not None:
        questions = read_labels(set_file, pictures)
    else:
        questions = read_set(set_file or demo_set(artifact, pictures), pictures)
    refuse_calibrated(artifact, recipe, questions)
    return questions


def _drawn(folder: Path, quiet: bool) -> list[Path]:
    """Table, CSV, Markdown and page, by the room above this one; without its libraries the raw report stays."""
    files = [folder / "report.json"]
    if not quiet:
        document, terminal = (importlib.import_module(f"vlmc.reports.{name}") for name in ("document", "terminal"))
        terminal.show(document.read(folder), console.output())
    try:
        files += importlib.import_module("vlmc.reports").write_all(folder)
    except (ImportError, VlmcError) as error:
        console.note(f"Only report.json was written: {error}")
    return files


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print every field as JSON.")
def devices(as_json: bool) -> None:
    """List the devices, what is known of them, and which can be built for on this machine.

    Example: vlmc devices
    """
    from rich.table import Table

    from .doctor import built_here

    known = [load_device(name) for name in device_names()]
    if as_json:
        console.print_json([asdict(device) | {"built_here": built_here(device) or True} for device in known])
        return
    output = console.output()
    left_out = ("first backend", "GB/s", "INT8", "budget") if output.width < 80 else ()
    rows = []
    for device in known:
        figures = [device.memory_gb, device.dram_gb_per_s, device.peak_int8_tops]
        gigabytes, bandwidth, int8 = ("?" if figure is None else f"{figure:g}" for figure in figures)
        budget = [f"{value:g} {unit}" for value, unit in _budget(device.memory_budget_gb, device.latency_budget_ms)]
        words = {"device": device.name, "": device.title, "first backend": device.backends[0]}
        numbers = {"GB": gigabytes, "GB/s": bandwidth, "INT8": int8, "budget": " ".join(budget) or "-"}
        rows.append(words | numbers | {"built": "no" if built_here(device) else "yes"})
    table = Table(box=None, pad_edge=False)
    for title in rows[0]:
        if title not in left_out:
            number = title in ("GB", "GB/s", "INT8", "budget")
            table.add_column(title, justify="right" if number else "left", no_wrap=number or title == "device")
    for row in rows:
        table.add_row(*(cell for title, cell in row.items() if title not in left_out))
    output.print(table)
    if left_out:
        output.print(f"The terminal is too narrow for {', '.join(left_out)}; --json has them.")
    click.echo(
        "\nGB: memory; GB/s: its bandwidth; INT8: dense TOPS; ?: no published figure\n"
        "(the sources are named in profiles/devices/*.toml).\n"
        "built: whether engines can be built on this machine; `vlmc doctor` says why not."
    )


def _budget(memory: float | None, latency: float | None) -> list[tuple[float, str]]:
    return [(value, unit) for value, unit in ((memory, "GB"), (latency, "ms")) if value is not None]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Say what can run on this machine, and why the rest cannot.

    Example: vlmc doctor
    """
    from rich.markup import escape
    from rich.table import Table

    from .doctor import examine

    found = examine()
    if as_json:
        console.print_json(found)
        return
    table = Table("", "", "", box=None, pad_edge=False, show_header=False)
    for group, entries in found.items():
        table.add_row(f"[bold]{group}[/]")
        for name, value in entries.items():
            table.add_row(f"  {name}", *map(escape, _state(group, value)))
    console.output().print(table)


def _state(group: str, value: Any) -> tuple[str, str]:
    """A word, and the reason or the value."""
    if group in ("backends", "power", "devices"):
        word = "can be built here" if group == "devices" else "ready"
        return ("yes", word) if not value else ("no", str(value))
    if str(value).startswith("unavailable: "):
        return "no", str(value).removeprefix("unavailable: ")
    return "yes" if group == "packages" else "", str(value)
