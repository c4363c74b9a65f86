"""Draws one object as a small RGBA tile: vector shapes at four times the size, or a garment's photograph.

Shapes are given in units of the radius (x to the right, y down, 0 in the middle): every size is one drawing.
"""

import math
from collections.abc import Callable, Sequence
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .layout import Group, Thing
from .words import COLOURS

Rgb = tuple[int, int, int]
Points = list[tuple[float, float]]
FINE = 4  # how many times larger than native a tile is drawn
TILT = 14.0  # degrees
DARK_WHEEL, GLASS = (38, 38, 44), (206, 232, 248)


def mix(a: Rgb, b: Rgb, share: float) -> Rgb:
    """`share` of colour b in colour a."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


class Pen:
    """A tile's canvases: `body` is what takes the object's colour and pattern, `trim` lies on top of it."""

    def __init__(self, radius: float) -> None:
        self.unit = radius * FINE
        self.side = (2 * math.ceil(radius) + 6) * FINE
        self.body = Image.new("L", (self.side, self.side))
        self.trim = Image.new("RGBA", (self.side, self.side))
        self.on_body = ImageDraw.Draw(self.body)
        self.on_trim = ImageDraw.Draw(self.trim)
        self.line = max(4, round(0.085 * self.unit))

    def at(self, points: Sequence[tuple[float, float]]) -> Points:
        half = self.side / 2
        return [(half + x * self.unit, half + y * self.unit) for x, y in points]

    def polygon(self, points: Points, edge: Rgb) -> None:
        placed = self.at(points)
        self.on_body.polygon(placed, fill=255)
        self.on_body.line([*placed, placed[0], placed[1]], fill=255, width=self.line, joint="curve")
        self.on_trim.line([*placed, placed[0], placed[1]], fill=edge, width=self.line, joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, edge: Rgb) -> None:
        box = self.at([(x - rx, y - ry), (x + rx, y + ry)])
        self.on_body.ellipse(box, fill=255)
        self.on_trim.ellipse(box, outline=edge, width=self.line)

    def dot(self, x: float, y: float, r: float, fill: Rgb) -> None:
        self.on_trim.ellipse(self.at([(x - r, y - r), (x + r, y + r)]), fill=fill)

    def stroke(self, points: Points, fill: Rgb, width: float) -> None:
        self.on_trim.line(self.at(points), fill=fill, width=max(3, round(width * self.unit)), joint="curve")


def _ball(pen: Pen, edge: Rgb) -> None:
    pen.ellipse(0, 0, 0.94, 0.94, edge)


def _star(pen: Pen, edge: Rgb) -> None:
    spikes = [(math.sin(i * math.pi / 5), -math.cos(i * math.pi / 5), 0.98 if i % 2 == 0 else 0.46) for i in range(10)]
    pen.polygon([(x * r, y * r + 0.06) for x, y, r in spikes], edge)


def _heart(pen: Pen, edge: Rgb) -> None:
    points: Points = []
    for i in range(48):
        t = 2 * math.pi * i / 48
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 17.5, -(y + 2.2) / 17.0))
    pen.polygon(points, edge)


def _car(pen: Pen, edge: Rgb) -> None:
    side = [
        (-0.95, 0.05),
        (-0.6, -0.02),
        (-0.38, -0.5),
        (0.32, -0.5),
        (0.62, -0.02),
        (0.95, 0.08),
        (0.95, 0.42),
    ]
    pen.polygon([*side, (-0.95, 0.42)], edge)
    pen.on_trim.polygon(pen.at([(-0.45, -0.04), (-0.29, -0.38), (-0.06, -0.38), (-0.06, -0.04)]), fill=GLASS)
    pen.on_trim.polygon(pen.at([(0.06, -0.04), (0.06, -0.38), (0.25, -0.38), (0.45, -0.04)]), fill=GLASS)
    for x in (-0.52, 0.52):
        pen.dot(x, 0.44, 0.25, DARK_WHEEL)
        pen.dot(x, 0.44, 0.11, (190, 190, 196))


def _fish(pen: Pen, edge: Rgb) -> None:
    pen.polygon([(0.42, 0.0), (0.95, -0.5), (0.84, 0.0), (0.95, 0.5)], edge)
    pen.ellipse(-0.18, 0, 0.76, 0.52, edge)
    pen.dot(-0.6, -0.12, 0.12, (255, 255, 255))
    pen.dot(-0.62, -0.12, 0.06, DARK_WHEEL)


def _mug(pen: Pen, edge: Rgb) -> None:
    pen.on_body.ellipse(pen.at([(0.18, -0.4), (0.94, 0.44)]), fill=255)
    pen.on_trim.ellipse(pen.at([(0.18, -0.4), (0.94, 0.44)]), outline=edge, width=pen.line)
    hole = pen.at([(0.36, -0.2), (0.74, 0.24)])
    pen.on_body.ellipse(hole, fill=0)
    pen.on_trim.ellipse(hole, outline=edge, width=pen.line)
    pen.on_trim.rectangle(pen.at([(-0.72, -0.72), (0.44, 0.76)]), fill=(0, 0, 0, 0))
    pen.polygon([(-0.72, -0.7), (0.46, -0.7), (0.4, 0.78), (-0.66, 0.78)], edge)
    pen.on_trim.ellipse(pen.at([(-0.72, -0.86), (0.46, -0.54)]), fill=(92, 62, 44), outline=edge, width=pen.line)


def _kite(pen: Pen, edge: Rgb) -> None:
    pen.stroke([(0, 0.5), (0.16, 0.66), (-0.1, 0.8), (0.12, 0.96)], edge, 0.08)
    pen.polygon([(0, -0.98), (0.62, -0.3), (0, 0.6), (-0.62, -0.3)], edge)
    pen.stroke([(0, -0.95), (0, 0.58)], edge, 0.05)
    pen.stroke([(-0.6, -0.3), (0.6, -0.3)], edge, 0.05)


def _umbrella(pen: Pen, edge: Rgb) -> None:
    pen.stroke([(0, -0.1), (0, 0.76), (0.1, 0.88), (0.24, 0.86), (0.3, 0.72)], (84, 58, 44), 0.1)
    dome = [(-0.96 * math.cos(math.pi * i / 20), -0.84 * math.sin(math.pi * i / 20) + 0.06) for i in range(21)]
    scallops = [(0.96 - 1.92 * i / 24, 0.06 - 0.13 * abs(math.sin(math.pi * i / 8))) for i in range(25)]
    pen.polygon(dome + scallops, edge)
    pen.stroke([(0, -0.98), (0, -0.78)], edge, 0.09)


SHAPES: dict[str, Callable[[Pen, Rgb], None]] = {
    "ball": _ball,
    "star": _star,
    "heart": _heart,
    "car": _car,
    "fish": _fish,
    "mug": _mug,
    "kite": _kite,
    "umbrella": _umbrella,
}
SIDEWAYS = ("car", "fish", "mug", "umbrella")  # drawn facing either way
# Light colours take a darker second colour, dark colours a lighter one, so a pattern always shows.
LIGHT = ("yellow", "white", "pink", "orange")


def _pattern(name: str, colour: str, base: Rgb, side: int, unit: float) -> Image.Image:
    """A square of the object's colour with its pattern."""
    second = mix(base, (70, 60, 70), 0.5) if colour in LIGHT else mix(base, (255, 255, 255), 0.66)
    square = Image.new("RGB", (side, side), base)
    draw = ImageDraw.Draw(square)
    if name == "striped":
        step = 0.52 * unit
        for i in range(-1, math.ceil(2 * side / step) + 1):
            x = i * step - side * 0.5
            draw.line([(x, side), (x + side * 0.5, 0)], fill=second, width=round(step * 0.5))
    elif name == "dotted":
        step, r = 0.5 * unit, 0.155 * unit
        count = math.ceil(side / step) + 1
        for row in range(count):
            for column in range(count):
                x, y = (column + 0.5 * (row % 2)) * step, row * step
                draw.ellipse((x - r, y - r, x + r, y + r), fill=second)
    return square


_GRADIENT = Image.linear_gradient("L")  # 0 at the top, 255 at the bottom


def _shade(square: Image.Image) -> Image.Image:
    """Lighter at the top, darker at the bottom: a little depth."""
    ramp = _GRADIENT.resize(square.size)
    lighter = Image.blend(square, Image.new("RGB", square.size, (255, 255, 255)), 0.16)
    darker = ImageChops.multiply(square, Image.new("RGB", square.size, (196, 196, 204)))
    return Image.composite(darker, lighter, ramp)


def _drawn(group: Group, radius: float, rng: Random) -> Image.Image:
    base = COLOURS[group.colour]
    pen = Pen(radius)
    SHAPES[group.kind](pen, mix(base, (16, 12, 24), 0.62))
    tile = _shade(_pattern(group.pattern, group.colour, base, pen.side, pen.unit)).convert("RGBA")
    tile.putalpha(pen.body)
    tile.alpha_composite(pen.trim)
    if group.kind in SIDEWAYS and rng.random() < 0.5:
        tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return tile


def _garment(grey: Image.Image, group: Group, radius: float, rng: Random) -> Image.Image:
    """A grey photograph tinted. Its light and shade stay, its brightness goes: the colour always shows."""
    side = (2 * math.ceil(radius) + 6) * FINE
    inner = round(2 * radius * FINE * 1.06)
    mask = grey.point(lambda v: min(255, max(0, (v - 8) * 8)))
    mask = mask.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.MinFilter(3))
    top = max(grey.tobytes())
    even = grey.point([min(255, round(255 * (0.5 + 0.5 * v / top))) for v in range(256)])
    large = even.resize((inner, inner), Image.Resampling.BICUBIC)
    alpha = mask.resize((inner, inner), Image.Resampling.BICUBIC).point(lambda v: min(255, max(0, (v - 96) * 4)))
    tinted = ImageChops.multiply(Image.merge("RGB", (large,) * 3), Image.new("RGB", large.size, COLOURS[group.colour]))
    tinted.putalpha(alpha)
    tile = Image.new("RGBA", (side, side))
    tile.paste(tinted, ((side - inner) // 2, (side - inner) // 2))
    return tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else tile


def paste(canvas: Image.Image, group: Group, thing: Thing, grey: Image.Image | None, rng: Random) -> None:
    """Draw one object with its soft shadow onto an RGBA canvas of native size."""
    tile = _drawn(group, thing.radius, rng) if grey is None else _garment(grey, group, thing.radius, rng)
    tile = tile.convert("RGBa")  # colours times alpha, so that no dark fringe comes from empty pixels
    tile = tile.rotate(rng.uniform(-TILT, TILT), Image.Resampling.BILINEAR).reduce(FINE).convert("RGBA")
    left, top = round(thing.x - tile.width / 2), round(thing.y - tile.height / 2)
    shadow = Image.new("RGBA", tile.size, (8, 8, 20, 0))
    shadow.putalpha(tile.getchannel("A").filter(ImageFilter.GaussianBlur(1.4)).point(lambda v: v * 0.45))
    for layer, dx, dy in ((shadow, 1, 2), (tile, 0, 0)):
        _over(canvas, layer, left + dx, top + dy)


def _over(canvas: Image.Image, layer: Image.Image, left: int, top: int) -> None:
    """alpha_composite that allows a layer to stick out."""
    x, y = max(0, left), max(0, top)
    crop = (x - left, y - top, min(layer.width, canvas.width - left), min(layer.height, canvas.height - top))
    canvas.alpha_composite(layer.crop(crop), (x, y))
