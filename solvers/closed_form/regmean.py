"""Merges that keep the outputs of linear maps: RegMean by a direct solve, MaTS by conjugate gradients.

    min_W  Σ_t w_t ‖(W − W_t) X_t‖²,   G_t = X_t X_tᵀ:   W (Σ_t w_t G_t) = Σ_t w_t W_t G_t

Tensors without Grams (biases, norms, embeddings) are averaged. RegMean++ would need the inputs of the merged model,
layer by layer, rather than statistics of the experts; it is not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ...pools import Pool
from ..errors import check_choice, check_number
from .merge import Merge, Rule
from .quadratic import GRAM_COPIES, GramSystem, check_masses, gram_rule, masses, need

if TYPE_CHECKING:
    from ...pools.statistics import Statistics


@dataclass(frozen=True)
class RegMean(Merge):
    """W = (Σ w_t W_t G_t) (Σ w_t G_t)⁻¹ for linear maps, whose outputs it keeps in least squares; the mean elsewhere.

    shrink: factor of the off-diagonal entries of every G_t; 1 leaves them, 0 weighs inputs one by one. ridge: added to
    the diagonal. G_t is a mean over rows: every expert counts the same, however many samples it had.
    """

    source: ClassVar[str] = "Jin et al. (2023), Dataless Knowledge Fusion by Merging Weights, equation 2"
    statistics: ClassVar[str | None] = "gram"
    whole: ClassVar[bool] = True
    held: ClassVar[float] = GRAM_COPIES

    shrink: float = 0.9
    ridge: float = 0.0
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_number(self, "shrink", 0, 1)
        check_number(self, "ridge", 0, math.inf, closed="left")
        check_masses(self, self.weights)

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the solve of each linear map."""
        need(statistics, "gram", self)
        return gram_rule(masses(self.weights, pool, self), GramSystem.solve, ridge=self.ridge, shrink=self.shrink)


@dataclass(frozen=True)
class Mats(Merge):
    """W (Σ w_t G_t) = Σ w_t W_t G_t by conjugate gradients for linear maps; the mean elsewhere.

    They run from the average or the base for `iterations`, or until all residuals are `tol` of the right-hand side.
    Stopped early, they stay near the start along inputs that the data hardly show; singular Grams do no harm.
    """

    source: ClassVar[str] = "Tam et al. (2024), Merging by Matching Models in Task Parameter Subspaces, section 4"
    statistics: ClassVar[str | None] = "gram"
    whole: ClassVar[bool] = True
    held: ClassVar[float] = GRAM_COPIES

    start: Literal["average", "base"] = "average"
    iterations: int = 100
    tol: float = 1e-6
    shrink: float = 1.0
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_choice(self, "start", ("average", "base"))
        check_number(self, "iterations", 0, math.inf, integer=True)
        check_number(self, "tol", 0, 1)
        check_number(self, "shrink", 0, 1)
        check_masses(self, self.weights)

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the iteration for each linear map."""
        need(statistics, "gram", self)

        def solve(system: GramSystem, name: str) -> torch.Tensor:
            return system.iterate(self.start, self.tol, self.iterations)

        return gram_rule(masses(self.weights, pool, self), solve, shrink=self.shrink)
