"""What is drawn: one function per family of concepts, in canonical pose, on the 64×64 canvas of `rendering`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .rendering import CANVAS, INKS, Bytes, Drawing, Floats, Ints, sketch

Pen = ImageDraw.ImageDraw
Rng = np.random.Generator
A, B, C = INKS
MIDDLE = CANVAS / 2

PLAIN_FONTS = ("DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono", "STIXGeneral", "cmss10")
"""Faces seen in pre-training; the tasks add the ones below."""
TEXT_FONTS = (
    *PLAIN_FONTS,
    "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono-Bold",
    "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmb10", "cmti10", "cmtt10",
)  # fmt: skip
GREEK_FONTS = (
    "DejaVuSans", "DejaVuSerif-Bold", "STIXGeneral",
    "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono", "STIXGeneralBol",
    "STIXGeneralItalic",
)  # fmt: skip
SYMBOL_FONTS = ("DejaVuSans", "DejaVuSansMono-Bold", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSansMono")


@lru_cache(maxsize=4096)
def _glyph(face: str, character: str) -> Bytes:
    """One character as a mask, uint8 [64, 64], about 40 pixels in its longer side and centred."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    font = ImageFont.truetype(str(path), 48)
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(canvas)
    pen.text((MIDDLE - (left + right) / 2, MIDDLE - (top + bottom) / 2), character, fill=255, font=font)
    return np.asarray(canvas)


def glyphs(variants: Sequence[str], faces: Sequence[str], plain: int) -> Drawing:
    """Class k is any character of variants[k] in any face; up to level 0.5 only the first `plain` faces are used."""

    def batch(rng: Rng, classes: Ints, level: float) -> Bytes:
        masks = np.zeros((len(classes), 3, CANVAS, CANVAS), dtype=np.uint8)
        chosen = rng.integers(len(faces) if level > 0.5 else plain, size=len(classes))
        which = rng.integers(1 << 16, size=len(classes))
        for i, k in enumerate(classes):
            characters = variants[k]
            masks[i, 0] = _glyph(faces[chosen[i]], characters[which[i] % len(characters)])
        return masks

    return batch


@lru_cache(maxsize=1)
def _scans() -> tuple[Bytes, Ints]:
    """scikit-learn's 1797 handwritten digits, enlarged to 64×64 masks with a margin, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    masks = np.zeros((len(data.target), CANVAS, CANVAS), dtype=np.uint8)
    for i, scan in enumerate(data.images):
        small = Image.fromarray(np.clip(scan * 15.9, 0, 255).astype(np.uint8))
        masks[i, 8:56, 8:56] = np.asarray(small.resize((48, 48), Image.Resampling.BICUBIC))
    return masks, data.target.astype(np.int64)


def handwriting(first: int, last: int) -> Drawing:
    """Handwritten digits number first..last−1 of the 1797."""

    def batch(rng: Rng, classes: Ints, level: float) -> Bytes:
        scans, labels = _scans()
        masks = np.zeros((len(classes), 3, CANVAS, CANVAS), dtype=np.uint8)
        for k in range(10):
            pool = first + np.flatnonzero(labels[first:last] == k)
            rows = np.flatnonzero(classes == k)
            masks[rows, 0] = scans[pool[rng.integers(len(pool), size=len(rows))]]
        return masks

    return batch


def regular(cx: float, cy: float, radius: float, sides: int, turn: float = 0.0) -> list[tuple[float, float]]:
    """Corners of a regular polygon, the first one up when turn is 0."""
    angles = [turn - math.pi / 2 + 2 * math.pi * i / sides for i in range(sides)]
    return [(cx + radius * math.cos(a), cy + radius * math.sin(a)) for a in angles]


def star(cx: float, cy: float, radius: float, points: int, inner: float = 0.45) -> list[tuple[float, float]]:
    """Corners of a star."""
    outer = regular(cx, cy, radius, points)
    inside = regular(cx, cy, radius * inner, points, math.pi / points)
    return [corner for pair in zip(outer, inside, strict=True) for corner in pair]


def disc(pen: Pen, cx: float, cy: float, radius: float, fill: str | None = A, outline: str | None = None) -> None:
    """A filled circle or, with outline, a ring."""
    pen.ellipse([cx - radius, cy - radius, cx + radius, cy + radius], fill=fill, outline=outline, width=4)


def _polygon(pen: Pen, corners: list[tuple[float, float]], hollow: bool, ink: str = A) -> None:
    if hollow:
        pen.line([*corners, corners[0], corners[1]], fill=ink, width=4, joint="curve")
    else:
        pen.polygon(corners, fill=ink)


def _between(rng: Rng, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def _ray(angle: float, length: float) -> tuple[float, float]:
    """The point at this angle (degrees, clockwise from up) and distance from the middle."""
    a = math.radians(angle)
    return MIDDLE + length * math.sin(a), MIDDLE - length * math.cos(a)


@sketch
def shapes(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """Circle, ring, square, triangle, star, plus, heart, crescent, diamond, semicircle."""
    r = _between(rng, 17, 22)
    hollow = bool(rng.random() < 0.5)
    m = MIDDLE
    if k == 0:
        disc(pen, m, m, r)
    elif k == 1:
        pen.ellipse([m - r, m - r, m + r, m + r], outline=A, width=int(rng.integers(5, 9)))
    elif k == 2:
        _polygon(pen, regular(m, m, r * 1.25, 4, math.pi / 4), hollow)
    elif k == 3:
        _polygon(pen, regular(m, m + 3, r * 1.2, 3), hollow)
    elif k == 4:
        _polygon(pen, star(m, m, r * 1.25, 5), hollow)
    elif k == 5:
        t = _between(rng, 4, 8)
        pen.rectangle([m - r, m - t, m + r, m + t], fill=A)
        pen.rectangle([m - t, m - r, m + t, m + r], fill=A)
    elif k == 6:
        turn = np.linspace(0, 2 * np.pi, 40)
        x = 16 * np.sin(turn) ** 3
        y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
        _polygon(pen, [(m + float(a) * r / 16, m + float(b) * r / 16) for a, b in zip(x, y, strict=True)], hollow)
    elif k == 7:
        disc(pen, m, m, r)
        disc(pen, m + r * 0.5, m - r * 0.15, r * 0.85, fill="#000000")
    elif k == 8:
        corners = [(m, m - r * 1.2), (m + r * 0.75, m), (m, m + r * 1.2), (m - r * 0.75, m)]
        _polygon(pen, corners, hollow)
    else:
        pen.pieslice([m - r * 1.2, m - r * 0.6, m + r * 1.2, m + r * 1.8], 180, 360, fill=A)


SIDES = (3, 4, 5, 6, 8)


@sketch
def polygons(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """Regular polygons with 3, 4, 5, 6, 8 sides, in any rotation at full level."""
    turn = _between(rng, -math.pi, math.pi) * level
    _polygon(pen, regular(MIDDLE, MIDDLE, _between(rng, 22, 28), SIDES[k], turn), bool(rng.random() < 0.5))


def _spots(rng: Rng, n: int, radius: float, gap: float) -> list[tuple[float, float]]:
    """n random points at least gap apart, away from the border."""
    points: list[tuple[float, float]] = []
    for _ in range(400):
        x, y = rng.uniform(radius + 5, CANVAS - radius - 5, 2)
        if all((x - a) ** 2 + (y - b) ** 2 > gap**2 for a, b in points):
            points.append((float(x), float(y)))
        if len(points) == n:
            break
    return points


@sketch
def counts(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """One to six equal objects: discs, squares or triangles."""
    kind = int(rng.integers(3))
    radius = _between(rng, 4.5, 6.5)
    for x, y in _spots(rng, k + 1, radius, 2.5 * radius + 2):
        if kind == 0:
            disc(pen, x, y, radius)
        else:
            pen.polygon(regular(x, y, radius * 1.3, 5 - kind, math.pi / 4 if kind == 1 else 0.0), fill=A)


PIPS = {1: [4], 2: [0, 8], 3: [0, 4, 8], 4: [0, 2, 6, 8], 5: [0, 2, 4, 6, 8], 6: [0, 2, 3, 5, 6, 8]}


@sketch
def dice(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """A die face with one to six pips."""
    h = _between(rng, 19, 24)
    pen.rounded_rectangle([MIDDLE - h, MIDDLE - h, MIDDLE + h, MIDDLE + h], 5, fill=A)
    step, radius = h * 0.58, _between(rng, 3.5, 5.0)
    for pip in PIPS[k + 1]:
        disc(pen, MIDDLE + (pip % 3 - 1) * step, MIDDLE + (pip // 3 - 1) * step, radius, fill=B)


@sketch
def clocks(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """A clock at the full hour: short thick hand at the hour, long thin hand up."""
    r = _between(rng, 24, 28)
    if rng.random() < 0.5:
        disc(pen, MIDDLE, MIDDLE, r, fill=None, outline=A)
    else:
        disc(pen, MIDDLE, MIDDLE, r, fill=B)
    pen.line([(MIDDLE, MIDDLE), _ray(0, r * 0.85)], fill=A, width=2)
    pen.line([(MIDDLE, MIDDLE), _ray((k + 1) * 30, r * 0.62)], fill=A, width=int(rng.integers(5, 8)))


@sketch
def arrows(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """Arrows in eight directions; heads open or filled, some with two shafts."""
    angle, length = k * 45.0, _between(rng, 19, 26)
    tip, tail = _ray(angle, length), _ray(angle + 180, length)
    width = int(rng.integers(3, 7))
    pen.line([tail, _ray(angle, length * 0.7)], fill=A, width=width)
    spread, back = math.radians(_between(rng, 25, 42)), _between(rng, 13, 18)
    a = math.radians(angle)
    wings = [(tip[0] - back * math.sin(a + s), tip[1] + back * math.cos(a + s)) for s in (-spread, spread)]
    if rng.random() < 0.5:
        pen.polygon([tip, wings[0], wings[1]], fill=A)
    else:
        pen.line([wings[0], tip, wings[1]], fill=A, width=width)
        pen.line([tail, tip], fill=A, width=width)


@sketch
def angles(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """A bar, an ellipse or a pair of bars at one of six angles."""
    angle, kind = k * 30.0 + _between(rng, -4, 4) * level, int(rng.integers(3))
    length = _between(rng, 20, 28)
    if kind == 0:
        pen.line([_ray(angle, length), _ray(angle + 180, length)], fill=A, width=int(rng.integers(4, 10)))
    elif kind == 1:
        a = math.radians(angle)
        t = np.linspace(0, 2 * np.pi, 30)
        thin = length * _between(rng, 0.25, 0.4)
        x = length * np.cos(t) * math.sin(a) + thin * np.sin(t) * math.cos(a)
        y = -length * np.cos(t) * math.cos(a) + thin * np.sin(t) * math.sin(a)
        pen.polygon([(MIDDLE + float(p), MIDDLE + float(q)) for p, q in zip(x, y, strict=True)], fill=A)
    else:
        a, off = math.radians(angle), _between(rng, 7, 12)
        for sign in (-1, 1):
            dx, dy = sign * off * math.cos(a), sign * off * math.sin(a)
            ends = [(x + dx, y + dy) for x, y in (_ray(angle, length), _ray(angle + 180, length))]
            pen.line(ends, fill=A, width=4)


@sketch
def positions(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """A small object in one of nine cells of a grid; beside it, at full level, three smaller marks in the other ink."""
    x, y = ((c + 0.5) * CANVAS / 3 for c in (k % 3, k // 3))
    x, y = x + _between(rng, -4, 4), y + _between(rng, -4, 4)
    kind, radius = int(rng.integers(4)), _between(rng, 6, 9)
    if rng.random() < level:
        for a, b in rng.uniform(4, CANVAS - 4, (3, 2)):
            disc(pen, float(a), float(b), 2.2, fill=B)
    if kind == 0:
        disc(pen, x, y, radius)
    else:
        pen.polygon(regular(x, y, radius * 1.2, kind + 2, math.pi / 4 if kind == 2 else 0.0), fill=A)


@sketch
def relations(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """A circle left of, right of, above, below, inside, around, overlapping or far diagonal from a square."""
    m = MIDDLE

    def square(x: float, y: float, h: float, ink: str = B) -> None:
        pen.rectangle([x - h, y - h, x + h, y + h], fill=ink)

    r, h = _between(rng, 8, 11), _between(rng, 7, 10)
    jitter = _between(rng, -7, 7)
    if k < 4:
        dx, dy = ((-1, 0), (1, 0), (0, -1), (0, 1))[k]
        off = _between(rng, 12, 15)
        disc(pen, m + dx * off + dy * jitter, m + dy * off + dx * jitter, r)
        square(m - dx * off, m - dy * off, h)
    elif k == 4:
        x, y = m + _between(rng, -8, 8), m + _between(rng, -8, 8)
        square(x, y, r * 2)
        disc(pen, x + jitter * 0.5, y - jitter * 0.5, r)
    elif k == 5:
        x, y = m + _between(rng, -8, 8), m + _between(rng, -8, 8)
        disc(pen, x, y, r * 2.2)
        square(x + jitter * 0.5, y - jitter * 0.5, h)
    elif k == 6:
        square(m + jitter, m + 5, h * 1.4)
        disc(pen, m - jitter, m - 5, r * 1.2)
    else:
        sx, sy = rng.choice([-1, 1], 2)
        disc(pen, m + float(sx) * 20, m + float(sy) * 20, r * 0.9)
        square(m - float(sx) * 20, m - float(sy) * 20, h * 0.9)


@sketch
def among_distractors(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """One large object in ink A among smaller ones in inks B and C; the class is the colour, which the palette sets."""
    kind = int(rng.integers(4))
    x, y = rng.uniform(20, CANVAS - 20, 2)
    for _ in range(int(rng.integers(1, 2 + round(5 * level)))):
        a, b = rng.uniform(4, CANVAS - 4, 2)
        ink, h = (B, C)[int(rng.integers(2))], _between(rng, 4, 7)
        pen.rectangle([a - h, b - h, a + h, b + h], fill=ink)
    if kind == 0:
        disc(pen, float(x), float(y), 13)
    else:
        pen.polygon(regular(float(x), float(y), 15, kind + 2), fill=A)


HUES: tuple[tuple[float, float, float], ...] = (
    (0.85, 0.10, 0.10), (0.95, 0.55, 0.10), (0.92, 0.88, 0.15), (0.15, 0.65, 0.20), (0.15, 0.75, 0.78),
    (0.12, 0.25, 0.85), (0.50, 0.15, 0.70), (0.95, 0.50, 0.72), (0.45, 0.27, 0.12), (0.97, 0.97, 0.97),
)  # fmt: skip


def named_colour(rng: Rng, classes: Ints, colours: Floats) -> Floats:
    """Ink A takes the class's colour with some spread; paper and distractors become greys."""
    n = len(classes)
    result = colours.copy()
    result[:, 1] = np.asarray(HUES, dtype=np.float32)[classes] + rng.uniform(-0.09, 0.09, (n, 3)).astype(np.float32)
    grey = rng.uniform(0.05, 0.7, (n, 3, 1)).astype(np.float32)
    tint = rng.uniform(-0.06, 0.06, (n, 3, 3)).astype(np.float32)
    result[:, [0, 2, 3]] = grey + tint
    return np.clip(result, 0, 1)


@sketch
def sizes(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """Tiny, small, middle, large, huge: discs, squares, triangles or stars, anywhere they fit."""
    radius = (4.0, 7.5, 12.0, 18.0, 26.0)[k] * _between(rng, 0.88, 1.12)
    room = max(0.0, 29 - radius) * 0.8
    x, y = MIDDLE + _between(rng, -room, room), MIDDLE + _between(rng, -room, room)
    kind = int(rng.integers(4))
    if kind == 0:
        disc(pen, x, y, radius)
    elif kind == 3:
        pen.polygon(star(x, y, radius * 1.2, 5), fill=A)
    else:
        pen.polygon(regular(x, y, radius * 1.15, kind + 2, math.pi / 4 if kind == 2 else 0.0), fill=A)


@sketch
def line_styles(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """One line across: solid, dashed, dotted, dash-dot, double, wavy, zigzag, or three parallel ones."""
    angle, width = _between(rng, -0.5, 0.5) * math.pi * (0.3 + 0.7 * level), int(rng.integers(3, 5))
    cos, sin = math.cos(angle), math.sin(angle)

    def at(t: float, off: float = 0.0) -> tuple[float, float]:
        return MIDDLE + t * cos - off * sin, MIDDLE + t * sin + off * cos

    if k == 0:
        pen.line([at(-30), at(30)], fill=A, width=width)
    elif k in (1, 3):
        t, dash, gap = -30.0, _between(rng, 8, 11), _between(rng, 5, 7)
        while t < 30:
            pen.line([at(t), at(min(t + dash, 31))], fill=A, width=width)
            t += dash + gap
            if k == 3:
                disc(pen, *at(t), 2.2)
                t += gap
    elif k == 2:
        for t in np.arange(-28, 30, _between(rng, 7, 9)):
            disc(pen, *at(float(t)), width * 0.75)
    elif k in (4, 7):
        off = _between(rng, 5, 7)
        for o in (-off, off) if k == 4 else (-off * 1.6, 0.0, off * 1.6):
            pen.line([at(-30, o), at(30, o)], fill=A, width=3)
    else:
        along = np.linspace(-30, 30, 61)
        phase = along / _between(rng, 14, 20) + _between(rng, 0, 1)
        wave = np.sin(2 * np.pi * phase) if k == 5 else 4 * np.abs(phase % 1 - 0.5) - 1
        high = _between(rng, 6, 9)
        pen.line([at(float(a), high * float(b)) for a, b in zip(along, wave, strict=True)], fill=A, width=width)


@sketch
def gaps(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """Landolt rings: a ring with a gap in one of eight directions."""
    r, half = _between(rng, 18, 24), _between(rng, 20, 30)
    middle = k * 45 - 90
    pen.arc([MIDDLE - r, MIDDLE - r, MIDDLE + r, MIDDLE + r], middle + half, middle - half + 360, fill=A,
            width=int(rng.integers(5, 10)))  # fmt: skip


@sketch
def flags(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """Flags: three columns, three rows, cross, saltire, canton, disc, hoist triangle, border."""
    x0, y0, x1, y1 = 6.0, 14 + _between(rng, -3, 3), 58.0, 50 + _between(rng, -3, 3)
    w, h, t = x1 - x0, y1 - y0, _between(rng, 4, 6)
    pen.rectangle([x0, y0, x1, y1], fill=A)
    if k == 0:
        pen.rectangle([x0 + w / 3, y0, x0 + 2 * w / 3, y1], fill=B)
        pen.rectangle([x0 + 2 * w / 3, y0, x1, y1], fill=C)
    elif k == 1:
        pen.rectangle([x0, y0 + h / 3, x1, y0 + 2 * h / 3], fill=B)
        pen.rectangle([x0, y0 + 2 * h / 3, x1, y1], fill=C)
    elif k == 2:
        x = x0 + w * _between(rng, 0.35, 0.5)
        pen.rectangle([x - t, y0, x + t, y1], fill=B)
        pen.rectangle([x0, y0 + h / 2 - t, x1, y0 + h / 2 + t], fill=B)
    elif k == 3:
        pen.line([x0, y0, x1, y1], fill=B, width=int(t * 2))
        pen.line([x0, y1, x1, y0], fill=B, width=int(t * 2))
    elif k == 4:
        pen.rectangle([x0, y0, x0 + w * 0.45, y0 + h * 0.55], fill=B)
    elif k == 5:
        disc(pen, x0 + w / 2, y0 + h / 2, h * _between(rng, 0.25, 0.36), fill=B)
    elif k == 6:
        pen.polygon([(x0, y0), (x0 + w * _between(rng, 0.4, 0.55), y0 + h / 2), (x0, y1)], fill=B)
    else:
        pen.rectangle([x0, y0, x1, y1], outline=B, width=int(t * 1.4))


@sketch
def faces(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """Smiling, sad, neutral, surprised, winking."""
    m, r = MIDDLE, _between(rng, 23, 27)
    disc(pen, m, m, r, fill=A)
    for side in (-1, 1):
        if k == 4 and side == 1:
            pen.line([m + 5, m - 8, m + 14, m - 8], fill=B, width=3)
        else:
            disc(pen, m + side * 9, m - 8, 3.5, fill=B)
    if k in (0, 4):
        pen.arc([m - 13, m - 8, m + 13, m + 15], 20, 160, fill=B, width=4)
    elif k == 1:
        pen.arc([m - 12, m + 7, m + 12, m + 26], 200, 340, fill=B, width=4)
    elif k == 2:
        pen.line([m - 11, m + 11, m + 11, m + 11], fill=B, width=4)
    else:
        disc(pen, m, m + 12, 6, fill=B)


@sketch
def tallest_bar(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """A bar chart with four bars of which number k is the tallest."""
    for i in range(4):
        height = _between(rng, 42, 50) if i == k else _between(rng, 10, 34)
        pen.rectangle([6 + i * 13, 58 - height, 16 + i * 13, 58], fill=A)


@sketch
def pies(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """A disc of which an eighth, a quarter, a half, three quarters or all is filled."""
    r, start = _between(rng, 22, 27), _between(rng, -180, 180) * level - 90
    box = [MIDDLE - r, MIDDLE - r, MIDDLE + r, MIDDLE + r]
    pen.ellipse(box, fill=B)
    pen.pieslice(box, start, start + (45, 90, 180, 270, 359.9)[k], fill=A)


@sketch
def objects(pen: Pen, rng: Rng, k: int, level: float) -> None:
    """House, tree, car, boat, fish, flower, cup, ladder, kite, table."""
    s = _between(rng, 0.85, 1.1)

    def p(*xy: float) -> list[tuple[float, float]]:
        return [(MIDDLE + x * s, MIDDLE + y * s) for x, y in zip(xy[::2], xy[1::2], strict=True)]

    def ball(x: float, y: float, r: float, ink: str) -> None:
        disc(pen, MIDDLE + x * s, MIDDLE + y * s, r * s, fill=ink)

    if k == 0:
        pen.rectangle(p(-16, -2, 16, 22), fill=A)
        pen.polygon(p(-22, -2, 0, -24, 22, -2), fill=B)
    elif k == 1:
        pen.rectangle(p(-4, 4, 4, 25), fill=B)
        ball(0, -8, 16, A)
    elif k == 2:
        pen.rectangle(p(-24, -2, 24, 12), fill=A)
        pen.polygon(p(-14, -2, -8, -14, 10, -14, 16, -2), fill=A)
        ball(-13, 13, 6, B)
        ball(13, 13, 6, B)
    elif k == 3:
        pen.polygon(p(-24, 8, 24, 8, 15, 20, -15, 20), fill=A)
        pen.polygon(p(0, -24, 0, 5, 20, 5), fill=B)
    elif k == 4:
        pen.ellipse([*p(-22, -11)[0], *p(14, 11)[0]], fill=A)
        pen.polygon(p(10, 0, 25, -11, 25, 11), fill=A)
        ball(-13, -3, 2.5, B)
    elif k == 5:
        pen.line(p(0, 0, 0, 27), fill=C, width=4)
        for x, y in regular(0, -7, 12, 5):
            ball(x, y, 7.5, A)
        ball(0, -7, 5.5, B)
    elif k == 6:
        pen.polygon(p(-16, -14, 10, -14, 7, 18, -13, 18), fill=A)
        pen.ellipse([*p(4, -8)[0], *p(22, 11)[0]], outline=A, width=4)
    elif k == 7:
        pen.line(p(-10, -26, -10, 26), fill=A, width=4)
        pen.line(p(10, -26, 10, 26), fill=A, width=4)
        for y in (-18, -6, 6, 18):
            pen.line(p(-10, y, 10, y), fill=A, width=3)
    elif k == 8:
        pen.polygon(p(0, -25, 15, -8, 0, 12, -15, -8), fill=A)
        pen.line(p(0, 12, 6, 18, -4, 22, 2, 28), fill=B, width=3)
    else:
        pen.rectangle(p(-24, -10, 24, -4), fill=A)
        pen.rectangle(p(-20, -4, -15, 20), fill=A)
        pen.rectangle(p(15, -4, 20, 20), fill=A)


def _field(pattern: Callable[[Rng, int, Floats, Floats], Floats]) -> Drawing:
    """A drawing from a function of the coordinates (u right, v down, both in [−1, 1]) with values in [0, 1]."""

    def batch(rng: Rng, classes: Ints, level: float) -> Bytes:
        axis = np.linspace(-1, 1, CANVAS, dtype=np.float32)
        v, u = np.meshgrid(axis, axis, indexing="ij")
        masks = np.zeros((len(classes), 3, CANVAS, CANVAS), dtype=np.uint8)
        for i, k in enumerate(classes):
            masks[i, 0] = np.clip(pattern(rng, int(k), u, v), 0, 1) * 255
        return masks

    return batch


@_field
def textures(rng: Rng, k: int, u: Floats, v: Floats) -> Floats:
    """Rows, columns, falling and rising diagonals, checks, grid, dots, rings, bricks, speckle, rays, zigzags."""
    f, a, b = _between(rng, 2.4, 4.2), _between(rng, 0, 1), _between(rng, 0, 1)
    on = _between(rng, 0.4, 0.6)
    if k == 0:
        mask = (v * f + a) % 1 < on
    elif k == 1:
        mask = (u * f + a) % 1 < on
    elif k == 2:
        mask = ((u - v) * f * 0.7 + a) % 1 < on
    elif k == 3:
        mask = ((u + v) * f * 0.7 + a) % 1 < on
    elif k == 4:
        mask = (((u * f + a) % 1 < 0.5) ^ ((v * f + b) % 1 < 0.5)).astype(bool)
    elif k == 5:
        mask = ((u * f + a) % 1 < 0.25) | ((v * f + b) % 1 < 0.25)
    elif k == 6:
        mask = ((u * f + a) % 1 - 0.5) ** 2 + ((v * f + b) % 1 - 0.5) ** 2 < 0.09
    elif k == 7:
        mask = (np.hypot(u - a * 0.6 + 0.3, v - b * 0.6 + 0.3) * f) % 1 < on
    elif k == 8:
        row = np.floor(v * f + b)
        mask = ((v * f + b) % 1 < 0.2) | ((u * f * 0.6 + a + row / 2) % 1 < 0.12)
    elif k == 9:
        cells = rng.random((16, 16)) < on - 0.05
        mask = np.kron(cells, np.ones((4, 4))) > 0
    elif k == 10:
        mask = (np.arctan2(v - a * 0.5 + 0.25, u - b * 0.5 + 0.25) / (2 * np.pi) * round(f * 3)) % 1 < on
    else:
        mask = (v * f + 0.9 * np.abs((u * f * 0.7 + a) % 1 - 0.5)) % 1 < on * 0.85
    return mask.astype(np.float32)


@_field
def frequencies(rng: Rng, k: int, u: Floats, v: Floats) -> Floats:
    """Sinusoidal gratings of 1.5, 2.5, 4, 6, 9 periods across the image, in any direction."""
    angle, phase = _between(rng, 0, math.pi), _between(rng, 0, 2 * math.pi)
    f = (1.5, 2.5, 4.0, 6.0, 9.0)[k] * _between(rng, 0.92, 1.08)
    wave: Any = 0.5 + 0.5 * np.sin(math.pi * f * (u * math.cos(angle) + v * math.sin(angle)) + phase)
    return wave


@_field
def gradients(rng: Rng, k: int, u: Floats, v: Floats) -> Floats:
    """Ink growing toward one of eight sides, toward the middle or toward the rim."""
    gamma = _between(rng, 0.7, 1.4)
    if k < 8:
        angle = math.radians(k * 45)
        ramp: Any = 0.5 + 0.5 * (u * math.sin(angle) - v * math.cos(angle)) / (
            abs(math.sin(angle)) + abs(math.cos(angle))
        )
    else:
        ramp = np.clip(1 - np.hypot(u - _between(rng, -0.15, 0.15), v - _between(rng, -0.15, 0.15)), 0, 1)
        ramp = ramp if k == 8 else 1 - ramp
    result: Floats = np.clip(ramp, 0, 1) ** gamma
    return result


def light_on_dark(rng: Rng, classes: Ints, colours: Floats) -> Floats:
    """Ink A lighter than the paper: for tasks in which the direction of the contrast is the class."""
    result = colours.copy()
    luminance = colours[:, :2] @ np.array([0.3, 0.59, 0.11], dtype=np.float32)
    swap = luminance[:, 0] > luminance[:, 1]
    result[swap, :2] = colours[swap, 1::-1]
    return result
