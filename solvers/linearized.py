"""The largest of several linear functions around a point, minimized over a domain: what steps for many tasks ask.

    m(V) = max_t a_t + ⟨S_t, V − Λ⟩ = max_p Σ_t p_t (a_t + ⟨S_t, V − Λ⟩),     p in the simplex of the tasks

Over the domain itself it is a linear program; by the oracle alone it is solved from both sides, columns V_k against
prices p, and every p gives a lower bound: min_V m ≥ Σ p_t (a_t − ⟨S_t, Λ⟩) + min_V ⟨Σ p_t S_t, V⟩. With ‖V − Λ‖²/2s
added it has one minimizer, V = Π(Λ − s Σ p_t S_t), and a smooth concave dual in p.
If a_t are losses and S_t their scores, and the losses are convex, min_V m is a lower bound of the least worst loss.
Source: Dantzig and Wolfe (1960) for the columns; Nesterov (2004), Introductory Lectures on Convex Optimization, 2.3,
for the step; Beck and Teboulle (2009) for its dual.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .domains import Domain, Free, Simplex
from .problem import Array

COLUMNS = 200
DUAL_STEPS = 200
PRECISION = 1e-12  # of the linear program, relative to its numbers
LEFT = 1e-8  # of the dual, relative to what the step gains


class Saddle(NamedTuple):
    """A point V of the domain [rows, n], prices p [T], and the bounds lower ≤ min m ≤ upper = m(V)."""

    target: Array
    prices: Array
    upper: float
    lower: float


def least_maximum(values: Array, scores: Array, point: Array, domain: Domain) -> Saddle:
    """Minimize m over a bounded domain: values a [T], scores S [T, rows, n] at ``point`` [rows, n]."""
    offsets = values - np.sum(scores * point, axis=(1, 2))
    if len(values) == 1:
        target = domain.minimizer(scores[0])
        value = float(offsets[0] + np.sum(scores[0] * target))
        return Saddle(target, np.ones(1), value, value)
    targets = [point, *(domain.minimizer(table) for table in scores)]
    columns = [offsets + np.sum(scores * target, axis=(1, 2)) for target in targets]
    shift, scale = float(values.max()), max(float(np.ptp(columns)), 1e-300)
    best, prices, shares, upper = -math.inf, np.zeros(len(values)), np.eye(len(targets))[0], shift
    for _ in range(COLUMNS):
        table = (np.array(columns).T - shift) / scale
        found = matrix_game(table)
        if found is None:
            break
        row, column = found
        mixed = np.tensordot(row, scores, axes=1)
        target = domain.minimizer(mixed)
        lower = float(row @ offsets + np.sum(mixed * target))
        shares, upper = column, float((np.array(columns).T @ column).max())
        if lower > best:
            best, prices = lower, row
        if upper - best <= PRECISION * scale:
            break
        targets.append(target)
        columns.append(offsets + np.sum(scores * target, axis=(1, 2)))
    solution = np.tensordot(shares, np.array(targets[: len(shares)]), axes=1)
    return Saddle(solution, prices, upper, min(best, upper))


def matrix_game(table: Array) -> tuple[Array, Array] | None:
    """Return p [T] and q [k] that solve max_p min_q pᵀ M q for M [T, k]; None if the linear program fails."""
    from scipy.optimize import linprog  # takes longer to import than the rest of the package

    tasks, columns = table.shape
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    found = linprog(
        np.append(np.zeros(columns), 1.0),
        A_ub=np.hstack([table, -np.ones((tasks, 1))]),
        b_ub=np.zeros(tasks),
        A_eq=np.append(np.ones(columns), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * columns + [(None, None)],
        method="highs-ds",
        options=tight,
    )
    if found.status != 0:
        return None
    prices, shares = np.maximum(-found.ineqlin.marginals, 0.0), np.maximum(found.x[:-1], 0.0)
    if not (prices.sum() > 0 and shares.sum() > 0):
        return None
    return prices / prices.sum(), shares / shares.sum()


class Proximal(NamedTuple):
    """The step D = V − Λ [rows, n] that minimizes m + ‖D‖²/2s, and its prices p [T]."""

    step: Array
    prices: Array


def proximal_maximum(
    values: Array, scores: Array, point: Array, domain: Domain, size: float, prices: Array | None = None
) -> Proximal:
    """Minimize m(V) + ‖V − Λ‖²/2s over any domain, by accelerated gradients of the dual; prices: where p starts."""
    tasks, simplex = len(values), Simplex()
    table = scores.reshape(tasks, -1)
    free = isinstance(domain, Free)
    gram = table @ table.T

    def answer(p: Array) -> Array:
        mixed = np.tensordot(p, scores, axes=1)
        return -size * mixed if free else domain.project(point - size * mixed) - point

    if tasks == 1:
        return Proximal(answer(np.ones(1)), np.ones(1))
    if free and np.ptp(values) == 0:
        from .mgda import min_norm

        exact = min_norm(table)
        return Proximal(answer(exact), exact)
    curvature = size * float(np.linalg.eigvalsh(gram)[-1])
    p = np.full(tasks, 1 / tasks) if prices is None else prices
    if curvature == 0.0:
        return Proximal(answer(p), p)
    scale = max(float(np.ptp(values)), curvature)
    best, momentum, t = (math.inf, p), p, 1.0
    for _ in range(DUAL_STEPS):
        if free:
            linear = values - size * (gram @ momentum)
            square = size**2 * float(momentum @ gram @ momentum)
        else:
            step = answer(momentum)
            linear = values + table @ step.ravel()
            square = float(np.sum(step**2))
        # The difference of primal and dual values at these prices: what is left to gain.
        left = float(linear.max() - momentum @ linear)
        if left < best[0]:
            best = (left, momentum)
        if left <= LEFT * min(scale, max(square / size, 1e-300)):
            break
        following = simplex.project((momentum + linear / curvature)[None])[0]
        uphill = float((momentum - following) @ (following - p)) > 0
        t_next = 1.0 if uphill else (1 + math.sqrt(1 + 4 * t**2)) / 2
        ahead = 0.0 if uphill else (t - 1) / t_next
        momentum, p, t = simplex.project((following + ahead * (following - p))[None])[0], following, t_next
    return Proximal(answer(best[1]), best[1])
