from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.profiles.questions import Question, examples, read_set, refuse_calibrated, refuse_unaskable
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
        ("\n\nnot json", r"set\.jsonl, line 3 is not valid JSON"),
        ("null", "line 1 is no JSON object. Found: NoneType"),
        ("[" * 100_000, "line 1 is not valid JSON. Found: maximum recursion"),
        (" " * (1 << 20), "line 1 is longer than 1048576 characters"),
        ('{"prompt": "x", "answer": "y"}', "line 1 lacks 'image'. Expected: one"),
        ('{"image": "a.png", "prompt": "x"}', "line 1 lacks 'answer'"),
        ('{"image": "a.png", "prompt": "x", "answer": 1}', "line 1 has no text in 'answer'. Found: 1. "),
        ('{"image": "a.png", "prompt": null, "answer": "y"}', "line 1 has no text in 'prompt'. Found: null"),
        ('{"image": "gone.png", "prompt": "x", "answer": "y"}', "line 1 names a picture that is not there"),
        ('{"image": "%s", "prompt": "x", "answer": "y"}' % ("a" * 300), "names a picture that is not there"),
        ('{"image": "a.png", "prompt": "x", "answer": "y", "task": 3}', "no text in 'task'"),
        ('{"image": "a.png", "prompt": "x", "answer": "y", "facts": 3}', "no list of texts in 'facts'"),
        ('{"image": "a.png", "prompt": "x", "answer": "y", "facts": ["z", 3]}', "no list of texts in 'facts'"),
    ],
    ids=lambda text: text[:40],
)
def test_a_bad_set_is_a_sentence(question_set: Path, text: str, found: str) -> None:
    question_set.write_text(text)
    with pytest.raises(VlmcError, match=found):
        read_set(question_set, 5)


def test_a_missing_set_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match="There is no evaluation set"):
        read_set(tmp_path / "absent.jsonl", 5)
    with pytest.raises(VlmcError, match=r"The evaluation set .* cannot be read. Found: it is no file"):
        read_set(tmp_path, 5)
    (tmp_path / "latin1.jsonl").write_bytes(b"\xe9")
    with pytest.raises(VlmcError, match="is not UTF-8 text"):
        read_set(tmp_path / "latin1.jsonl", 5)


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


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ({"prompt": "Is it <image>?"}, "line 2: The question contains the token that stands for a picture"),
        ({"prompt": "\ud800"}, "line 2: The prompt is not valid Unicode text"),
        ({"prompt": "word " * 16}, "line 2: The prompt is longer than the KV cache. Found: 17 tokens"),
        ({"image": "broken.png"}, r"line 2: .*broken\.png is not a picture that vlmc reads"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(
    artifact: Artifact, question_set: Path, bad: dict[str, str], found: str
) -> None:
    (question_set.parent / "broken.png").write_text("no picture")
    good = {"image": "a.png", "prompt": "word " * 15, "answer": "y"}
    question_set.write_text(f"{json.dumps(good)}\n{json.dumps(good | bad)}\n")
    first, second = read_set(question_set, 5)
    checked: list[int] = []
    refuse_unaskable(artifact, [first, first], checked.append)
    assert checked == [0, 1]
    with pytest.raises(VlmcError, match=rf"set\.jsonl, {found}"):
        refuse_unaskable(artifact, [first, second], checked.append)


class Folder:
    """An artefact as far as the plans of its recipes go."""

    def __init__(self, root: Path, pictures: list[str]) -> None:
        self.root = root
        (root / "plans").mkdir()
        (root / "plans" / "int8.json").write_text(json.dumps({"calibrated_on": {"pictures": pictures}}))
        (root / "plans" / "w4.json").write_text(json.dumps({"calibrated_on": None}))

    def plan_path(self, recipe: str) -> Path:
        return self.root / "plans" / f"{recipe}.json"


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


@pytest.mark.parametrize("plan", [[], {"calibrated_on": [1]}, {"calibrated_on": {"pictures": [{}]}}, {"samples": []}])
def test_a_plan_of_another_form_is_one_sentence(plan: object, artifact: Artifact, question_set: Path) -> None:
    (artifact.root / "plans").mkdir()
    (artifact.root / "plans/int8.json").write_text(json.dumps(plan))
    with pytest.raises(VlmcError, match=r"int8\.json.*run `vlmc calibrate .* --recipe int8`"):
        refuse_calibrated(artifact, "int8", read_set(question_set, 1))
    with pytest.raises(VlmcError, match="leaves the folder"):
        refuse_calibrated(artifact, "../../int8", read_set(question_set, 1))
