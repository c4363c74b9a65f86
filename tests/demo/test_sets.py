"""A written set is a folder of PNG pictures and one JSON line per question, complete or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from vlmc.demo import sets
from vlmc.demo.scenes import scene
from vlmc.demo.words import TASKS


def test_a_set_holds_every_question_of_every_scene_in_order(tmp_path: Path) -> None:
    listed = sets.write_set(tmp_path / "set", "calibration", 3, first=5)
    assert listed == tmp_path / "set" / "set.jsonl"
    lines = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 3 * len(TASKS)
    expected = [(s, q) for s in (scene(seed, "calibration") for seed in (5, 6, 7)) for q in s.questions]
    for line, (made, question) in zip(lines, expected, strict=True):
        assert set(line) == {"image", "prompt", "answer", "task", "facts"}
        assert (line["prompt"], line["answer"], line["task"]) == (question.prompt, question.answer, question.task)
        assert line["facts"] == list(question.facts)
        assert not Path(line["image"]).is_absolute()
        assert Image.open(listed.parent / line["image"]).tobytes() == made.image.tobytes()


def test_nothing_else_lies_in_the_folder(tmp_path: Path) -> None:
    sets.write_set(tmp_path, "test", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "set.jsonl"]
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_an_interrupted_set_has_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(seed: int, split: str) -> object:
        if seed == 1:
            raise OSError("disk full")
        return scene(seed, split)

    monkeypatch.setattr(sets, "scene", broken)
    with pytest.raises(OSError, match="disk full"):
        sets.write_set(tmp_path, "test", 3)
    assert not (tmp_path / "set.jsonl").exists()


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        sets.write_set(tmp_path, "test", 0)
