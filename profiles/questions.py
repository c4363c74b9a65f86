"""The evaluation set: JSON Lines of {"image", "prompt", "answer", "task", "facts"}, pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..artifact import Artifact
from ..errors import VlmcError
from ..files import read_json
from ..runtime.images import open_image, picture_hash


@dataclass(frozen=True)
class Question:
    """One question about one picture; `facts` are what a caption should state."""

    image: Path
    prompt: str
    gold: str
    task: str
    facts: tuple[str, ...]


def read_set(path: Path, pictures: int) -> list[Question]:
    """The questions about the first `pictures` different pictures, in the order of the file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VlmcError(f"The evaluation set {path} cannot be read", found=str(error), fix=_SHAPE) from None
    questions: list[Question] = []
    seen: set[Path] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        question = _question(path, number, line)
        if question.image not in seen and len(seen) == pictures:
            break
        seen.add(question.image)
        questions.append(question)
    if not questions:
        raise VlmcError(f"The evaluation set {path} holds no questions", fix=_SHAPE)
    return questions


def refuse_calibrated(artifact: Artifact, recipe: str, questions: Sequence[Question]) -> None:
    """Raises where a picture is one that the recipe's plan was calibrated on, found by its pixels in any format."""
    path = artifact.root / "plans" / f"{recipe}.json"
    plan = read_json(path) if path.is_file() else {}
    calibrated_on = set((plan.get("calibrated_on") or {}).get("pictures", ()))
    images = dict.fromkeys(question.image for question in questions) if calibrated_on else ()
    common = [image for image in images if picture_hash(open_image(image)) in calibrated_on]
    if common:
        raise VlmcError(
            f"The recipe {recipe!r} was calibrated on {len(common)} of the evaluation's pictures: its accuracy would "
            "be too good",
            found=f"for example {common[0]}",
            fix="evaluate on other pictures, or calibrate again without these",
        )


def demo_set(artifact: Artifact, pictures: int) -> Path:
    """The demo's held-out pictures, made on first use in `profile/sets/` of the artefact."""
    from ..demo.sets import write_set

    folder = artifact.root / "profile" / "sets" / f"test-{pictures}"
    listed = folder / "set.jsonl"
    return listed if listed.is_file() else write_set(folder, "test", pictures)


def examples(questions: Sequence[Question], count: int) -> list[int]:
    """Indices of a few questions to show: different pictures, the tasks in turn."""
    chosen: list[int] = []
    used: dict[str, int] = {}
    for _ in range(count):
        free = [
            index
            for index, question in enumerate(questions)
            if all(question.image != questions[other].image for other in chosen)
        ]
        if not free:
            break
        best = min(free, key=lambda index: used.get(questions[index].task, 0))
        used[questions[best].task] = used.get(questions[best].task, 0) + 1
        chosen.append(best)
    return chosen


_SHAPE = 'give a file with one {"image": …, "prompt": …, "answer": …, "task": …} a line'


def _question(path: Path, number: int, line: str) -> Question:
    try:
        row = json.loads(line)
        question = Question(
            image=path.parent / str(row["image"]),
            prompt=str(row["prompt"]),
            gold=str(row["answer"]),
            task=str(row.get("task") or "questions"),
            facts=tuple(str(fact) for fact in row.get("facts") or ()),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise VlmcError(f"Line {number} of the evaluation set {path} is no question", found=what, fix=_SHAPE) from None
    if not question.image.is_file():
        raise VlmcError(f"Line {number} of {path} names a picture that is not there", found=str(question.image))
    return question
