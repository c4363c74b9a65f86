"""What `vlmc profile` does otherwise for models that match (CLIP): their evaluation set, and their verdict in words.

A run matches one golden picture with its prompt. For the accuracy every picture of a set is matched with all labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import VlmcError
from . import verdict
from .questions import Line, Question, read_lines

_FORM = 'one {"image": …, "label": …} or {"image": …, "labels": […]} a line'


def read_labels(path: Path, pictures: int) -> list[Question]:
    """The first `pictures` pictures of a JSONL set with the labels that are right for each (`facts`)."""
    found = [_labelled(line, path.parent) for line in islice(read_lines(path, "evaluation set", _FORM), pictures)]
    if len(labels_of(found)) < 2:
        raise VlmcError(
            f"The evaluation set {path} has nothing to choose from", found="fewer than 2 labels", expected=_FORM
        )
    return found


def labels_of(questions: Sequence[Question]) -> tuple[str, ...]:
    """Every label once, in the order of the set."""
    return tuple(dict.fromkeys(label for question in questions for label in question.facts))


def _labelled(line: Line, folder: Path) -> Question:
    labels = line.texts("labels") if "labels" in line.values else (line.text("label"),)
    return Question(line.image(folder), "", labels[0], "", labels, line.where)


Group = Mapping[str, Any]


def sentences(report: Group, choices: Group) -> list[str]:
    """As `verdict.sentences`, of a model that matches."""
    variants = report["variants"]
    kept = next(variant for variant in variants if variant["name"] == verdict.kept_name(variants, choices))
    others = [variant for variant in variants if variant is not kept]
    speedups = [entry for entry in report["speedups"] if entry["of"] == kept["name"]]
    return [
        _speed(kept, speedups),
        *verdict.parts(speedups, variants, ("vision", "text")),
        *verdict.accuracy(kept, others),
        *verdict.beaten(kept, report, choices),
        verdict.memory(kept, others),
        _energy(kept, report["power"]),
        *verdict.limits(kept),
        *verdict.doubts(report),
        *(f"{name} was not measured: {reason.rstrip('.')}." for name, reason in report["not_measured"].items()),
    ]


def _speed(kept: Group, speedups: Sequence[Group]) -> str:
    whole, vision, text = (kept["latency_ms"][part]["median"] for part in ("end_to_end", "vision", "text"))
    said = (
        f"{kept['name']} matches a picture with a text in {verdict.figure(whole)} ms, "
        f"{verdict.figure(vision)} ms of them for the picture and {verdict.figure(text)} ms for the text"
    )
    return said + "".join(f"{', ' if i else ': '}{verdict.ratio(entry)}" for i, entry in enumerate(speedups)) + "."


def _energy(kept: Group, source: Group) -> str:
    energy = kept["energy"]
    if isinstance(energy["joules_per_pair"], str):
        return f"Energy: {energy['joules_per_pair']}."
    idle = source["idle_watts"]
    above = verdict.joules(energy["joules_per_pair_above_idle"])
    told = idle if isinstance(idle, str) else f"{above} without {idle:.3g} W of idle power"
    cost = f"A picture matched with a text costs {energy['joules_per_pair']:.3g} J, at {energy['watts']:.3g} W"
    return f"{cost} ({told}; {verdict.metered(source)})."
