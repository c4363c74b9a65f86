"""`vlmc build`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from .. import console
from ..artifact import ASKED, ASKED_MEANS, Artifact, BuildSpec
from ..calibration import recipes
from ..profiles.device import Device, device_names
from ..runtime import backends

KNOWN = ", ".join(recipes.names())
DEVICES, RECIPES = console.completing(device_names), console.completing(recipes.names)
BACKENDS = console.completing(backends.names)
LAST = ("build s", "peak MB")  # columns for wide terminals
COLUMNS = ("engine", "ms", "cosine", "matrix products", "MB", *LAST)


@click.command()
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--device", default="cpu", show_default=True, shell_complete=DEVICES, help="One of `vlmc devices`.")
@click.option("--recipe", default="", shell_complete=RECIPES, help=f"What precision each part gets: {KNOWN}.")
@click.option("--int8", is_flag=True, help="Short for --recipe int8.")
@click.option("--backend", "only", multiple=True, shell_complete=BACKENDS, help="Build for it alone, where it can.")
@click.option("--set", "set_file", type=click.Path(path_type=Path), help="Calibration set, where no plan is there yet.")
@click.option("--json", "as_json", is_flag=True, help="Print every engine as JSON.")
def build(
    artefact: Path,
    device: str,
    recipe: str,
    int8: bool,
    only: tuple[str, ...],
    set_file: Path | None,
    as_json: bool,
) -> None:
    """Build ARTEFACT's engines for a device, float and quantised, and keep per component what wins.

    Example: vlmc build out/demo --device cpu --int8
    """
    from ..profiles.device import load_device, require_backends, require_precision
    from .build import build as run
    from .build import results

    if int8 and recipe not in ("", "int8"):
        raise click.UsageError("--int8 and --recipe contradict each other.")
    recipe = recipe or ("int8" if int8 else "fp32")
    chosen = recipes.load(recipe)
    if set_file and not chosen.needs_data:
        raise click.UsageError(f"The recipe {recipe} observes nothing; leave --set out.")
    opened, target = Artifact(artefact), load_device(device)
    require_precision(target, chosen.name, chosen.kind)
    require_backends(target, only)
    _ensure_plan(opened, chosen, set_file, target)
    with console.reporting("building") as report:
        record, hits = run(opened, target, recipe, report, only)
    rows = results(opened, record)
    if as_json:
        answers = [asdict(answer) for answer in record.answers]
        console.print_json({"device": device, "recipe": recipe, "engines": rows, "answers": answers, "cached": hits})
    else:
        _print(record, rows, hits)


def _ensure_plan(artifact: Artifact, recipe: recipes.Recipe, set_file: Path | None, device: Device) -> None:
    """Calibrates where a set is named, or where the recipe has no plan that is as it says and of the right pictures."""
    from ..calibration.command import make_plan
    from ..calibration.plan import write_plan

    if not recipe.rules and not recipe.implicit:
        return
    if why := f"on {set_file.name}" if set_file else _outdated(artifact, recipe, device):
        console.note(f"Calibrating {recipe.name} first, {why}: {recipe.about}.")
        plan = make_plan(artifact, recipe, set_file or device.own_set)
        if plan.calibrated_on and set_file is None:
            plan = replace(plan, calibrated_on=replace(plan.calibrated_on, own=_own(device)))
        write_plan(artifact, plan)


def _own(device: Device) -> str:
    return device.calibration_set if device.own_set else ""


def _outdated(artifact: Artifact, recipe: recipes.Recipe, device: Device) -> str:
    """Why the artefact's plan of the recipe does not serve the device; empty where it does. A plan of a device's own
    set serves those that name this set alone."""
    from ..calibration.plan import read_plan
    from ..calibration.sets import load_set

    if not artifact.plan_path(recipe.name).is_file():
        return "which has no plan yet"
    plan = read_plan(artifact, recipe.name)
    if (plan.recipe.rules, plan.recipe.implicit) != (recipe.rules, recipe.implicit):
        return "which was another when the plan was made"
    seen = plan.calibrated_on
    if seen is None:
        return ""
    if seen.own != _own(device):
        return f"whose plan is of the set {seen.own or seen.name}"
    own = device.own_set
    if own and own.is_file() and load_set(own).sha256 != seen.sha256:  # no wheel holds it
        return f"whose set {seen.own} has changed"
    return ""


def _print(record: BuildSpec, rows: list[dict[str, Any]], hits: list[str]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from .trial import ANSWER
    from .verdict import title

    output = console.output()
    narrow = output.width < console.WIDTH
    columns = COLUMNS[: -len(LAST)] if narrow else COLUMNS
    table = Table(title=f"Engines for {record.device}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        words = column in ("engine", "matrix products")
        table.add_column(column, justify="left" if words else "right", no_wrap=column == "engine", overflow="fold")
    component = ""
    for row in rows:
        if row["component"] != component:
            component = row["component"]
            table.add_row(f"[bold]{component}")
        times = [f"{ms:.2f}{'' if name == 'run' else ' ' + name}" for name, ms in row["latency_ms"].items()]
        cells = (
            f"  {row['engine']}" + " (kept)" * row["kept"],
            "\n".join(times),
            "" if row["agreement"] is None else f"{row['agreement']:.4f}",
            "\n".join(f"{count} {kind}" for kind, count in row["products"].items()),
            f"{row['size_bytes'] / 1e6:.1f}",
            f"{row['build_seconds']:.1f}",
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
        )
        table.add_row(*cells[: len(columns)], style="bold" if row["kept"] else "")
    output.print(table)
    if narrow:
        output.print(f"The terminal is too narrow for {' and '.join(LAST)}; --json has them.")
    if any(kind.endswith(ASKED) for row in rows for kind in row["products"]):
        output.print(f"{ASKED.strip()}: {ASKED_MEANS}.")
    for component, choice in record.choices.items():
        output.print(f"[bold]{component}[/bold]: {escape(f'{choice.engine}, {choice.reason}.')}")
    if record.answers:
        found = ", ".join(f"{title(answer.engines)} {answer.milliseconds:.1f} ms" for answer in record.answers)
        output.print(f"Whole answers of {ANSWER} tokens: {found}.")
    if hits:
        output.print(f"Unchanged since an earlier build: {', '.join(hits)}.")
    if record.remaining:
        output.print(record.remaining, markup=False)
    else:
        output.print("Next: vlmc profile, or vlmc run ARTEFACT PICTURE --prompt QUESTION.")
