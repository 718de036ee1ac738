"""Corruptions of images, to see how a merge does where the test images are worse than the training images.

Seven kinds in five severities after the released code of Hendrycks and Dietterich (2019), Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations: its constants for CIFAR-10-C at 32 × 32 pixels, and for ImageNet-C
at 224 × 224. For a shorter side of s pixels between the two, a constant is the power law in s through both,

    c(s) = c(32)^(1 − t) · c(224)^t,    t = log(s / 32) / log(7);

beyond them it stays as it is, except that lengths in pixels are proportional to s.

Two things differ from that code. Grey levels are rounded to the nearest one, where it truncates. And random numbers
depend on the seed, the kind and the index of the image in its task alone: an image is corrupted in the same way in
every batch, and a higher severity is more of the same noise, not other noise.

The severities are the paper's, with two oddities of its constants at 32 pixels: motion blur of severity 4 is that of
severity 3 (a longer trail, whose end has no weight), and spatter turns from water to mud between severities 3 and 4,
which may bring an image closer to the clean one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from .errors import DataError, nearest
from .images import KEPT_BYTES

SEVERITIES = (1, 2, 3, 4, 5)

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Constants = tuple[float, ...]

_SMALL, _LARGE = 32, 224


@dataclass(frozen=True)
class Corruption:
    """One kind. function(image uint8 [3, H, W], constants, generator) -> image.

    small, large: the constants of severity 1 to 5 at 32 and at 224 pixels. lengths: which of them are in pixels.
    """

    function: Callable[[Pixels, Constants, np.random.Generator], Pixels]
    summary: str
    source: str
    small: tuple[Constants, ...]
    large: tuple[Constants, ...]
    lengths: tuple[int, ...] = ()

    def constants(self, severity: int, side: int) -> Constants:
        """The constants of this severity for images whose shorter side has so many pixels."""
        within = min(max(side, _SMALL), _LARGE)
        t = math.log(within / _SMALL) / math.log(_LARGE / _SMALL)
        both = zip(self.small[severity - 1], self.large[severity - 1], strict=True)
        values = [a if a == b else a ** (1 - t) * b**t for a, b in both]
        return tuple(v * side / within if k in self.lengths else v for k, v in enumerate(values))


# -- the kinds ---------------------------------------------------------------------------------------------------------


def _grey_levels(image: Floats) -> Pixels:
    """uint8 of values in [0, 1], clipped, rounded to the nearest level."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def gaussian_noise(image: Pixels, constants: Constants, rng: np.random.Generator) -> Pixels:
    """x + σ z, z standard normal in each pixel and channel. Constants: σ, where 1 is the range of the grey levels."""
    (sigma,) = constants
    return _grey_levels(image / 255 + sigma * rng.standard_normal(image.shape))


def impulse_noise(image: Pixels, constants: Constants, rng: np.random.Generator) -> Pixels:
    """Black or white, either as often, in this share of the values (each channel on its own). Constants: the share."""
    (share,) = constants
    hit, white = rng.random(image.shape) < share, rng.random(image.shape) < 0.5
    return np.where(hit, np.where(white, 255, 0), image).astype(np.uint8)


def motion_blur(image: Pixels, constants: Constants, rng: np.random.Generator) -> Pixels:
    """A mean along a straight trail, within 45° of the horizontal, whose weights fall as one half of a Gaussian.

    The filter of ImageMagick, which the paper uses: 2 ⌈r⌉ + 1 pixels with weights ∝ exp(−i² / 2σ²), and the border's
    pixels beyond the border. Constants: r and σ in pixels.
    """
    radius, sigma = constants
    angle = math.radians(rng.uniform(-45, 45))
    i = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(i**2) / (2 * sigma**2))
    right, down = (np.ceil(i * along - 0.5).astype(int) for along in (math.cos(angle), math.sin(angle)))
    above, below, beside = max(0, -down.min()), max(0, down.max()), right.max()
    padded = np.pad(image.astype(np.float64), ((0, 0), (above, below), (0, beside)), mode="edge")
    height, width = image.shape[1:]
    blurred = np.zeros(image.shape)
    for weight, x, y in zip(weights / weights.sum(), right, above + down, strict=True):
        blurred += weight * padded[:, y : y + height, x : x + width]
    return _grey_levels(blurred / 255)


def pixelate(image: Pixels, constants: Constants, rng: np.random.Generator) -> Pixels:
    """Down to a share of the size and up again, with a box filter. Constants: the share."""
    (share,) = constants
    height, width = image.shape[1:]
    small = (max(1, int(width * share)), max(1, int(height * share)))
    box = Image.Resampling.BOX
    return _channels_first(_as_image(image).resize(small, box).resize((width, height), box))


def jpeg(image: Pixels, constants: Constants, rng: np.random.Generator) -> Pixels:
    """Through a JPEG file with chroma at half the resolution, Pillow's default. Constants: the quality, rounded."""
    (quality,) = constants
    with BytesIO() as file:
        _as_image(image).save(file, "JPEG", quality=round(quality))
        with Image.open(file) as decoded:
            return _channels_first(decoded)


def contrast(image: Pixels, constants: Constants, rng: np.random.Generator) -> Pixels:
    """m + c (x − m), with m the mean of the channel. Constants: c."""
    (factor,) = constants
    means = image.mean(axis=(1, 2), keepdims=True)
    return _grey_levels((means + factor * (image - means)) / 255)


def spatter(image: Pixels, constants: Constants, rng: np.random.Generator) -> Pixels:
    """Splashes of water (severity 1 to 3), shaded by the distance to their edges, or of mud (4 and 5).

    They lie where smoothed normal noise is above a threshold. Constants: mean, standard deviation and smoothing length
    of the noise, the threshold, water's opacity (0: it is mud), and the width of mud's edges in pixels.
    The steps are the released code's, with exact distances to the edges, which OpenCV approximates.
    """
    mean, deviation, length, threshold, opacity, edge = constants
    noise = mean + deviation * rng.standard_normal(image.shape[1:])
    liquid = _smoothed(noise, length)
    clean = image / 255
    if opacity == 0:
        cover = _smoothed((liquid > threshold).astype(np.float64), edge)
        cover[cover < 0.8] = 0
        return _grey_levels(clean * (1 - cover) + cover * _MUD)
    drops = np.where(liquid < threshold, 0, np.clip(liquid, 0, 1) * 255).astype(np.uint8)
    shade = drops * _relief(drops)
    if shade.max() == 0:  # no drop fell on the image
        return image
    return _grey_levels(clean + opacity * shade / shade.max() * _WATER)


_WATER, _MUD = (np.array(colour).reshape(3, 1, 1) / 255 for colour in ((175, 238, 238), (63, 42, 20)))


def _smoothed(values: Floats, sigma: float) -> Floats:
    return ndimage.gaussian_filter(values, sigma, mode="nearest", truncate=4.0)


def _relief(drops: Pixels) -> Floats:
    """Light and shade on drops [H, W]: the equalized distance to the nearest edge, lit from one side, in [0, 255]."""
    edges = _edges(drops.astype(np.int64))
    distance = np.full(drops.shape, 20.0)
    if edges.any():
        distance = np.minimum(ndimage.distance_transform_edt(~edges), 20)
    level = _equalized(_mean_of_neighbours(distance).astype(np.uint8))
    light = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    lit = np.clip(ndimage.correlate(level.astype(np.int64), light, mode="mirror"), 0, 255)
    return np.rint(_mean_of_neighbours(lit.astype(np.float64)))


def _mean_of_neighbours(values: Floats) -> Floats:
    return ndimage.correlate(values, np.full((3, 3), 1 / 9), mode="mirror")


def _equalized(levels: Pixels) -> Pixels:
    """Grey levels whose histogram is flat, the lowest at 0."""
    counts = np.bincount(levels.ravel(), minlength=256)
    lowest = int(levels.min())
    rest = levels.size - counts[lowest]
    if rest == 0:
        return levels
    counts[lowest] = 0
    return np.rint(counts.cumsum() * (255 / rest)).astype(np.uint8)[levels]


def _edges(levels: NDArray[np.int64], low: int = 50, high: int = 150) -> NDArray[np.bool_]:
    """Canny's edges of grey levels [H, W]: local maxima of |∂x| + |∂y| above `low` with a way to one above `high`."""
    across = ndimage.sobel(levels, axis=1, mode="nearest")
    along = ndimage.sobel(levels, axis=0, mode="nearest")
    size = np.abs(across) + np.abs(along)
    around = np.pad(size, 1)
    height, width = size.shape

    def neighbour(down: int, right: int) -> NDArray[np.int64]:
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    tangent = math.tan(math.pi / 8)
    flat = np.abs(along) < tangent * np.abs(across)
    steep = np.abs(along) > (tangent + 2) * np.abs(across)
    falling = (across ^ along) < 0
    maximal = np.select(
        [flat, steep, falling],
        [
            (size > neighbour(0, -1)) & (size >= neighbour(0, 1)),
            (size > neighbour(-1, 0)) & (size >= neighbour(1, 0)),
            (size > neighbour(-1, 1)) & (size > neighbour(1, -1)),
        ],
        (size > neighbour(-1, -1)) & (size > neighbour(1, 1)),
    )
    candidates = maximal.astype(bool) & (size > low)
    pieces, count = ndimage.label(candidates, structure=np.ones((3, 3)))
    strong = np.zeros(count + 1, dtype=bool)
    strong[pieces[candidates & (size > high)]] = True
    return strong[pieces]


def _as_image(image: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))


def _channels_first(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def _each(*values: float) -> tuple[Constants, ...]:
    return tuple((value,) for value in values)


_PAPER = "Hendrycks and Dietterich (2019), Benchmarking Neural Network Robustness to Common Corruptions, section 3"

CORRUPTIONS: dict[str, Corruption] = {
    "motion-blur": Corruption(
        motion_blur,
        "The camera moves, nearly horizontally.",
        _PAPER,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        lengths=(0, 1),
    ),
    "impulse-noise": Corruption(
        impulse_noise,
        "Salt and pepper: values that turn black or white.",
        _PAPER,
        _each(0.01, 0.02, 0.03, 0.05, 0.07),
        _each(0.03, 0.06, 0.09, 0.17, 0.27),
    ),
    "gaussian-noise": Corruption(
        gaussian_noise,
        "Normal noise in each value, as in low light.",
        _PAPER,
        _each(0.04, 0.06, 0.08, 0.09, 0.10),
        _each(0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    "pixelate": Corruption(
        pixelate,
        "A smaller image, enlarged without interpolation.",
        _PAPER,
        _each(0.95, 0.9, 0.85, 0.75, 0.65),
        _each(0.6, 0.5, 0.4, 0.3, 0.25),
    ),
    "spatter": Corruption(
        spatter,
        "Drops of water, then mud, on the lens.",
        f"{_PAPER} and appendix B (an extra corruption)",
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0, 0.6),
            (0.65, 0.1, 0.5, 0.68, 0, 0.6),
        ),
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 0, 1.5),
            (0.67, 0.4, 1, 0.65, 0, 1.5),
        ),
        lengths=(2, 5),
    ),
    "contrast": Corruption(
        contrast,
        "Grey levels drawn towards their mean.",
        _PAPER,
        _each(0.75, 0.5, 0.4, 0.3, 0.15),
        _each(0.4, 0.3, 0.2, 0.1, 0.05),
    ),
    "jpeg": Corruption(
        jpeg,
        "JPEG compression of low quality.",
        _PAPER,
        _each(80, 65, 58, 50, 40),
        _each(25, 18, 15, 10, 7),
    ),
}


# -- batches and tasks -------------------------------------------------------------------------------------------------


def corrupt(
    images: Tensor, kind: str, severity: int, seed: int = 0, indices: Sequence[int] | NDArray[np.int64] | None = None
) -> Tensor:
    """Images [B, 3, H, W], uint8, with this corruption; the given ones are left as they are.

    kind: a name of CORRUPTIONS. severity: 1 (weak) to 5. indices: what each image's random numbers are drawn from,
    beside the seed and the kind; 0 to B − 1 if not given.
    Raises DataError for other names and severities, and for images of another type or shape.
    """
    check(kind, severity, seed)
    check_images(images, f"corrupt ({kind})")
    keys = range(len(images)) if indices is None else [int(i) for i in indices]
    if len(keys) != len(images) or any(key < 0 for key in keys):
        raise DataError(f"corrupt: {len(keys)} indices for {len(images)} images; give one, from 0 on, an image.")
    corruption = CORRUPTIONS[kind]
    constants = corruption.constants(severity, min(images.shape[2:]))
    corrupted = torch.empty_like(images, device="cpu", memory_format=torch.contiguous_format)
    target = corrupted.numpy()
    for b, (image, key) in enumerate(zip(images.cpu().numpy(), keys, strict=True)):
        rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), key])
        target[b] = corruption.function(image, constants, rng)
    return corrupted.to(images.device)


def check(kind: str, severity: int, seed: int = 0) -> None:
    """DataError unless there is such a corruption."""
    if kind not in CORRUPTIONS:
        raise DataError(f"Unknown corruption {kind!r}.{nearest(str(kind), CORRUPTIONS)}")
    if isinstance(severity, bool) or not isinstance(severity, int | np.integer) or severity not in SEVERITIES:
        raise DataError(
            f"The 'severity' of a corruption must be 1 (weak), 2, 3, 4 or 5 (strong). Got {severity!r} instead."
        )
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise DataError(f"The 'seed' of a corruption must be an int in the range [0, inf). Got {seed!r} instead.")


def check_images(images: Tensor, where: str) -> None:
    """DataError unless these are uint8 images [B, 3, H, W]."""
    if images.dtype != torch.uint8:
        raise DataError(
            f"{where}: only uint8 images (0 to 255) can be corrupted, and these inputs are {images.dtype}. Build the "
            f"task from the images themselves; the model normalizes them."
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise DataError(f"{where}: inputs of shape {list(images.shape)}; expected images [B, 3, H, W].")


class Corrupted:
    """A task's inputs with a corruption, applied when rows are asked for; the first ones, up to `KEPT_BYTES`, are kept.

    name: the task's, for messages.
    """

    def __init__(self, inputs: Any, name: str, kind: str, severity: int, seed: int = 0) -> None:
        check(kind, severity, seed)
        if isinstance(inputs, Tensor):  # files are looked at when they are read
            check_images(inputs, f"task {name!r}")
        self.inputs, self.name = inputs, name
        self.corruption = (kind, int(severity), int(seed))
        self._kept: dict[int, Tensor] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: NDArray[np.int64] | slice) -> Tensor:
        rows: list[int] = np.atleast_1d(np.arange(len(self))[index]).tolist()
        missing = [i for i in dict.fromkeys(rows) if i not in self._kept]
        new: dict[int, Tensor] = {}
        if missing:
            clean = self.inputs[torch.tensor(missing) if isinstance(self.inputs, Tensor) else np.array(missing)]
            check_images(clean, f"task {self.name!r}")
            corrupted = corrupt(clean, *self.corruption, missing)
            new = dict(zip(missing, corrupted, strict=True))
        images = torch.stack([new[i] if i in new else self._kept[i] for i in rows])
        for i, image in new.items():
            if self._kept_bytes + image.nbytes <= KEPT_BYTES:
                self._kept[i] = image.clone()  # not a view that keeps the batch in memory
                self._kept_bytes += image.nbytes
        return images
