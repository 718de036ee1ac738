"""The ℓ1 ball: coefficients of either sign whose absolute values sum to at most a radius.

    {λ : ‖λ‖₁ ≤ r},   argmin ⟨v, s⟩ = −r sign(s_i) e_i  with  i = argmax |s_i|

Task vectors may be subtracted, as in unlearning, and the sum of what is added and subtracted is bounded. Its vertices
are ± r times one expert, so that Frank-Wolfe keeps few experts here, too. It contains `capped` where r ≥ 1.
Source: Duchi, Shalev-Shwartz, Singer and Chandra (2008), Efficient Projections onto the ℓ1-Ball.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .domains import Domain, Simplex
from .errors import check_number

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class L1Ball(Domain):
    """Coefficients of either sign, their absolute values sum to at most ``radius``."""

    radius: float = 1.0
    source: ClassVar[str] = "Duchi, Shalev-Shwartz, Singer and Chandra (2008)"

    def __post_init__(self) -> None:
        check_number(self, "radius", 0, math.inf, closed="neither")

    def project(self, point: Array) -> Array:
        """Rows outside: project the absolute values onto the simplex of that size, and give them their signs back."""
        outside = np.abs(point).sum(axis=1) > self.radius
        if not outside.any():
            return point
        projected = point.copy()
        size = np.abs(point[outside]) / self.radius
        projected[outside] = np.sign(point[outside]) * (Simplex().project(size) * self.radius)
        return projected

    def violation(self, point: Array) -> Array:
        """Excess of the sum of absolute values over the radius."""
        return np.maximum(np.abs(point).sum(axis=1) - self.radius, 0.0)

    def minimizer(self, scores: Array) -> Array:
        """One expert a row, of the largest absolute score, with the sign that lowers the loss."""
        return self.matrix(self.atom(scores), scores.shape[1])

    def atom(self, scores: Array) -> Array:
        """Index i of +r e_i, or n + i of −r e_i [rows]; ties go to the first in the pool."""
        best = np.argmax(np.abs(scores), axis=1)
        rising = np.take_along_axis(scores, best[:, None], axis=1)[:, 0] > 0
        return best + scores.shape[1] * rising

    def matrix(self, atom: Array, n: int) -> Array:
        """The rows ± r e_i of the chosen vertices."""
        rows = np.zeros((len(atom), n))
        rows[np.arange(len(atom)), atom % n] = np.where(atom < n, self.radius, -self.radius)
        return rows
