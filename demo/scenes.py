"""One picture with its five questions, always the same for the same seed and split.

>>> scene(7, "test").questions[0].task
'caption_brief'
"""

from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image

from . import atlas, backdrops, shapes
from .layout import SIDE, Layout, sample
from .questions import Question, ask_all
from .words import SPLITS, Split

__all__ = ["Question", "Scene", "layout_of", "render", "scene", "stream"]

# How far the light of the place also falls on the objects; a part, so that colours stay what they are called.
ON_OBJECTS = {"daylight": 0.0, "bright": 0.0, "sunset": 0.22, "night": 0.3, "dim": 0.3}
SHADE = {"sunset": (255, 176, 120), "night": (84, 96, 156), "dim": (104, 92, 100)}


@dataclass(frozen=True)
class Scene:
    """A picture and exactly one question per task, in the order of `words.TASKS`."""

    image: Image.Image
    questions: tuple[Question, ...]


def stream(seed: int, split: Split, purpose: str) -> Random:
    """A stream of random numbers of its own for every split, seed and purpose."""
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, not {split!r}")
    return Random(f"vlmc-demo/{split}/{seed}/{purpose}")


def layout_of(seed: int, split: Split, sources: atlas.Sources) -> Layout:
    return sample(stream(seed, split, "layout"), sources.photos)


def scene(seed: int, split: Split, sources: atlas.Sources | None = None) -> Scene:
    """The scene of this seed. Training passes its larger `sources`; otherwise the repository's own serve."""
    sources = sources or atlas.bundled(split)
    layout = layout_of(seed, split, sources)
    return Scene(
        render(layout, stream(seed, split, "picture"), sources),
        ask_all(layout, stream(seed, split, "questions")),
    )


def render(layout: Layout, rng: Random, sources: atlas.Sources) -> Image.Image:
    """Draw a layout: backdrop, objects, light on them, noise."""
    light = layout.backdrop.light
    back = backdrops.draw(layout.backdrop, sources, rng)
    objects = Image.new("RGBA", (SIDE, SIDE))
    for group in layout.groups:
        for thing in group.things:
            shapes.paste(objects, group, thing, sources.garment(group.kind, rng), rng)
    shade = Image.new("RGB", (SIDE, SIDE), SHADE.get(light, (255, 255, 255)))
    colours = np.asarray(objects.convert("RGB"), np.float32)
    colours *= 1 - ON_OBJECTS[light] * (1 - np.asarray(shade, np.float32) / 255)
    alpha = np.asarray(objects.getchannel("A"), np.float32)[..., None] / 255
    picture = np.asarray(back, np.float32) * (1 - alpha) + colours * alpha
    sigma = max(0.0, rng.uniform(-2.0, 7.0))
    noise = np.random.default_rng(rng.getrandbits(63)).standard_normal(picture.shape, np.float32)
    return Image.fromarray(np.clip(picture + sigma * noise + 0.5, 0, 255).astype(np.uint8))
