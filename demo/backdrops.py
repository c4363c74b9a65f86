"""Draws the place behind the objects: a room, a street, a landscape, or a crop of a real photograph.

Drawn at twice the size and reduced. Colours are given as by day; `Light` turns them into sunset or night.
"""

import math
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

from .atlas import Sources
from .layout import SIDE, Backdrop
from .shapes import Rgb, mix

FINE = 2
S = SIDE * FINE
SKY: dict[str, tuple[Rgb, Rgb]] = {  # top and horizon
    "daylight": ((88, 158, 232), (206, 230, 248)),
    "sunset": ((92, 70, 140), (255, 150, 70)),
    "night": ((8, 12, 36), (32, 42, 84)),
}
GREY_SKY: dict[str, tuple[Rgb, Rgb]] = {
    "daylight": ((142, 152, 166), (204, 210, 216)),
    "sunset": ((110, 84, 116), (232, 146, 96)),
    "night": ((14, 16, 34), (44, 50, 76)),
}
CAST: dict[str, Rgb] = {"daylight": (255, 255, 255), "sunset": (236, 162, 128), "night": (66, 76, 128)}


@dataclass(frozen=True)
class Light:
    """How the light of a picture changes a colour."""

    name: str

    def on(self, colour: Rgb) -> Rgb:
        r, g, b = CAST[self.name]
        return (colour[0] * r // 255, colour[1] * g // 255, colour[2] * b // 255)


def draw(backdrop: Backdrop, sources: Sources, rng: Random) -> Image.Image:
    """The backdrop as an RGB picture of native size."""
    if backdrop.place == "indoor":
        return _room(backdrop, rng)
    if backdrop.photo:
        fine = _photograph(backdrop, sources, rng)
    else:
        fine = _sky(backdrop, rng)
        if backdrop.place == "urban":
            _street(fine, backdrop, rng)
        else:
            {"mountains": _mountains, "sea": _sea, "forest": _forest, "desert": _desert}[backdrop.landscape](
                fine, backdrop, rng
            )
    _weather(fine, backdrop.weather, rng)
    return fine.reduce(FINE)


def _ramp(top: Rgb, bottom: Rgb, size: tuple[int, int]) -> Image.Image:
    mask = Image.linear_gradient("L").resize(size)
    return Image.composite(Image.new("RGB", size, bottom), Image.new("RGB", size, top), mask)


def _near(rng: Random, colour: Rgb, by: int = 14) -> Rgb:
    r, g, b = (min(255, max(0, c + rng.randint(-by, by))) for c in colour)
    return r, g, b


def _glow(picture: Image.Image, x: float, y: float, radius: float, colour: Rgb, strength: float) -> None:
    """A soft round light added to the picture."""
    side = round(2 * radius)
    spot = Image.radial_gradient("L").resize((side, side)).point(lambda v: max(0.0, 255 - 1.42 * v) * strength)
    box = (round(x - radius), round(y - radius))
    picture.paste(Image.new("RGB", (side, side), colour), box, spot)


def _sky(backdrop: Backdrop, rng: Random) -> Image.Image:
    top, horizon = (SKY if backdrop.weather == "clear" else GREY_SKY)[backdrop.light]
    picture = _ramp(_near(rng, top, 10), _near(rng, horizon, 10), (S, round(S * 0.62)))
    whole = Image.new("RGB", (S, S), horizon)
    whole.paste(picture, (0, 0))
    draw_on = ImageDraw.Draw(whole)
    x, y = rng.uniform(0.12, 0.88) * S, rng.uniform(0.08, 0.22) * S
    if backdrop.light == "night":
        for _ in range(40 if backdrop.weather == "clear" else 0):
            sx, sy, r = rng.uniform(0, S), rng.uniform(0, 0.5 * S), rng.choice((0.6, 0.8, 1.2))
            draw_on.ellipse((sx - r, sy - r, sx + r, sy + r), fill=(226, 230, 250))
        _glow(whole, x, y, 44, (150, 160, 210), 0.5)
        draw_on.ellipse((x - 13, y - 13, x + 13, y + 13), fill=(238, 236, 214))
    elif backdrop.light == "sunset":
        y = rng.uniform(0.36, 0.46) * S
        _glow(whole, x, y, 90, (255, 214, 120), 0.8)
        draw_on.ellipse((x - 17, y - 17, x + 17, y + 17), fill=(255, 240, 190))
    elif backdrop.weather == "clear":
        _glow(whole, x, y, 60, (255, 250, 220), 0.9)
        draw_on.ellipse((x - 14, y - 14, x + 14, y + 14), fill=(255, 246, 190))
    if backdrop.weather != "clear" or rng.random() < 0.7:
        _clouds(whole, backdrop, rng)
    return whole


def _clouds(picture: Image.Image, backdrop: Backdrop, rng: Random) -> None:
    white = {"daylight": (252, 252, 255), "sunset": (250, 186, 150), "night": (60, 68, 104)}[backdrop.light]
    colour = white if backdrop.weather == "clear" else mix(white, (84, 88, 100), 0.5)
    mask = Image.new("L", (S, S))
    draw_on = ImageDraw.Draw(mask)
    for _ in range(rng.randint(1, 3) if backdrop.weather == "clear" else 6):
        x, y, w = rng.uniform(0, S), rng.uniform(0.04, 0.3) * S, rng.uniform(22, 44)
        for dx, dy, r in ((-0.7, 0.1, 0.32), (-0.25, -0.1, 0.45), (0.3, -0.02, 0.4), (0.75, 0.12, 0.28)):
            draw_on.ellipse(
                (x + dx * w - r * w, y + dy * w - r * w * 0.7, x + dx * w + r * w, y + dy * w + r * w * 0.7),
                fill=215,
            )
    picture.paste(colour, (0, 0), mask.filter(ImageFilter.GaussianBlur(2.5)))


def _ridge(rng: Random, base: float, rough: float, steps: int) -> list[tuple[float, float]]:
    points = [(S * i / steps, base - rng.uniform(0, rough)) for i in range(steps + 1)]
    return [(-2, S + 2), *points, (S + 2, S + 2)]


def _mountains(picture: Image.Image, backdrop: Backdrop, rng: Random) -> None:
    light, draw_on = Light(backdrop.light), ImageDraw.Draw(picture)
    for depth, rock in enumerate(((128, 142, 172), (92, 100, 120))):
        tone = light.on(_near(rng, rock))
        for _ in range(3):
            x, peak = rng.uniform(-0.05, 1.05) * S, (0.2 + 0.14 * depth + rng.uniform(0, 0.12)) * S
            w = rng.uniform(0.3, 0.45) * S
            foot = 0.68 * S
            draw_on.polygon([(x - w, foot), (x, peak), (x + w, foot)], fill=tone)
            draw_on.polygon([(x, peak), (x + w, foot), (x + w * 0.1, foot)], fill=mix(tone, (10, 12, 30), 0.22))
            cap = 0.26 * (foot - peak)
            snow = [
                (x, peak),
                (x + w * 0.26, peak + cap),
                (x + w * 0.1, peak + cap * 0.8),
                (x, peak + cap * 1.15),
            ]
            draw_on.polygon(
                [*snow, (x - w * 0.12, peak + cap * 0.75), (x - w * 0.26, peak + cap)],
                fill=light.on((246, 248, 252)),
            )
    grass = (238, 242, 248) if backdrop.weather == "snowy" else (104, 158, 74)
    tone = light.on(_near(rng, grass))
    draw_on.polygon(_ridge(rng, 0.66 * S, 0.06 * S, 5), fill=tone)
    draw_on.polygon(_ridge(rng, 0.8 * S, 0.06 * S, 4), fill=mix(tone, (16, 40, 20), 0.14))


def _sea(picture: Image.Image, backdrop: Backdrop, rng: Random) -> None:
    light, horizon = Light(backdrop.light), round(rng.uniform(0.42, 0.52) * S)
    water = light.on(_near(rng, (36, 122, 176)))
    picture.paste(_ramp(mix(water, SKY[backdrop.light][1], 0.35), water, (S, S - horizon)), (0, horizon))
    draw_on = ImageDraw.Draw(picture)
    foam = mix(water, (255, 255, 255), 0.4)
    for _ in range(38):
        y = horizon + (rng.random() ** 1.3) * (0.84 * S - horizon)
        x, w = rng.uniform(-10, S), 6 + 30 * (y - horizon) / S
        draw_on.arc((x, y, x + w, y + w * 0.35), 200, 340, fill=foam, width=2)
    shore = 0.85 * S
    points = [(S * i / 12, shore + 7 * math.sin(i * 0.9 + rng.uniform(0, 0.8))) for i in range(13)]
    draw_on.line([(x, y - 3) for x, y in points], fill=mix(foam, (255, 255, 255), 0.5), width=5)
    sand = (240, 242, 246) if backdrop.weather == "snowy" else (232, 208, 152)
    draw_on.polygon([(-2, S + 2), *points, (S + 2, S + 2)], fill=light.on(_near(rng, sand)))


def _forest(picture: Image.Image, backdrop: Backdrop, rng: Random) -> None:
    light, draw_on = Light(backdrop.light), ImageDraw.Draw(picture)
    ground = (236, 240, 246) if backdrop.weather == "snowy" else (92, 122, 62)
    draw_on.rectangle((0, 0.6 * S, S, S), fill=light.on(_near(rng, ground)))
    for depth in range(3):
        foot, tall = (0.62 + 0.1 * depth) * S, (0.36 + 0.09 * depth) * S
        green = light.on(_near(rng, ((96, 138, 110), (56, 106, 72), (34, 84, 52))[depth], 10))
        x = rng.uniform(-20, 10)
        while x < S + 20:
            h, w = tall * rng.uniform(0.75, 1.1), rng.uniform(0.07, 0.1) * S * (1 + 0.25 * depth)
            draw_on.rectangle((x - 3, foot - 6, x + 3, foot + 5), fill=light.on((92, 66, 46)))
            for level in range(3):
                top, wide = foot - h + level * h * 0.24, w * (0.5 + 0.25 * level)
                draw_on.polygon([(x - wide, top + h * 0.46), (x, top), (x + wide, top + h * 0.46)], fill=green)
                draw_on.polygon(
                    [(x, top), (x + wide, top + h * 0.46), (x + 2, top + h * 0.46)],
                    fill=mix(green, (0, 10, 10), 0.2),
                )
            x += w * rng.uniform(1.2, 2.0)


def _desert(picture: Image.Image, backdrop: Backdrop, rng: Random) -> None:
    light, draw_on = Light(backdrop.light), ImageDraw.Draw(picture)
    sand = (234, 226, 214) if backdrop.weather == "snowy" else (226, 178, 108)
    for depth in range(3):
        tone = mix(light.on(_near(rng, sand, 10)), (70, 30, 20), 0.1 * depth)
        base, phase, high = (0.54 + 0.14 * depth) * S, rng.uniform(0, 6), rng.uniform(0.03, 0.07) * S
        crest = [(S * i / 24, base + high * math.sin(phase + i * (0.22 + 0.06 * depth))) for i in range(25)]
        draw_on.polygon([(-2, S + 2), *crest, (S + 2, S + 2)], fill=tone)
        draw_on.line(crest, fill=mix(tone, (255, 246, 220), 0.3), width=3)
    green = light.on((72, 128, 76))
    for _ in range(rng.randint(2, 4)):
        x, foot, h = rng.uniform(0.05, 0.95) * S, rng.uniform(0.6, 0.82) * S, rng.uniform(34, 52)
        draw_on.line([(x, foot), (x, foot - h)], fill=green, width=9)
        draw_on.line([(x, foot - h * 0.35), (x - 15, foot - h * 0.35), (x - 15, foot - h * 0.7)], fill=green, width=7)
        draw_on.line([(x, foot - h * 0.5), (x + 15, foot - h * 0.5), (x + 15, foot - h * 0.85)], fill=green, width=7)


def _street(picture: Image.Image, backdrop: Backdrop, rng: Random) -> None:
    light, draw_on = Light(backdrop.light), ImageDraw.Draw(picture)
    kerb = round(rng.uniform(0.74, 0.8) * S)
    walls = ((168, 120, 104), (150, 156, 170), (196, 178, 150), (112, 124, 150), (184, 188, 194))
    lit = {"daylight": (176, 208, 230), "sunset": (255, 210, 130), "night": (255, 222, 130)}[backdrop.light]
    for depth in range(2):
        x = rng.uniform(-30.0, 0.0)
        while x < S:
            w, top = rng.uniform(38, 64), rng.uniform(0.16, 0.4) * S + depth * 0.14 * S
            wall = light.on(_near(rng, rng.choice(walls)))
            wall = mix(wall, SKY[backdrop.light][1], 0.35) if depth == 0 else wall
            draw_on.rectangle((x, top, x + w, kerb), fill=wall)
            if backdrop.weather == "snowy":
                draw_on.rectangle((x, top, x + w, top + 5), fill=light.on((244, 246, 250)))
            _windows(draw_on, (x, top, x + w, kerb), wall, lit, backdrop.light, rng)
            x += w + rng.choice((0, 0, 4, 12))
    pavement = (240, 242, 246) if backdrop.weather == "snowy" else (170, 170, 174)
    draw_on.rectangle((0, kerb, S, kerb + 9), fill=light.on(pavement))
    draw_on.rectangle((0, kerb + 9, S, S), fill=light.on(_near(rng, (86, 88, 96), 8)))
    lane, start = (kerb + 9 + S) / 2, rng.randint(-20, 0)
    for x0 in range(start, S, 44):
        draw_on.rectangle((x0, lane - 2, x0 + 22, lane + 2), fill=light.on((240, 236, 214)))
    x = rng.uniform(20, 70)
    while x < S:
        draw_on.line([(x, kerb + 4), (x, kerb - 62), (x + 12, kerb - 66)], fill=light.on((56, 58, 66)), width=4)
        if backdrop.light != "daylight":
            _glow(picture, x + 14, kerb - 62, 26, (255, 226, 150), 0.9)
        x += rng.uniform(90, 130)


def _windows(
    draw_on: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    wall: Rgb,
    lit: Rgb,
    light: str,
    rng: Random,
) -> None:
    dark = mix(wall, (20, 24, 44), 0.5)
    share = {"daylight": 0.75, "sunset": 0.45, "night": 0.5}[light]
    x0, y0, x1, y1 = box
    y = y0 + 10
    while y < y1 - 12:
        x = x0 + 6
        while x < x1 - 9:
            draw_on.rectangle((x, y, x + 6, y + 8), fill=lit if rng.random() < share else dark)
            x += 12
        y += 17


def _room(backdrop: Backdrop, rng: Random) -> Image.Image:
    wall = _near(rng, rng.choice(((232, 220, 196), (196, 214, 222), (222, 204, 206), (204, 218, 196), (226, 226, 230))))
    edge = round(rng.uniform(0.6, 0.68) * S)
    picture = _ramp(wall, mix(wall, (120, 110, 100), 0.2), (S, S))
    draw_on = ImageDraw.Draw(picture)
    _window(picture, backdrop, rng)
    for _ in range(rng.randint(1, 2)):
        x, y, w, h = (
            rng.uniform(0.52, 0.8) * S,
            rng.uniform(0.08, 0.3) * S,
            rng.uniform(26, 44),
            rng.uniform(26, 44),
        )
        draw_on.rectangle((x, y, x + w, y + h), fill=(112, 84, 60))
        draw_on.rectangle((x + 4, y + 4, x + w - 4, y + h - 4), fill=_near(rng, (190, 196, 190), 40))
    _ground(picture, edge, backdrop.floor, rng)
    draw_on.rectangle((0, edge - 7, S, edge), fill=mix(wall, (255, 255, 255), 0.5))
    draw_on.line([(0, edge), (S, edge)], fill=(110, 100, 92), width=2)
    if backdrop.light == "dim":
        picture = ImageChops.multiply(picture, Image.new("RGB", (S, S), (84, 74, 84)))
        _glow(picture, rng.uniform(0.2, 0.8) * S, 0.3 * S, 80, (255, 190, 110), 0.35)
    else:
        _glow(picture, S / 2, 0.1 * S, 150, (255, 252, 236), 0.45)
    return picture.reduce(FINE)


def _window(picture: Image.Image, backdrop: Backdrop, rng: Random) -> None:
    x, y, w, h = (round(v * S) for v in (rng.uniform(0.06, 0.2), rng.uniform(0.08, 0.16), 0.28, 0.34))
    bright = backdrop.light == "bright"
    view = _ramp(*((SKY if bright else GREY_SKY)["daylight" if bright else "night"]), (w, h))
    picture.paste(view, (x, y))
    draw_on = ImageDraw.Draw(picture)
    frame = (246, 244, 240)
    draw_on.rectangle((x - 3, y - 3, x + w + 3, y + h + 3), outline=frame, width=6)
    draw_on.line([(x + w / 2, y), (x + w / 2, y + h)], fill=frame, width=4)
    draw_on.line([(x, y + h / 2), (x + w, y + h / 2)], fill=frame, width=4)
    cloth = _near(rng, rng.choice(((150, 90, 90), (96, 120, 150), (140, 140, 110))))
    for side in (x - 16, x + w - 4):
        draw_on.rectangle((side, y - 8, side + 20, y + h + 14), fill=cloth)
        for fold in (6, 13):
            draw_on.line([(side + fold, y - 8), (side + fold, y + h + 14)], fill=mix(cloth, (0, 0, 0), 0.2), width=2)


def _ground(picture: Image.Image, edge: int, floor: str, rng: Random) -> None:
    draw_on = ImageDraw.Draw(picture)
    vanish = (S / 2, edge - 0.5 * S)  # lines of the floor run towards this point
    rows = [edge + (S - edge) * (i / 5) ** 1.5 for i in range(6)]
    feet = [S / 2 + (i - 9) * 0.2 * S for i in range(19)]

    def across(foot: float, y: float) -> float:
        return vanish[0] + (foot - vanish[0]) * (y - vanish[1]) / (S - vanish[1])

    if floor == "carpet":
        cloth = _near(rng, rng.choice(((128, 52, 60), (54, 72, 124), (62, 104, 82), (104, 72, 116))))
        draw_on.rectangle((0, edge, S, S), fill=cloth)
        for _ in range(420):
            x, y = rng.uniform(0, S), rng.uniform(edge, S)
            draw_on.line(
                [(x, y), (x + 2, y + 3)],
                fill=mix(cloth, rng.choice(((255, 255, 255), (0, 0, 0))), 0.2),
                width=2,
            )
        return
    if floor == "tile":
        one = _near(rng, rng.choice(((222, 224, 226), (206, 216, 214), (226, 216, 202))), 8)
        two = mix(one, (70, 84, 98), 0.55)
        for r in range(5):
            for c in range(18):
                top, bottom = rows[r], rows[r + 1]
                corner = [(across(feet[c], top), top), (across(feet[c + 1], top), top)]
                corner += [(across(feet[c + 1], bottom), bottom), (across(feet[c], bottom), bottom)]
                draw_on.polygon(corner, fill=one if (r + c) % 2 else two)
        return
    plank = _near(rng, rng.choice(((178, 124, 74), (146, 96, 56), (202, 156, 104))), 8)
    for c in range(18):
        tone = mix(plank, rng.choice(((255, 236, 200), (60, 30, 10))), rng.uniform(0, 0.2))
        corner = [
            (across(feet[c], edge), edge),
            (across(feet[c + 1], edge), edge),
            (feet[c + 1], S),
            (feet[c], S),
        ]
        draw_on.polygon(corner, fill=tone)
        for _ in range(3):
            foot = rng.uniform(feet[c], feet[c + 1])
            grain = mix(tone, (60, 30, 10), 0.25)
            draw_on.line([(across(foot, edge), edge), (foot, S)], fill=grain, width=1)
        draw_on.line([(across(feet[c], edge), edge), (feet[c], S)], fill=mix(plank, (40, 20, 8), 0.6), width=2)


def _photograph(backdrop: Backdrop, sources: Sources, rng: Random) -> Image.Image:
    """A random crop, perhaps mirrored. It keeps a light of its own; else it is lit like drawn places."""
    whole = sources.pictures[backdrop.photo]
    side = round(whole.height * rng.uniform(0.72, 1.0))
    x, y = rng.randint(0, whole.width - side), rng.randint(0, whole.height - side)
    crop = whole.resize((S, S), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    crop = ImageEnhance.Color(crop).enhance(rng.uniform(0.75, 1.15))
    crop = ImageEnhance.Brightness(crop).enhance(rng.uniform(0.85, 1.1))
    photo = next(p for p in sources.photos if p.name == backdrop.photo)
    if photo.light or backdrop.light == "daylight":
        return crop
    if backdrop.light == "night":
        return ImageChops.multiply(crop, Image.new("RGB", (S, S), CAST["night"]))
    warm = ImageChops.multiply(crop, Image.new("RGB", (S, S), (238, 172, 138)))
    return ImageChops.screen(warm, _ramp((78, 30, 44), (96, 44, 0), (S, S)))


def _weather(picture: Image.Image, weather: str, rng: Random) -> None:
    veil = Image.new("RGBA", (S, S))
    draw_on = ImageDraw.Draw(veil)
    if weather == "rainy":
        slant = rng.uniform(-8, 8)
        for _ in range(110):
            x, y, long = rng.uniform(-8, S), rng.uniform(-20, S), rng.uniform(12, 24)
            draw_on.line([(x, y), (x + slant * long / 20, y + long)], fill=(214, 226, 244, 150), width=2)
    elif weather == "snowy":
        for _ in range(120):
            x, y, r = rng.uniform(0, S), rng.uniform(0, S), rng.uniform(1.4, 3.4)
            draw_on.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255, 215))
    else:
        return
    picture.paste(veil, (0, 0), veil)
