"""PCB-Merging: weigh each entry by how much it matters within its task and how well it agrees with the others.

    s_i = exp(n · a_i²) · tanh(τ_i · Σ_j τ_j)        a_i: |τ_i|, clipped and scaled to [0, 1] over the model
    w_i = s_i, those below the `density` largest of the model set to 0, scaled to [0, 1]
    θ   = θ0 + scale · Σ w_i τ̂_i / Σ w_i             τ̂_i: τ_i with its magnitude clipped

As in the authors' code (the paper has softmax functions in the place of exp and tanh). All ranks are over the whole
model and exact: they take streaming passes, not memory.
Source: Du et al. (2024), Parameter Competition Balancing for Model Merging, section 3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from ...pools import Pool
from ...pools.magnitudes import model_cuts
from ...pools.sources import Scratch, TaskVectors
from ...pools.transforms.transform import Apply, Transform
from ...pools.workers import Workers
from ..errors import check_number
from .merge import Matrix, Merge, Part, Rule, not_finite

if TYPE_CHECKING:
    from ...pools.statistics import Statistics

CLIPPED = 1e-4  # fraction of the smallest, and of the largest, magnitudes that are clipped
SMALLEST = 1e-12  # a smaller Σ w_i is taken as this


@dataclass(frozen=True)
class Pcb(Merge):
    """θ = θ0 + scale · Σ w_i τ̂_i / Σ w_i with weights from intra-task magnitude and inter-task agreement.

    `density` is the fraction of entries of each expert that keep a weight.
    """

    source: ClassVar[str] = "Du et al. (2024), Parameter Competition Balancing for Model Merging, section 3"
    passes: ClassVar[int] = 10

    density: float = 0.1
    scale: float = 1.2

    def __post_init__(self) -> None:
        check_number(self, "density", 0, 1, closed="right")
        check_number(self, "scale", -math.inf, math.inf, closed="neither")

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Find the ranges of magnitudes and of scores of each expert."""
        source, workers = pool.stream()
        size = source.frozen + elements(source)
        bounds = int(size * CLIPPED), max(0, int(size * (1 - CLIPPED) - 1))
        low, high = (kth(source, workers, size - place) for place in bounds)
        score = Scores(tuple(low.tolist()), tuple(high.tolist()))
        floor = column(cut_of_scores(pool, score, int(size * (1 - self.density)), size))
        scored, workers = pool.transform(score).stream()
        top = column(np.maximum(extremes(scored, workers)[1], 0 if source.frozen else -np.inf))

        def rule(part: Part) -> torch.Tensor:
            stack = part.stack()
            if not bool(stack.isfinite().all()):  # which clipping would hide
                raise not_finite(part.name)
            weights = scaled(score(stack), floor.to(stack), top.to(stack))
            clipped = stack.abs().clamp_(column(low).to(stack), column(high).to(stack)).mul_(stack.sign())
            merged = (weights * clipped).sum(0) / weights.sum(0).clamp_min_(SMALLEST)
            return torch.add(part.base, merged, alpha=self.scale)

        return rule


@dataclass(frozen=True)
class Scores(Transform):
    """s_i / eⁿ in the place of τ_i, all of them or those of one sign, for magnitudes clipped to [low, high] [n]."""

    joint: ClassVar[bool] = True

    low: tuple[float, ...]
    high: tuple[float, ...]
    sign: int = 0

    def __call__(self, deltas: torch.Tensor) -> torch.Tensor:
        """Return the scores [n, m] of all task vectors [n, m]."""
        low, high = column(self.low).to(deltas), column(self.high).to(deltas)
        inner = scaled(deltas.abs(), low, high).square_().sub_(1).mul_(len(deltas)).exp_()
        found = inner.mul_((deltas * deltas.sum(0)).tanh_())
        return found if self.sign == 0 else found.clamp_(min=0) if self.sign > 0 else found.clamp_(max=0)

    def prepare(self, source: TaskVectors, workers: Workers, names: Sequence[str]) -> Apply:
        """Return the scores as a transform."""

        def apply(
            name: str, start: int, base: torch.Tensor | None, deltas: torch.Tensor, experts: Sequence[int]
        ) -> torch.Tensor:
            return self(deltas)

        return apply


def column(values: Sequence[float] | Matrix) -> torch.Tensor:
    """Return values of experts as a column [n, 1], float32."""
    return torch.tensor(np.asarray(values), dtype=torch.float32).unsqueeze(1)


def scaled(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return values [n, m] clipped to [low, high] and mapped to [0, 1]; where low = high, 1 from there on, else 0."""
    width = high - low
    found = (torch.minimum(torch.maximum(values, low), high) - low) / torch.where(width > 0, width, 1)
    return torch.where(width > 0, found, (values >= low).to(found))


def elements(source: TaskVectors) -> int:
    """Return how many entries an expert has."""
    return sum(map(prod, source.shapes.values()))


def kth(source: TaskVectors, workers: Workers, k: int) -> Matrix:
    """Return the k-th largest magnitude of each expert [n]; beyond the last, 0, as entries that no expert changed."""
    size = elements(source)
    if k > size:
        return np.zeros(source.n)
    if k == size:
        return extremes(source, workers, magnitudes=True)[0]
    return np.array([found.value for found in model_cuts(source, workers, [k] * source.n)])


def cut_of_scores(pool: Pool, score: Scores, place: int, size: int) -> Matrix:
    """Return the score [n] at a place (from 0) in ascending order, of all entries of each expert.

    Looks among the positive scores, and among the negative ones for the experts that have too few of those.
    """
    above = kth(*pool.transform(dataclasses.replace(score, sign=1)).stream(), size - place)
    if (above > 0).all():
        return above
    below = kth(*pool.transform(dataclasses.replace(score, sign=-1)).stream(), place + 1)
    return np.where(above > 0, above, -below)


def extremes(source: TaskVectors, workers: Workers, *, magnitudes: bool = False) -> tuple[Matrix, Matrix]:
    """Return the smallest and the largest value, or magnitude, of each expert, [n] each, in one pass."""
    least, most = np.full(source.n, np.inf), np.full(source.n, -np.inf)
    items = [
        (name, start, min(start + workers.limit, prod(shape)))
        for name, shape in source.shapes.items()
        for start in range(0, prod(shape), workers.limit)
    ]

    def measure(item: tuple[str, int, int], scratch: Scratch) -> tuple[Matrix, Matrix]:
        name, start, stop = item
        low, high = np.empty(source.n), np.empty(source.n)
        for positions, delta in source.deltas(name, range(source.n), start, stop, scratch):
            values = delta.abs() if magnitudes else delta
            low[positions], high[positions] = values.amin(1).numpy(), values.amax(1).numpy()
        return low, high

    def add(item: tuple[str, int, int], part: tuple[Matrix, Matrix]) -> None:
        np.minimum(least, part[0], out=least)
        np.maximum(most, part[1], out=most)

    workers.run(items, measure, then=add, serial=source.serial)
    return least, most
