"""Merges that a few wrong models cannot drag away: order statistics of each entry, geometric median, Krum.

The average follows any single model as far as it likes. Trimmed mean and median look at each entry on its own, and
their result need not be near any model; the geometric median and Krum look at whole models through the inner products
of their task vectors, and stay in the convex hull of the models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from ...pools import Blocks, Pool
from ..errors import OptionError, check_number
from .linear import one_row
from .merge import Linear, Matrix, Merge, Part, Rule, check_weights, expert_weights, not_finite
from .norms import grams

if TYPE_CHECKING:
    from ...pools.statistics import Statistics

ROUNDING = 1e-9  # share · n may be this much below the integer that it means, as 0.29 · 100 is


@dataclass(frozen=True)
class TrimmedMean(Merge):
    """θ = θ0 + the mean of each entry's τ_i without its k largest and its k smallest values,   k = ⌊share · n⌋.

    Bounded however k models or fewer are chosen. `share` 0 is the average; below 1 / n nothing is trimmed.
    """

    source: ClassVar[str] = "Yin et al. (2018), Byzantine-Robust Distributed Learning, definition 2"

    share: float = 0.2

    def __post_init__(self) -> None:
        check_number(self, "share", 0, 0.5, closed="left")

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the trimmed mean of entries."""
        return _middle(min(math.floor(self.share * pool.n + ROUNDING), (pool.n - 1) // 2))


@dataclass(frozen=True)
class Median(Merge):
    """θ = θ0 + the median of each entry's τ_i; of an even number of experts, the mean of the two in the middle."""

    source: ClassVar[str] = "Yin et al. (2018), Byzantine-Robust Distributed Learning, definition 1"

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the median of entries."""
        return _middle((pool.n - 1) // 2)


def _middle(k: int) -> Rule:
    def rule(part: Part) -> torch.Tensor:
        stack = part.stack()
        if not bool(stack.sum(0).isfinite().all()) and not bool(stack.isfinite().all()):  # which trimming would hide
            raise not_finite(part.name)
        return middle(stack, k).add_(part.base)

    return rule


def middle(stack: torch.Tensor, k: int) -> torch.Tensor:
    """Return the mean [m] of entries [n, m] without the k largest and the k smallest of each column; 2k < n.

    `stack` is overwritten. Exchanges of whole rows move the extremes outwards: 2kn passes over memory at most, several
    times faster than sorting columns for the numbers of experts that there are.
    """
    rows = list(stack.unbind(0))
    n = len(rows)
    low = torch.empty_like(rows[0])

    def exchange(i: int) -> None:
        torch.minimum(rows[i], rows[i + 1], out=low)
        torch.maximum(rows[i], rows[i + 1], out=rows[i + 1])
        rows[i].copy_(low)

    for done in range(k):
        for i in range(done, n - 1 - done):
            exchange(i)
        for i in range(n - 3 - done, done - 1, -1):
            exchange(i)
    total = rows[k].clone()
    for row in rows[k + 1 : n - k]:
        total += row
    return total.div_(n - 2 * k)


@dataclass(frozen=True)
class GeometricMedian(Linear):
    """θ = argmin Σ_i α_i ‖θ − θ_i‖ over the whole model, α_i = w_i / Σ w: the point that minimizes mean distance.

        θ ← Σ β_i θ_i / Σ β_i,   β_i = α_i / max(smoothing, ‖θ − θ_i‖)

    Smoothed Weiszfeld steps from the average, on inner products: the experts are read twice. Models that hold less than
    half of the weight move it by a bounded amount, wherever they are. It stops when the norm of the (smoothed)
    objective's gradient, which lies between 0 and 1, is at most `tol`, or after `max_iter` steps. `smoothing` is a
    distance between models; `weights` are by name, not negative, 1 unless given.
    """

    source: ClassVar[str] = (
        "Pillutla, Kakade and Harchaoui (2022), Robust Aggregation for Federated Learning, algorithm 2"
    )
    passes: ClassVar[int] = 2

    weights: Mapping[str, float] | None = None
    smoothing: float = 1e-6
    max_iter: int = 1000
    tol: float = 1e-8

    def __post_init__(self) -> None:
        check_weights(self, self.weights)
        check_number(self, "smoothing", 0, math.inf, closed="neither")
        check_number(self, "max_iter", 1, math.inf, integer=True)
        check_number(self, "tol", 0, 1, closed="left")

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return the coefficients of the median, which are not negative and sum to 1."""
        found = expert_weights(self.weights, pool, self, default=1.0)
        if (found < 0).any() or not found.any():
            raise OptionError(
                "The 'weights' parameter of GeometricMedian must hold numbers of 0 or more that are not all 0. "
                f"Got {dict(zip(pool.names, found.tolist(), strict=True))!r} instead."
            )
        shares = found / found.max()
        return one_row(
            pool, weiszfeld(whole_gram(pool), shares / shares.sum(), self.smoothing, self.max_iter, self.tol)
        )


def weiszfeld(gram: Matrix, shares: Matrix, smoothing: float, max_iter: int, tol: float) -> Matrix:
    """Return the coefficients [n] of the geometric median of vectors with these inner products [n, n] and shares [n].

    The gradient of the objective is Σ β_i (θ − θ_i) = (θ − θ⁺) Σ β_i, so that steps measure it.
    """
    found = shares
    for _ in range(max_iter):
        across = gram @ found
        squares = (gram.diagonal() - 2 * across + found @ across).clip(min=0)
        pulls = shares / np.maximum(np.sqrt(squares), smoothing)
        moved = pulls / pulls.sum()
        step = moved - found
        found = moved
        if math.sqrt(max(step @ gram @ step, 0.0)) * pulls.sum() <= tol:
            break
    return found


@dataclass(frozen=True)
class Krum(Linear):
    """The expert with the smallest sum of squared distances to its n − f − 2 nearest others, or the mean of the best.

    f = `byzantine` experts may be anything; n ≥ 2f + 3 are needed, and unless given f is the most that n allows. `keep`
    is m of multi-Krum, which averages the m experts of lowest score (m = n: the average). Of equal scores, the first
    name wins.
    """

    source: ClassVar[str] = (
        "Blanchard et al. (2017), Machine Learning with Adversaries, the Krum function and multi-Krum"
    )
    passes: ClassVar[int] = 2

    byzantine: int | None = None
    keep: int = 1

    def __post_init__(self) -> None:
        if self.byzantine is not None:
            check_number(self, "byzantine", 0, math.inf, integer=True)
        check_number(self, "keep", 1, math.inf, integer=True)

    def check(self, pool: Pool) -> None:
        """At least 2f + 3 experts, and as many as are kept."""
        wrong = self.byzantine or 0
        if pool.n < 2 * wrong + 3:
            most = (pool.n - 3) // 2
            remedy = f"or lower 'byzantine' to at most {most}" if most >= 0 else "or take the median"
            raise OptionError(
                f"Krum with byzantine={wrong} needs 2 · {wrong} + 3 = {2 * wrong + 3} experts or more; the pool has "
                f"{pool.n}: {', '.join(pool.names)}. Add experts, {remedy}."
            )
        if self.keep > pool.n:
            raise OptionError(
                f"The 'keep' parameter of Krum must be at most the number of experts. Got {self.keep} instead, for "
                f"{pool.n}: {', '.join(pool.names)}."
            )

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return 1/m for the m experts of lowest score."""
        wrong = (pool.n - 3) // 2 if self.byzantine is None else self.byzantine
        scores = krum_scores(whole_gram(pool), wrong)
        chosen = sorted(range(pool.n), key=lambda i: (scores[i], pool.names[i]))[: self.keep]
        found = np.zeros(pool.n)
        found[chosen] = 1 / self.keep
        return one_row(pool, found)


def krum_scores(gram: Matrix, byzantine: int) -> Matrix:
    """Return the sum of the n − f − 2 smallest squared distances to others [n], of vectors with this Gram [n, n]."""
    norms = gram.diagonal()
    squares = (norms[:, None] + norms[None, :] - 2 * gram).clip(min=0)
    np.fill_diagonal(squares, np.inf)
    nearest: Matrix = np.sort(squares, axis=1)[:, : len(gram) - byzantine - 2].sum(axis=1)
    return nearest


def whole_gram(pool: Pool) -> Matrix:
    """Return the inner products [n, n] of whole task vectors, exactly symmetric, float64; one pass."""
    found = sum(grams(pool).values(), np.zeros((pool.n, pool.n)))
    return (found + found.T) / 2
