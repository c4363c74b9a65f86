"""What is in a picture, before anything is drawn: groups of objects, their places, the backdrop, its light.

A layout holds only facts, so the gold answers are computed from it and the picture is drawn from it.
"""

import math
from dataclasses import dataclass
from random import Random

from .words import (
    COLOURS,
    DRAWN,
    FLOORS,
    INDOOR_LIGHTS,
    KINDS,
    LANDSCAPES,
    OUTDOOR_LIGHTS,
    PATTERNS,
    PLACES,
    SIZES,
)

SIDE = 128  # of the picture, in pixels
RADIUS = {"small": (10.5, 12.5), "big": (17.0, 20.5)}  # apart enough to see which is which
MOST = 7  # objects in one picture
GAP = 3.0  # pixels between two objects
OFF_CENTRE = 10.0  # pixels from a middle line to be clearly in one half
MIDDLE = 8.0  # pixels around both middle lines that count as the center


@dataclass(frozen=True)
class Thing:
    """One object: the middle of it and its radius, in pixels."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Group:
    """All objects of one kind and colour; they share pattern and size. `pattern` is "" for garments."""

    kind: str
    colour: str
    pattern: str
    size: str
    things: tuple[Thing, ...]

    @property
    def count(self) -> int:
        return len(self.things)


@dataclass(frozen=True)
class Backdrop:
    """The place behind the objects. `photo` names a real photograph; then `landscape` may be unknown ("")."""

    place: str
    light: str
    weather: str = "clear"
    landscape: str = ""
    floor: str = ""
    photo: str = ""


@dataclass(frozen=True)
class Layout:
    backdrop: Backdrop
    groups: tuple[Group, ...]  # in the fixed order of kinds and colours, which is also the caption's

    @property
    def total(self) -> int:
        return sum(group.count for group in self.groups)


@dataclass(frozen=True)
class Photo:
    """A real background photograph: its name in the atlas, its own light ("" when daylight) and landscape."""

    name: str
    landscape: str = ""
    light: str = ""


def sample(rng: Random, photos: tuple[Photo, ...]) -> Layout:
    """Draw a layout; tries again until every object fits."""
    backdrop = _backdrop(rng, photos)
    while True:
        groups = _groups(rng)
        if groups is not None:
            return Layout(backdrop, groups)


def _backdrop(rng: Random, photos: tuple[Photo, ...]) -> Backdrop:
    place = rng.choice(PLACES)
    if place == "indoor":
        return Backdrop(place, rng.choice(INDOOR_LIGHTS), floor=rng.choice(FLOORS))
    light = rng.choice(OUTDOOR_LIGHTS)
    weather = rng.choices(("clear", "rainy", "snowy"), (0.6, 0.2, 0.2))[0]
    if place == "urban":
        return Backdrop(place, light, weather)
    if rng.random() < 0.4:
        photo = rng.choice(photos)
        # A photograph taken at sunset keeps its light; one taken by day can be re-lit.
        return Backdrop(place, photo.light or light, weather, photo.landscape, photo=photo.name)
    return Backdrop(place, light, weather, rng.choice(LANDSCAPES))


def _groups(rng: Random) -> tuple[Group, ...] | None:
    wanted = rng.choices((1, 2, 3, 4), (0.12, 0.33, 0.40, 0.15))[0]
    counts = [1] + [rng.choices((1, 2, 3, 4, 5), (0.46, 0.22, 0.16, 0.1, 0.06))[0] for _ in range(wanted - 1)]
    if sum(counts) > MOST:
        return None
    names: list[tuple[str, str]] = []
    while len(names) < wanted:
        # Sometimes the same kind or colour twice, so that the model must look at both.
        kind = rng.choice(names)[0] if names and rng.random() < 0.25 else rng.choice(KINDS)
        colour = rng.choice(names)[1] if names and rng.random() < 0.2 else rng.choice(list(COLOURS))
        if (kind, colour) not in names:
            names.append((kind, colour))
    placed: list[Thing] = []
    groups = []
    for (kind, colour), count in zip(names, counts, strict=True):
        size = rng.choice(SIZES) if count <= 2 else "small"
        pattern = rng.choice(PATTERNS) if kind in DRAWN else ""
        radius = rng.uniform(*RADIUS[size])
        things = []
        for _ in range(count):
            thing = _place(rng, radius, placed)
            if thing is None:
                return None
            placed.append(thing)
            things.append(thing)
        groups.append(Group(kind, colour, pattern, size, tuple(things)))
    if not any(_clear(g.things[0]) for g in groups if g.count == 1):
        return None  # nothing spatial could be asked
    order = list(COLOURS)
    return tuple(sorted(groups, key=lambda g: (KINDS.index(g.kind), order.index(g.colour))))


def _clear(thing: Thing) -> bool:
    """Whether the object is clearly in a half or clearly in the middle."""
    off = max(abs(thing.x - SIDE / 2), abs(thing.y - SIDE / 2))
    return off >= OFF_CENTRE or off <= MIDDLE


def _place(rng: Random, radius: float, placed: list[Thing]) -> Thing | None:
    edge = radius + 2.0
    for _ in range(30):
        x, y = round(rng.uniform(edge, SIDE - edge)), round(rng.uniform(edge, SIDE - edge))
        if all(math.dist((x, y), (o.x, o.y)) >= radius + o.radius + GAP for o in placed):
            return Thing(x, y, radius)
    return None
