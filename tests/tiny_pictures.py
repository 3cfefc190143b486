"""Pictures of one coloured shape or of a number, drawn with Pillow: what the tiny vision model is
trained on, and, from other seeds, what it is tested with.

Size, place, turn, colour, background, noise and hand vary. Digits are written in whatever fonts the
machine has and, half the time, as strokes of a shaky hand. Everything follows from the seed and the
fonts.
"""

from __future__ import annotations

import colorsys
import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
# Hue in degrees and how far it may lie off, then the ranges of saturation and value.
COLOURS = {
    "red": (0, 7, (0.8, 1.0), (0.65, 1.0)),
    "orange": (29, 5, (0.85, 1.0), (0.9, 1.0)),
    "yellow": (55, 4, (0.75, 1.0), (0.9, 1.0)),
    "green": (122, 20, (0.6, 1.0), (0.4, 0.85)),
    "blue": (222, 14, (0.65, 1.0), (0.5, 1.0)),
    "purple": (282, 10, (0.6, 1.0), (0.4, 0.8)),
    "black": (0, 180, (0.0, 0.3), (0.0, 0.1)),
    "white": (0, 180, (0.0, 0.05), (0.94, 1.0)),
}
# Each digit as strokes of points in a box 1 wide and 1 high, y downwards.
STROKES: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "0": (((0.5, 0), (0.1, 0.25), (0.1, 0.75), (0.5, 1), (0.9, 0.75), (0.9, 0.25), (0.5, 0)),),
    "1": (((0.25, 0.25), (0.6, 0), (0.6, 0.5), (0.6, 1)),),
    "2": (((0.1, 0.25), (0.4, 0), (0.85, 0.2), (0.7, 0.55), (0.1, 1)), ((0.1, 1), (0.9, 1))),
    "3": (((0.1, 0.1), (0.6, 0), (0.85, 0.25), (0.4, 0.47)),
          ((0.4, 0.47), (0.9, 0.7), (0.6, 1), (0.1, 0.9))),
    "4": (((0.6, 0), (0.1, 0.65)), ((0.1, 0.65), (0.95, 0.65)), ((0.7, 0.3), (0.7, 1))),
    "5": (((0.85, 0), (0.2, 0)), ((0.2, 0), (0.15, 0.45)),
          ((0.15, 0.45), (0.6, 0.4), (0.9, 0.7), (0.6, 1), (0.1, 0.92))),
    "6": (((0.75, 0), (0.3, 0.3), (0.1, 0.75), (0.5, 1), (0.88, 0.75), (0.5, 0.5), (0.15, 0.7)),),
    "7": (((0.1, 0), (0.9, 0)), ((0.9, 0), (0.55, 0.5), (0.35, 1))),
    "8": (((0.5, 0.46), (0.15, 0.22), (0.5, 0), (0.85, 0.22), (0.5, 0.46)),
          ((0.5, 0.46), (0.08, 0.75), (0.5, 1), (0.92, 0.75), (0.5, 0.46))),
    "9": (((0.85, 0.3), (0.5, 0.5), (0.12, 0.25), (0.5, 0), (0.88, 0.2), (0.85, 0.5), (0.6, 1)),),
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """One thing in one colour: `thing` is a shape's name or a number's digits."""

    colour: str
    thing: str

    @property
    def is_number(self) -> bool:
        return self.thing.isdigit()


def fonts(*folders: Path) -> list[str]:
    """Fonts whose digits look like digits, sorted by name."""
    found = [path for folder in folders for path in folder.rglob("*.ttf")]
    names = ("dejavusans", "dejavuserif", "liberation")
    kept = [p for p in found if p.stem.lower().startswith(names) and "Math" not in p.stem]
    return sorted(str(path) for path in kept)


def scene(chance: random.Random, numbers: float = 0.5, longest: int = 2) -> Scene:
    """A number is shown as often as `numbers`, with up to `longest` (2 or 3) digits."""
    colour = chance.choice(tuple(COLOURS))
    if chance.random() >= numbers:
        return Scene(colour, chance.choice(SHAPES))
    lengths = (1, 1, 2, 2, 3) if longest == 3 else (1, 2)
    length = chance.choice(lengths)
    return Scene(colour, "".join(chance.choice("0123456789") for _ in range(length)))


def draw(shown: Scene, chance: random.Random, faces: Sequence[str] = ()) -> Image.Image:
    width = int(2 ** chance.uniform(6.6, 8.6))
    height = max(64, min(420, int(width * 2 ** chance.uniform(-0.6, 0.6))))
    picture = _background(width, height, shown.colour, chance)
    ink = _ink(shown.colour, chance)
    if shown.is_number:
        _number(picture, shown.thing, ink, chance, faces)
    else:
        _shape(picture, shown.thing, ink, chance)
    return _worn(picture, chance)


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()


def _ink(colour: str, chance: random.Random) -> tuple[int, int, int]:
    hue, off, saturation, value = COLOURS[colour]
    return _rgb(
        (hue + chance.uniform(-off, off)) % 360, chance.uniform(*saturation), chance.uniform(*value)
    )


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb(hue / 360, saturation, value)
    return round(255 * r), round(255 * g), round(255 * b)


def _background(width: int, height: int, colour: str, chance: random.Random) -> Image.Image:
    """Grey with a little tint, sometimes shaded from corner to corner; far from black and white
    ink, and often plain paper for the others."""
    low, high = {"black": (0.4, 1.0), "white": (0.0, 0.65)}.get(colour, (0.0, 1.0))
    value = high if chance.random() < 0.25 and colour != "white" else chance.uniform(low, high)
    tint = (chance.uniform(0, 360), chance.uniform(0, 0.12) if value < 1 else 0.0)
    if chance.random() < 0.6:
        return Image.new("RGB", (width, height), _rgb(*tint, value))
    other = min(high, max(low, value + chance.uniform(-0.25, 0.25)))
    shade = Image.linear_gradient("L").rotate(chance.choice((0, 90, 180, 270)))
    ends = [Image.new("RGB", (width, height), _rgb(*tint, v)) for v in (value, other)]
    return Image.composite(*ends, shade.resize((width, height)))


def _shape(
    picture: Image.Image, shape: str, ink: tuple[int, int, int], chance: random.Random
) -> None:
    side = min(picture.size)
    radius = side * chance.uniform(0.16, 0.46)
    x = chance.uniform(radius, picture.width - radius)
    y = chance.uniform(radius, picture.height - radius)
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        return
    turn = chance.uniform(-0.3, 0.3) if shape != "star" else chance.uniform(0, 6.3)
    cos, sin = math.cos(turn), math.sin(turn)
    corners = [
        (x + radius * (px * cos - py * sin), y + radius * (px * sin + py * cos))
        for px, py in _corners(shape, chance)
    ]
    pen.polygon(corners, fill=ink)


def _corners(shape: str, chance: random.Random) -> list[tuple[float, float]]:
    """Of a shape in a circle of radius 1."""
    if shape == "square":
        return [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)]
    if shape == "triangle":
        return [(0.0, -0.95), (0.85, 0.55), (-0.85, 0.55)]
    if shape == "star":
        inner = chance.uniform(0.36, 0.48)
        angles = [(i * math.pi / 5, 1.0 if i % 2 == 0 else inner) for i in range(10)]
        return [(r * math.sin(a), -r * math.cos(a)) for a, r in angles]
    if shape == "cross":
        a = chance.uniform(0.18, 0.32)
        return [(-a, -0.95), (a, -0.95), (a, -a), (0.95, -a), (0.95, a), (a, a),
                (a, 0.95), (-a, 0.95), (-a, a), (-0.95, a), (-0.95, -a), (-a, -a)]  # fmt: skip
    steps = [i * math.tau / 60 for i in range(60)]
    return [
        (
            0.9 * math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
        )
        for t in steps
    ]


def _number(
    picture: Image.Image,
    digits: str,
    ink: tuple[int, int, int],
    chance: random.Random,
    faces: Sequence[str],
) -> None:
    width = picture.width * chance.uniform(0.5, 0.92)
    height = min(picture.height * chance.uniform(0.35, 0.9), width / len(digits) * 1.9)
    step = min(width / len(digits), height * chance.uniform(0.62, 0.85))
    x = chance.uniform(
        0.04 * picture.width, max(0.05 * picture.width, picture.width - step * len(digits))
    )
    y = chance.uniform(0.02, 0.98) * (picture.height - height)
    if faces and chance.random() < 0.5:
        _typeset(picture, digits, (x, y, step * len(digits), height), ink, chance.choice(faces))
        return
    pen = ImageDraw.Draw(picture)
    thick = max(2, round(height * chance.uniform(0.05, 0.14)))
    slant = chance.uniform(-0.18, 0.18)
    wobble = chance.uniform(0.0, 0.045)
    for i, digit in enumerate(digits):
        left = x + i * step + 0.12 * step
        for stroke in STROKES[digit]:
            points = [
                (px + chance.gauss(0, wobble), py + chance.gauss(0, wobble)) for px, py in stroke
            ]
            path = [
                (
                    left + 0.72 * step * (px + slant * (0.5 - py)),
                    y + thick + (height - 2 * thick) * py,
                )
                for px, py in _smooth(points)
            ]
            pen.line(path, fill=ink, width=thick, joint="curve")
            for px, py in (path[0], path[-1]):
                r = thick / 2
                pen.ellipse((px - r, py - r, px + r, py + r), fill=ink)


def _typeset(
    picture: Image.Image,
    digits: str,
    box: tuple[float, float, float, float],
    ink: tuple[int, int, int],
    face: str,
) -> None:
    x, y, width, height = box
    font = ImageFont.truetype(face, 100)
    left, top, right, bottom = font.getbbox(digits)
    size = 100 * min(width / (right - left), height / (bottom - top))
    font = ImageFont.truetype(face, max(8, size))
    left, top, right, bottom = font.getbbox(digits)
    x = min(x, picture.width - (right - left))
    y = min(y, picture.height - (bottom - top))
    ImageDraw.Draw(picture).text((max(0, x) - left, max(0, y) - top), digits, fill=ink, font=font)


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A Catmull-Rom curve through the points."""
    if len(points) < 3:
        return points
    padded = [points[0], *points, points[-1]]
    path = []
    for near in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        for k in range(6):
            path.append(
                (_between(*(p[0] for p in near), k / 6), _between(*(p[1] for p in near), k / 6))
            )
    return [*path, points[-1]]


def _between(a: float, b: float, c: float, d: float, t: float) -> float:
    """The curve's coordinate between b and c, at t from 0 to 1."""
    slope, bend = c - a, 2 * a - 5 * b + 4 * c - d
    return 0.5 * (2 * b + slope * t + bend * t**2 + (3 * b - a - 3 * c + d) * t**3)


def _worn(picture: Image.Image, chance: random.Random) -> Image.Image:
    if chance.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(chance.uniform(0, picture.width / 120)))
    if chance.random() < 0.5:
        noise = Image.effect_noise(picture.size, chance.uniform(2, 40))
        grey = Image.merge("RGB", [noise] * 3)
        picture = Image.blend(picture, grey, chance.uniform(0.0, 0.18))
    if chance.random() < 0.3:
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=chance.randint(35, 95))
        picture = Image.open(out).convert("RGB")
    return picture
