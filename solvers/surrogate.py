"""A quadratic model of each task's loss in Λ, fitted from a few evaluations: a Pareto front for the price of a solve.

    f_t(Λ) ≈ c_t + ⟨b_t, Λ⟩ + ½ ⟨Λ, H_t Λ⟩,     S_t(Λ) ≈ b_t + H_t Λ

Λ is read as one vector, and fitted in coordinates of the domain's affine hull, d of them (rows × (experts − 1) on the
simplex), so that H_t says how the loss bends inside the domain and nothing else. A value alone gives one equation, a
gradient d more, so that a sample says 1 + d things about 1 + d + d(d + 1)/2 unknowns. The fit is least squares, with
values held out to say how good it is; H_t may be made positive semidefinite (the nearest such matrix), so that the
front of the model can be solved to its end. Points that are chosen on the model are to be evaluated on the problem.
Source: MAP (Li et al. 2024), Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation; there
from values alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .domains import Domain, Free
from .errors import OptionError, check_number
from .problem import Array, Counts, Evaluation, MatrixProblem

UNKNOWNS = 20_000  # of one task: beyond that the least squares take gigabytes


class QuadraticTasks(MatrixProblem):
    """Tasks with quadratic losses f_t(Λ) = c_t + ⟨b_t, Λ⟩ + ½ ⟨Λ, H_t Λ⟩ over a domain.

    constants c [T]; linear b [T, d]; hessians H [T, d, d], symmetric; d = rows · n.
    """

    def __init__(
        self,
        constants: Array,
        linear: Array,
        hessians: Array,
        domain: Domain,
        *,
        experts: Sequence[str],
        tasks: Sequence[str],
        task_weights: Array | None = None,
    ) -> None:
        self.constants, self.linear, self.hessians = constants, linear, hessians
        self.domain, self.experts, self.tasks = domain, tuple(experts), tuple(tasks)
        self.rows = linear.shape[1] // len(self.experts)
        self.task_weights = np.full(len(tasks), 1 / len(tasks)) if task_weights is None else task_weights
        self.counts = Counts()

    def losses(self, point: Array) -> Array:
        """Return f [T]."""
        x = point.ravel()
        found: Array = self.constants + self.linear @ x + 0.5 * np.einsum("i,tij,j->t", x, self.hessians, x)
        return found

    def evaluate(
        self, point: Array, *, tasks: bool = False, raw: bool = False, experts: Sequence[int] | None = None
    ) -> Evaluation:
        """Values and scores by the formula."""
        self.counts.gradients += 1
        losses = self.losses(point)
        tables = (self.linear + self.hessians @ point.ravel()).reshape(len(losses), *point.shape)
        scores = np.tensordot(self.task_weights, tables, axes=1)
        return Evaluation(float(self.task_weights @ losses), scores, self._named(losses), tables if tasks else None)

    def value(self, point: Array) -> float:
        """The weighted sum by the formula."""
        self.counts.evaluations += 1
        return float(self.task_weights @ self.losses(point))

    def task_values(self, point: Array) -> dict[str, float]:
        """The losses by the formula."""
        self.counts.evaluations += 1
        return self._named(self.losses(point))

    def _named(self, losses: Array) -> dict[str, float]:
        return dict(zip(self.tasks, losses.tolist(), strict=True))


@dataclass(frozen=True)
class Surrogate:
    """A fitted model: `problem` with the quadratic losses, and how well it tells values that it has not seen.

    r2: by task, 1 − Σ(f − f̂)² / Σ(f − mean f)² over the `held_out` points (1 is exact, below 0 worse than the mean);
    error: by task, the largest |f − f̂| there. samples: points fitted to. gradients: whether scores were used.
    """

    problem: QuadraticTasks
    r2: dict[str, float]
    error: dict[str, float]
    samples: int
    held_out: int
    gradients: bool


@dataclass(frozen=True)
class Fit:
    """Options of :func:`fit_surrogate`, with their ranges."""

    samples: int | None
    held_out: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.samples is not None:
            check_number(self, "samples", 1, math.inf, closed="left", integer=True)
        if self.held_out is not None:
            check_number(self, "held_out", 2, math.inf, closed="left", integer=True)
        check_number(self, "seed", 0, math.inf, closed="left", integer=True)


def fit_surrogate(
    problem: MatrixProblem,
    samples: int | None = None,
    *,
    held_out: int | None = None,
    gradients: bool = True,
    convex: bool = True,
    seed: int = 0,
    points: Sequence[Array] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Surrogate:
    """Fit a quadratic to each task's loss, from evaluations at points drawn from the domain, and say how good it is.

    samples: points; None: enough for twice as many equations as unknowns, at least 6. held_out: further points, of
    which the values alone are looked at, to measure the error; None: a quarter of `samples`, at least 4. gradients: fit
    the scores, too. convex: make each H_t positive semidefinite, and fit c_t and b_t again. points: fitted to, first.
    progress: called with (evaluations done, in all). Raises OptionError on the free domain, where there is nothing to
    draw from, and for more unknowns than fit into memory: then take coarser blocks.
    """
    size = problem.rows * problem.n
    Fit(samples, held_out, seed)
    if isinstance(problem.domain, Free):
        raise OptionError(
            "A surrogate is fitted to points of the domain, and 'free' has no bounds. Take 'simplex', 'capped' or "
            "'box'."
        )
    if size * (size + 1) // 2 > UNKNOWNS:
        raise OptionError(
            f"A quadratic in {problem.rows} blocks × {problem.n} experts has {size * (size + 1) // 2} curvatures a "
            f"task, more than {UNKNOWNS}. Take coarser blocks ('model') or fewer experts."
        )
    center, basis = affine_hull(problem, np.random.default_rng(seed))
    size = basis.shape[1]
    unknowns = 1 + size + size * (size + 1) // 2
    each = 1 + size if gradients else 1
    count = max(6, math.ceil(2 * unknowns / each)) if samples is None else samples
    apart = max(4, math.ceil(count / 4)) if held_out is None else held_out
    rng = np.random.default_rng(seed)
    chosen = [*points, *(draw_point(problem, rng) for _ in range(max(0, count - len(points))))]
    checks = [draw_point(problem, rng) for _ in range(apart)]
    total, done = len(chosen) + len(checks), 0
    problem.draw(None)
    values, tables = [], []
    for point in chosen:
        if gradients:
            found = problem.evaluate(point, tasks=True)
            assert found.task_scores is not None
            values.append([found.task_values[task] for task in problem.tasks])
            tables.append(found.task_scores.reshape(len(problem.tasks), -1) @ basis)
        else:
            losses = problem.task_values(point)
            values.append([losses[task] for task in problem.tasks])
        done += 1
        if progress is not None:
            progress(done, total)
    inside = (np.array([point.ravel() for point in chosen]) - center) @ basis
    design = equations(inside, gradients=gradients)
    right = np.array(values)  # [k, T]
    if gradients:
        right = np.concatenate([right, np.concatenate(list(np.array(tables).transpose(0, 2, 1)))])
    if not np.isfinite(right).all():
        raise OptionError(
            "A surrogate cannot be fitted: a loss or a score was NaN or infinite at a point of the domain."
        )
    fitted = np.linalg.lstsq(design, right, rcond=None)[0]
    hessians = np.array([symmetric(column, size) for column in fitted[1 + size :].T])
    if convex:
        hessians = np.array([positive(hessian) for hessian in hessians])
        packed = np.array([pack(hessian) for hessian in hessians]).T
        linear = np.linalg.lstsq(design[:, : 1 + size], right - design[:, 1 + size :] @ packed, rcond=None)[0]
        fitted = np.concatenate([linear, packed])
    full = basis @ hessians @ basis.T  # [T, d, d], of the matrix of coefficients again
    slopes = fitted[1 : 1 + size].T @ basis.T
    model = QuadraticTasks(
        fitted[0] - slopes @ center + 0.5 * np.einsum("i,tij,j->t", center, full, center),
        slopes - full @ center,
        full,
        problem.domain,
        experts=problem.experts,
        tasks=problem.tasks,
        task_weights=problem.task_weights,
    )
    truth, guess = [], []
    for point in checks:
        losses = problem.task_values(point)
        truth.append([losses[task] for task in problem.tasks])
        guess.append(model.losses(point))
        done += 1
        if progress is not None:
            progress(done, total)
    residual = np.array(truth) - np.array(guess)
    spread = np.sum((np.array(truth) - np.mean(truth, axis=0)) ** 2, axis=0)
    r2 = 1 - np.sum(residual**2, axis=0) / np.maximum(spread, np.finfo(float).tiny)
    return Surrogate(
        model,
        dict(zip(problem.tasks, r2.tolist(), strict=True)),
        dict(zip(problem.tasks, np.abs(residual).max(axis=0).tolist(), strict=True)),
        len(chosen),
        len(checks),
        gradients,
    )


def affine_hull(problem: MatrixProblem, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return a point [rows · n] and an orthonormal basis [rows · n, d] of the affine hull of a bounded domain."""
    size = problem.rows * problem.n
    vertices = [random_vertex(problem, rng).ravel() for _ in range(6 * size)]
    center = np.mean(vertices, axis=0)
    _, lengths, directions = np.linalg.svd(np.array(vertices) - center, full_matrices=False)
    return center, directions[lengths > 1e-9 * max(float(lengths[0]), 1e-300)].T


def random_vertex(problem: MatrixProblem, rng: np.random.Generator) -> Array:
    """Return a random vertex [rows, n] of a bounded domain; one time in four, where all scores are positive."""
    scores = rng.normal(size=(problem.rows, problem.n))
    return problem.domain.minimizer(np.abs(scores) if rng.random() < 0.25 else scores)  # the base, where there is one


def draw_point(problem: MatrixProblem, rng: np.random.Generator) -> Array:
    """Return a random point of a bounded domain: a mixture of a few of its vertices, more often of few than of many."""
    count = 2 + int(rng.integers(min(problem.n, 6)))
    shares = rng.dirichlet(np.ones(count))
    vertices = [random_vertex(problem, rng) for _ in range(count)]
    return problem.domain.project(np.tensordot(shares, np.array(vertices), axes=1))


def equations(points: Array, *, gradients: bool) -> Array:
    """Return the rows of the least squares, values first and then scores, in the unknowns (c, b, packed H)."""
    count, size = points.shape
    upper = np.triu_indices(size)
    halves = np.where(upper[0] == upper[1], 0.5, 1.0)
    squares = points[:, upper[0]] * points[:, upper[1]] * halves
    rows = [np.hstack([np.ones((count, 1)), points, squares])]
    if gradients:
        columns = np.arange(len(upper[0]))
        for point in points:
            block = np.zeros((size, 1 + size + len(columns)))
            block[:, 1 : 1 + size] = np.eye(size)
            block[upper[0], 1 + size + columns] = point[upper[1]]
            block[upper[1], 1 + size + columns] = point[upper[0]]
            rows.append(block)
    return np.concatenate(rows)


def symmetric(packed: Array, size: int) -> Array:
    """Return H [d, d] from its upper triangle, row by row."""
    found = np.zeros((size, size))
    found[np.triu_indices(size)] = packed
    return found + np.triu(found, 1).T


def pack(hessian: Array) -> Array:
    """Return the upper triangle of H, row by row."""
    found: Array = hessian[np.triu_indices(len(hessian))]
    return found


def positive(hessian: Array) -> Array:
    """Return the nearest positive semidefinite matrix in the Frobenius norm (Higham 1988)."""
    values, vectors = np.linalg.eigh(hessian)
    found: Array = (vectors * np.maximum(values, 0.0)) @ vectors.T
    return (found + found.T) / 2
