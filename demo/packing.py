"""Turns pictures into training rows: one row holds a picture and many questions about it, side by side.

Every question sees the picture and itself but not its neighbours, and its positions start right after the
picture, so a row teaches exactly what the same questions one by one would, at a third of the cost.
"""

from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from . import atlas
from .checkpoint import AFTER, BEFORE, END
from .layout import SIDE, Layout
from .questions import ask
from .scenes import layout_of, render, stream
from .words import TASKS, Split

LENGTH = 384
# How many questions of each task a row holds; counting and places are the hardest.
ASKED = (
    "caption_brief",
    *["objects_and_counts"] * 5,
    *["spatial_relationships"] * 5,
    *["scene_context"] * 2,
    *["attributes"] * 4,
)
CHUNK = 64  # pictures a worker hands over at once
Small = npt.NDArray[np.int16]


def mirrored(layout: Layout) -> Layout:
    """The layout of the picture flipped left to right."""
    groups = tuple(
        replace(group, things=tuple(replace(t, x=SIDE - t.x) for t in group.things)) for group in layout.groups
    )
    return replace(layout, groups=groups)


class Packer:
    def __init__(self, words: PreTrainedTokenizerFast) -> None:
        self._words = words
        self._known: dict[str, list[int]] = {}
        self._before = self._ids(BEFORE)
        self._end = self._ids(END)

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._words.encode(text, add_special_tokens=False)
        return self._known[text]

    def row(self, layout: Layout, seed: int, split: Split, again: int = 0) -> Small:
        """Token, position, segment (0 picture, -1 padding), task of an answer's token (else 0): by LENGTH.

        Questions that do not fit any more are left out.
        """
        rng = stream(seed, split, f"training questions {again}")
        out = np.zeros((4, LENGTH), np.int16)
        out[2] = -1
        at = len(self._before)
        out[0, :at], out[1, :at], out[2, :at] = self._before, range(at), 0
        for segment, task in enumerate(ASKED, 1):
            question = ask(layout, task, rng)
            prompt = self._ids(question.prompt + AFTER)
            # Captions are nearly all different: remembering them would fill the memory.
            spoken = " " + question.answer
            answer = self._words.encode(spoken) if task == "caption_brief" else self._ids(spoken)
            whole = [*prompt, *answer, *self._end]
            end = at + len(whole)
            if end > LENGTH:
                break
            out[0, at:end] = whole
            out[1, at:end] = range(len(self._before), len(self._before) + len(whole))
            out[2, at:end] = segment
            out[3, at + len(prompt) : end] = TASKS.index(task) + 1
            at = end
        return out


def chunks(
    words: PreTrainedTokenizerFast, seeds: Iterator[range], split: Split, sources: atlas.Sources
) -> Iterator[tuple[npt.NDArray[np.uint8], Small]]:
    """Pictures (n, side, side, 3) and their rows (n, 2, 4, LENGTH): as drawn, and mirrored."""
    packer = Packer(words)
    for some in seeds:
        pictures = np.empty((len(some), SIDE, SIDE, 3), np.uint8)
        rows = np.empty((len(some), 2, 4, LENGTH), np.int16)
        for i, seed in enumerate(some):
            layout = layout_of(seed, split, sources)
            pictures[i] = np.asarray(render(layout, stream(seed, split, "picture"), sources))
            rows[i, 0] = packer.row(layout, seed, split)
            rows[i, 1] = packer.row(mirrored(layout), seed, split, 1)
        yield pictures, rows


def work(
    queue: "Queue[tuple[npt.NDArray[np.uint8], Small]]",
    folder: Path | None,
    tokenizer: Path,
    first: int,
    step: int,
) -> None:
    """A worker process: renders chunk after chunk of the training split until it is ended."""
    sources = atlas.full(folder) if folder else atlas.bundled("train")
    words = PreTrainedTokenizerFast.from_pretrained(tokenizer)

    def seeds() -> Iterator[range]:
        at = first
        while True:
            yield range(at * CHUNK, (at + 1) * CHUNK)
            at += step

    for chunk in chunks(words, seeds(), "train", sources):
        queue.put(chunk)
