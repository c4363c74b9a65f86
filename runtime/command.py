"""`vlmc run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import console
from ..artifact import Artifact
from ..errors import VlmcError

if TYPE_CHECKING:
    from PIL.Image import Image

    from .matching import Matcher


@click.command()
@click.argument("artefact", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, type=click.Path(path_type=Path))
@click.option("--prompt", "-p", "prompts", required=True, multiple=True, help="The question; texts to match, one each.")
@click.option("--device", default="", help="Whose engines to run (the newest build's that can run here).")
@click.option("--recipe", default="", help="Of which build (the newest that can run here).")
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option("--threads", default=0, type=click.IntRange(0, 1024), help="Threads to run on (all cores).")
@click.option("--json", "as_json", is_flag=True, help="Print the answer and its timings as JSON.")
def run(
    artefact: Path,
    images: tuple[Path, ...],
    prompts: tuple[str, ...],
    device: str,
    recipe: str,
    max_tokens: int,
    threads: int,
    as_json: bool,
) -> None:
    """Answer a question about IMAGES with the engines that the build kept; the answer streams. A model that matches
    (CLIP) says how well each picture fits each of several prompts.

    Example: vlmc run out/demo picture.png --prompt "How many red circles are there?"
    """
    from . import backends
    from .images import open_image
    from .matching import open_matcher
    from .session import open_session

    pictures = [open_image(path) for path in images]
    opened = Artifact(artefact)
    build = opened.build(device, recipe, backends.can_run)
    engines = {component: choice.engine for component, choice in build.choices.items()}
    if missing := [component for component in opened.components if component not in engines]:
        raise VlmcError(
            f"The build {build.device}/{build.recipe} of {artefact} names no engine for the {', '.join(missing)}",
            fix=f"run `vlmc build {artefact} --device {build.device} --recipe {build.recipe}`",
        )
    if opened.manifest.matching is not None:
        _match(open_matcher(opened, build.device, engines, threads), images, pictures, prompts, engines, as_json)
        return
    if len(prompts) > 1:
        raise VlmcError("This model answers one question", found=f"{len(prompts)} prompts", fix="give --prompt once")
    session = open_session(opened, build.device, engines, threads)
    pieces: list[str] = []
    for piece in session.answer(pictures, prompts[0], max_tokens):
        piece = piece if "".join(pieces) else piece.lstrip()  # many templates leave the blank to the answer
        pieces.append(piece)
        if not as_json:
            click.echo(piece, nl=False)
    if as_json:
        times = session.timings
        console.print_json(
            {
                "answer": "".join(pieces),
                "device": build.device,
                "recipe": build.recipe,
                "engines": engines,
                "tokens": times.tokens,
                "preprocess_ms": times.preprocess * 1000,
                "vision_ms": times.vision * 1000,
                "prefill_ms": times.prefill * 1000,
                "decode_ms": [seconds * 1000 for seconds in times.decode],
            }
        )
    else:
        click.echo()
        if not "".join(pieces).strip():
            console.note("The model's answer is empty.")
        if session.timings.tokens == max_tokens:
            console.note(f"The answer may be cut off: --max-tokens allows {max_tokens}.")


def _match(
    matcher: Matcher,
    images: Sequence[Path],
    pictures: Sequence[Image],
    texts: Sequence[str],
    engines: dict[str, str],
    as_json: bool,
) -> None:
    from rich.table import Table

    from .matching import rows

    found = list(rows([str(path) for path in images], texts, matcher.match(pictures, texts)))
    if as_json:
        times = matcher.timings
        milliseconds = {f"{name}_ms": seconds * 1000 for name, seconds in vars(times).items()}
        console.print_json({"matches": found, "engines": engines} | milliseconds)
        return
    table = Table("picture", "text", "probability", "cosine")
    for row in found:
        chance = f"{row['probability']:.1%}" if "probability" in row else ""
        table.add_row(row["picture"], row["text"], chance, f"{row['cosine']:.3f}")
    console.output().print(table)
