"""What a closed-form merge is: transforms of the task vectors, then a function of one tensor.

    θ = rule(θ0, τ_1 .. τ_n)   tensor by tensor, or piece by piece where the rule is a function of single elements

Options are the fields of a frozen dataclass. What a rule needs to know of whole models (norms, thresholds) is taken
once, in `prepare` or by the transforms, in streaming passes.
"""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...pools import Blocks, Pool, PoolError
from ...pools.sources import Scratch, Shape, TaskVectors
from ...pools.transforms.transform import Transform
from ..errors import OptionError, unknown

if TYPE_CHECKING:
    from ...pools.statistics import Statistics

Matrix = NDArray[np.float64]


class Part:
    """What a rule sees of one tensor: all of it, or elements [start, stop), with the experts' task vectors."""

    def __init__(
        self,
        source: TaskVectors,
        scratch: Scratch,
        name: str,
        start: int,
        stop: int,
        device: torch.device,
        statistics: Statistics | None = None,
    ) -> None:
        self.name = name
        self.shape = tuple(source.shapes[name])
        self.start, self.stop, self.size = start, stop, stop - start
        self.n = source.n
        self.device = device
        self.statistics = statistics
        self._source = source
        self._scratch = scratch
        self._base: torch.Tensor | None = None
        self._host: torch.Tensor | None = None

    @property
    def base(self) -> torch.Tensor:
        """θ0 [size], flat, float32; not to be written to."""
        if self._base is None:
            self._base = self._on_host().to(self.device)
        return self._base

    def _on_host(self) -> torch.Tensor:
        """Return θ0 [size], which is read once, as every rule takes it and all differences need it."""
        if self._host is None:
            limit = self._scratch.limit
            if self.size <= limit:
                self._host = self._source.base(self.name, self.start, self.stop, self._scratch)
            else:
                self._host = torch.empty(self.size)
                for a in range(self.start, self.stop, limit):
                    b = min(a + limit, self.stop)
                    self._host[a - self.start : b - self.start] = self._source.base(self.name, a, b, self._scratch)
        return self._host

    def stack(self) -> torch.Tensor:
        """Return all task vectors [n, size], float32, freshly allocated where they are whole tensors.

        Those of a piece lie in a buffer that the next piece uses again; the rule may write to them.
        """
        limit = self._scratch.limit
        if self.size <= limit and self.device.type == "cpu":
            stack = self._scratch.stack(self.n, self.size)
        else:
            stack = torch.empty(self.n, self.size, device=self.device)
        for a in range(self.start, self.stop, limit):
            b = min(a + limit, self.stop)
            for positions, delta in self._source.deltas(
                self.name, range(self.n), a, b, self._scratch, self._piece(a, b)
            ):
                stack[positions, a - self.start : b - self.start] = delta.to(self.device)
        return stack

    def task_vector(self, expert: int) -> torch.Tensor:
        """Return τ_i [size], freshly allocated: memory for one expert, however many there are."""
        limit = self._scratch.limit
        found = torch.empty(self.size)
        for a in range(self.start, self.stop, limit):
            b = min(a + limit, self.stop)
            for _, delta in self._source.deltas(self.name, [expert], a, b, self._scratch, self._piece(a, b)):
                found[a - self.start : b - self.start] = delta[0]
        return found.to(self.device)

    def statistic(self, expert: int) -> torch.Tensor | None:
        """Return this expert's statistic: a Fisher diagonal [size] of these elements, or a Gram matrix [d, d].

        None where there is none for this tensor.
        """
        if self.statistics is None:
            return None
        if self.statistics.kind == "fisher":
            found = self.statistics.piece(self.name, expert, self.start, self.stop, self._scratch)
        else:
            found = self.statistics.tensor(self.name, expert)
        return None if found is None else found.to(self.device)

    @property
    def axis(self) -> int | None:
        """Which side of the matrix a Gram matrix belongs to: 1 for W.reshape(out, d), 0 for W.reshape(d, out)."""
        return None if self.statistics is None else self.statistics.axes.get(self.name)

    def _piece(self, start: int, stop: int) -> torch.Tensor:
        """Return a piece of the base on the host."""
        return self._on_host()[start - self.start : stop - self.start]


Rule = Callable[[Part], torch.Tensor]
"""rule(part) -> merged values, float32, as many as the part has (of any shape)."""


@dataclass(frozen=True)
class Merge(ABC):
    """A closed-form merge with its options; subclasses are listed in `MERGES`."""

    whole: ClassVar[bool] = False
    """The rule needs whole tensors (decompositions, solves); else it is a function of single elements."""
    statistics: ClassVar[str | None] = None
    """Kind of statistics of the experts that the rule needs: "fisher" or "gram"."""
    passes: ClassVar[int] = 1
    """How often each expert is read, the transforms' own passes left out."""
    held: ClassVar[float] = 0.0
    """Copies of the largest tensor that a rule on whole tensors holds, beside what it returns."""

    def __post_init__(self) -> None:  # noqa: B027 (for subclasses to extend)
        """Check the options; raise OptionError."""

    def transforms(self) -> Sequence[Transform]:
        """Return the transforms of the task vectors that the rule is applied to, first to last."""
        return ()

    def memory(self, shapes: Iterable[Shape], n: int) -> int:
        """Return the bytes that a rule on whole tensors of n experts holds, beside what it returns."""
        return int(4 * self.held * max(map(prod, shapes), default=0)) if self.whole else 0

    def check(self, pool: Pool) -> None:  # noqa: B027 (most merges take any pool)
        """Raise OptionError for a pool with more or fewer experts than this merge takes; looks at names only."""

    @abstractmethod
    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the function of one tensor for this (transformed) pool.

        Raises OptionError for options that do not fit the pool.
        """


@dataclass(frozen=True)
class Linear(Merge):
    """Merges that are points of the pool: θ = θ0 + Σ_i Λ[b,i] τ_i with coefficients that follow from the pool."""

    @abstractmethod
    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return Λ [rows, n] and the blocks that its rows belong to."""

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the linear rule (the driver uses the pool's own operator instead, which reads what is not 0)."""
        return point_rule(*self.coefficients(pool))


def point_rule(matrix: Matrix, blocks: Blocks) -> Rule:
    """Return θ0 + Σ_i Λ[b,i] τ_i for coefficients [rows, n], with one row a tensor; experts at 0 are not read."""

    def rule(part: Part) -> torch.Tensor:
        row = matrix[blocks.rows[part.name].start]
        merged = part.base.clone()
        for expert in np.flatnonzero(row).tolist():
            merged.add_(part.task_vector(expert), alpha=float(row[expert]))
        return merged

    return rule


def expert_weights(weights: Mapping[str, float] | None, pool: Pool, owner: object, *, default: float) -> Matrix:
    """Return a weight for each expert of the pool, from a mapping by name; those that it leaves out get `default`.

    Raises OptionError for names that the pool lacks and for weights that are not finite.
    """
    found = np.full(pool.n, default)
    for name, weight in (weights or {}).items():
        if name not in pool.names:
            raise unknown(f"expert in 'weights' of {type(owner).__name__}:", name, pool.names)
        found[pool.names.index(name)] = weight
    return found


def check_weights(owner: object, weights: object) -> None:
    """Raise OptionError unless `weights` is None or a mapping of names to finite numbers."""
    fine = weights is None or (
        isinstance(weights, Mapping)
        and all(
            isinstance(name, str)
            and isinstance(value, (int, float))
            and not isinstance(value, bool)
            and abs(value) <= sys.float_info.max
            for name, value in weights.items()
        )
    )
    if not fine:
        raise OptionError(
            f"The 'weights' parameter of {type(owner).__name__} must be a mapping from names of experts to finite "
            f"numbers. Got {weights!r} instead."
        )


def check_transforms(owner: Merge) -> None:
    """Raise OptionError for options that the merge's transforms do not take."""
    try:
        owner.transforms()
    except PoolError as error:
        raise OptionError(str(error)) from None


def only(pool: Pool, count: int, owner: object, what: str) -> None:
    """Raise OptionError unless the pool has exactly so many experts."""
    if pool.n != count:
        raise OptionError(
            f"{type(owner).__name__} merges exactly {count} {'expert' if count == 1 else 'experts'} ({what}); the pool "
            f"has {pool.n}: {', '.join(pool.names)}. Name those to merge."
        )


def not_finite(name: str) -> PoolError:
    """Return the error for a tensor of which a rule can make nothing."""
    return PoolError(
        f"pool: {name!r} holds NaN or infinity in some model; find it with `mergesolve pool inspect`, or leave the "
        "tensor out with exclude."
    )


def options(merge: Merge) -> dict[str, object]:
    """Return every option of a merge."""
    return {field.name: getattr(merge, field.name) for field in dataclasses.fields(merge)}
