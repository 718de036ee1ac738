"""Images as uint8 [B, 3, H, W]: files decoded when asked for, arrays in any of the usual layouts.

Resizing and cropping are open_clip's own (shorter side to the model's size, then the centre, bicubic), up to the
conversion to floats, which is the model's.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import DataError, nearest

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
KEPT_BYTES = 256 * 2**20
LAYOUTS = ("auto", "hwc", "chw")

Size = int | tuple[int, int]


def resizer(size: Size, interpolation: str = "bicubic", resize_mode: str = "shortest") -> Callable[[Any], Tensor]:
    """A function from a PIL image to uint8 [3, H, W] of this size, as open_clip prepares images.

    interpolation: 'bicubic' or 'bilinear'. resize_mode: 'shortest' (then crop), 'longest' (then pad) or 'squash'.
    """
    for name, value, known in (
        ("interpolation", interpolation, ("bicubic", "bilinear")),
        ("resize_mode", resize_mode, ("shortest", "longest", "squash")),
    ):
        if value not in known:
            raise DataError(f"images: unknown {name} {value!r}.{nearest(value, known)}")
    from open_clip.transform import image_transform

    # All but the last two steps, which make floats and normalize.
    steps = image_transform(size, is_train=False, interpolation=interpolation, resize_mode=resize_mode).transforms[:-2]

    def resize(image: Any) -> Tensor:
        image = image.convert("RGB")  # first, since the colours of a palette cannot be interpolated
        for step in steps:
            image = step(image)
        return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)

    return resize


class LazyImages(ABC):
    """Images as uint8 [B, 3, H, W] that are decoded when rows are asked for.

    The first ones, up to `KEPT_BYTES` in all, are kept: the few images of a small task are decoded once, and not in
    every evaluation of a line search.
    """

    threads = 1

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}
        self._kept_bytes = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def decode(self, i: int) -> Tensor:
        """Image i as uint8 [3, H, W]."""

    def __getitem__(self, index: NDArray[np.int64]) -> Tensor:
        rows = [int(i) for i in np.atleast_1d(index)]
        missing = [i for i in dict.fromkeys(rows) if i not in self._kept]
        with ThreadPoolExecutor(max_workers=self.threads) as pool:
            decoded = dict(zip(missing, pool.map(self.decode, missing), strict=True))
        images = torch.stack([decoded[i] if i in decoded else self._kept[i] for i in rows])
        for i, image in decoded.items():
            if self._kept_bytes + image.nbytes <= KEPT_BYTES:
                self._kept[i] = image
                self._kept_bytes += image.nbytes
        return images


class ImageFiles(LazyImages):
    """Image files, in the order of `paths`, resized to `size`.

    Raises DataError, with the file's name, for one that is missing, truncated or no image.
    """

    threads = min(8, os.cpu_count() or 1)  # decoding runs outside Python's lock

    def __init__(
        self, paths: Sequence[Path], size: Size, interpolation: str = "bicubic", resize_mode: str = "shortest"
    ) -> None:
        super().__init__()
        self.paths = tuple(paths)
        self._resize = resizer(size, interpolation, resize_mode)

    def __len__(self) -> int:
        return len(self.paths)

    def decode(self, i: int) -> Tensor:
        """Image i as uint8 [3, H, W]."""
        from PIL import Image

        path = self.paths[i]
        try:
            with Image.open(path) as image:
                return self._resize(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"images: cannot read {str(path)!r} ({error}); repair it or take it out.") from error


def image_paths(folder: Path) -> list[Path]:
    """The image files below a folder, in order."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def to_inputs(
    array: Any,
    where: str,
    size: Size | None = None,
    layout: str = "auto",
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
) -> Tensor:
    """uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W] with 1, 3 or 4 channels as uint8 [N, 3, H, W]; floats as
    they are, in float32.

    size: resize images to it; None leaves them. layout: 'hwc' or 'chw' where the shape does not tell.
    """
    if layout not in LAYOUTS:
        raise DataError(f"{where}: unknown layout {layout!r}.{nearest(layout, LAYOUTS)}")
    tensor = array.detach().cpu() if isinstance(array, Tensor) else _as_tensor(array, where)
    if tensor.is_floating_point():
        if size is not None:
            raise DataError(f"{where}: only uint8 images can be resized, and these are {tensor.dtype}.")
        return tensor.float()
    if tensor.dtype != torch.uint8:
        raise DataError(
            f"{where}: images must be uint8 (0 to 255) or, where they are normalized already, floats; got "
            f"{tensor.dtype}."
        )
    images = _channels_first(tensor, where, layout)
    if size is not None:
        from PIL import Image

        resize = resizer(size, interpolation, resize_mode)
        resized = [resize(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())) for image in images]
        images = torch.stack(resized) if resized else images[:, :, :0, :0]
    return images


def _as_tensor(array: Any, where: str) -> Tensor:
    values = np.ascontiguousarray(array)
    try:
        return torch.from_numpy(values if values.flags.writeable else values.copy())
    except TypeError as error:
        raise DataError(f"{where}: inputs must be an array of numbers, got {type(array).__name__}: {error}") from error


def _channels_first(images: Tensor, where: str, layout: str) -> Tensor:
    """[N, 3, H, W] without copying: greyscale is repeated by stride, alpha is dropped."""
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.ndim == 4:
        axes = {"chw": 1, "hwc": 3}
        fitting = [kind for kind, axis in axes.items() if layout in ("auto", kind) and images.shape[axis] in (1, 3, 4)]
        if len(fitting) == 2:
            raise DataError(
                f"{where}: images of shape {list(images.shape)} could have their channels first or last; say which "
                f"with layout='chw' or layout='hwc'."
            )
        if not fitting:
            raise DataError(
                f"{where}: images of shape {list(images.shape)} do not have 1, 3 or 4 channels where layout={layout!r} "
                f"expects them; expected [N, H, W], [N, H, W, C] or [N, C, H, W]."
            )
        if fitting == ["hwc"]:
            images = images.permute(0, 3, 1, 2)
    else:
        raise DataError(
            f"{where}: images of shape {list(images.shape)}; expected [N, H, W], [N, H, W, C] or [N, C, H, W]."
        )
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
