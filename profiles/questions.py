"""The evaluation set: JSON Lines of {"image", "prompt", "answer", "task", "facts"}, pictures beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..artifact import Artifact
from ..errors import VlmcError
from ..runtime.images import open_image, picture_hash
from ..runtime.matching import Matcher
from ..runtime.session import Session
from . import plans

MAX_LINE = 1 << 20  # characters
_FORM = 'one {"image": …, "prompt": …, "answer": …, "task": …} a line'


@dataclass(frozen=True)
class Question:
    """One question about one picture; `facts` are what a caption should state. `where` names it in messages."""

    image: Path
    prompt: str
    gold: str
    task: str
    facts: tuple[str, ...]
    where: str = ""


@dataclass(frozen=True)
class Line:
    """One object of a set in JSON Lines. What it lacks is a VlmcError that says where, and what `form` a line has."""

    values: Mapping[str, Any]
    where: str
    form: str

    def text(self, name: str) -> str:
        """The text of that name."""
        value = self._value(name)
        if not isinstance(value, str):
            raise VlmcError(f"{self.where} has no text in {name!r}", found=json.dumps(value)[:80], expected=self.form)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """The list of that name, of one text or more."""
        value = self._value(name)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            found = json.dumps(value)[:80]
            raise VlmcError(f"{self.where} has no list of texts in {name!r}", found=found, expected=self.form)
        return tuple(value)

    def image(self, folder: Path) -> Path:
        """The picture, whose name is relative to the set's folder."""
        image = folder / self.text("image")
        if not os.path.isfile(image):  # unlike Path's, which raises where the name is one that no file can have
            raise VlmcError(f"{self.where} names a picture that is not there", found=str(image)[:300])
        return image

    def _value(self, name: str) -> Any:
        if name not in self.values:
            raise VlmcError(f"{self.where} lacks {name!r}", expected=self.form)
        return self.values[name]


def read_lines(path: Path, what: str, form: str) -> Iterator[Line]:
    """The lines of a file in JSON Lines, which is `what`, blank ones passed over. A file that cannot be read is a
    VlmcError, and so is a line that is no object."""
    if path.exists() and not path.is_file():  # a folder, or a pipe that may never end
        raise VlmcError(f"The {what} {path} cannot be read", found="it is no file", fix="check the path")
    try:
        with path.open(encoding="utf-8") as file:
            number = 0
            while line := file.readline(MAX_LINE):
                number += 1
                where = f"{path}, line {number}"
                if len(line) == MAX_LINE:
                    raise VlmcError(f"{where} is longer than {MAX_LINE} characters", expected=form)
                if line.strip():
                    yield Line(_parsed(line, where, form), where, form)
    except FileNotFoundError:
        raise VlmcError(f"There is no {what} {path}", fix="check the path") from None
    except UnicodeDecodeError as error:
        raise VlmcError(f"{path} is not UTF-8 text", found=str(error), expected=form) from None
    except OSError as error:
        raise VlmcError(f"The {what} {path} cannot be read", found=error.strerror or str(error)) from None


def read_set(path: Path, pictures: int) -> list[Question]:
    """The questions about the first `pictures` different pictures, in the order of the file."""
    questions: list[Question] = []
    seen: set[Path] = set()
    for line in read_lines(path, "evaluation set", _FORM):
        question = Question(
            image=line.image(path.parent),
            prompt=line.text("prompt"),
            gold=line.text("answer"),
            task=line.text("task") if line.values.get("task") else "questions",
            facts=line.texts("facts") if line.values.get("facts") else (),
            where=line.where,
        )
        if question.image not in seen and len(seen) == pictures:
            break
        seen.add(question.image)
        questions.append(question)
    if not questions:
        raise VlmcError(f"The evaluation set {path} holds no questions", expected=_FORM)
    return questions


def refuse_unaskable(artifact: Artifact, questions: Sequence[Question], checked: Callable[[int], None]) -> None:
    """Raises where a question or its picture is none that the model takes, on which every variant would fail after all
    else was measured. `checked` is called with the number of those that were found to be good."""
    engine: Any = SimpleNamespace(capacity=artifact.manifest.kv.capacity)  # no more of one is needed for it
    matches = artifact.manifest.matching is not None
    model = Matcher(artifact, engine, engine) if matches else Session(artifact, engine, engine, engine)
    for number, question in enumerate(questions):
        checked(number)
        try:
            images = [open_image(question.image)]
            if isinstance(model, Matcher):
                model.preprocess(images)
                model.encode(question.facts)
            else:
                model.check_length(model.prepare(images, question.prompt))
        except VlmcError as error:
            what = f"{question.where}: {error.what}"
            raise VlmcError(what, found=error.found, expected=error.expected, fix=error.fix) from None


def refuse_calibrated(artifact: Artifact, recipe: str, questions: Sequence[Question]) -> None:
    """Raises where a picture is one that the recipe's plan was calibrated on, found by its pixels in any format."""
    plan = plans.read(artifact, recipe)
    calibrated_on = set(plan.calibrated_on.pictures) if plan and plan.calibrated_on else set()
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


def _parsed(line: str, where: str, form: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise VlmcError(f"{where} is not valid JSON", found=str(error), expected=form) from None
    if not isinstance(values, dict):
        raise VlmcError(f"{where} is no JSON object", found=type(values).__name__, expected=form)
    return values
