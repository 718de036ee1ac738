"""A budget of experts: at most k coefficients of a row differ from 0.

    {λ ∈ D : ‖λ‖₀ ≤ k},   D the simplex or the capped simplex

The set is not convex. Its projection is exact all the same: keep the k largest entries, and project these onto D. Its
convex hull is D itself, whose vertices have one entry, so the gap is that of D: an upper bound for the best point with
or without the budget, which does not go to 0. Only solvers that project each iterate can use it.
Source: Kyrillidis, Becker, Cevher and Koch (2013), Sparse Projections onto the Simplex, theorem 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .domains import Capped, Domain, Simplex, make_domain
from .errors import OptionError, check_number

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sparse(Domain):
    """At most ``count`` experts a row, within ``domain`` (simplex or capped); not convex."""

    count: int = 3
    domain: Any = "simplex"
    source: ClassVar[str] = "Kyrillidis, Becker, Cevher and Koch (2013)"
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number(self, "count", 1, math.inf, closed="left", integer=True)
        object.__setattr__(self, "domain", make_domain(self.domain))
        if not isinstance(self.domain, (Simplex, Capped)):
            raise OptionError(
                f"A budget of experts ('count') has an exact projection within 'simplex' and 'capped' only; got "
                f"{self.domain.name!r}."
            )

    def project(self, point: Array) -> Array:
        """Project the ``count`` largest entries of each row; of equal ones, the first in the pool stay."""
        count = min(self.count, point.shape[1])
        kept = np.argsort(-point, axis=1, kind="stable")[:, :count]
        projected = np.zeros_like(point)
        np.put_along_axis(projected, kept, self.domain.project(np.take_along_axis(point, kept, axis=1)), axis=1)
        return projected

    def violation(self, point: Array) -> Array:
        """Largest of the domain's violation and the entry that is one too many."""
        base: Array = self.domain.violation(point)
        if self.count >= point.shape[1]:
            return base
        return np.maximum(base, -np.sort(-np.abs(point), axis=1)[:, self.count])

    def breach(self, point: Array, row: int) -> str:
        """How many experts a row uses, where these are too many."""
        used = int(np.count_nonzero(point[row]))
        base: str = self.domain.breach(point, row)
        return f"it uses {used} experts, more than {self.count}" if used > self.count else base

    def minimizer(self, scores: Array) -> Array:
        """One expert a row: a vertex of the convex hull, which is in the set itself."""
        found: Array = self.domain.minimizer(scores)
        return found

    def atom(self, scores: Array) -> Array:
        """As the domain within which the budget holds."""
        found: Array = self.domain.atom(scores)
        return found

    def matrix(self, atom: Array, n: int) -> Array:
        """As the domain within which the budget holds."""
        found: Array = self.domain.matrix(atom, n)
        return found
