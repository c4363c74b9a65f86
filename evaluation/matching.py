"""How well a model that matches finds the right label of a picture, and the right picture of a label.

Zero-shot classification (Radford et al. 2021, arXiv:2103.00020): the label nearest to the picture is one of its own.
Retrieval, recall@1: the picture nearest to the label has it. Nearest is the largest cosine; a tie goes to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import accuracy

ZERO_SHOT, RECALL = "zero_shot", "recall_at_1"

Row = dict[str, Any]


def zero_shot(answers: Sequence[Row]) -> list[Row]:
    """Rows as `accuracy` wants them, one a picture. An answer has `file`, `answer` (the label that was nearest) and
    `facts` (those that are right)."""
    return [
        {"image": row["file"], "task": ZERO_SHOT, "prompt": "", "score": float(row["answer"] in row["facts"])}
        for row in answers
    ]


def retrieval(answers: Sequence[Row], labels: Sequence[str]) -> list[Row]:
    """The same, one a label that a picture here has; an answer's `cosines` are with each of `labels` in their order."""
    cosines = np.array([row["cosines"] for row in answers])
    nearest = cosines.argmax(axis=0)
    known = {label for row in answers for label in row["facts"]}
    return [
        {"image": label, "task": RECALL, "prompt": "", "score": float(label in answers[nearest[index]]["facts"])}
        for index, label in enumerate(labels)
        if label in known
    ]


def summarize(answers: Sequence[Row], labels: Sequence[str]) -> dict[str, Any]:
    """`accuracy.summarize` with both as tasks; `overall` is zero-shot classification alone. No answers: a VlmcError."""
    classified = accuracy.summarize(zero_shot(answers))
    found = accuracy.summarize(retrieval(answers, labels))
    return {"tasks": classified["tasks"] | found["tasks"], "overall": classified["overall"]}
