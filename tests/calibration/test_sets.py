"""A calibration set is read whole, known by its content, and refused by the line that is wrong."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from vlmc.calibration.sets import CalibrationSet, demo_set, load_set
from vlmc.errors import VlmcError
from vlmc.profiles.questions import MAX_LINE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.linear_gradient("L").convert("RGB").resize((40, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "b.png")
    return tmp_path


def write(folder: Path, *rows: Any, name: str = "set.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_rows_have_what_the_lines_say(set_file: Path) -> None:
    loaded = load_set(set_file)
    assert loaded.name == "three"
    assert [row.prompt for row in loaded.rows][:2] == ["How many objects are there?", "Is it night?"]
    assert loaded.rows[1].answer == "yes"
    assert loaded.rows[2].answer == ""
    assert loaded.rows[0].image == set_file.parent / "a.png"
    assert len(loaded.pictures) == 2


def test_pictures_may_lie_elsewhere_and_blank_lines_do_not_count(folder: Path) -> None:
    (folder / "lists").mkdir()
    path = write(folder / "lists", "", {"image": "../a.png", "prompt": "?"}, "  ")
    assert len(load_set(path).rows) == 1


def test_a_limit_takes_the_first_rows(folder: Path) -> None:
    path = write(folder, {"image": "a.png", "prompt": "1"}, {"image": "b.png", "prompt": "2"}, "not even JSON")
    limited = load_set(path, limit=2)
    assert [row.prompt for row in limited.rows] == ["1", "2"]
    assert load_set(path, limit=1).sha256 != limited.sha256


def test_the_hash_covers_rows_and_pictures_but_not_their_place(folder: Path, tmp_path_factory: Any) -> None:
    path = write(folder, {"image": "a.png", "prompt": "?"})
    before = load_set(path).sha256
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, elsewhere)
    assert load_set(elsewhere / "set.jsonl").sha256 == before
    write(elsewhere, {"image": "a.png", "prompt": "!"})
    assert load_set(elsewhere / "set.jsonl").sha256 != before
    Image.new("RGB", (40, 30), "blue").save(folder / "a.png")
    assert load_set(path).sha256 != before


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1, 2]", "line 2 is no JSON object"),
        ('{"prompt": "?"}', "line 2 lacks 'image'"),
        ('{"image": "a.png"}', "line 2 lacks 'prompt'"),
        ('{"image": "a.png", "prompt": ""}', "line 2 has an empty 'image' or 'prompt'"),
        ('{"image": "a.png", "prompt": 3}', "line 2 has no text in 'prompt'"),
        ('{"image": "a.png", "prompt": "?", "answer": null}', "line 2 has no text in 'answer'"),
        ('{"image": "gone.png", "prompt": "?"}', "line 2: There is no picture .*gone.png"),
        ('{"image": "set.jsonl", "prompt": "?"}', "line 2: .*set.jsonl is not a picture"),
        ('{"image": ".", "prompt": "?"}', "line 2: .* is not a file"),
        ("[" * 100_000, "line 2 is not valid JSON"),
    ],
)
def test_a_wrong_line_is_named(folder: Path, line: str, says: str) -> None:
    path = write(folder, {"image": "a.png", "prompt": "?"}, line)
    with pytest.raises(VlmcError, match=says):
        load_set(path)


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_an_empty_set_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(VlmcError, match="is empty"):
        load_set(write(folder, text))


def test_a_missing_binary_or_endless_file_is_refused(folder: Path) -> None:
    with pytest.raises(VlmcError, match="There is no calibration set"):
        load_set(folder / "gone.jsonl")
    with pytest.raises(VlmcError, match="cannot be read"):
        load_set(folder)
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(VlmcError, match="is not UTF-8"):
        load_set(folder / "binary.jsonl")
    with pytest.raises(VlmcError, match="line 1 is longer"):
        load_set(write(folder, "x" * (MAX_LINE + 5)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=80).map(lambda t: f'{{"image": "a.png", {t}}}'.encode())))
def test_no_bytes_whatever_end_in_anything_but_a_set_or_a_sentence(folder: Path, content: bytes) -> None:
    path = folder / "fuzz.jsonl"
    path.write_bytes(content)
    with contextlib.suppress(VlmcError):
        assert load_set(path).rows


def test_the_demo_set_asks_each_picture_one_question_of_each_task_in_turn(tmp_path: Path) -> None:
    made: CalibrationSet = demo_set(tmp_path, 6)
    assert made.name == "demo"
    assert len(made.pictures) == len(made.rows) == 6
    tasks = [json.loads(line)["task"] for line in (tmp_path / "demo.jsonl").read_text().splitlines()]
    assert len(set(tasks[:5])) == 5
    assert tasks[0] == tasks[5]
    assert all(row.answer for row in made.rows)
