"""Convex quadratic programs over the coefficients of one block: min λᵀQλ − 2cᵀλ, λ in a domain.

Without constraints, the solution of least norm. Else Clarabel by way of cvxpy (an optional dependency) finds the
constraints that hold with equality; given these, the solution is a linear system, which is solved to float64.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..domains import FEASIBILITY, Box, Capped, Domain, Free, Simplex
from ..errors import OptionError

Matrix = NDArray[np.float64]

RANK = 1e-12  # eigenvalues of the correlations below this are rounding: Q is made of float64 sums
ACTIVE = 1e-6  # Clarabel stops this close to a constraint that holds with equality, or closer
KKT = 1e-6  # the largest ‖λ − Π(λ − gradient)‖ that is returned as a solution, with Q scaled to a largest entry of 1
TOLERANCE = 1e-13


def minimize(quadratic: Matrix, linear: Matrix, domain: Domain, block: str = "model") -> Matrix:
    """Return argmin λᵀQλ − 2cᵀλ over the domain, for Q [n, n] positive semidefinite and c [n] in its range: λ [n].

    Raises OptionError without cvxpy, unless the domain is free, and where the solver fails.
    """
    if isinstance(domain, Free):
        return least_norm(quadratic, linear)
    scale = float(np.abs(quadratic).max(initial=0.0))
    if scale == 0:  # every λ is as good: the feasible point next to the base
        return domain.project(np.zeros((1, len(linear))))[0]
    quadratic, linear = quadratic / scale, linear / scale
    raw = _interior_point(quadratic, linear, domain, block)
    found = domain.project(raw[None])[0]
    error = _stationarity(found, quadratic, linear, domain)
    polished = _on_active_set(raw, quadratic, linear, domain)
    if polished is not None and (better := _stationarity(polished, quadratic, linear, domain)) <= error:
        found, error = polished, better
    if not error <= KKT:
        raise OptionError(
            f"The coefficients of block {block!r} in the domain {domain.name!r} miss optimality by {error:.3g}, which "
            f"is more than {KKT:g}: the quadratic is too badly scaled; raise 'anchor' or 'ridge'."
        )
    return found


def least_norm(quadratic: Matrix, linear: Matrix) -> Matrix:
    """Return the λ of least norm among the minima of λᵀQλ − 2cᵀλ.

    The rank is decided on correlations, which do not depend on the norms of the experts.
    """
    norms = np.sqrt(np.maximum(quadratic.diagonal(), 0.0))
    live = norms > 0
    found = np.zeros(len(linear))
    if not live.any():
        return found
    inverse = 1 / norms[live]
    values, vectors = np.linalg.eigh(quadratic[np.ix_(live, live)] * np.outer(inverse, inverse))
    full = values > RANK * len(values) * values[-1]
    projected = vectors[:, full].T @ (inverse * linear[live])
    point = inverse * (vectors[:, full] @ (projected / values[full]))
    if not full.all():
        null, _ = np.linalg.qr(inverse[:, None] * vectors[:, ~full])
        point -= null @ (null.T @ point)
    found[live] = point
    return found


def _interior_point(quadratic: Matrix, linear: Matrix, domain: Domain, block: str) -> Matrix:
    """Return Clarabel's solution, feasible and optimal to about its tolerances."""
    cvxpy = _cvxpy()
    values, vectors = np.linalg.eigh(quadratic)
    root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    variable = cvxpy.Variable(len(linear))
    objective = cvxpy.Minimize(cvxpy.sum_squares(root @ variable) - 2 * (linear @ variable))
    problem = cvxpy.Problem(objective, _constraints(cvxpy, variable, domain))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "may be inaccurate": the caller measures by how much
        problem.solve(
            solver=cvxpy.CLARABEL, tol_gap_abs=TOLERANCE, tol_gap_rel=TOLERANCE, tol_feas=TOLERANCE, max_iter=200
        )
    if variable.value is None:
        raise OptionError(
            f"Clarabel found no coefficients for block {block!r} in the domain {domain.name!r}: {problem.status}."
        )
    return np.asarray(variable.value, dtype=np.float64)


def _constraints(cvxpy: Any, variable: Any, domain: Domain) -> list[Any]:
    if isinstance(domain, Simplex):
        return [variable >= 0, cvxpy.sum(variable) == 1]
    if isinstance(domain, Capped):
        return [variable >= 0, cvxpy.sum(variable) <= 1]
    assert isinstance(domain, Box)
    return [variable >= domain.lower, variable <= domain.upper]


def _cvxpy() -> Any:
    try:
        import cvxpy
    except ImportError:
        raise OptionError(
            "Coefficients under constraints take cvxpy, which is not installed: pip install 'mergesolve[convex]' (or "
            "set domain='free', which needs no solver)."
        ) from None
    return cvxpy


def _stationarity(point: Matrix, quadratic: Matrix, linear: Matrix, domain: Domain) -> float:
    return domain.stationarity(point[None], 2 * (quadratic @ point - linear)[None])


def _on_active_set(near: Matrix, quadratic: Matrix, linear: Matrix, domain: Domain) -> Matrix | None:
    """Return the minimum with the constraints that hold near a point taken as equalities; None if it is infeasible."""
    low, high = (domain.lower, domain.upper) if isinstance(domain, Box) else (0.0, np.inf)
    margin = ACTIVE * (high - low if isinstance(domain, Box) else 1.0)
    bound = isinstance(domain, Simplex) or (isinstance(domain, Capped) and near.sum() > 1 - margin)
    at_low, at_high = near <= low + margin, near >= high - margin
    point = np.where(at_low, low, np.where(at_high, high, 0.0))
    free = ~(at_low | at_high)
    if free.any():
        target = linear[free] - quadratic[free] @ point
        inner = quadratic[np.ix_(free, free)]
        if bound:
            count = int(free.sum())
            system = np.zeros((count + 1, count + 1))
            system[:count, :count] = inner
            system[:count, count] = system[count, :count] = 1.0
            point[free] = np.linalg.lstsq(system, np.append(target, 1.0 - point.sum()), rcond=RANK)[0][:count]
        else:
            point[free] = least_norm(inner, target)
    if domain.violation(point[None])[0] > FEASIBILITY:
        return None
    return domain.project(point[None])[0]
