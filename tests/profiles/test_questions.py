from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vlmc.errors import VlmcError
from vlmc.profiles.questions import Question, examples, read_set, refuse_calibrated
from vlmc.runtime.images import picture_hash


def test_all_questions_about_the_first_pictures_are_read(question_set: Path) -> None:
    one, both = read_set(question_set, 1), read_set(question_set, 9)
    assert [question.task for question in one] == ["attributes", "caption_brief"]
    assert len(both) == 4
    assert one[1].facts == ("two dogs", "grass")
    assert one[0].image == question_set.parent / "a.png"


def test_a_plain_row_needs_no_task_and_no_facts(question_set: Path) -> None:
    question_set.write_text('{"image": "a.png", "prompt": "What?", "answer": "dogs"}\n\n')
    (question,) = read_set(question_set, 5)
    assert (question.task, question.facts) == ("questions", ())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "holds no questions"),
        ("not json\n", "Line 1 of the evaluation set"),
        ('{"prompt": "x", "answer": "y"}\n', "KeyError: 'image'"),
        ('{"image": "gone.png", "prompt": "x", "answer": "y"}\n', "a picture that is not there"),
        ('{"image": "a.png", "prompt": "x", "answer": "y", "facts": 3}\n', "is no question"),
    ],
)
def test_a_bad_set_is_a_sentence(question_set: Path, text: str, found: str) -> None:
    question_set.write_text(text)
    with pytest.raises(VlmcError, match=found):
        read_set(question_set, 5)


def test_a_missing_set_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match="cannot be read"):
        read_set(tmp_path / "absent.jsonl", 5)


@settings(max_examples=30)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_no_line_is_a_traceback(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.mktemp("set") / "set.jsonl"
    path.write_text(json.dumps(value) + "\n")
    with pytest.raises(VlmcError):
        read_set(path, 1)


def test_examples_show_other_pictures_and_tasks_in_turn() -> None:
    tasks = ["caption", "counts", "places"]
    asked = [Question(Path(f"{n}.png"), "?", "", task, ()) for n in range(4) for task in tasks]
    chosen = examples(asked, 4)
    assert [asked[index].image.stem for index in chosen] == ["0", "1", "2", "3"]
    assert [asked[index].task for index in chosen] == ["caption", "counts", "places", "caption"]
    assert len(examples(asked, 99)) == 4
    assert examples([], 4) == []


class Folder:
    """An artefact as far as the plans of its recipes go."""

    def __init__(self, root: Path, pictures: list[str]) -> None:
        self.root = root
        (root / "plans").mkdir()
        (root / "plans" / "int8.json").write_text(json.dumps({"calibrated_on": {"pictures": pictures}}))
        (root / "plans" / "w4.json").write_text(json.dumps({"calibrated_on": None}))


def test_a_picture_that_was_calibrated_on_is_refused_however_it_was_saved(tmp_path: Path) -> None:
    picture = Image.linear_gradient("L").resize((8, 8)).convert("RGB")
    picture.save(tmp_path / "again.bmp")
    picture.rotate(90).save(tmp_path / "other.png")
    artifact = Folder(tmp_path, [picture_hash(picture)])
    again, other = (Question(tmp_path / name, "?", "", "", ()) for name in ("again.bmp", "other.png"))
    with pytest.raises(VlmcError, match=r"calibrated on 1 of the evaluation's pictures.*again\.bmp"):
        refuse_calibrated(artifact, "int8", [other, again])  # type: ignore[arg-type]
    for recipe, asked in (("int8", [other]), ("w4", [again]), ("fp32", [again])):
        refuse_calibrated(artifact, recipe, asked)  # type: ignore[arg-type]
