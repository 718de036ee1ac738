"""Projection onto bounds and a few linear constraints, for many points at once, by Newton's method on the dual.

    max_y ½‖x(y) − p‖² + ⟨y, A x(y) − b⟩,   x(y) = clip(p − Aᵀ y, l, u),   y ≥ 0 for inequalities
    gradient A x(y) − b,   generalized Hessian −A D Aᵀ,  D = 1 where x(y) is strictly between its bounds

The dual has one variable a constraint, so a step for all points is one batch of small linear systems. Projected Newton
steps with a backtracked size rise until the conditions of optimality hold to rounding, usually in fewer than ten; the
points where they do not (degenerate ones) are named, and left to a quadratic program.
Source: Bertsekas (1982), Projected Newton Methods for Optimization Problems with Simple Constraints; Qi and Sun (1993).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
STEPS, HALVINGS = 60, 20
ACCURACY = 1e-11


@dataclass(frozen=True, eq=False)
class Few:
    """l ≤ x ≤ u (maybe infinite), the first ``equalities`` rows of A x equal to b, the others at most b."""

    lower: Array
    upper: Array
    matrix: Array
    limits: Array
    equalities: int

    def project(self, points: Array) -> tuple[Array, Array]:
        """Return the nearest points [k, n], and whether each is known to be optimal [k]."""
        k, m = len(points), len(self.limits)
        multipliers, found = np.zeros((k, m)), np.clip(points, self.lower, self.upper)
        done = np.zeros(k, dtype=bool)
        accuracy = ACCURACY * (1.0 + np.abs(points).max(axis=1))
        inequality = np.arange(m) >= self.equalities
        for _ in range(STEPS):
            excess = found @ self.matrix.T - self.limits
            wrong = np.where(inequality & (multipliers <= 0), np.maximum(excess, 0.0), np.abs(excess))
            done = wrong.max(axis=1, initial=0.0) <= accuracy
            if done.all():
                break
            at = np.flatnonzero(~done)
            moved = self._step(points[at], multipliers[at], found[at], excess[at], inequality)
            multipliers[at], found[at] = moved
        return found, done

    def _primal(self, points: Array, multipliers: Array) -> Array:
        found: Array = np.clip(points - multipliers @ self.matrix, self.lower, self.upper)
        return found

    def _dual(self, points: Array, multipliers: Array, found: Array) -> Array:
        value: Array = 0.5 * np.sum((found - points) ** 2, axis=1)
        return value + np.sum(multipliers * (found @ self.matrix.T - self.limits), axis=1)

    def _step(
        self, points: Array, multipliers: Array, found: Array, excess: Array, inequality: Array
    ) -> tuple[Array, Array]:
        m = len(self.limits)
        open_ = ((found > self.lower) & (found < self.upper)).astype(float)
        free = ~inequality | (multipliers > 0) | (excess > 0)
        hessian = np.einsum("in,kn,jn->kij", self.matrix, open_, self.matrix)
        hessian = np.where(free[:, :, None] & free[:, None, :], hessian, 0.0)
        scale = np.maximum(np.einsum("kii->ki", hessian).max(axis=1), 1e-12)
        # Where the Hessian is singular the way is steep and its end unknown: less so the nearer the optimum.
        damping = np.clip(np.abs(excess * free).max(axis=1) / (1.0 + np.abs(points).max(axis=1)), 1e-10, 1e-2)
        flat = np.einsum("kii->ki", hessian) <= 1e-12
        diagonal = np.where(flat, np.sum(self.matrix**2, axis=1), (damping * scale)[:, None])
        diagonal = np.where(free, diagonal, 1.0)
        hessian[:, np.arange(m), np.arange(m)] += diagonal
        direction = np.linalg.solve(hessian, np.where(free, excess, 0.0)[:, :, None])[:, :, 0]
        size = np.ones(len(points))
        value = self._dual(points, multipliers, found)
        rows = np.arange(len(points))  # those whose step is not accepted yet
        best, nearest = multipliers.copy(), found.copy()
        for _ in range(HALVINGS):
            trial = multipliers[rows] + size[rows, None] * direction[rows]
            trial = np.where(inequality, np.maximum(trial, 0.0), trial)
            reached = self._primal(points[rows], trial)
            rise = np.sum(excess[rows] * (trial - multipliers[rows]), axis=1)
            slack = 1e-14 * (1.0 + np.abs(value[rows]))
            good = self._dual(points[rows], trial, reached) >= value[rows] + 1e-4 * rise - slack
            best[rows[good]], nearest[rows[good]] = trial[good], reached[good]
            rows = rows[~good]
            if not len(rows):
                break
            size[rows] /= 2
        return best, nearest
