"""The page's and the plots' colours, light and dark, in one place.

A variant's colour says its precision, everywhere the same: baselines grey, float blue, int8 orange (after Okabe and
Ito's palette, told apart with every kind of colour vision). Nothing is told by colour alone.
"""

from __future__ import annotations

from .document import Report, precision

LIGHT = {
    "paper": "#ffffff",
    "ground": "#f6f7f8",
    "ink": "#16191d",
    "muted": "#59626d",
    "line": "#dfe3e7",
    "track": "#e9ecef",
    "accent": "#0b6e69",
    "wash": "#e3f1ef",
    "wrong": "#b3261e",
    "baseline": "#87909a",
    "float": "#0072b2",
    "int8": "#d97a00",
    "other1": "#009e73",
    "other2": "#b85c93",
    "other3": "#3a95c9",
    "other4": "#9d8f12",
    "part1": "#c4ccd4",
    "part2": "#7cc4bd",
    "part3": "#257b76",
    "part4": "#0a4a47",
    "light_text": "#fffffe",
    "dark_text": "#101214",
}
DARK = LIGHT | {
    "paper": "#171b20",
    "ground": "#0f1215",
    "ink": "#e9ecef",
    "muted": "#a3acb6",
    "line": "#2d343b",
    "track": "#262c33",
    "accent": "#5cc4bb",
    "wash": "#12302e",
    "wrong": "#ff8f85",
    "float": "#3d9bdc",
    "int8": "#f0992e",
    "other1": "#1fb88b",
    "other2": "#d47fb1",
    "other3": "#7cc3ec",
    "other4": "#d2c34a",
    "part4": "#166661",
}


def variant_colours(report: Report) -> dict[str, str]:
    """The name of each variant's colour, by the variant's name."""
    colours, others = {}, 0
    for variant in report.variants:
        colours[variant.name] = kind = precision(variant)
        if kind == "other":
            colours[variant.name] = f"other{others % 4 + 1}"
            others += 1
    return colours


def css(palette: dict[str, str]) -> str:
    """The palette as CSS variables."""
    return "".join(f"--{name}:{value};" for name, value in palette.items())


def themed(svg: str) -> str:
    """An SVG drawn in LIGHT's colours, each replaced by its CSS variable, so that it follows the page into the dark."""
    for name, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{name})")
    return svg
