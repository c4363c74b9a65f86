"""`vlmc export` and `vlmc models`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from rich.progress import Progress

from .. import console
from ..artifact import Artifact


@click.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the artefact.")
@click.option(
    "--capacity", default=1024, show_default=True, type=click.IntRange(1, 1 << 20), help="Positions in the KV cache."
)
@click.option("--random-weights", is_flag=True, help="A preset or config of true size with seeded random weights.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=None, help="Of the random weights (0).")
@click.option(
    "--cases", type=click.IntRange(1, 1000), default=None, help="Golden pictures (16; 2 with random weights)."
)
@click.option(
    "--pictures", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="JSONL set to take goldens from."
)
@click.option("--force", is_flag=True, help="Replace an artefact that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print the parity ladder as JSON.")
def export(
    model: str,
    output: Path,
    capacity: int,
    random_weights: bool,
    seed: int | None,
    cases: int | None,
    pictures: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Export MODEL (`demo`, a local folder, or a hub id; safetensors only) to ONNX, checked against PyTorch.
    Interrupted, the same command goes on where it stopped.

    Example: vlmc export demo -o out/demo
    """
    from . import checkpoint, matching
    from .export import Options
    from .export import export as run

    if seed is not None and not random_weights:
        raise click.UsageError("--seed is of --random-weights, which was not given.")
    resolved = checkpoint.resolve(model, random_weights, seed or 0)
    if isinstance(resolved.family, matching.MatchingFamily):
        run = matching.export
    options = Options(capacity, cases or (2 if random_weights else 16), pictures, force=force)
    with console.progress() as bar:
        artifact = run(resolved, output, options, follow(bar))
    if as_json:
        console.print_json([asdict(level) for level in artifact.manifest.parity])
    else:
        _print(artifact, resolved.family.left_out)


def follow(bar: Progress) -> console.Report:
    """Shows the stage in work on the bar: how far it is, or, where nobody can tell, that something moves."""

    def show(stage: str, done: int, total: int) -> None:
        known = {task.description: task.id for task in bar.tasks}
        if stage not in known:  # a stage of its own, for the time that remains is the stage's
            for task in known.values():
                bar.remove_task(task)
            known[stage] = bar.add_task(stage, total=None)
        bar.update(known[stage], completed=done, total=total or None)

    return show


def _print(artifact: Artifact, left_out: str) -> None:
    from rich.table import Table

    manifest = artifact.manifest
    table = Table(
        "level", "component", "max abs", "cosine", "", title=f"Parity of {manifest.name} with PyTorch float32"
    )
    for level in manifest.parity:
        numbers = (
            (level.detail, "") if level.level == "greedy tokens" else (f"{level.max_abs:.2e}", f"{level.cosine:.7f}")
        )
        table.add_row(level.level, level.component, *numbers, "ok" if level.passed else "failed")
    output = console.output()
    output.print(table)
    if manifest.source.random_weights:
        output.print("Random weights: its answers mean nothing; its speed and size are real.")
    if left_out:
        output.print(f"Left out: {left_out}.")
    parameters = sum(spec.parameters for spec in manifest.components.values())
    size = sum(known.bytes for known in manifest.files.values())
    peak = manifest.peak_memory_bytes
    known = f"{peak / 1e6:,.0f} MB" if peak else "unavailable: the system does not tell"
    output.print(f"Peak memory of the export: {known}; its float32 weights are {4 * parameters / 1e6:,.0f} MB.")
    output.print(
        f"{artifact.root}: {parameters / 1e6:.1f} M parameters, {size / 1e6:.1f} MB. Next: vlmc build {artifact.root}",
        soft_wrap=True,  # a command that is broken in two cannot be copied
    )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def models(as_json: bool) -> None:
    """List the families that can be exported and the presets of true size.

    Example: vlmc models
    """
    from rich.table import Table

    from . import checkpoint
    from .family import all_families

    families = sorted({type(f).__module__.split(".")[-1] for f in all_families().values()})
    types = {
        name: [t for t, f in all_families().items() if type(f).__module__.endswith("." + name)] for name in families
    }
    if as_json:
        console.print_json({"families": types, "presets": checkpoint.preset_names(), "bundled": ["demo"]})
        return
    table = Table()
    for title in ("family", "model types", "presets (--random-weights)"):
        table.add_column(title, overflow="fold")  # all of a name, for it is to be typed
    for name in families:
        table.add_row(
            name, ", ".join(types[name]), ", ".join(p for p in checkpoint.preset_names() if p.startswith(f"{name}-"))
        )
    console.output().print(table)
    console.output().print("Bundled with trained weights: demo. Any hub id or folder of these types works.")
