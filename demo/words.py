"""Every word the demo's pictures and questions are made of: objects, colours, places, light, numbers."""

from typing import Final, Literal

Split = Literal["train", "calibration", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "calibration", "test")

TASKS: Final = ("caption_brief", "objects_and_counts", "spatial_relationships", "scene_context", "attributes")

# Chosen to stay apart from each other in sunset and night light too: no brown, grey or black.
COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 34, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 214, 30),
    "green": (36, 158, 62),
    "blue": (32, 92, 214),
    "purple": (124, 48, 168),
    "pink": (248, 132, 186),
    "white": (244, 244, 246),
}

DRAWN: Final = ("ball", "star", "heart", "car", "fish", "mug", "kite", "umbrella")
GARMENTS: Final = ("shirt", "dress", "bag", "boot", "shoe")
KINDS: Final = DRAWN + GARMENTS
PLURALS: Final = {kind: kind + "s" for kind in KINDS} | {"fish": "fish", "dress": "dresses"}

PATTERNS: Final = ("plain", "striped", "dotted")
SIZES: Final = ("small", "big")

PLACES: Final = ("indoor", "urban", "landscape")
LANDSCAPES: Final = ("mountains", "sea", "forest", "desert")
FLOORS: Final = ("wood", "tile", "carpet")
INDOOR_LIGHTS: Final = ("bright", "dim")
OUTDOOR_LIGHTS: Final = ("daylight", "sunset", "night")

NUMBERS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven")


def counted(count: int, colour: str, kind: str) -> str:
    """A group as a caption says it, e.g. "two red balls"."""
    return f"{NUMBERS[count]} {colour} {kind if count == 1 else PLURALS[kind]}"
