"""Fisher-weighted averages: of each entry, the mean of the experts weighted by how much their tasks depend on it.

    θ = Σ_t w_t F_t θ_t / Σ_t w_t F_t          (all operations entry by entry)

the minimum of Σ_t w_t (θ − θ_t)ᵀ F_t (θ − θ_t): the mode of a product of Gaussian posteriors. Where every F_t is 0, no
task depends on the entry, and it is averaged; so are tensors without Fishers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from ...pools import Pool
from ...pools.sources import Scratch
from ..errors import check_number
from .merge import Matrix, Merge, Rule, only
from .quadratic import check_masses, diagonal_rule, masses, need

if TYPE_CHECKING:
    from ...pools.statistics import Statistics


@dataclass(frozen=True)
class Fisher(Merge):
    """θ = Σ w_t F_t θ_t / Σ w_t F_t with diagonal Fishers; where all of them are 0, the average.

    Tensors that the files lack (buffers, what `mergesolve stats` was told to leave out) are averaged, too.
    floor: smaller entries of F_t count as this. ridge: added to every entry. normalize: F_t is then divided by its norm
    over all tensors, so that no expert dominates by the scale of its gradients. The authors' code: floor=1e-6,
    normalize=True; FusionBench: ridge=1e-6, normalize=True (by norms plus 1e-6).
    """

    source: ClassVar[str] = "Matena and Raffel (2022), Merging Models with Fisher-Weighted Averaging, equation 3"
    statistics: ClassVar[str | None] = "fisher"

    weights: Mapping[str, float] | None = None
    floor: float = 0.0
    ridge: float = 0.0
    normalize: bool = False

    def __post_init__(self) -> None:
        check_masses(self, self.weights)
        check_number(self, "floor", 0, math.inf, closed="left")
        check_number(self, "ridge", 0, math.inf, closed="left")

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the weighted mean's rule."""
        found = need(statistics, "fisher", self)
        weights = masses(self.weights, pool, self)
        factors = np.ones(pool.n)
        if self.normalize:
            norms = np.sqrt(moments(pool, found)[:, 1])
            if norms.any():  # those of an expert whose Fishers are all 0 stay 0
                factors = norms.max() / np.where(norms > 0, norms, norms.max())

        def measure(fisher: torch.Tensor, expert: int) -> torch.Tensor:
            return (fisher.clamp(min=self.floor) + self.ridge) * float(factors[expert])

        return diagonal_rule(weights, measure=measure)


@dataclass(frozen=True)
class Ewc(Fisher):
    """θ = (F_1 θ_1 + F_2 θ_2) / (F_1 + F_2): Fisher merging of two experts."""

    source: ClassVar[str] = "Leontev et al. (2020), Non-Iterative Knowledge Fusion in Deep Convolutional Networks"

    def check(self, pool: Pool) -> None:
        """Two experts."""
        only(pool, 2, self, "H1 and H2 of (H1 θ1 + H2 θ2) / (H1 + H2); 'fisher' merges any number")


@dataclass(frozen=True)
class Uncertainty(Merge):
    """θ = θ0 + Σ α_t (H0 + F_t) τ_t / (H0 + Σ α_t F_t): each step weighted by its curvature over that of all data.

    α_t is `scale` times the expert's weight. H0, the curvature of the base, is `prior`; unless given, the mean of all
    entries of the Fishers. Large, it gives task arithmetic with α; 0 gives Fisher merging.
    """

    source: ClassVar[str] = "Daheim et al. (2024), Model Merging by Uncertainty-Based Gradient Matching, equation 12"
    statistics: ClassVar[str | None] = "fisher"

    scale: float = 1.0
    weights: Mapping[str, float] | None = None
    prior: float | None = None

    def __post_init__(self) -> None:
        check_number(self, "scale", 0, math.inf, closed="neither")
        check_masses(self, self.weights)
        if self.prior is not None:
            check_number(self, "prior", 0, math.inf, closed="left")

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the member of the family with ridge H0 and anchor (1 − Σ α) H0."""
        found = need(statistics, "fisher", self)
        weights = self.scale * masses(self.weights, pool, self)
        prior = self.prior
        if prior is None:
            size = sum(prod(pool.tensors[name]) for name in pool.tensors if name in found.shapes)
            prior = float(moments(pool, found)[:, 0].mean() / size) if size else 0.0
        return diagonal_rule(weights, anchor=(1 - weights.sum()) * prior, ridge=prior, missing=0.0)


def moments(pool: Pool, statistics: Statistics) -> Matrix:
    """Return Σ F and Σ F² over the merged tensors, by expert [n, 2]. One pass of the statistics."""
    _, workers = pool.engine()
    names = [name for name in pool.tensors if name in statistics.shapes]
    sizes = {name: prod(pool.tensors[name]) for name in names}
    limit = workers.limit
    items = [
        (name, expert, a, min(a + limit, sizes[name]))
        for name in names
        for expert in range(pool.n)
        for a in range(0, sizes[name], limit)
    ]
    found = np.zeros((pool.n, 2))

    def sums(item: tuple[str, int, int, int], scratch: Scratch) -> tuple[float, float]:
        piece = statistics.piece(*item, scratch)
        assert piece is not None
        values = piece.double()
        return float(values.sum()), float(values @ values)

    def add(item: tuple[str, int, int, int], sums: tuple[float, float]) -> None:
        found[item[1]] += sums

    workers.run(items, sums, then=add)
    return found
