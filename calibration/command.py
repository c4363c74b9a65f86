"""`vlmc calibrate`."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .. import console
from ..artifact import Artifact
from ..errors import VlmcError
from . import recipes
from .observers import RANGES
from .plan import Plan, write_plan

DEMO_PICTURES = 32
KNOWN, RECIPES = ", ".join(recipes.names()), console.completing(recipes.names)


@click.command()
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--recipe", default="int8", show_default=True, shell_complete=RECIPES, help=f"One of {KNOWN}.")
@click.option("--set", "set_file", type=click.Path(path_type=Path), help="JSONL of pictures and prompts (the demo's).")
@click.option("--observer", type=click.Choice(list(RANGES)), help="How activation ranges are chosen (the recipe's).")
@click.option("--limit", type=click.IntRange(1), help="Take only the first rows of the set.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def calibrate(
    artefact: Path, recipe: str, set_file: Path | None, observer: str | None, limit: int | None, as_json: bool
) -> None:
    """Run image+prompt pairs through the whole model and write a quantisation plan.

    Example: vlmc calibrate out/demo --recipe int8
    """
    opened = Artifact(artefact)
    chosen = recipes.load(recipe)
    if not chosen.needs_data and (set_file or observer or limit):
        raise click.UsageError(f"The recipe {recipe} observes nothing; leave --set, --observer and --limit out.")
    if observer:
        chosen = replace(chosen, observer=observer)
    plan = make_plan(opened, chosen, set_file, limit or 0)
    path = write_plan(opened, plan)
    if as_json:
        console.print_json({"plan": str(path)} | summary(plan))
    else:
        _print(plan, path)


def make_plan(artifact: Artifact, recipe: recipes.Recipe, set_file: Path | None = None, limit: int = 0) -> Plan:
    """The recipe's plan, calibrated on the set or else on the demo's pictures, with a progress bar; not yet written."""
    from .calibrate import calibrate as run
    from .sets import demo_set, load_set

    with tempfile.TemporaryDirectory(prefix="vlmc-") as folder, console.reporting("loading") as report:
        data = None
        if recipe.needs_data:
            data = load_set(set_file, limit) if set_file else demo_set(Path(folder), limit or DEMO_PICTURES)
        plan = run(artifact, recipe, data, report)
    if recipe.rules and not (plan.modules or plan.samples):
        raise VlmcError(
            f"The recipe {recipe.name} names nothing that is in {artifact.root}",
            found=f"the components {', '.join(artifact.components)}",
            expected=recipe.about,
            fix="take another recipe",
        )
    return plan


def summary(plan: Plan) -> dict[str, Any]:
    """What a plan holds, in numbers."""
    components: dict[str, dict[str, int]] = {}
    for path, module in plan.modules.items():
        counts = components.setdefault(path.partition("/")[0], {"smoothed": 0})
        kind = f"w{module.weight_bits}" + ("a8" if module.activation_scale else "")
        if module.weight_bits:
            counts[kind] = counts.get(kind, 0) + 1
        counts["smoothed"] += module.smoothing is not None
    data = plan.calibrated_on
    return {
        "recipe": plan.recipe.name,
        "observer": plan.recipe.observer if data else None,
        "set": {"name": data.name, "sha256": data.sha256, "rows": data.rows} if data else None,
        "components": components,
        "samples": list(plan.samples),
        "notes": list(plan.notes),
    }


def _print(plan: Plan, path: Path) -> None:
    from rich import box
    from rich.table import Table

    values, output = summary(plan), console.output()
    output.print(f"Recipe {plan.recipe.name}: {plan.recipe.about}")
    if plan.modules:
        table = Table("component", "layers", "smoothed", box=box.SIMPLE_HEAD)
        for component, counts in values["components"].items():
            smoothed = counts.pop("smoothed")
            table.add_row(component, ", ".join(f"{n} × {kind}" for kind, n in counts.items()), str(smoothed))
        output.print(table)
    if plan.samples and plan.calibrated_on:
        parts = ", ".join(plan.samples)
        output.print(
            f"Kept {plan.calibrated_on.rows} inputs of {parts} for TensorRT, which calibrates by "
            f"{plan.recipe.observer} itself while it builds."
        )
    elif data := plan.calibrated_on:
        output.print(
            f"Observed on {data.rows} questions about {len(data.pictures)} pictures of the set {data.name!r}; "
            f"ranges by {plan.recipe.observer}."
        )
    else:
        output.print("No activations are quantised, so no calibration set was needed.")
    for note in plan.notes:
        output.print(f"Note: {note}")
    output.print(f"Written: {path}", soft_wrap=True)
    output.print(f"Next: vlmc build {path.parent.parent} --recipe {plan.recipe.name}", soft_wrap=True)
