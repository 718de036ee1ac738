"""The table of concepts: one row a task (name, class phrases, drawing, nuisance), and the image sets made from it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

from . import drawings as d
from .rendering import Bytes, Drawing, Ints, Nuisance, Palette, render

TEMPLATES = ("a photo of {}.", "an image of {}.", "a picture showing {}.", "a drawing of {}.")
SPLITS = {"train": 3000, "validation": 500, "test": 1000}
"""Images a task in each split."""


@dataclass(frozen=True)
class Concepts:
    """One row: a family of classes that can be told apart, how each is drawn and what varies."""

    name: str
    classes: tuple[str, ...]
    drawing: Drawing
    nuisance: Nuisance = field(default_factory=Nuisance)
    palette: Palette | None = None
    severity: float = 1.0
    """Nuisance level of the task's own splits."""
    splits: dict[str, Drawing] | None = None
    """Drawings of the splits where these differ (real data: other scans in each split)."""


def _numbers(pattern: str, words: str) -> tuple[str, ...]:
    return tuple(pattern.format(word) for word in words.split())


DIGITS = "zero one two three four five six seven eight nine"
UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
GREEK = "alpha beta gamma delta theta lambda mu pi sigma phi psi omega"
UPRIGHT = Nuisance(rotation=14)
STILL = Nuisance(rotation=9, shift=0.12, shear=0.08)
TURNED = Nuisance(rotation=8, shear=0.08)
GLYPH = Nuisance(rotation=14, shift=0.18, zoom=0.22, clutter=0.4, noise=0.1, blur=0.7, dim=0.45)
SEVERE = Nuisance(rotation=28, shift=0.28, zoom=0.35, shear=0.25, clutter=0.75, noise=0.17, dim=0.6)

TASKS: tuple[Concepts, ...] = (
    Concepts(
        "digits", _numbers("a handwritten digit {}", DIGITS), d.handwriting(0, 1000), Nuisance(rotation=20, noise=0.15),
        splits={"validation": d.handwriting(1000, 1250), "test": d.handwriting(1250, 1797)}, severity=0.95,
    ),
    Concepts("numerals", _numbers("a printed number {}", DIGITS), d.glyphs("0123456789", d.TEXT_FONTS, 5),
             SEVERE, severity=0.85),
    Concepts("uppercase", tuple(f"a capital letter {c}" for c in UPPER), d.glyphs(UPPER, d.TEXT_FONTS, 5),
             GLYPH, severity=0.9),
    Concepts(
        "lowercase", tuple(f"a small letter {c.lower()}" for c in UPPER), d.glyphs(UPPER.lower(), d.TEXT_FONTS, 5),
        GLYPH, severity=0.9,
    ),
    Concepts("greek", _numbers("a Greek {}", GREEK), d.glyphs("αβγδθλμπσφψω", d.GREEK_FONTS, 3), GLYPH, severity=0.95),
    Concepts(
        "symbols",
        ("a plus sign", "an ampersand", "a question mark", "an exclamation mark", "a hash sign", "a percent sign",
         "an at sign", "a dollar sign", "an asterisk", "an equals sign", "a section sign", "a slash",
         "a pair of brackets", "a less-than sign"),
        d.glyphs(("+", "&", "?", "!", "#", "%", "@", "$", "*", "=", "§", "/", "[", "<"), d.GREEK_FONTS, 3), SEVERE,
        severity=0.85,
    ),
    Concepts(
        "chess",
        ("a chess king", "a chess queen", "a chess rook", "a chess bishop", "a chess knight", "a chess pawn"),
        d.glyphs(("♔♚", "♕♛", "♖♜", "♗♝", "♘♞", "♙♟"), d.SYMBOL_FONTS, 2), GLYPH,
    ),
    Concepts(
        "pictograms",
        ("a sun", "an umbrella", "a snowman", "a telephone", "a skull", "a music note", "an anchor", "an aeroplane",
         "a pair of scissors", "an envelope", "a pencil", "a coffee cup", "a gear", "a pair of scales"),
        d.glyphs("☀☂☃☎☠♫⚓✈✂✉✏☕⚙⚖", d.SYMBOL_FONTS, 2), SEVERE, severity=0.85,
    ),
    Concepts(
        "shapes",
        ("a circle", "a ring", "a square", "a triangle", "a star", "a cross", "a heart", "a crescent moon",
         "a diamond", "a half circle"),
        d.shapes, SEVERE, severity=0.95,
    ),
    Concepts("polygons", _numbers("a polygon with {} sides", "three four five six eight"), d.polygons,
             Nuisance(rotation=30, shear=0.1), severity=0.9),
    Concepts("counts", _numbers("a group of {} objects", "one two three four five six"), d.counts,
             Nuisance(rotation=30, shift=0.1, zoom=0.15, clutter=0.35)),
    Concepts("dice", _numbers("a die showing {}", "one two three four five six"), d.dice, SEVERE, severity=0.8),
    Concepts("clocks", _numbers("a clock at {}", "one two three four five six seven eight nine ten eleven twelve"),
             d.clocks, TURNED, severity=0.95),
    Concepts(
        "arrows",
        tuple(f"an arrow pointing {w}" for w in ("up", "up and right", "right", "down and right", "down",
                                                 "down and left", "left", "up and left")),
        d.arrows, UPRIGHT,
    ),
    Concepts(
        "angles",
        ("an upright bar", "a bar leaning slightly right", "a bar leaning far right", "a flat bar",
         "a bar leaning far left", "a bar leaning slightly left"),
        d.angles, Nuisance(rotation=8, shear=0.05, clutter=0.7, noise=0.2, dim=0.65),
    ),
    Concepts(
        "textures",
        ("horizontal stripes", "vertical stripes", "falling diagonal stripes", "rising diagonal stripes",
         "a checkerboard", "a grid", "polka dots", "concentric rings", "a brick wall", "speckles", "rays", "zigzags"),
        d.textures, Nuisance(rotation=14, shift=0.1, zoom=0.4, clutter=0.3, shade=0.6, noise=0.3, dim=0.85),
        severity=0.95,
    ),
    Concepts(
        "positions",
        tuple(f"an object at the {w}" for w in ("top left", "top", "top right", "left", "centre", "right",
                                                "bottom left", "bottom", "bottom right")),
        d.positions, Nuisance(rotation=8, shift=0.08, zoom=0.08, shear=0.05, clutter=0.75, noise=0.2, dim=0.65),
    ),
    Concepts(
        "relations",
        ("a circle left of a square", "a circle right of a square", "a circle above a square",
         "a circle below a square", "a circle inside a square", "a square inside a circle",
         "a circle on top of a square", "a circle and a square in opposite corners"),
        d.relations, Nuisance(rotation=14, shift=0.12, zoom=0.2, shear=0.1),
    ),
    Concepts(
        "colours",
        tuple(f"a {c} object" for c in ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink",
                                        "brown", "white")),
        d.among_distractors, Nuisance(clutter=0.5, shade=0.4, noise=0.25, dim=0.75), palette=d.named_colour,
        severity=0.95,
    ),
    Concepts("sizes", _numbers("a {} object", "tiny small middle-sized large huge"), d.sizes,
             Nuisance(rotation=30, shift=0.2, zoom=0.05, clutter=0.7, noise=0.2, dim=0.65)),
    Concepts(
        "lines",
        ("a solid line", "a dashed line", "a dotted line", "a dash-dotted line", "a double line", "a wavy line",
         "a zigzag line", "three parallel lines"),
        d.line_styles, Nuisance(rotation=30, shift=0.2, zoom=0.15, clutter=0.4), severity=0.65,
    ),
    Concepts(
        "gradients",
        tuple(f"light {w}" for w in ("from the top", "from the top right", "from the right", "from the bottom right",
                                     "from the bottom", "from the bottom left", "from the left", "from the top left",
                                     "in the middle", "around the rim")),
        d.gradients, Nuisance(rotation=9, shift=0.25, zoom=0.3, clutter=0.5, shade=0.8, noise=0.45, dim=0.85),
        palette=d.light_on_dark,
    ),
    Concepts(
        "gaps",
        tuple(f"a ring open {w}" for w in ("at the right", "at the bottom right", "at the bottom",
                                           "at the bottom left", "at the left", "at the top left", "at the top",
                                           "at the top right")),
        d.gaps, Nuisance(rotation=10, shift=0.28, zoom=0.35, clutter=0.6, noise=0.17), severity=0.95,
    ),
    Concepts(
        "flags",
        ("a flag with three columns", "a flag with three rows", "a flag with a cross", "a flag with a diagonal cross",
         "a flag with a canton", "a flag with a disc", "a flag with a triangle", "a flag with a border"),
        d.flags, SEVERE, severity=0.9,
    ),
)  # fmt: skip
"""The tasks that have an expert."""

EXTRAS: tuple[Concepts, ...] = (
    Concepts("suits", ("a heart suit", "a spade suit", "a diamond suit", "a club suit"),
             d.glyphs("♥♠♦♣", ("DejaVuSans", "DejaVuSerif-Bold", "STIXGeneral"), 3)),
    Concepts("frequencies", tuple(f"{w} stripes" for w in ("very broad", "broad", "middle-wide", "fine", "very fine")),
             d.frequencies),
    Concepts("faces", tuple(f"a {w} face" for w in ("smiling", "sad", "plain", "surprised", "winking")), d.faces),
    Concepts("charts", _numbers("a bar chart with the {} bar tallest", "first second third fourth"), d.tallest_bar,
             STILL),
    Concepts("pies", tuple(f"a pie with {w} filled" for w in ("an eighth", "a quarter", "a half", "three quarters",
                                                              "everything")), d.pies),
    Concepts("objects", tuple(f"a {w}" for w in ("house", "tree", "car", "boat", "fish", "flower", "mug", "ladder",
                                                 "kite", "table")), d.objects),
)  # fmt: skip
"""Seen in pre-training only: breadth for the base."""

ALL = (*TASKS, *EXTRAS)
BY_NAME = {row.name: row for row in ALL}
REFERENCE_LEVEL = 0.25
_STREAMS = {
    **{"train": 1, "validation": 2, "test": 3},
    **{"reference-train": 11, "reference-validation": 12, "reference-test": 13},
}
_CHUNK = 500


def generator(name: str, stream: int, *more: int) -> np.random.Generator:
    """The generator of one stream of one task: streams are disjoint, so splits are."""
    return np.random.default_rng([2026, zlib.crc32(name.encode()), stream, *more])


def balanced(rng: np.random.Generator, n: int, classes: int) -> Ints:
    """n labels, each class equally often (to within one), in random order."""
    if n < classes:
        return rng.permutation(classes)[:n].astype(np.int64)
    return rng.permutation(np.arange(n) % classes).astype(np.int64)


def images(
    row: Concepts, n: int, rng: np.random.Generator, level: float = 1.0, split: str = "train"
) -> tuple[Bytes, Ints]:
    """n images of one row and their labels: uint8 [n, 3, 32, 32], int64 [n]."""
    labels = balanced(rng, n, len(row.classes))
    drawing = (row.splits or {}).get(split, row.drawing)
    parts = [
        render(drawing, labels[i : i + _CHUNK], rng, row.nuisance, level, row.palette) for i in range(0, n, _CHUNK)
    ]
    return np.concatenate(parts), labels


def split_images(
    row: Concepts, split: str, n: int | None = None, level: float = 1.0, edition: int = 0
) -> tuple[Bytes, Ints]:
    """The n (default: `SPLITS`) images of one split at `level` times the task's severity: the same on every call.

    edition: 0 for the split itself; others are rendered anew, to augment it (in training only).
    """
    rng = generator(row.name, _STREAMS[split], *([edition] if edition else []))
    return images(row, n or SPLITS[split], rng, row.severity * level, split)


def reference_images(split: str, each: int) -> dict[str, tuple[Bytes, Ints]]:
    """Simplified renderings, as in pre-training but of streams of their own: `each` images a class, by row's name."""
    result = {}
    for row in ALL:
        rng = generator(row.name, _STREAMS[f"reference-{split}"])
        result[row.name] = images(row, each * len(row.classes), rng, REFERENCE_LEVEL, split)
    return result
