"""Hugging Face datasets as tasks (optional: `pip install mergesolve[hub]`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import DataError, nearest
from .images import LazyImages, Size, resizer


@dataclass(frozen=True)
class Columns:
    """Which columns of a dataset a task is made of, and the names of its classes."""

    image: str
    label: str | None
    classes: tuple[str, ...]


def open_dataset(dataset: Any, split: str, config: str | None) -> tuple[Any, str]:
    """The dataset, loaded if it was given by name, and a name for its task."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("Hugging Face datasets are not installed: pip install 'mergesolve[hub]'.") from error
    if not isinstance(dataset, str | Path):
        if not isinstance(dataset, datasets.Dataset):
            raise DataError(
                f"from_hub takes a dataset's name or one split of it (datasets.Dataset), got {type(dataset).__name__}; "
                f"choose a split: data['train']."
            )
        return dataset, str(dataset.info.dataset_name or "dataset")
    try:
        loaded = datasets.load_dataset(str(dataset), config, split=split)
    except (OSError, ValueError) as error:
        # Unknown names and splits are told apart only by these messages; both name what was asked for.
        raise DataError(f"from_hub: cannot load {str(dataset)!r}, split {split!r}: {error}") from error
    return loaded, Path(str(dataset)).name


def hub_columns(data: Any, image: str | None, label: str | None, where: str) -> Columns:
    """The columns that were asked for, or the first of the fitting kind."""
    import datasets

    for column in (image, label):
        if column is not None and column not in data.features:
            raise DataError(f"{where}: the dataset has no column {column!r}.{nearest(column, data.features)}")
    kinds = {name: type(feature) for name, feature in data.features.items()}
    image = image or next((name for name, kind in kinds.items() if kind is datasets.Image), None)
    label = label or next((name for name, kind in kinds.items() if kind is datasets.ClassLabel), None)
    if image is None:
        raise DataError(
            f"{where}: the dataset has no image column among {', '.join(map(repr, kinds))}; name it: image=..."
        )
    names = getattr(data.features[label], "names", None) if label is not None else None
    return Columns(image, label, tuple(str(n).replace("_", " ") for n in names or ()))


class HubImages(LazyImages):
    """The image column of a dataset, resized to `size`."""

    def __init__(self, data: Any, column: str, size: Size, interpolation: str, resize_mode: str) -> None:
        super().__init__()
        self._data = data.select_columns([column])
        self._column = column
        self._resize = resizer(size, interpolation, resize_mode)

    def __len__(self) -> int:
        return len(self._data)

    def decode(self, i: int) -> Tensor:
        """Image i as uint8 [3, H, W]."""
        return self._resize(self._data[i][self._column])
