"""What a transform is, and the task vectors that it makes of others, piece by piece.

A transform takes what it needs to know of whole models once (thresholds, norms), in streaming passes, and is a function
of single elements from then on. So a transformed pool streams as any other: in pieces, on all threads, reading only the
experts that are asked for unless it compares experts.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import ClassVar, Protocol

import torch

from ..errors import PoolError, nearest
from ..sources import Scratch, Shape, TaskVectors
from ..workers import Workers


class Apply(Protocol):
    """The function of elements that a prepared transform is."""

    def __call__(
        self, name: str, start: int, base: torch.Tensor | None, deltas: torch.Tensor, experts: Sequence[int]
    ) -> torch.Tensor:
        """Return the transformed `deltas` [len(experts), m]: elements [start, start + m) of a tensor, float32.

        `deltas` is not to be written to. `base` [m] is given to transforms that use it.
        """
        ...


@dataclass(frozen=True)
class Transform(ABC):
    """Options of a transform; subclasses are listed in `TRANSFORMS`."""

    joint: ClassVar[bool] = False
    """Every piece needs all experts, whichever are asked for."""
    by_row: ClassVar[bool] = False
    """Pieces must hold whole rows of a tensor (all of one without rows)."""
    passes: ClassVar[int] = 0
    """How often `prepare` reads each expert."""

    @property
    def label(self) -> str:
        """What it does, with every option; enters the fingerprint of the pool."""
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{type(self).__name__.lower()}({options})"

    @abstractmethod
    def prepare(self, source: TaskVectors, workers: Workers, names: Sequence[str]) -> Apply:
        """Return the function of elements for these task vectors; `names` are the experts'."""


def check_fraction(owner: Transform, name: str, low: float = 0.0, high: float = 1.0, *, open_low: bool = True) -> None:
    """Raise PoolError unless an option is a number between `low` (itself excluded if `open_low`) and `high`."""
    value = getattr(owner, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    if not number or value > high or value < low or (open_low and value == low):
        raise PoolError(
            f"The '{name}' parameter of {type(owner).__name__} must be a number in {'(' if open_low else '['}{low:g}, "
            f"{high:g}]. Got {value!r} instead."
        )


def check_integer(owner: Transform, name: str, low: int) -> None:
    """Raise PoolError unless an option is an integer of at least `low`."""
    value = getattr(owner, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise PoolError(
            f"The '{name}' parameter of {type(owner).__name__} must be an integer of at least {low}. "
            f"Got {value!r} instead."
        )


def check_word(owner: Transform, name: str, words: Sequence[str]) -> None:
    """Raise PoolError unless an option is one of the words."""
    value = getattr(owner, name)
    if value not in words:
        raise PoolError(
            f"The '{name}' parameter of {type(owner).__name__} must be one of {', '.join(map(repr, words))}. "
            f"Got {value!r} instead."
        )


def check_densities(owner: Transform, densities: object) -> None:
    """Raise PoolError unless `densities` is None or a mapping of names to numbers in (0, 1]."""
    fine = densities is None or (
        isinstance(densities, Mapping)
        and all(
            isinstance(name, str) and isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
            for name, value in densities.items()
        )
    )
    if not fine:
        raise PoolError(
            f"The 'densities' parameter of {type(owner).__name__} must be a mapping from names of experts to numbers "
            f"in (0, 1]. Got {densities!r} instead."
        )


def by_expert(density: float, densities: Mapping[str, float] | None, names: Sequence[str]) -> list[float]:
    """Return each expert's density: its own of `densities`, else `density`."""
    for name in densities or {}:
        if name not in names:
            raise PoolError(f"pool: there is a density for {name!r}, which is no expert." + nearest(name, names))
    return [(densities or {}).get(name, density) for name in names]


class Prepared:
    """Task vectors of another source after a prepared transform."""

    def __init__(self, source: TaskVectors, workers: Workers, transform: Transform, names: Sequence[str]) -> None:
        self._source = source
        self._joint = transform.joint
        self._by_row = transform.by_row
        self._apply = transform.prepare(source, workers, names)
        self.n = source.n
        self.shapes: Mapping[str, Shape] = source.shapes
        self.frozen = source.frozen
        self.serial = source.serial

    def base(self, name: str, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        """Return the base, which a transform leaves alone."""
        return self._source.base(name, start, stop, scratch)

    def deltas(
        self,
        name: str,
        experts: Sequence[int],
        start: int,
        stop: int,
        scratch: Scratch,
        base: torch.Tensor | None = None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Transform the other source's pieces: one expert at a time, or all at once if experts are compared."""
        if base is None:
            base = self.base(name, start, stop, scratch)
        if self._joint:
            everyone = range(self.n)
            stack = torch.empty(self.n, stop - start)
            for positions, delta in self._source.deltas(name, everyone, start, stop, scratch, base):
                stack[positions] = delta
            found = self._apply(name, start, base, stack, everyone)
            yield slice(0, len(experts)), found if list(experts) == list(everyone) else found[list(experts)]
            return
        first, last = self._rows(name, start, stop)
        if (first, last) == (start, stop):
            for positions, delta in self._source.deltas(name, experts, start, stop, scratch, base):
                yield positions, self._apply(name, start, base, delta, list(experts[positions]))
            return
        for position, expert in enumerate(experts):
            rows = torch.empty(1, last - first)
            for a in range(first, last, scratch.limit):
                b = min(a + scratch.limit, last)
                inner = base if (a, b) == (start, stop) else None
                # The caller's piece of the base may lie in the scratch buffers, so others are read into their own.
                spare = scratch if inner is not None else Scratch(b - a)
                for _, delta in self._source.deltas(name, [expert], a, b, spare, inner):
                    rows[0, a - first : b - first] = delta[0]
                if spare is not scratch:
                    scratch.bytes_read += spare.bytes_read
            found = self._apply(name, first, None, rows, [expert])
            yield slice(position, position + 1), found[:, start - first : stop - first]

    def _rows(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """Return the range of elements, of whole rows if the transform needs them, around a piece."""
        if not self._by_row:
            return start, stop
        shape = self.shapes[name]
        width = prod(shape[1:]) if len(shape) > 1 else prod(shape)
        return start // width * width, -(-stop // width) * width
