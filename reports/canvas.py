"""A sheet for horizontal bars: rows from the top down, a name over each, the value beside the bar, as inline SVG.

Everything is 360 units wide with text 11 units high, so that it is read on a phone as well. matplotlib draws it; the
SVG keeps its text as text, in the page's font, and its colours follow the page's theme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from .document import Report
from .style import LIGHT, themed, variant_colours

WIDTH, TEXT = 360, 11
_TITLE, _BAR, _GAP, _LEGEND = 17, 13, 3, 26
_VALUES = 66  # kept free at the right for the value of the longest bar
_NAME_LENGTH = 50


class Canvas:
    """`bars` bars to a row; horizontal places are shares of the longest bar; `values` units are kept for values."""

    def __init__(
        self,
        report: Report,
        rows: int,
        *,
        bars: int = 1,
        values: int = _VALUES,
        legend: Sequence[tuple[str, str]] = (),
    ) -> None:
        from matplotlib.figure import Figure

        self.report, self.colours = report, variant_colours(report)
        self._full = WIDTH - values
        self._row_height = _TITLE + bars * (_BAR + _GAP) + 7
        self._next_row = _LEGEND if legend else 0
        height = self._next_row + rows * self._row_height
        self._top = self._next_row
        self._figure = Figure(figsize=(WIDTH / 72, height / 72))
        self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self._axes.axis("off")
        left = 0
        for title, colour in legend:
            self._box(left, 3, 10, 10, colour)
            self._text(left + 15, 8, title, "ink")
            left += 33 + 6 * len(title)

    def row(self, variant: str, detail: str = "") -> None:
        """Begins the next row under its name, which is bold and tagged where the variant is the one kept."""
        name = tagged(self.report, variant)
        self._text(0, self._next_row + 8, short(name + detail), "ink", weight="normal" if name == variant else "bold")
        self._top, self._next_row = self._next_row + _TITLE, self._next_row + self._row_height

    def bar(self, left: float, share: float, colour: str, *, faint: bool = False) -> None:
        apart = 1.5 if left else 0  # a hair between the parts of a stacked bar
        width = max(0.0, share * self._full - apart)
        self._box(left * self._full + apart, self._top, width, _BAR, colour, alpha=0.45 if faint else 1)

    def inside(self, left: float, share: float, text: str, colour: str) -> None:
        """The text in the middle of a part of the bar, where there is room for it."""
        if share * self._full > 8 * len(text):
            self._text((left + share / 2) * self._full, self._middle, text, colour, ha="center")

    def value(self, end: float, text: str, more: str = "") -> None:
        """The bar's value behind its end, with more of it where there is room."""
        left = end * self._full + 6
        fits = left + 6.4 * len(text + more) < WIDTH
        self._text(left, self._middle, text + more if fits else text, "ink")

    def whisker(self, low: float, high: float) -> None:
        at = [low * self._full, high * self._full]
        self._axes.plot(at, [self._middle] * 2, color=LIGHT["ink"], linewidth=1.2, marker="|", markersize=6)

    def down(self) -> None:
        """To the next bar of the same row."""
        self._top += _BAR + _GAP

    def svg(self, name: str) -> str:
        return to_svg(self._figure, name)

    @property
    def _middle(self) -> float:
        return self._top + _BAR / 2

    def _box(self, x: float, y: float, width: float, height: float, colour: str, alpha: float = 1) -> None:
        from matplotlib.patches import Rectangle

        self._axes.add_patch(Rectangle((x, y), width, height, facecolor=LIGHT[colour], linewidth=0, alpha=alpha))

    def _text(self, x: float, y: float, text: str, colour: str, **how: Any) -> None:
        self._axes.text(x, y, text, color=LIGHT[colour], va="center_baseline", **how)


def settings() -> Any:
    """matplotlib's settings for all that is drawn here, as a context."""
    import matplotlib

    rc: dict[Any, Any] = {"svg.fonttype": "none", "text.parse_math": False, "font.size": TEXT}
    rc |= {"text.color": LIGHT["ink"], "axes.edgecolor": LIGHT["line"], "axes.labelcolor": LIGHT["muted"]}
    rc |= {f"{axis}tick.color": LIGHT["line"] for axis in "xy"}
    rc |= {f"{axis}tick.labelcolor": LIGHT["muted"] for axis in "xy"}
    return matplotlib.rc_context(rc)


def tagged(report: Report, variant: str) -> str:
    return f"{variant} (kept)" if report.kept and report.kept.name == variant else variant


def short(text: str) -> str:
    return text if len(text) <= _NAME_LENGTH else text[: _NAME_LENGTH - 1] + "…"


def to_svg(figure: Any, name: str) -> str:
    """The figure as an SVG element to stand in a page: no headers, ids of its own, colours that follow the theme."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    return themed(svg)
