"""From drawings to images: pose, colours, background, blur and noise, for a whole batch at once.

A drawing is a stack of three ink masks on a 64×64 canvas in its canonical pose, uint8 [3, 64, 64]. An image is

    x = clip(gain · blur(bg · (1 − Σ_k m_k) + Σ_k m_k · colour_k) + noise),   m = downsample(affine(masks)),

32×32 RGB, uint8. Everything random comes from one numpy generator, so that an image set is a function of its seed.
`level` in [0, 1] scales every nuisance: 1 is the task, smaller values are the simplified renderings for pre-training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

CANVAS = 64
SIDE = 32
INKS = ("#ff0000", "#00ff00", "#0000ff")
"""The three inks as PIL colours: each paints one channel and erases the other two, so masks never overlap."""

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Drawing = Callable[[np.random.Generator, Ints, float], Bytes]
"""(generator, classes [N], level) -> ink masks uint8 [N, 3, 64, 64]."""
Palette = Callable[[np.random.Generator, Ints, Floats], Floats]
"""(generator, classes [N], colours [N, 4, 3]) -> colours of background and the three inks, [N, 4, 3] in [0, 1]."""


@dataclass(frozen=True)
class Nuisance:
    """Ranges of what varies without changing the class; all are multiplied by the level.

    rotation: degrees; shift: share of the half width; zoom: log of the scale factor; shear: tangent; clutter: contrast
    of background strokes; shade: contrast of the background's slow variation; noise: standard deviation; blur: weight
    of the blurred image; dim: share of the contrast that may be lost.
    """

    rotation: float = 20.0
    shift: float = 0.22
    zoom: float = 0.25
    shear: float = 0.15
    clutter: float = 0.5
    shade: float = 0.35
    noise: float = 0.12
    blur: float = 0.8
    dim: float = 0.5


def sketch(draw: Callable[[ImageDraw.ImageDraw, np.random.Generator, int, float], None]) -> Drawing:
    """Turns a function that draws one image with PIL into a drawing of a batch."""

    def batch(rng: np.random.Generator, classes: Ints, level: float) -> Bytes:
        masks = np.empty((len(classes), CANVAS, CANVAS, 3), dtype=np.uint8)
        for i, label in enumerate(classes):
            canvas = Image.new("RGB", (CANVAS, CANVAS))
            draw(ImageDraw.Draw(canvas), rng, int(label), level)
            masks[i] = np.asarray(canvas)
        return np.ascontiguousarray(masks.transpose(0, 3, 1, 2))

    return batch


def _pose(rng: np.random.Generator, masks: Bytes, nuisance: Nuisance, level: float) -> Floats:
    """Random affine map of each drawing, then 64×64 → 32×32 by averaging; float32 [N, 3, 32, 32] in [0, 1]."""
    n = len(masks)
    angle, shear, zoom = (rng.uniform(-1, 1, (3, n)) * level).astype(np.float32)
    shift = (rng.uniform(-1, 1, (n, 2)) * level * nuisance.shift).astype(np.float32)
    angle *= np.float32(np.deg2rad(nuisance.rotation))
    scale = np.exp(-zoom * nuisance.zoom)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    shear = shear * nuisance.shear
    matrix = np.stack([np.stack([cos, -sin + shear * cos], 1), np.stack([sin, cos + shear * sin], 1)], 1)
    theta = np.concatenate([matrix, -np.einsum("nij,nj->ni", matrix, shift)[:, :, None]], 2).astype(np.float32)
    grid = F.affine_grid(torch.from_numpy(theta), [n, 3, CANVAS, CANVAS], align_corners=False)
    moved = F.grid_sample(torch.from_numpy(masks).float().div_(255.0), grid, align_corners=False, padding_mode="border")
    result: Floats = F.avg_pool2d(moved, CANVAS // SIDE).numpy()
    return result


def _colours(rng: np.random.Generator, n: int) -> Floats:
    """Colours of background and three inks, [N, 4, 3]: each ink at least 0.35 in luminance away from the background,
    neighbouring inks at least 0.5 apart in colour.
    """
    weights = np.array([0.3, 0.59, 0.11], dtype=np.float32)
    colours = rng.random((n, 4, 3), dtype=np.float32)
    for _ in range(30):
        luminance = colours @ weights
        bad = np.abs(luminance[:, 1:] - luminance[:, :1]) < 0.35
        bad[:, 1:] |= np.linalg.norm(colours[:, 2:] - colours[:, 1:-1], axis=2) < 0.5
        if not bad.any():
            break
        fresh = rng.random((n, 4, 3), dtype=np.float32)
        # An ink is drawn again; a background in the middle, from which no ink may be far enough, is drawn again too.
        redraw = np.concatenate([bad.all(1, keepdims=True), bad], 1)
        colours = np.where(redraw[:, :, None], fresh, colours)
    return colours


def _clutter_bank(size: int = 192) -> Floats:
    """Masks of random background strokes, float32 [size, 32, 32]: the same on every call."""
    rng = np.random.default_rng(20210)
    bank = np.empty((size, SIDE, SIDE), dtype=np.float32)
    for i in range(size):
        canvas = Image.new("L", (CANVAS, CANVAS))
        pen = ImageDraw.Draw(canvas)
        for _ in range(int(rng.integers(2, 6))):
            x0, y0, x1, y1 = rng.uniform(-8, CANVAS + 8, 4)
            kind, width = int(rng.integers(3)), int(rng.integers(2, 5))
            box = [min(x0, x1), min(y0, y1), max(x0, x1) + 1, max(y0, y1) + 1]
            if kind == 0:
                pen.line([x0, y0, x1, y1], fill=255, width=width)
            elif kind == 1:
                pen.arc(box, float(rng.uniform(0, 360)), float(rng.uniform(0, 360)), fill=255, width=width)
            else:
                pen.ellipse([x0 - 3, y0 - 3, x0 + 3, y0 + 3], fill=255)
        bank[i] = np.asarray(canvas.reduce(CANVAS // SIDE), dtype=np.float32) / 255.0
    return bank


_BANK: list[Floats] = []


def _background(rng: np.random.Generator, colour: Floats, nuisance: Nuisance, level: float) -> Floats:
    """Plain colour plus slow shading plus strokes, float32 [N, 3, 32, 32]."""
    if not _BANK:
        _BANK.append(_clutter_bank())
    bank, n = _BANK[0], len(colour)
    coarse = torch.from_numpy(rng.uniform(-0.5, 0.5, (n, 3, 3, 3)).astype(np.float32))
    shade = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear", align_corners=True).numpy()
    amplitude = (rng.random((n, 1, 1, 1)) * nuisance.shade * level).astype(np.float32)
    strokes = bank[rng.integers(len(bank), size=n)]
    flip = rng.random(n) < 0.5
    strokes = np.where(flip[:, None, None], strokes[:, :, ::-1], strokes)
    tint = (rng.uniform(-1, 1, (n, 3)) * nuisance.clutter * level * 0.6).astype(np.float32)
    result: Floats = colour[:, :, None, None] + amplitude * shade + tint[:, :, None, None] * strokes[:, None]
    return result


def render(
    drawing: Drawing,
    classes: Ints,
    rng: np.random.Generator,
    nuisance: Nuisance,
    level: float = 1.0,
    palette: Palette | None = None,
) -> Bytes:
    """Images of the given classes, uint8 [N, 3, 32, 32]; the only randomness is the generator's."""
    masks = _pose(rng, drawing(rng, classes, level), nuisance, level)
    colours = _colours(rng, len(classes))
    if palette is not None:
        colours = palette(rng, classes, colours)
    paper = _background(rng, colours[:, 0], nuisance, level)
    image = paper * (1.0 - masks.sum(1, keepdims=True)) + np.einsum("nkhw,nkc->nchw", masks, colours[:, 1:])
    n = len(image)
    keep = (1.0 - rng.random((n, 1, 1, 1)) * nuisance.dim * level).astype(np.float32)
    image = image * keep + (1.0 - keep) * rng.random((n, 1, 1, 1), dtype=np.float32)
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]
    soft = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9.0
    weight = (rng.random((n, 1, 1, 1)) * nuisance.blur * level).astype(np.float32)
    image = image + weight * (soft - image)
    sigma = (rng.random((n, 1, 1, 1)) * nuisance.noise * level).astype(np.float32)
    image = image + sigma * rng.standard_normal(image.shape, dtype=np.float32)
    return np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)
