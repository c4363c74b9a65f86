"""Writes a folder of scenes that any program can read: PNG pictures and `set.jsonl`, one question a line."""

import json
import os
from pathlib import Path

from .scenes import scene
from .words import Split


def write_set(folder: Path, split: Split, count: int, first: int = 0) -> Path:
    """Write `count` scenes from seed `first` on; returns the path of `set.jsonl`.

    The list is written last and put in place by a rename: where it exists, every picture in it does too.
    """
    if count < 1:
        raise ValueError(f"a set holds at least one picture, not {count}")
    pictures = folder / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in range(first, first + count):
        made = scene(seed, split)
        path = pictures / f"{split}-{seed:06d}.png"
        made.image.save(path, optimize=False)
        for question in made.questions:
            line = {
                "image": path.relative_to(folder).as_posix(),
                "prompt": question.prompt,
                "answer": question.answer,
                "task": question.task,
                "facts": list(question.facts),
            }
            lines.append(json.dumps(line) + "\n")
    listed = folder / "set.jsonl"
    beside = folder / ".set.jsonl.new"
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(listed)
    return listed
