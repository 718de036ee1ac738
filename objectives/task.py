"""A task: inputs, perhaps labels, and the class texts that make a classifier of a CLIP model.

Sources are tensors and arrays, `.npz` files, image folders (one class a subfolder, decoded when asked for) and Hugging
Face datasets; whatever they are, an objective only ever takes `len(inputs)` and `inputs[index array]`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import DataError, some
from .files import class_order, listed_names, read_class_names, read_npz
from .images import SUFFIXES, ImageFiles, Size, image_paths, to_inputs

SPLITS = ("train", "validation", "test")
TEMPLATES = ("a photo of a {}.",)

Indices = NDArray[np.int64]


class Inputs(Protocol):
    """What a task's inputs must offer: a length, and the rows of an index array as one tensor [B, ...]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Tensor: ...


class Selected:
    """Some rows of lazily decoded inputs, in the order of `indices`; nothing is read until rows are asked for."""

    def __init__(self, inputs: Inputs, indices: Indices) -> None:
        self.inputs: Inputs = inputs
        self.indices: Indices = indices
        if isinstance(inputs, Selected):
            self.inputs, self.indices = inputs.inputs, inputs.indices[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Indices) -> Tensor:
        return self.inputs[self.indices[index]]


@dataclass(frozen=True)
class ClassTexts:
    """The class texts of one head: `name` is the task that they come from, `templates` hold a {} for the class."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Task:
    """Inputs with class texts, labelled or not.

    inputs: anything with a length and `[index array] -> tensor [B, ...]`: a tensor, or lazily decoded images. Images
        are uint8 [B, 3, H, W] and are normalized by the model; float inputs reach the model as they are.
    labels: int64 [N], each in [0, len(classes)), or None.
    classes: the class names; templates: prompts with a {} where the name goes. A plain module needs no templates.
    split: 'train', 'validation' or 'test'; an objective on a test split says so in its record.
    parts: the heads whose rows, one after the other, make this task's head, if it is not the task's own (see `joint`).

    Raises DataError for no inputs, no classes, labels outside the classes, and the like.
    """

    name: str
    inputs: Inputs
    labels: Tensor | None
    classes: tuple[str, ...]
    templates: tuple[str, ...] = TEMPLATES
    split: str = "train"
    parts: tuple[ClassTexts, ...] = ()

    def __post_init__(self) -> None:
        where = f"task {self.name!r}"
        if isinstance(self.classes, str) or isinstance(self.templates, str):
            raise DataError(f"{where}: classes and templates are sequences of strings, got one string; write (text,).")
        object.__setattr__(self, "classes", tuple(str(c) for c in self.classes))
        object.__setattr__(self, "templates", tuple(self.templates))
        if not self.classes:
            raise DataError(f"{where} has an empty class list; give one name a class, in the order of the labels.")
        if not self.templates:
            raise DataError(f"{where} has no templates; give at least one, such as {TEMPLATES[0]!r}.")
        for template in self.templates:
            if "{}" not in template:
                raise DataError(f"{where}: the template {template!r} has no {{}}, where the class name goes.")
        if self.split not in SPLITS:
            raise DataError(f"{where}: the split must be one of {', '.join(map(repr, SPLITS))}, got {self.split!r}.")
        if len(self.inputs) == 0:
            raise DataError(f"{where} is empty: it has classes but no inputs.")
        if self.labels is not None:
            object.__setattr__(self, "labels", self._checked_labels(where))

    def _checked_labels(self, where: str) -> Tensor:
        labels = torch.as_tensor(self.labels)
        if labels.ndim != 1 or len(labels) != len(self.inputs):
            raise DataError(
                f"{where}: labels of shape {list(labels.shape)} do not match {len(self.inputs)} inputs; "
                f"give one class index an input, or labels=None."
            )
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise DataError(f"{where}: labels must be integers (class indices), got {labels.dtype}.")
        labels = labels.to(torch.int64).cpu()
        outside = (labels < 0) | (labels >= len(self.classes))
        if outside.any():
            first = int(outside.nonzero()[0])
            raise DataError(
                f"{where}: label {int(labels[first])} of input {first} is outside the {len(self.classes)} classes "
                f"(labels go from 0 to {len(self.classes) - 1}); {int(outside.sum())} labels are. "
                f"Check the class list and whether the labels start at 1."
            )
        return labels

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def texts(self) -> tuple[ClassTexts, ...]:
        """The heads that make this task's head: its own, unless it was joined with others."""
        return self.parts or (ClassTexts(self.name, self.classes, self.templates),)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, classes, labels and a sample of the inputs: whether two tasks hold the same data."""
        digest = hashlib.sha256(repr((self.name, self.classes, self.templates, self.split, len(self))).encode())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        sample = np.unique(np.linspace(0, len(self) - 1, 8).astype(np.int64))
        digest.update(self.batch(sample).contiguous().cpu().view(torch.uint8).numpy().tobytes())
        # The sample alone may not show it: JPEG of high quality, or spatter, can leave a few images as they were.
        digest.update("".join(map(repr, self.corruptions)).encode())
        digest.update("".join(repr(layer.mixture) for layer in self._layers if hasattr(layer, "mixture")).encode())
        return digest.hexdigest()[:16]

    @property
    def corruptions(self) -> tuple[tuple[str, int, int], ...]:
        """(kind, severity, seed) of each corruption of the inputs, in the order in which they were applied."""
        return tuple(layer.corruption for layer in reversed(self._layers) if hasattr(layer, "corruption"))

    @property
    def _layers(self) -> tuple[Any, ...]:
        """What the inputs are wrapped in (selections, corruptions, mixtures), the last one that was applied first."""
        found: list[Any] = []
        inputs: Any = self.inputs
        while not isinstance(inputs, Tensor) and hasattr(inputs, "inputs"):
            found.append(inputs)
            inputs = inputs.inputs
        return tuple(found)

    @property
    def examples(self) -> tuple[Inputs, int]:
        """Where this task's examples come from, and how many distinct ones there are: mixtures are not new examples."""
        inputs, rows = self.inputs, np.arange(len(self))
        for layer in self._layers:
            if isinstance(layer, Selected):
                rows = layer.indices[rows]
            elif hasattr(layer, "mixture"):
                rows = np.union1d(layer.first[rows], layer.second[rows])
                if len(rows) == len(layer.inputs):
                    inputs = layer.inputs
        return inputs, len(np.unique(rows))

    def batch(self, indices: Indices) -> Tensor:
        """The inputs [len(indices), ...] at these indices."""
        return self.inputs[torch.from_numpy(indices)] if isinstance(self.inputs, Tensor) else self.inputs[indices]

    def take(self, indices: Indices) -> Task:
        """The same task with these samples only, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        rows = torch.from_numpy(indices)
        inputs = self.inputs[rows] if isinstance(self.inputs, Tensor) else Selected(self.inputs, indices)
        return replace(self, inputs=inputs, labels=None if self.labels is None else self.labels[rows])

    def subset(self, n: int, seed: int = 0) -> Task:
        """At most n samples, drawn from `seed`: class by class in turn where there are labels, so that the classes are
        balanced to one sample as far as they reach. The smaller of two subsets of one seed is part of the larger."""
        if n < 1:
            raise DataError(f"task {self.name!r}: a subset needs at least 1 sample, got {n}.")
        rng = np.random.default_rng([seed, 0x5B5E7])
        order = rng.permutation(len(self))
        if self.labels is not None:
            # The k-th sample of every class comes before the (k+1)-th of any; ties in the order of the permutation.
            labels = self.labels.numpy()[order]
            turn = np.empty(len(self), dtype=np.int64)
            for c in np.unique(labels):
                mine = labels == c
                turn[mine] = np.arange(mine.sum())
            order = order[np.argsort(turn, kind="stable")]
        return self.take(np.sort(order[:n]).astype(np.int64))

    def without_labels(self) -> Task:
        """The same inputs with the labels taken away, so that nothing can use them by accident."""
        return replace(self, labels=None)

    def corrupted(self, kind: str, severity: int, seed: int = 0) -> Task:
        """The same task on worse images: a kind of `CORRUPTIONS`, severity 1 (weak) to 5, applied batch by batch.

        Image i is the same in every batch and in every subset taken after this; it depends on the seed, the kind and i.
        Raises DataError for inputs that are not uint8 images; where they are files, when the first ones are read.
        """
        from .corruptions import Corrupted

        return replace(self, inputs=Corrupted(self.inputs, self.name, kind, severity, seed))

    def mixed(self, count: int, seed: int = 0) -> Task:
        """The task without labels and with `count` inputs: its own, then mixtures u x_i + (1 − u) x_j of two of them.

        For distillation: a teacher judges any input. With a count of at most its length it is the subset of that many.
        Mixtures are made batch by batch; each is the same in every batch, and in a task with more of them.
        Raises DataError for one input alone, and for inputs that are neither uint8 nor floating-point.
        """
        from .mixing import Mixed

        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
            raise DataError(
                f"task {self.name!r}: the number of mixed inputs must be an int of at least 1, got {count!r}."
            )
        unlabelled = self.without_labels()
        if count <= len(self):
            return unlabelled.subset(int(count), seed)
        return replace(unlabelled, inputs=Mixed(self.inputs, self.name, int(count), seed))

    @classmethod
    def from_arrays(
        cls,
        name: str,
        inputs: Any,
        labels: Any = None,
        classes: Sequence[str] = (),
        *,
        templates: Sequence[str] = TEMPLATES,
        split: str = "train",
        image_size: Size | None = None,
        layout: str = "auto",
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
    ) -> Task:
        """A task from an array or tensor of inputs and, perhaps, labels.

        inputs: uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W] (1, 3 or 4 channels), or floats of any shape [N,
            ...], which reach the model as they are. layout: 'hwc' or 'chw', where the shape leaves it open.
        image_size: resize uint8 images to what the model takes; `**clip.preprocess` gives it with the rest.
        """
        prepared = to_inputs(inputs, f"task {name!r}", image_size, layout, interpolation, resize_mode)
        if labels is not None and not isinstance(labels, Tensor):
            labels = torch.as_tensor(np.asarray(labels))
        return cls(name, prepared, labels, tuple(classes), tuple(templates), split)

    @classmethod
    def from_npz(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        classes: Sequence[str] | str | Path | None = None,
        **options: Any,
    ) -> Task:
        """A task from an `.npz` file with 'images' (or 'inputs'), and, if it has them, 'labels' and 'classes'.

        name: the file's name without its ending, if not given. classes: names in the order of the labels, or a JSON or
        text file that lists them. The options are those of `from_arrays`.
        """
        path = Path(path)
        name = path.stem if name is None else name
        arrays = read_npz(path)
        inputs = arrays.get("images", arrays.get("inputs"))
        if inputs is None:
            raise DataError(f"task {name!r}: {str(path)!r} has no array 'images' or 'inputs'; it has {some(arrays)}.")
        if classes is None:
            if "classes" not in arrays:
                raise DataError(f"task {name!r}: {str(path)!r} has no array 'classes'; give classes=[...].")
            classes = [str(c) for c in np.atleast_1d(arrays["classes"])]
        names = listed_names(classes, f"task {name!r}")
        return cls.from_arrays(name, inputs, arrays.get("labels"), names, **options)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        classes: Mapping[str, str] | Sequence[str] | str | Path | None = None,
        templates: Sequence[str] = TEMPLATES,
        split: str = "train",
        image_size: Size = 224,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
    ) -> Task:
        """A task from a folder of images with one subfolder a class, in the order of their names; read when needed.

        classes: class names, where the subfolders' (with spaces for underscores) are not good ones: a mapping from
        subfolder
            to name, names in the order of the subfolders, or a file of either: JSON, or text with a name a line or
            "subfolder<tab>name". Images without subfolders make a task without labels, whose classes must be given.
        image_size: what the model takes; `**clip.preprocess` gives it with interpolation and resize_mode.
        """
        folder = Path(path)
        name = folder.name if name is None else name
        if not folder.is_dir():
            raise DataError(f"task {name!r}: there is no folder {str(path)!r}.")
        subfolders = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        given = read_class_names(Path(classes)) if isinstance(classes, str | Path) else classes
        if not subfolders:
            if given is None:
                raise DataError(
                    f"task {name!r}: {str(path)!r} has no subfolders, one a class; without them the images have no "
                    f"labels, and the class names must be given: classes=[...]."
                )
            paths, labels = image_paths(folder), None
            texts = tuple(given.values()) if isinstance(given, Mapping) else tuple(given)
        else:
            order, texts = class_order(subfolders, given, f"task {name!r} ({str(path)!r})")
            files = [(file, order[subfolder]) for subfolder in subfolders for file in image_paths(folder / subfolder)]
            paths, labels = [file for file, _ in files], torch.tensor([c for _, c in files], dtype=torch.int64)
        if not paths:
            raise DataError(f"task {name!r}: {str(path)!r} holds no images (looked for {', '.join(SUFFIXES)}).")
        inputs = ImageFiles(paths, image_size, interpolation, resize_mode)
        return cls(name, inputs, labels, texts, tuple(templates), split)

    @classmethod
    def from_hub(
        cls,
        dataset: Any,
        split: str = "train",
        *,
        name: str | None = None,
        config: str | None = None,
        image: str | None = None,
        label: str | None = None,
        classes: Sequence[str] | str | Path | None = None,
        templates: Sequence[str] = TEMPLATES,
        image_size: Size = 224,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
    ) -> Task:
        """A task from a Hugging Face dataset: its name on the Hub (or a local folder's), or a `datasets.Dataset`.

        split: as `datasets.load_dataset` takes it ('train', 'test[:10%]'); what does not begin with 'train' or 'valid'
            counts as a test split. image, label: columns; the first Image and the first ClassLabel column, if not
            given. A dataset without a label column makes a task without labels. Needs `pip install mergesolve[hub]`.
        """
        from .hub import HubImages, hub_columns, open_dataset

        data, found = open_dataset(dataset, split, config)
        name = found if name is None else name
        columns = hub_columns(data, image, label, f"task {name!r}")
        names = columns.classes if classes is None else listed_names(classes, f"task {name!r}")
        labels = None if columns.label is None else torch.tensor(data[columns.label][:], dtype=torch.int64)
        inputs = HubImages(data, columns.image, image_size, interpolation, resize_mode)
        kind = next((k for k in ("train", "validation") if split.startswith(k[:5])), "test")
        return cls(name, inputs, labels, names, tuple(templates), kind)


def joint(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """The same tasks over the classes of all of them: every task is classified among all classes, in the tasks' order.

    Labels move by the number of classes before theirs. Each class keeps its own task's templates. Classes with the same
    text in two tasks get the same row of the head, and then tie.
    """
    classes = tuple(c for task in tasks for c in task.classes)
    parts = tuple(text for task in tasks for text in task.texts)
    joined, before = [], 0
    for task in tasks:
        labels = None if task.labels is None else task.labels + before
        joined.append(replace(task, labels=labels, classes=classes, parts=parts))
        before += len(task.classes)
    return tuple(joined)
