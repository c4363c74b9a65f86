"""Goldens: real pictures and questions with PyTorch's outputs, against which every later stage is checked.

golden/golden.json   the cases: picture, prompt, greedy tokens, and by how much each token won
golden/golden.npz    for the first DETAILED cases the arrays between the components
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..artifact import Artifact
from ..demo import scenes
from ..errors import VlmcError
from ..files import read_json, write_json
from ..runtime.images import open_image
from ..runtime.runner import HostDecoder
from ..runtime.session import Session

DETAILED = 2  # cases whose arrays are kept; the others are held to their tokens alone
STEPS = 4  # decode steps of each detailed case whose logits are kept
FIRST_SEED = 1_000_000  # of the demo's calibration split, far from the pictures that calibrate


@dataclass(frozen=True)
class Case:
    """A picture (relative to the artefact) and a question about it."""

    image: str
    prompt: str
    task: str


def write_pictures(folder: Path, count: int, picture_set: Path | None) -> list[Case]:
    """`count` cases with their pictures copied as PNG: from a JSONL set, or else from the demo's generator."""
    (folder / "golden").mkdir()
    cases = []
    for index, (image, prompt, task) in enumerate(_pictures(count, picture_set)):
        name = f"golden/{index:02d}.png"
        image.save(folder / name)
        cases.append(Case(name, prompt, task))
    if len(cases) < count:
        raise VlmcError(
            f"{picture_set} holds too few pictures for the goldens", found=f"{len(cases)}", expected=f"at least {count}"
        )
    return cases


def _pictures(count: int, picture_set: Path | None) -> Iterator[tuple[Image.Image, str, str]]:
    if picture_set is None:
        for index in range(count):
            scene = scenes.scene(FIRST_SEED + index, "calibration")
            question = scene.questions[index % len(scene.questions)]  # every task in turn
            yield scene.image, question.prompt, question.task
        return
    for line in picture_set.read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        yield open_image(picture_set.parent / row["image"]), row["prompt"], row.get("task", "")


def record(session: Session, folder: Path, cases: Sequence[Case], max_new_tokens: int) -> Iterator[int]:
    """Runs PyTorch over the cases and writes the goldens; yields the number of cases done."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    rows = []
    for index, case in enumerate(cases):
        inputs = session.prepare([open_image(folder / case.image)], case.prompt)
        tokens, margins = [], []
        for token in session.generate(inputs, max_new_tokens):
            best = np.sort(np.partition(session.decoder.logits(), -2)[-2:])
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
    np.savez(folder / "golden" / "golden.npz", **arrays)  # type: ignore[arg-type]
    write_json(folder / "golden" / "golden.json", {"cases": rows})


def detail(session: Session, image: Path, prompt: str, tokens: Sequence[int]) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays between the components for one case, its decode steps fed with `tokens` whatever was chosen."""
    inputs = session.prepare([open_image(image)], prompt)
    assert inputs.pixel_values is not None
    features = session.vision.run({"pixel_values": inputs.pixel_values})["image_features"]
    embeds = session.embed_prompt(inputs.input_ids, features)
    decoder = session.decoder
    assert isinstance(decoder, HostDecoder)
    decoder.prefill(embeds)
    arrays = {"pixel_values": inputs.pixel_values, "input_ids": inputs.input_ids, "image_features": features}
    arrays |= {"inputs_embeds": embeds, "prefill_logits": decoder.logits()}
    steps = list(tokens[:STEPS])
    logits = []
    for token in steps:
        decoder.feed(token)
        logits.append(decoder.logits())
    if logits:
        arrays |= {"step_tokens": np.array(steps, np.int64), "step_logits": np.stack(logits)}
    return arrays


def read(artifact: Artifact) -> tuple[list[dict[str, Any]], dict[str, np.ndarray[Any, Any]]]:
    """The artefact's golden cases and arrays."""
    cases = read_json(artifact.path_of("golden/golden.json"))["cases"]
    with np.load(artifact.path_of("golden/golden.npz"), allow_pickle=False) as arrays:
        return cases, {name: arrays[name] for name in arrays.files}
