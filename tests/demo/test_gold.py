"""Every gold answer is checked against the layout by a reader of its own, form by form."""

from __future__ import annotations

import math
import re
from collections import Counter
from random import Random

import pytest
from vlmc.demo import atlas
from vlmc.demo.layout import SIDE, Group, Layout
from vlmc.demo.questions import ask
from vlmc.demo.scenes import layout_of
from vlmc.demo.words import PLURALS, TASKS

SINGULAR = {plural: kind for kind, plural in PLURALS.items()}


def groups(layout: Layout, words: str) -> list[Group]:
    """The groups that words like "red balls", "balls", "red objects" or "objects" mean."""
    *colour, noun = words.split()
    kind = SINGULAR.get(noun, noun)
    found = [g for g in layout.groups if not colour or g.colour == colour[0]]
    return found if noun == "objects" else [g for g in found if g.kind == kind]


def one(layout: Layout, words: str) -> Group:
    """The group meant, which must be a single object: else the question would be ambiguous."""
    (group,) = groups(layout, words)
    assert group.count == 1
    return group


def far(a: Group, b: Group) -> float:
    return math.dist((a.things[0].x, a.things[0].y), (b.things[0].x, b.things[0].y))


def counting(layout: Layout, prompt: str) -> str | None:
    if found := re.fullmatch(r"(?:How many (.+?) (?:are there(?: in total)?|can you see)\?|Count the (.+)\.)", prompt):
        return str(sum(g.count for g in groups(layout, found[1] or found[2])))
    if found := re.fullmatch(r"Is there an? (.+) in the picture\?", prompt):
        return "yes" if groups(layout, found[1]) else "no"
    return None


def placing(layout: Layout, prompt: str) -> str | None:
    if found := re.fullmatch(r"Is the (.+) left or right of the (.+)\?", prompt):
        gap = one(layout, found[1]).things[0].x - one(layout, found[2]).things[0].x
        assert abs(gap) > 10
        return "left" if gap < 0 else "right"
    if found := re.fullmatch(r"Is the (.+) above or below the (.+)\?", prompt):
        gap = one(layout, found[1]).things[0].y - one(layout, found[2]).things[0].y
        assert abs(gap) > 10
        return "above" if gap < 0 else "below"
    if found := re.fullmatch(r"Which is closer to the (.+), the (.+) or the (.+)\?", prompt):
        target, a, b = (one(layout, found[i]) for i in (1, 2, 3))
        assert not 0.8 < far(target, a) / far(target, b) < 1.25
        return found[2] if far(target, a) < far(target, b) else found[3]
    if found := re.fullmatch(r"(?:Where(?: in the picture)? is|Is) the (.+?)(?: in the .+)?\?", prompt):
        thing = one(layout, found[1]).things[0]
        dx, dy = thing.x - SIDE / 2, thing.y - SIDE / 2
        middle = max(abs(dx), abs(dy)) < 10
        if "left or right half" in prompt:
            assert abs(dx) >= 10
            return "left" if dx < 0 else "right"
        if "top or bottom half" in prompt:
            assert abs(dy) >= 10
            return "top" if dy < 0 else "bottom"
        if "near an edge" in prompt:
            assert middle or max(abs(dx), abs(dy)) > 25
            return "center" if middle else "edge"
        assert middle or min(abs(dx), abs(dy)) > 15
        return "center" if middle else f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"
    return None


def context(layout: Layout, prompt: str) -> str | None:
    back = layout.backdrop
    if "indoors or outdoors" in prompt:
        return "indoors" if back.place == "indoor" else "outdoors"
    if "weather" in prompt or "rainy" in prompt:
        assert back.place != "indoor"
        return back.weather
    if "landscape is" in prompt:
        return back.landscape
    return back.place if "scene" in prompt else None


def attribute(layout: Layout, prompt: str) -> str | None:
    if found := re.fullmatch(r"What colou?r (?:is|are) the (.+)\?", prompt):
        (group,) = groups(layout, found[1])
        return group.colour
    if found := re.fullmatch(r"(?:Is|Are) the (.+) plain, striped or dotted\?", prompt):
        (group,) = groups(layout, found[1])
        return group.pattern
    if found := re.fullmatch(r"Is the (.+) big or small\?", prompt):
        assert {g.size for g in layout.groups} == {"big", "small"}  # something to compare with
        return one(layout, found[1]).size
    if found := re.fullmatch(r"Which is (bigger|smaller), the (.+) or the (.+)\?", prompt):
        a, b = (one(layout, found[i]).things[0].radius for i in (2, 3))
        assert max(a, b) > 1.3 * min(a, b)
        return found[2] if (a > b) == (found[1] == "bigger") else found[3]
    if "floor" in prompt:
        return layout.backdrop.floor
    return layout.backdrop.light if re.search("lighting|bright|daylight", prompt) else None


READERS = {
    "objects_and_counts": counting,
    "spatial_relationships": placing,
    "scene_context": context,
    "attributes": attribute,
}


@pytest.mark.parametrize("task", READERS)
def test_gold_answers_agree_with_the_layout(task: str) -> None:
    answers: Counter[str] = Counter()
    for seed in range(400):
        layout, rng = layout_of(seed, "train", atlas.bundled("train")), Random(seed)
        for _ in range(3):
            question = ask(layout, task, rng)
            assert READERS[task](layout, question.prompt) == question.answer, question
            answers[question.answer] += 1
    # No answer is so common that saying it always would look like seeing.
    assert answers.most_common(1)[0][1] < 0.5 * answers.total()
    assert set(TASKS) == {"caption_brief", *READERS}
