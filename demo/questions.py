"""Questions and gold answers, computed from a layout alone.

Each task has a few forms of question. A form is offered only when a person could answer it from the picture:
two objects must differ clearly in position to ask left or right, in size to ask which is bigger, and so on.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from .layout import MIDDLE, OFF_CENTRE, SIDE, Group, Layout
from .words import COLOURS, KINDS, PLURALS, TASKS, counted

APART = 14.0  # pixels two objects must differ in x (or y) to be left/right (above/below) of each other
CORNER = 18.0  # pixels from both middle lines to be in a corner
CLOSER = 1.4  # how many times farther the farther of two objects must be


@dataclass(frozen=True)
class Question:
    """One prompt and its gold answer. `facts`, for captions, are the phrases a right caption must contain."""

    task: str
    prompt: str
    answer: str
    facts: tuple[str, ...] = ()


Pair = tuple[str, str]  # prompt, answer
Form = Callable[[Layout, Random], Iterator[Pair]]


def ask(layout: Layout, task: str, rng: Random) -> Question:
    """One question of this task about this layout: a form drawn evenly, then one of its questions."""
    if task == "caption_brief":
        text, facts = caption(layout)
        return Question(task, rng.choice(CAPTION_PROMPTS), text, facts)
    offers = [pairs for form in FORMS[task] if (pairs := list(form(layout, rng)))]
    prompt, answer = rng.choice(rng.choice(offers))
    return Question(task, prompt, answer)


def ask_all(layout: Layout, rng: Random) -> tuple[Question, ...]:
    """One question per task, in the order of the tasks."""
    return tuple(ask(layout, task, rng) for task in TASKS)


CAPTION_PROMPTS = (
    "Describe the picture briefly.",
    "Write a brief caption.",
    "Give a short caption for this image.",
    "What does the picture show?",
)
SKIES = {"daylight": "in daylight", "sunset": "at sunset", "night": "at night"}
ROOMS = {"bright": "in bright light", "dim": "in dim light"}
PLACE_NAMES = {"indoor": "An indoor scene", "urban": "An urban scene", "landscape": "A landscape"}
FALLING = {"rainy": "raining", "snowy": "snowing"}


def caption(layout: Layout) -> tuple[str, tuple[str, ...]]:
    """The caption of a layout and the facts in it."""
    back = layout.backdrop
    groups = [counted(g.count, g.colour, g.kind) for g in layout.groups]
    listed = groups[0] if len(groups) == 1 else ", ".join(groups[:-1]) + " and " + groups[-1]
    text = f"{PLACE_NAMES[back.place]} {(SKIES | ROOMS)[back.light]} with {listed}."
    facts = [*groups, back.place, back.light]
    if back.weather in FALLING:
        text += f" It is {FALLING[back.weather]}."
        facts.append(FALLING[back.weather])
    return text, tuple(facts)


def _name(group: Group) -> str:
    return f"{group.colour} {group.kind}"


def _singles(layout: Layout) -> list[Group]:
    return [g for g in layout.groups if g.count == 1]


def _many(rng: Random, what: str) -> str:
    return rng.choice((f"How many {what} are there?", f"How many {what} can you see?", f"Count the {what}."))


def _count_group(layout: Layout, rng: Random) -> Iterator[Pair]:
    for g in layout.groups:
        yield _many(rng, f"{g.colour} {PLURALS[g.kind]}"), str(g.count)


def _count_kind(layout: Layout, rng: Random) -> Iterator[Pair]:
    for kind in {g.kind: None for g in layout.groups}:
        yield _many(rng, PLURALS[kind]), str(sum(g.count for g in layout.groups if g.kind == kind))


def _count_colour(layout: Layout, rng: Random) -> Iterator[Pair]:
    for colour in {g.colour: None for g in layout.groups}:
        yield _many(rng, f"{colour} objects"), str(sum(g.count for g in layout.groups if g.colour == colour))


def _count_total(layout: Layout, rng: Random) -> Iterator[Pair]:
    yield rng.choice((_many(rng, "objects"), "How many objects are there in total?")), str(layout.total)


def _absent(layout: Layout, rng: Random) -> tuple[str, str]:
    """A colour and kind that are not there together, but often one of them is."""
    there = {(g.colour, g.kind) for g in layout.groups}
    while True:
        g = rng.choice(layout.groups)
        colour = g.colour if rng.random() < 0.4 else rng.choice(list(COLOURS))
        kind = g.kind if rng.random() < 0.4 else rng.choice(KINDS)
        if (colour, kind) not in there:
            return colour, kind


def _exists(layout: Layout, rng: Random) -> Iterator[Pair]:
    if rng.random() < 0.5:
        g = rng.choice(layout.groups)
        colour, kind, answer = g.colour, g.kind, "yes"
    else:
        (colour, kind), answer = _absent(layout, rng), "no"
    article = "an" if colour == "orange" else "a"
    yield f"Is there {article} {colour} {kind} in the picture?", answer


def _left_right(layout: Layout, rng: Random) -> Iterator[Pair]:
    for a, b in _pairs(layout):
        if abs(a.things[0].x - b.things[0].x) >= APART:
            answer = "left" if a.things[0].x < b.things[0].x else "right"
            yield f"Is the {_name(a)} left or right of the {_name(b)}?", answer


def _above_below(layout: Layout, rng: Random) -> Iterator[Pair]:
    for a, b in _pairs(layout):
        if abs(a.things[0].y - b.things[0].y) >= APART:
            answer = "above" if a.things[0].y < b.things[0].y else "below"
            yield f"Is the {_name(a)} above or below the {_name(b)}?", answer


def _pairs(layout: Layout) -> Iterator[tuple[Group, Group]]:
    singles = _singles(layout)
    return ((a, b) for a in singles for b in singles if a is not b)


def _where(layout: Layout, rng: Random) -> Iterator[Pair]:
    for g in _singles(layout):
        dx, dy = g.things[0].x - SIDE / 2, g.things[0].y - SIDE / 2
        prompt = rng.choice((f"Where is the {_name(g)}?", f"Where in the picture is the {_name(g)}?"))
        if abs(dx) <= MIDDLE and abs(dy) <= MIDDLE:
            yield prompt, "center"
        elif abs(dx) >= CORNER and abs(dy) >= CORNER:
            yield prompt, f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"


def _half(layout: Layout, rng: Random) -> Iterator[Pair]:
    for g in _singles(layout):
        dx, dy = g.things[0].x - SIDE / 2, g.things[0].y - SIDE / 2
        if abs(dx) >= OFF_CENTRE:
            yield f"Is the {_name(g)} in the left or right half?", "left" if dx < 0 else "right"
        if abs(dy) >= OFF_CENTRE:
            yield f"Is the {_name(g)} in the top or bottom half?", "top" if dy < 0 else "bottom"
        if abs(dx) <= MIDDLE and abs(dy) <= MIDDLE:
            yield f"Is the {_name(g)} in the center or near an edge?", "center"
        if max(abs(dx), abs(dy)) >= 3 * OFF_CENTRE:
            yield f"Is the {_name(g)} in the center or near an edge?", "edge"


def _closest(layout: Layout, rng: Random) -> Iterator[Pair]:
    for a, b in _pairs(layout):
        for c in _singles(layout):
            if c is a or c is b:
                continue
            to_a, to_b = (math.dist((c.things[0].x, c.things[0].y), (o.things[0].x, o.things[0].y)) for o in (a, b))
            if max(to_a, to_b) >= CLOSER * min(to_a, to_b):
                nearer = a if to_a < to_b else b
                yield f"Which is closer to the {_name(c)}, the {_name(a)} or the {_name(b)}?", _name(nearer)


def _place(layout: Layout, rng: Random) -> Iterator[Pair]:
    prompts = (
        "What kind of scene is this?",
        "Is the scene indoor, urban or landscape?",
        "Classify the scene.",
    )
    yield rng.choice(prompts), layout.backdrop.place


def _indoors(layout: Layout, rng: Random) -> Iterator[Pair]:
    yield "Is this indoors or outdoors?", "indoors" if layout.backdrop.place == "indoor" else "outdoors"


def _weather(layout: Layout, rng: Random) -> Iterator[Pair]:
    if layout.backdrop.place != "indoor":
        yield rng.choice(("What is the weather?", "Is it clear, rainy or snowy?")), layout.backdrop.weather


def _landscape(layout: Layout, rng: Random) -> Iterator[Pair]:
    if layout.backdrop.landscape:
        prompt = rng.choice(("Which landscape is this: mountains, sea, forest or desert?", "What landscape is shown?"))
        yield prompt, layout.backdrop.landscape


def _colour(layout: Layout, rng: Random) -> Iterator[Pair]:
    spelled = rng.choice(("color", "colour"))
    for g in layout.groups:
        if sum(o.kind == g.kind for o in layout.groups) == 1:
            what = f"is the {g.kind}" if g.count == 1 else f"are the {PLURALS[g.kind]}"
            yield f"What {spelled} {what}?", g.colour


def _light(layout: Layout, rng: Random) -> Iterator[Pair]:
    indoors = layout.backdrop.place == "indoor"
    choice = "Is the room bright or dim?" if indoors else "Is it daylight, sunset or night?"
    yield rng.choice(("What is the lighting?", "What is the lighting like?", choice)), layout.backdrop.light


def _pattern(layout: Layout, rng: Random) -> Iterator[Pair]:
    for g in layout.groups:
        if g.pattern:
            verb, name = ("is", _name(g)) if g.count == 1 else ("are", f"{g.colour} {PLURALS[g.kind]}")
            yield f"{verb.capitalize()} the {name} plain, striped or dotted?", g.pattern


def _size(layout: Layout, rng: Random) -> Iterator[Pair]:
    if len({g.size for g in layout.groups}) == 2:
        for g in _singles(layout):
            yield f"Is the {_name(g)} big or small?", g.size


def _bigger(layout: Layout, rng: Random) -> Iterator[Pair]:
    for a, b in _pairs(layout):
        if a.size != b.size:
            word = rng.choice(("bigger", "smaller"))
            bigger, smaller = (a, b) if a.size == "big" else (b, a)
            yield (
                f"Which is {word}, the {_name(a)} or the {_name(b)}?",
                _name(bigger if word == "bigger" else smaller),
            )


def _floor(layout: Layout, rng: Random) -> Iterator[Pair]:
    if layout.backdrop.floor:
        prompts = ("What material is the floor?", "Is the floor wood, tile or carpet?")
        yield rng.choice(prompts), layout.backdrop.floor


FORMS: dict[str, tuple[Form, ...]] = {
    "objects_and_counts": (_count_group, _count_kind, _count_colour, _count_total, _exists),
    "spatial_relationships": (_left_right, _above_below, _where, _half, _closest),
    "scene_context": (_place, _indoors, _weather, _landscape),
    "attributes": (_colour, _light, _pattern, _size, _bigger, _floor),
}
