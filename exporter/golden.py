"""Goldens: real pictures and questions with PyTorch's outputs, against which every later stage is checked.

golden/golden.json   the cases: picture, prompt, greedy tokens, and by how much each token won
golden/golden.npz    for the first DETAILED cases the arrays between the components
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..artifact import Artifact
from ..demo import scenes
from ..errors import VlmcError
from ..evaluation import goldens
from ..files import read_json, write_json
from ..profiles.questions import read_lines
from ..runtime.images import open_image
from ..runtime.runner import Array, HostDecoder
from ..runtime.session import Session

DETAILED = 2  # cases whose arrays are kept; the others are held to their tokens alone
STEPS = 4  # decode steps of each detailed case whose logits are kept
_FORM = 'one {"image": …, "prompt": …} a line'
FIRST_SEED = 1_000_000  # of the demo's calibration split, far from the pictures that calibrate


@dataclass(frozen=True)
class Case:
    """A picture (relative to the artefact) and a question about it."""

    image: str
    prompt: str
    task: str


def write_pictures(folder: Path, count: int, picture_set: Path | None) -> list[Case]:
    """`count` cases with their pictures copied as PNG: from a JSONL set, or else from the demo's generator."""
    (folder / "golden").mkdir(exist_ok=True)
    cases = []
    for index, (image, prompt, task) in enumerate(pictures(count, picture_set)):
        name = f"golden/{index:02d}.png"
        image.save(folder / name)
        cases.append(Case(name, prompt, task))
    if len(cases) < count:
        raise VlmcError(
            f"{picture_set} holds too few pictures for the goldens",
            found=f"{len(cases)}",
            expected=f"{count}",
            fix="add some, or ask for fewer with --cases",
        )
    return cases


def pictures(count: int, picture_set: Path | None) -> Iterator[tuple[Image.Image, str, str]]:
    """Picture, prompt and task of the first `count` cases; a VlmcError at a row that is none."""
    if picture_set is None:
        for index in range(count):
            scene = scenes.scene(FIRST_SEED + index, "calibration")
            question = scene.questions[index % len(scene.questions)]  # every task in turn
            yield scene.image, question.prompt, question.task
        return
    for line in islice(read_lines(picture_set, "set of pictures", _FORM), count):
        task = line.text("task") if "task" in line.values else ""
        yield open_image(line.image(picture_set.parent)), line.text("prompt"), task


def record(session: Session, folder: Path, cases: Sequence[Case], options: dict[str, Any]) -> Iterator[int]:
    """Runs PyTorch over the cases and writes the goldens; yields the number of cases done. Each answer has at most
    options["max_new_tokens"] tokens; the options are kept for `made_from`."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    rows = []
    for index, case in enumerate(cases):
        inputs = session.prepare([open_image(folder / case.image)], case.prompt)
        tokens, margins = [], []
        for token in session.generate(inputs, options["max_new_tokens"]):
            best = np.sort(np.partition(session.decoder.logits(), -2)[-2:])
            if not np.isfinite(best).all():
                raise VlmcError("The model's logits are not finite numbers", fix="check the checkpoint's weights")
            tokens.append(token)
            margins.append(round(float(best[1] - best[0]), 6))
        rows.append(
            {"image": case.image, "prompt": case.prompt, "task": case.task, "tokens": tokens, "margins": margins}
            | {"text": session.tokenizer.decode(tokens)}
        )
        if index < DETAILED:
            for name, array in detail(session, folder / case.image, case.prompt, tokens).items():
                arrays[f"{index}.{name}"] = array
        yield index + 1
    np.savez(folder / "golden" / "golden.npz", **arrays)  # type: ignore[arg-type]  # numpy types `allow_pickle` alone
    write_json(folder / "golden" / "golden.json", {"made_from": options, "cases": rows})


def detail(session: Session, image: Path, prompt: str, tokens: Sequence[int]) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays between the components for one case, each by the name of the input or output that it is, its decode
    steps fed with `tokens` whatever was chosen."""
    inputs = session.prepare([open_image(image)], prompt)
    features = session.vision.run(inputs.vision)["image_features"]
    fusion: dict[str, Array] = {}
    if session.fusion is not None:
        embeds = session.embed.run({"input_ids": inputs.input_ids[None]})["inputs_embeds"]
        fusion = session.fusion_inputs(inputs, embeds, features)
        fusion |= session.fusion.run(fusion)
    read = session.embed_prompt(inputs, features)
    decoder = session.decoder
    assert isinstance(decoder, HostDecoder)
    decoder.prefill(**read)
    prefill = decoder.logits()
    steps = list(tokens[: min(STEPS, decoder.capacity - read["inputs_embeds"].shape[1])])
    logits = []
    for token in steps:
        decoder.feed(token)
        logits.append(decoder.logits())
    return {
        **inputs.vision,
        "input_ids": inputs.input_ids,
        "image_features": features,
        **fusion,
        **read,
        "prefill_logits": prefill,
        "step_tokens": np.array(steps, np.int64),
        "step_logits": np.array(logits, np.float32).reshape(len(steps), prefill.size),
    }


def made_from(artifact: Artifact) -> dict[str, Any] | None:
    """The options that the artefact's goldens were recorded with."""
    found: Any = read_json(artifact.path_of("golden/golden.json"))
    return found.get("made_from") if isinstance(found, dict) else None


def read(artifact: Artifact) -> tuple[list[dict[str, Any]], dict[str, np.ndarray[Any, Any]]]:
    """The artefact's golden cases and arrays."""
    return goldens.cases(artifact), goldens.arrays(artifact)
