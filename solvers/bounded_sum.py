"""Bounds on each coefficient and on their sum: what floors, caps and a budget make of a simplex.

    {λ : l ≤ λ ≤ u,  low ≤ Σλ ≤ high}

Projection: clip(x − τ, l, u), with τ = 0 where the sum then fits and else the root of the piecewise linear
Σ clip(x − τ, l, u) = low or high, found between two of its breakpoints x − u, x − l. Linear minimization: fill from the
floors in the order of the scores, a continuous knapsack. Both for all rows at once, without any solver.
Source: Brucker (1984), An O(n) algorithm for quadratic knapsack problems; Dantzig (1957), Discrete-variable extremum
problems.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import OptionError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class BoundedSum:
    """Rows with bounds [n] (maybe infinite) and a range of their sum; there is a point in it."""

    lower: Array
    upper: Array
    low: float
    high: float

    @property
    def bounded(self) -> bool:
        """Whether no coefficient can go to infinity."""
        above = np.isfinite(self.upper).all() or (np.isfinite(self.lower).all() and np.isfinite(self.high))
        below = np.isfinite(self.lower).all() or (np.isfinite(self.upper).all() and np.isfinite(self.low))
        return bool(above and below)

    def project(self, point: Array) -> Array:
        """Return the nearest rows [k, n]."""
        projected = np.clip(point, self.lower, self.upper)
        total = projected.sum(axis=1)
        for outside, target in ((total > self.high, self.high), (total < self.low, self.low)):
            if outside.any():
                projected[outside] = self._onto(point[outside], target)
        return projected

    def _onto(self, point: Array, target: float) -> Array:
        """Nearest rows with Σλ = target."""
        k, n = point.shape
        point = point - point.mean(axis=1, keepdims=True)  # τ takes up any shift, and large numbers lose nothing
        breakpoints = np.hstack([point - self.upper, point - self.lower])
        finite = np.isfinite(breakpoints)
        excess = np.abs(np.clip(point, self.lower, self.upper).sum(axis=1) - target)
        far = 1.0 + excess + np.abs(np.where(finite, breakpoints, 0.0)).max(axis=1)
        far += np.abs(point).max(axis=1)
        breakpoints = np.sort(np.clip(breakpoints, -far[:, None], far[:, None]), axis=1)
        first, last = np.zeros(k, dtype=int), np.full(k, 2 * n - 1)
        rows = np.arange(k)
        while (gap := last - first).max() > 1:  # Σ clip(x − τ) falls with τ
            middle = first + gap // 2
            too_much = np.clip(point - breakpoints[rows, middle][:, None], self.lower, self.upper).sum(axis=1) >= target
            first, last = np.where(too_much, middle, first), np.where(too_much, last, middle)
        left, right = breakpoints[rows, first], breakpoints[rows, last]
        at_left = np.clip(point - left[:, None], self.lower, self.upper).sum(axis=1)
        at_right = np.clip(point - right[:, None], self.lower, self.upper).sum(axis=1)
        fall = at_left - at_right
        share = np.clip(np.where(fall > 0, (at_left - target) / np.where(fall > 0, fall, 1.0), 0.0), 0.0, 1.0)
        projected = np.clip(point - (left + share * (right - left))[:, None], self.lower, self.upper)
        return self._settle(projected, target)

    def _settle(self, projected: Array, target: float) -> Array:
        """Take what rounding left of the sum to the coefficients that are free to move."""
        for _ in range(3):
            missing = target - projected.sum(axis=1, keepdims=True)
            room = np.where(missing > 0, self.upper - projected, projected - self.lower) > 0
            inside = (projected > self.lower) & (projected < self.upper)
            movable = np.where((inside & room).any(axis=1, keepdims=True), inside & room, room)
            share = missing / np.maximum(movable.sum(axis=1, keepdims=True), 1)
            projected = np.clip(projected + share * movable, self.lower, self.upper)
        return projected

    def violation(self, point: Array) -> Array:
        """Return the largest excess over a bound or over the range of the sum [k]."""
        total = point.sum(axis=1)
        bounds = np.maximum(self.lower - point, point - self.upper).max(axis=1)
        return np.maximum(np.maximum(bounds, np.maximum(self.low - total, total - self.high)), 0.0)

    def minimizer(self, scores: Array) -> Array:
        """Return argmin ⟨v, scores⟩ [k, n]; ties go to the first in the pool. Raises OptionError if there is none."""
        if not self.bounded:
            raise OptionError(
                "The constraints leave coefficients that may grow without end, so there is no linear minimization "
                "oracle. Constrain 'simplex', 'capped' or 'box' instead, or use projected gradient."
            )
        # All lower bounds, or the upper ones and the sum, are finite. From the floors up, else from the caps down.
        if not np.isfinite(self.lower).all():
            turned = BoundedSum(-self.upper, -self.lower, -self.high, -self.low)
            return -turned.minimizer(-scores)
        floor = float(self.lower.sum())
        most = np.minimum(self.upper - self.lower, max(self.high - floor, 0.0))
        order = np.argsort(scores, axis=1, kind="stable")
        room = most[order]
        wanted = np.where(np.take_along_axis(scores, order, axis=1) < 0, room, 0.0).sum(axis=1)
        amount = np.clip(wanted, max(self.low - floor, 0.0), max(self.high - floor, 0.0))
        before = np.cumsum(room, axis=1) - room
        filled = np.clip(amount[:, None] - before, 0.0, room)
        found = np.empty_like(scores)
        np.put_along_axis(found, order, filled, axis=1)
        found = np.minimum(found + self.lower, self.upper)
        total = found.sum(axis=1)
        for outside, target in ((total > self.high, self.high), (total < self.low, self.low)):
            if outside.any():
                found[outside] = self._settle(found[outside], target)
        return found
