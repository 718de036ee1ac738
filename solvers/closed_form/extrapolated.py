"""Steps along the sum of the task vectors whose length follows from their inner products: no data, no tuning.

    θ = θ0 + s Σ_i τ_i

The average (s = 1/n) is too short where task vectors are orthogonal, their sum (s = 1) too long where they agree.
FedExP and the stability bound lie between the two, by how much the task vectors agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...pools import Blocks, Pool
from ..errors import check_number
from .linear import one_row
from .merge import Linear, Matrix
from .robust import whole_gram

VANISHING = 1e-12  # a mean whose squared norm is this part of the mean squared norm, or less, is rounding


@dataclass(frozen=True)
class FedExP(Linear):
    """θ = θ0 + η/n Σ τ_i,   η = max(1, Σ ‖τ_i‖² / (2n (‖mean τ‖² + epsilon))), but at most `cap`.

    η is 1 where experts agree and grows up to n/2 for orthogonal ones, which is beyond what repeated rounds bear once
    experts share a part: the error of that part is multiplied by 1 − η in each. So `cap`; its default halves that error
    at least. None leaves it out. `epsilon`, a squared norm of weights, is the paper's guard against a mean near 0,
    which the cap makes dispensable. Where the mean vanishes altogether, η is 1.
    """

    source: ClassVar[str] = "Jhunjhunwala, Wang and Joshi (2023), FedExP, algorithm 1 (the cap is ours)"
    passes: ClassVar[int] = 2

    cap: float | None = 1.5
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if self.cap is not None:
            check_number(self, "cap", 1, np.inf, closed="left")
        check_number(self, "epsilon", 0, 1)

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return η/n."""
        return one_row(pool, np.full(pool.n, self.step(whole_gram(pool)) / pool.n))

    def step(self, gram: Matrix) -> float:
        """Return η from the inner products [n, n] of the task vectors."""
        n = len(gram)
        spread, mean = gram.trace() / n, gram.sum() / n**2
        if mean <= VANISHING * spread:
            return 1.0
        step = max(1.0, float(spread / (2 * (mean + self.epsilon))))
        return step if self.cap is None else min(step, self.cap)


@dataclass(frozen=True)
class Stable(Linear):
    """θ = θ0 + s Σ τ_i,   s = safety / λ_max(C),   C_ij = cos(τ_i, τ_j): short enough that rounds converge.

    In the quadratic model in which expert i's loss is ½ ‖P_i (θ − θ_i)‖², P_i the projector on its own direction
    u_i = τ_i / ‖τ_i‖, the step is gradient descent, θ ← θ + s Σ P_i (θ_i − θ): at θ0, P_i (θ_i − θ0) = τ_i.
    It converges if and only if s < 2 / λ_max(Σ P_i); with U = [u_1 .. u_n], Σ P_i = U Uᵀ and C = Uᵀ U, which have the
    same nonzero eigenvalues. So `safety` is below 2; at 1, the default, no component of the error changes its sign.

    Equal directions give the average, orthogonal ones the sum. Task vectors of 0 have no direction and are left out.
    """

    source: ClassVar[str] = (
        "Gradient descent on a quadratic: Nesterov (2018), Lectures on Convex Optimization, section 2.1"
    )
    passes: ClassVar[int] = 2

    safety: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "safety", 0, 2, closed="neither")

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return s for every expert with a direction."""
        gram = whole_gram(pool)
        live = gram.diagonal() > 0
        found = np.zeros(pool.n)
        if live.any():
            norms = np.sqrt(gram.diagonal()[live])
            cosines = gram[np.ix_(live, live)] / np.outer(norms, norms)
            found[live] = self.safety / np.linalg.eigvalsh(cosines)[-1]
        return one_row(pool, found)
