"""The answers gallery: pictures with their questions, and what the variants answered, side by side."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from . import words
from .document import Answer, Report

_PICTURE = re.compile(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}", re.ASCII)

_LONG = 240  # characters of an answer that are shown; report.json has the rest


@dataclass
class Given:
    """An answer and the variants that gave it; `mark` is right, part or wrong, `told` the same in words."""

    text: str
    mark: str
    told: str
    variants: list[str] = field(default_factory=list)


@dataclass
class Question:
    """Its answers, those of the first variant first."""

    task: str
    prompt: str
    gold: str
    given: dict[str, Given] = field(default_factory=dict)


@dataclass
class Picture:
    """`data` is a data URI, empty where the report holds no picture; `alt` describes it for who cannot see it."""

    name: str
    data: str = ""
    alt: str = ""
    questions: dict[tuple[str, str], Question] = field(default_factory=dict)


def pictures(report: Report) -> list[Picture]:
    """Every picture of the report in its order; only embedded data is taken, never an address to load."""
    found: dict[str, Picture] = {}
    for variant in report.variants:
        for answer in variant.answers:
            picture = found.setdefault(answer.image, Picture(answer.image))
            if not picture.data and _PICTURE.fullmatch(answer.image_data):
                picture.data = answer.image_data
            if answer.task == "caption_brief":
                picture.alt = answer.gold
            key = (answer.task, answer.prompt)
            question = picture.questions.setdefault(key, Question(words.task(answer.task), answer.prompt, answer.gold))
            question.given.setdefault(answer.answer, _given(answer)).variants.append(variant.name)
    return list(found.values())


def _given(answer: Answer) -> Given:
    said = answer.answer
    if len(said) > _LONG:
        said = f"{said[:_LONG]}… ({len(said)} characters)"
    if answer.right:
        return Given(said, "right", "right")
    if answer.score:
        return Given(said, "part", f"{100 * answer.score:.0f} % of the facts")
    return Given(said, "wrong", "wrong")
