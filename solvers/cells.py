"""Linear constraints on a cell of coefficients: linear minimization by linear programming, projection by a QP.

    {z = (x, t) : E z = f,  H z ≤ k},   x the coefficients of one block, or of several that are coupled

Blocks with the same constraints are copies of one cell and are solved together, as one block-diagonal sparse program;
projections of small cells by Newton's method on the dual (:mod:`.dual_newton`), and by a program where that fails.
What the programs return is made feasible by construction: moved onto the equalities, then toward a point c that is
strictly inside of everything else, by the least θ with H((1 − θ) z + θ c) ≤ k.
Source: Nocedal and Wright (2006), ch. 13 and 16; the point inside of all inequalities that are not implied equalities,
by one linear program: Freund, Roundy and Todd (1985), Identifying the Set of Always-Active Constraints.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .dual_newton import Few
from .errors import OptionError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Array = np.ndarray[Any, Any]
TOGETHER = 20_000  # coefficients of one program
POLISHED = 300  # largest cell whose projections are polished by their active set
MOST_MULTIPLIERS = 16  # of a cell that is projected onto by Newton's method on the dual
INSIDE = 1e-10  # a point that breaks nothing by more is its own projection
PROGRAMS: tuple[dict[str, Any], ...] = (
    {"solver": "CLARABEL", "tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12},
    {"solver": "CLARABEL"},
    {"solver": "OSQP", "eps_abs": 1e-8, "eps_rel": 1e-8, "max_iter": 100_000, "polishing": True},
)
TIGHT = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


@dataclass(frozen=True, eq=False)
class Cell:
    """Coefficients x [size] and auxiliary variables with E z = f and H z ≤ k; there is a point in it.

    unbounded: whether the coefficients may go to infinity.
    """

    size: int
    equal: csr_matrix
    equal_to: Array
    below: csr_matrix
    at_most: Array
    programs: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if importlib.util.find_spec("cvxpy") is None:
            raise OptionError(
                "Projection onto these constraints is a quadratic program, which needs cvxpy: pip install "
                "'mergesolve[convex]'. Floors and caps of single experts and bounds of sum(*) do without."
            )

    @property
    def width(self) -> int:
        """Number of variables, auxiliary ones included."""
        return int(self.below.shape[1])

    @cached_property
    def bounds(self) -> tuple[Array, Array, csr_matrix, Array]:
        """Lower and upper bounds of the variables, and the inequalities that are more than a bound."""
        lower, upper = np.full(self.width, -np.inf), np.full(self.width, np.inf)
        entries = np.diff(self.below.indptr)
        single = np.flatnonzero(entries == 1)
        column = self.below.indices[self.below.indptr[single]]
        factor = self.below.data[self.below.indptr[single]]
        limit = self.at_most[single] / factor
        np.minimum.at(upper, column[factor > 0], limit[factor > 0])
        np.maximum.at(lower, column[factor < 0], limit[factor < 0])
        rest = np.flatnonzero(entries > 1)
        return lower, upper, self.below[rest], self.at_most[rest]

    @cached_property
    def bounded(self) -> bool:
        """Whether the recession cone {d : H d ≤ 0, E d = 0} has no ray."""
        from scipy.optimize import linprog
        from scipy.sparse import vstack

        result = linprog(
            np.asarray(self.below.sum(axis=0)).ravel(),
            A_ub=self.below,
            b_ub=np.zeros(self.below.shape[0]),
            A_eq=self.equal if self.equal.shape[0] else None,
            b_eq=np.zeros(self.equal.shape[0]) if self.equal.shape[0] else None,
            bounds=(-1, 1),
        )
        if result.status != 0 or result.fun < -1e-9:
            return False
        lower, upper, _, _ = self.bounds
        if np.all(np.isfinite(lower) | np.isfinite(upper)):  # H d = 0 on the cone: bounds leave no line
            return True
        return bool(np.linalg.matrix_rank(vstack([self.below, self.equal]).toarray()) == self.width)

    @cached_property
    def affine(self) -> tuple[csr_matrix, Array, Array]:
        """The equalities with those that the inequalities imply, and which inequalities are left."""
        from scipy.optimize import linprog
        from scipy.sparse import bmat, eye, vstack

        m = self.below.shape[0]
        # max Σ t:  H x + t ≤ s k,  E x = s f,  0 ≤ t ≤ 1,  s ≥ 1.  t_i = 0 where no point has slack.
        result = linprog(
            np.r_[np.zeros(self.width), -np.ones(m), 0.0],
            A_ub=bmat([[self.below, eye(m), -self.at_most[:, None]]], format="csr"),
            b_ub=np.zeros(m),
            A_eq=bmat([[self.equal, _zeros(self.equal.shape[0], m), -self.equal_to[:, None]]], format="csr")
            if self.equal.shape[0]
            else None,
            b_eq=np.zeros(self.equal.shape[0]) if self.equal.shape[0] else None,
            bounds=[(None, None)] * self.width + [(0, 1)] * m + [(1, 1e7)],
            options=TIGHT,
        )
        if result.status != 0:
            raise RuntimeError(f"no point inside of the constraints was found: {result.message}")
        slack = result.x[self.width : -1] > 0.5
        equal = vstack([self.equal, self.below[np.flatnonzero(~slack)]], format="csr")
        return equal, np.append(self.equal_to, self.at_most[~slack]), slack

    @cached_property
    def centre(self) -> Array:
        """A point with the largest least slack in the inequalities that no equality implies [width]."""
        from scipy.optimize import linprog
        from scipy.sparse import bmat

        equal, equal_to, slack = self.affine
        kept = np.flatnonzero(slack)
        result = linprog(
            np.r_[np.zeros(self.width), -1.0],
            A_ub=bmat([[self.below[kept], np.ones((len(kept), 1))]], format="csr") if len(kept) else None,
            b_ub=self.at_most[kept] if len(kept) else None,
            A_eq=bmat([[equal, np.zeros((equal.shape[0], 1))]], format="csr") if equal.shape[0] else None,
            b_eq=equal_to if equal.shape[0] else None,
            bounds=[(None, None)] * self.width + [(0, 1)],
            options=TIGHT,
        )
        if result.status != 0:
            raise RuntimeError(f"no point inside of the constraints was found: {result.message}")
        point: Array = self._onto_equalities(result.x[None, :-1])[0]
        return point

    @cached_property
    def _normal(self) -> Any:
        """Solver of (E Eᵀ) y = r, slightly regularized, for redundant equalities."""
        from scipy.sparse import csc_matrix, eye
        from scipy.sparse.linalg import splu

        equal = self.affine[0]
        return splu(csc_matrix(equal @ equal.T + 1e-10 * eye(equal.shape[0])))

    def _onto_equalities(self, points: Array) -> Array:
        equal, equal_to, _ = self.affine
        if not equal.shape[0]:
            return points
        for _ in range(3):
            residual = (equal @ points.T) - equal_to[:, None]
            points = points - (equal.T @ self._normal.solve(np.ascontiguousarray(residual))).T
        return points

    def repair(self, points: Array) -> Array:
        """Make points [k, width] feasible that nearly are."""
        points = self._onto_equalities(points)
        _, _, slack = self.affine
        kept = np.flatnonzero(slack)
        if not len(kept):
            return points
        excess = np.maximum((self.below[kept] @ points.T).T - self.at_most[kept], 0.0)
        room = self.at_most[kept] - self.below[kept] @ self.centre
        share = np.max(excess / (excess + np.maximum(room, 1e-300)), axis=1, keepdims=True)
        return points + share * (self.centre - points)

    def violation(self, points: Array) -> Array:
        """Return the largest excess over a constraint [k] of points [k, width]."""
        worst = np.zeros(len(points))
        if self.below.shape[0]:
            worst = np.maximum(worst, ((self.below @ points.T).T - self.at_most).max(axis=1))
        if self.equal.shape[0]:
            worst = np.maximum(worst, np.abs((self.equal @ points.T).T - self.equal_to).max(axis=1))
        return worst

    def minimizer(self, scores: Array) -> Array:
        """Return argmin ⟨x, scores⟩ for each of [k, size]. Raises OptionError where the cell is unbounded."""
        if not self.bounded:
            raise OptionError(
                "The constraints leave coefficients that may grow without end, so there is no linear minimization "
                "oracle. Constrain 'simplex', 'capped' or 'box' instead, or use projected gradient."
            )
        parts = [self._minimize(part) for part in _parts(scores, self.width)]
        return np.concatenate(parts)

    def _minimize(self, scores: Array) -> Array:
        from scipy.optimize import linprog
        from scipy.sparse import eye, kron

        k = len(scores)
        lower, upper, below, at_most = self.bounds
        costs = np.zeros((k, self.width))
        size = np.abs(scores).max(axis=1, keepdims=True)  # tolerances are absolute
        costs[:, : self.size] = scores / np.where(size > 0, size, 1.0)
        result = linprog(
            costs.ravel(),
            A_ub=kron(eye(k), below, format="csr") if len(at_most) else None,
            b_ub=np.tile(at_most, k) if len(at_most) else None,
            A_eq=kron(eye(k), self.equal, format="csr") if len(self.equal_to) else None,
            b_eq=np.tile(self.equal_to, k) if len(self.equal_to) else None,
            bounds=np.column_stack([np.tile(lower, k), np.tile(upper, k)]),
            method="highs",
            options=TIGHT,
        )
        if result.x is None:
            raise RuntimeError(f"linear minimization over the constraints failed: {result.message}")
        return self.repair(result.x.reshape(k, self.width))[:, : self.size]

    def project(self, points: Array) -> Array:
        """Return the nearest points of the cell [k, size]."""
        projected = points.copy()
        outside = self._lifted_violation(points) > INSIDE
        if not outside.any():
            return projected
        at = 0
        for part in _parts(points, self.width):
            rows = np.flatnonzero(outside[at : at + len(part)])
            if len(rows):
                projected[at + rows] = self._project(part, rows)
            at += len(part)
        return projected

    @cached_property
    def few(self) -> Few | None:
        """The same set for Newton's method on the dual, where the cell and its constraints are few."""
        lower, upper, below, at_most = self.bounds
        rows, equalities = len(at_most) + len(self.equal_to), len(self.equal_to)
        if self.width > self.size or self.size > POLISHED or rows > MOST_MULTIPLIERS:
            return None
        matrix = np.vstack([self.equal.toarray(), below.toarray()])
        return Few(lower, upper, matrix, np.append(self.equal_to, at_most), equalities)

    def _lifted_violation(self, points: Array) -> Array:
        """Violation with the best auxiliary variables: those of the ℓ1 ball are absolute values."""
        if self.width == self.size:
            return self.violation(points)
        return self.violation(np.hstack([points, np.abs(points)]))

    def _project(self, points: Array, rows: Array) -> Array:
        """Nearest points of those in ``rows``: by Newton's method on the dual, what that leaves by a program."""
        if self.few is None:
            return self._solve(points)[rows]
        found, done = self.few.project(points[rows])
        found = self.repair(found)
        if not done.all():
            found[~done] = self._solve(points)[rows[~done]]
        return found

    def _solve(self, points: Array) -> Array:
        import cvxpy as cp

        k = len(points)
        if k not in self.programs:
            self.programs[k] = self._program(k)
        problem, parameter, variable = self.programs[k]
        parameter.value = points
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "may be inaccurate": what it returns is repaired below
            for options in PROGRAMS:
                try:
                    problem.solve(**options)
                    break
                except cp.SolverError:  # the tightest tolerances are sometimes out of reach
                    continue
        if variable.value is None:
            raise RuntimeError(f"projection onto the constraints failed: {problem.status}")
        found = self.repair(np.asarray(variable.value))
        if self.width == self.size <= POLISHED:
            found = self._polish(found, points)
        return found[:, : self.size]

    def _program(self, k: int) -> tuple[Any, Any, Any]:
        cp: Any = importlib.import_module("cvxpy")
        parameter = cp.Parameter((k, self.size))
        variable = cp.Variable((k, self.width))
        constraints = []
        if len(self.at_most):
            constraints.append(self.below @ variable.T <= np.tile(self.at_most[:, None], (1, k)))
        if len(self.equal_to):
            constraints.append(self.equal @ variable.T == np.tile(self.equal_to[:, None], (1, k)))
        nearest = cp.Minimize(cp.sum_squares(variable[:, : self.size] - parameter))
        return cp.Problem(nearest, constraints), parameter, variable

    def _polish(self, found: Array, points: Array) -> Array:
        """Solve for the projections exactly, given which inequalities are tight; keep those that are no worse."""
        equal, equal_to, below = self._dense
        active = self.at_most - found @ below.T < 1e-7 * (1.0 + np.abs(points).max(axis=1, keepdims=True))
        exact = points.copy()
        for one, tight in zip(exact, active, strict=True):
            rows = np.vstack([equal, below[tight]])
            if len(rows):
                residual = rows @ one - np.append(equal_to, self.at_most[tight])
                one -= np.linalg.lstsq(rows, residual, rcond=1e-12)[0]
        exact = self.repair(exact)
        nearer = np.linalg.norm(exact - points, axis=1) <= np.linalg.norm(found - points, axis=1) * (1 + 1e-12)
        kept = nearer & (self.violation(exact) <= INSIDE)
        return np.where(kept[:, None], exact, found)

    @cached_property
    def _dense(self) -> tuple[Array, Array, Array]:
        equal, equal_to, _ = self.affine
        return equal.toarray(), equal_to, self.below.toarray()


def _parts(rows: Array, width: int) -> list[Array]:
    count = max(1, -(-len(rows) * width // TOGETHER))
    return np.array_split(rows, min(count, max(1, len(rows))))


def _zeros(rows: int, columns: int) -> Any:
    from scipy.sparse import csr_matrix

    return csr_matrix((rows, columns))
