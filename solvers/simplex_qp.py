"""The exact minimizer of a convex quadratic over the simplex, for few variables, by an active-set method.

    min ⟨c, w⟩ + ½ wᵀ M w    over  w ≥ 0, Σ_k w_k = 1,    M positive semidefinite

Newton steps on the face of the present support: a step that leaves the simplex ends at its boundary and loses that
coordinate; after one that does not, the coordinate of the most negative multiplier joins, and if there is none the
point is optimal. Each support is left for good, so it ends, with exact zeros and at the precision of a linear solve.
Source: Wolfe (1976), Finding the Nearest Point in a Polytope; Nocedal and Wright (2006), algorithm 16.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
RIDGE = 1e-13  # relative; a face along which M is flat is crossed in one long step
ROUNDING = 1e-14


def minimize_on_simplex(quadratic: Array, linear: Array, start: Array) -> Array:
    """Return argmin ⟨c, w⟩ + ½ wᵀMw on the simplex [k]. quadratic: M [k, k]; linear: c [k]; start: feasible [k]."""
    weights = start.astype(np.float64)
    free = weights > 0
    weights[~free] = 0.0
    scale = max(float(np.abs(quadratic).max()), float(np.abs(linear).max()))
    ridge = RIDGE * max(float(np.abs(quadratic).max()), ROUNDING * scale)
    for _ in range(20 * len(weights) + 20):
        support = np.flatnonzero(free)
        newton = newton_step(quadratic, linear + quadratic @ weights, support, ridge)
        falling = newton < 0
        steps = np.full(len(support), np.inf)
        steps[falling] = -weights[support[falling]] / newton[falling]
        first = int(np.argmin(steps))
        if steps[first] < 1.0:
            weights[support] = np.maximum(weights[support] + steps[first] * newton, 0.0)
            weights[support[first]], free[support[first]] = 0.0, False
            continue
        weights[support] = np.maximum(weights[support] + newton, 0.0)
        weights /= weights.sum()
        gradient = linear + quadratic @ weights
        multipliers = gradient - float(weights @ gradient)
        multipliers[free] = 0.0
        enters = int(np.argmin(multipliers))
        if multipliers[enters] >= -ROUNDING * scale:
            break
        free[enters] = True
    return weights / weights.sum()


def newton_step(quadratic: Array, gradient: Array, support: Array, ridge: float) -> Array:
    """Return argmin ⟨g, p⟩ + ½ pᵀMp over the p [support] of sum 0."""
    k = len(support)
    system = np.zeros((k + 1, k + 1))
    system[:k, :k] = quadratic[np.ix_(support, support)] + ridge * np.eye(k)
    scale = max(float(np.abs(system[:k, :k]).max()), np.finfo(float).tiny)
    system[:k, k] = system[k, :k] = scale
    right = np.append(-(gradient[support] - gradient[support].mean()), 0.0)
    step: Array = (
        np.linalg.lstsq(system, right, rcond=None)[0][:k] if ridge == 0 else np.linalg.solve(system, right)[:k]
    )
    return step - step.mean()
