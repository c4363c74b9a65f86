"""Exports that are killed, each at a place of its own, for test_resume.py.

    python killed_exports.py CHECKPOINT GRAPHS PICTURES FOLDER PLACES

GRAPHS is a JSON object of what tracing would give, PLACES a JSON list; the export to FOLDER/3/out is killed at the
fourth of them. This process has imported torch and is forked for each: to import it nine times would take a minute.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
from vlmc import files
from vlmc.exporter import export, graph
from vlmc.exporter.checkpoint import resolve


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_half_a_graph() -> None:
    save = graph.save

    def half(model: ir.Model, path: Path, *report: Any) -> None:
        save(model, path, *report)
        if "decoder" in path.name:
            os.truncate(path.with_name(f"{path.name}.data"), 1000)
            die()

    graph.save = half


def before_the_record(last: Callable[[Path], bool]) -> None:
    """Dies in the place of writing the first file of which that is true."""
    write = export.write_record
    export.write_record = lambda path, record: die() if last(path) else write(path, record)


def is_a_manifest_after_goldens(path: Path) -> bool:
    return path.name == "manifest.json" and (path.parent / "golden/golden.json").exists()


def in_the_last_step() -> None:
    files._sync = die


# What makes an export die at each place; at any other it dies when it reports that stage.
PREPARE: dict[str, Callable[[], None]] = {
    "half a graph": in_half_a_graph,
    "a graph without its record": lambda: before_the_record(lambda path: path.name == "decoder.json"),
    "goldens that are not in the manifest": lambda: before_the_record(is_a_manifest_after_goldens),
    "the last step": in_the_last_step,
}


def export_until(place: str, source: str, graphs: dict[str, str], pictures: Path, target: Path) -> None:
    graph.export_component = lambda name, *_: ir.load(graphs[name])
    PREPARE.get(place, lambda: None)()

    def report(stage: str, done: int, total: int) -> None:
        if stage == place:
            die()

    options = export.Options(capacity=128, cases=2, picture_set=pictures, max_new_tokens=2)
    export.export(resolve(source), target, options, report)


if __name__ == "__main__":
    source, graphs, pictures, folder, places = sys.argv[1:]
    for index, place in enumerate(json.loads(places)):
        if (child := os.fork()) == 0:
            export_until(place, source, json.loads(graphs), Path(pictures), Path(folder, str(index), "out"))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, place
