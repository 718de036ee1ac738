"""A task: inputs, perhaps labels, and the class texts that make a classifier of a CLIP model.

Sources are tensors and arrays, `.npz` files, image folders (one class a subfolder, decoded when asked for) and Hugging
Face datasets; whatever they are, an objective only ever takes `len(inputs)` and `inputs[index array]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import DataError

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
        if isinstance(inputs, Selected):
            inputs, indices = inputs.inputs, inputs.indices[indices]
        self.inputs, self.indices = inputs, indices

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
