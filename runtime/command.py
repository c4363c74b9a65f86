"""`vlmc run`."""

from __future__ import annotations

from pathlib import Path

import click

from .. import console
from ..artifact import Artifact


@click.command()
@click.argument("artefact", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, type=click.Path(path_type=Path))
@click.option("--prompt", "-p", required=True, help="The question.")
@click.option("--device", default="", help="Whose engines to run (the newest build's).")
@click.option("--recipe", default="", help="Of which build (the newest).")
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option("--threads", default=0, type=click.IntRange(0), help="Threads to run on (all cores).")
@click.option("--json", "as_json", is_flag=True, help="Print the answer and its timings as JSON.")
def run(
    artefact: Path,
    images: tuple[Path, ...],
    prompt: str,
    device: str,
    recipe: str,
    max_tokens: int,
    threads: int,
    as_json: bool,
) -> None:
    """Answer a question about IMAGES with the engines that the build kept; the answer streams.

    Example: vlmc run out/demo picture.png --prompt "How many red circles are there?"
    """
    from .images import open_image
    from .session import open_session

    pictures = [open_image(path) for path in images]
    opened = Artifact(artefact)
    build = opened.build(device, recipe)
    engines = {component: choice.engine for component, choice in build.choices.items()}
    session = open_session(opened, build.device, engines, threads)
    pieces = []
    for piece in session.answer(pictures, prompt, max_tokens):
        pieces.append(piece)
        if not as_json:
            click.echo(piece, nl=False)
    if as_json:
        times = session.timings
        console.print_json(
            {
                "answer": "".join(pieces),
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
