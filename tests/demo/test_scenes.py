"""A scene is always the same for its seed and split, and holds one question per task that a person could answer."""

from __future__ import annotations

import numpy as np
import pytest
from vlmc.demo import atlas
from vlmc.demo.layout import SIDE, Backdrop, Group, Layout, Thing
from vlmc.demo.scenes import layout_of, render, scene, stream
from vlmc.demo.words import COLOURS, DRAWN, KINDS, SPLITS, TASKS

SEEDS = range(40)


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_gives_the_same_scene(split: str) -> None:
    first, again = scene(3, split), scene(3, split)
    assert first.questions == again.questions
    assert first.image.tobytes() == again.image.tobytes()


def test_every_seed_and_every_split_gives_another_scene() -> None:
    pictures = {scene(seed, split).image.tobytes() for split in SPLITS for seed in range(8)}
    assert len(pictures) == 8 * len(SPLITS)


def test_splits_draw_from_disjoint_streams() -> None:
    drawn = {stream(seed, split, purpose).getrandbits(64) for split in SPLITS for seed in range(99) for purpose in "ab"}
    assert len(drawn) == 99 * 2 * len(SPLITS)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="validation"):
        stream(0, "validation", "layout")


def test_a_picture_is_rgb_of_the_models_size() -> None:
    picture = scene(0, "test").image
    assert (picture.mode, picture.size) == ("RGB", (SIDE, SIDE))


@pytest.mark.parametrize("seed", SEEDS)
def test_one_question_per_task_in_their_order(seed: int) -> None:
    questions = scene(seed, "test").questions
    assert tuple(q.task for q in questions) == TASKS
    caption, *short = questions
    assert all(1 <= len(q.answer.split()) <= 4 and q.answer == q.answer.lower() and not q.facts for q in short)
    assert all(q.prompt[0].isupper() and q.prompt[-1] in "?." for q in questions)
    assert len(caption.answer.split()) <= 40
    assert caption.facts
    for fact in caption.facts:
        assert fact in caption.answer.lower()


def test_the_facts_of_a_caption_are_its_groups_its_place_its_light_and_its_weather() -> None:
    layout = Layout(
        Backdrop("urban", "night", "snowy"),
        (
            Group("ball", "red", "plain", "small", (Thing(20, 20, 11), Thing(60, 20, 11))),
            Group("dress", "orange", "", "big", (Thing(90, 90, 18),)),
        ),
    )
    from vlmc.demo.questions import caption

    text, facts = caption(layout)
    assert text == "An urban scene at night with two red balls and one orange dress. It is snowing."
    assert facts == ("two red balls", "one orange dress", "urban", "night", "snowing")


def hue(rgb: np.ndarray) -> np.ndarray:
    """The direction of a colour away from grey."""
    away = rgb - rgb.mean()
    return away / np.linalg.norm(away)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_an_object_is_drawn_where_and_in_the_colour_the_layout_says(kind: str, colour: str) -> None:
    group = Group(kind, colour, "plain" if kind in DRAWN else "", "big", (Thing(40, 80, 18),))
    sources, back = atlas.bundled("test"), Backdrop("indoor", "bright", floor="wood")
    drawn = np.asarray(render(Layout(back, (group,)), stream(1, "test", "picture"), sources), np.float32)
    empty = np.asarray(render(Layout(back, ()), stream(1, "test", "picture"), sources), np.float32)
    changed = np.abs(drawn - empty).max(-1) > 60
    rows, columns = np.nonzero(changed[60:100, 18:62])
    assert len(rows) > 120
    assert changed[60:100, 18:62].sum() > 0.9 * changed.sum()
    # Shading makes a colour lighter and darker but leaves its hue, which is what is compared.
    seen = hue(np.median(drawn[60:100, 18:62][rows, columns], axis=0))
    coloured = [name for name in COLOURS if name != "white"]
    if colour in coloured:
        assert max(coloured, key=lambda name: float(hue(np.array(COLOURS[name])) @ seen)) == colour


def test_objects_do_not_touch_and_stay_inside() -> None:
    for seed in range(200):
        layout = layout_of(seed, "test", atlas.bundled("test"))
        things = [t for g in layout.groups for t in g.things]
        assert 1 <= len(things) <= 7
        for i, a in enumerate(things):
            assert a.radius < a.x < SIDE - a.radius
            assert a.radius < a.y < SIDE - a.radius
            for b in things[:i]:
                assert (a.x - b.x) ** 2 + (a.y - b.y) ** 2 >= (a.radius + b.radius) ** 2
