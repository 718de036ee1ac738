"""Why constraints have no solution: a smallest set of them that contradict each other, and the contradiction itself.

Deletion filter: leave out one constraint after the other, for good if what remains is still infeasible. What is left
is infeasible, and feasible without any one of its members. Infeasibility is measured by an elastic program,

    v = min Σ e   s.t.   low − e ≤ U x ≤ high + e,  e ≥ 0,  x in the domain

whose multipliers y add the constraints up to one inequality ⟨Uᵀy, x⟩ ≤ β that the domain misses by v.
Source: Chinneck and Dravnieks (1991), Locating Minimal Infeasible Constraint Sets in Linear Programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Array = np.ndarray[Any, Any]
FEASIBLE = 1e-9


@dataclass(frozen=True, eq=False)
class System:
    """The user's rows low ≤ U z ≤ high, with the number of the constraint that each comes from, and the domain's rows.

    The domain is E z = f, H z ≤ k.
    """

    rows: csr_matrix
    low: Array
    high: Array
    sources: Array
    equal: csr_matrix
    equal_to: Array
    below: csr_matrix
    at_most: Array


@dataclass(frozen=True)
class Conflict:
    """Constraints that contradict each other (within the domain, if ``domain``), and how.

    miss: v, by which they would have to be relaxed in all; weights [width]: of the inequality ⟨weights, x⟩ ≤ limit that
    they add up to (0 where they contradict each other without the domain); least: the least of ⟨weights, x⟩ there.
    """

    sources: tuple[int, ...]
    domain: bool
    miss: float
    weights: Array
    limit: float
    least: float


def elastic(system: System, sources: Sequence[int], *, domain: bool) -> tuple[float, Array, float]:
    """Return v, the weights Uᵀy [width] and β = ⟨y, limits⟩ of the constraints in ``sources``."""
    from scipy.optimize import linprog
    from scipy.sparse import eye, hstack, vstack

    wanted = np.isin(system.sources, sources)
    above = np.flatnonzero(wanted & np.isfinite(system.high))
    under = np.flatnonzero(wanted & np.isfinite(system.low))
    rows = vstack([system.rows[above], -system.rows[under]], format="csr")
    limits = np.append(system.high[above], -system.low[under])
    m, width = rows.shape
    matrix, right = hstack([rows, -eye(m)], format="csr"), limits
    equal = None
    if domain:
        if len(system.at_most):
            padded = hstack([system.below, _zeros(len(system.at_most), m)], format="csr")
            matrix, right = vstack([matrix, padded], format="csr"), np.append(limits, system.at_most)
        if len(system.equal_to):
            equal = hstack([system.equal, _zeros(len(system.equal_to), m)], format="csr")
    result = linprog(
        np.r_[np.zeros(width), np.ones(m)],
        A_ub=matrix,
        b_ub=right,
        A_eq=equal,
        b_eq=system.equal_to if equal is not None else None,
        bounds=[(None, None)] * width + [(0, None)] * m,
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if result.status != 0:
        raise RuntimeError(f"the constraints could not be checked: {result.message}")
    multipliers = np.maximum(-np.asarray(result.ineqlin.marginals)[:m], 0.0)
    return float(result.fun), np.asarray(rows.T @ multipliers).ravel(), float(multipliers @ limits)


def find(system: System) -> Conflict | None:
    """Return a minimal conflict, or None if some point satisfies everything."""
    sources = [int(source) for source in np.unique(system.sources)]
    if not sources or elastic(system, sources, domain=True)[0] <= FEASIBLE:
        return None
    for source in list(sources):
        rest = [other for other in sources if other != source]
        if rest and elastic(system, rest, domain=True)[0] > FEASIBLE:
            sources = rest
    domain = elastic(system, sources, domain=False)[0] <= FEASIBLE
    miss, weights, limit = elastic(system, sources, domain=domain)
    return Conflict(tuple(sources), domain, miss, weights, limit, limit + miss)


def _zeros(rows: int, columns: int) -> Any:
    from scipy.sparse import csr_matrix

    return csr_matrix((rows, columns))
