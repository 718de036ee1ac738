"""Multiple gradient descent: a step along which every task's loss falls, and a certificate where there is none.

    d = argmin ‖d‖² over the hull of the task gradients S_t,     ⟨d, S_t⟩ ≥ ‖d‖² for every task t

So −d lowers all losses at once unless d = 0, and d = 0 exactly where no direction does (Pareto stationarity). On a
domain with constraints the step is the minimizer of max_t ⟨S_t, V − Λ⟩ + ‖V − Λ‖²/2s, which is −s d where nothing
binds, and keeps the inequality: with d = (Λ − V)/s, ⟨d, S_t⟩ ≥ ‖d‖². The gap is

    −min_V max_t ⟨S_t, V − Λ⟩ ≥ 0,

zero exactly at the Pareto-stationary points of the domain; if the losses are convex, no point of it is better in every
task by more than the gap. PCGrad instead takes from each task's gradient what conflicts with another's.
Choose MGDA to move from a given merge without making any task worse; it stops at the first Pareto point it meets.
Source: Désidéri (2012); on constraints: Fliege and Svaiter (2000), section 5, Assunção, Ferreira and Prudente (2021);
the minimum norm: Wolfe (1976), Finding the nearest point in a polytope. PCGrad: Yu et al. (2020), algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .domains import Free
from .errors import OptionError, check_choice, check_number
from .linearized import least_maximum, proximal_maximum
from .problem import Array, Evaluation, MatrixProblem
from .scalarization import Scalarized
from .solver import Certificate, Clock, Solver, State, Step

ARMIJO = 0.5
SMALLEST = 1e-30


@dataclass(frozen=True)
class MGDA(Solver):
    """Multiple gradient descent: every step lowers the loss of every task.

    direction: "gradient" (the projected minimum-norm step), or "vertex" (toward the point V of the domain that
    minimizes max_t ⟨S_t, V − Λ⟩, as Frank-Wolfe does: few experts at a time). normalize: gradients of length 1, so that
    no task decides by its scale alone. grow: factor by which the step is tried larger after each success (≥ 1).
    The trace has the certificate of common descent: extra.min_norm is ‖d‖, extra.common_descent is
    min_t ⟨d, S_t⟩ − ‖d‖² (≥ 0 to rounding), extra.task_weights are the weights of the hull.
    """

    direction: str = "gradient"
    normalize: bool = False
    grow: float = 2.0
    source: ClassVar[str] = "Désidéri (2012); Fliege and Svaiter (2000); Wolfe (1976)"
    needs_task_scores: ClassVar[bool] = True
    certifies_by_task: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice(self, "direction", ("gradient", "vertex"))
        if not isinstance(self.normalize, bool):
            raise OptionError(f"The 'normalize' parameter of MGDA must be true or false. Got {self.normalize!r}.")
        check_number(self, "grow", 1, math.inf, closed="left")

    def check(self, problem: MatrixProblem) -> None:
        """Refuse a scalarized problem, and vertices where there are none."""
        refuse_scalarized("mgda", problem)
        if hasattr(getattr(problem, "objective", None), "constraint_task"):
            raise OptionError(
                "The solver 'mgda' would take the price of a constraint for a task. Choose a solver of one objective, "
                "such as 'projected-gradient', or 'minimax' for the worst task."
            )
        if self.direction == "vertex" and isinstance(problem.domain, Free):
            problem.domain.minimizer(np.zeros((1, 1)))

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Shrink the step until every loss falls by half of what its gradient promises."""
        point, tables = state.coefficients, task_tables(problem, evaluation)
        losses = np.array([evaluation.task_values[task] for task in problem.tasks])
        slack = problem.resolution * np.abs(losses)
        norms = np.linalg.norm(tables, axis=(1, 2))
        scaled = tables / np.maximum(norms, SMALLEST)[:, None, None] if self.normalize else tables
        still = np.zeros(len(tables))
        memory = state.memory
        size = float(memory["size"]) * self.grow if "size" in memory else self.first_size(scaled)
        saddle = least_maximum(still, scaled, point, problem.domain) if self.direction == "vertex" else None
        prices = saddle.prices if saddle is not None else memory.get("prices")
        while size >= SMALLEST:
            if saddle is not None:
                size = min(size, 1.0)
                move = size * (saddle.target - point)
            else:
                move, prices = proximal_maximum(still, scaled, point, problem.domain, size, prices)
            slopes = np.sum(tables * move, axis=(1, 2))
            if not np.any(move) or slopes.max() >= 0:
                break
            found = problem.task_values(point + move)
            if (np.array([found[task] for task in problem.tasks]) <= losses + ARMIJO * slopes + slack).all():
                assert prices is not None
                extra: dict[str, Any] = {"task_weights": dict(zip(problem.tasks, prices.tolist(), strict=True))}
                if saddle is not None:
                    return Step(State(point + move, {"size": np.array(size)}), size, extra=extra)
                d = -move / size
                extra["min_norm"] = float(np.linalg.norm(d))
                extra["common_descent"] = float(np.sum(scaled * d, axis=(1, 2)).min() - np.sum(d**2))
                return Step(State(point + move, {"size": np.array(size), "prices": prices}), size, extra=extra)
            size /= 2
        return Step(state, 0.0)

    def first_size(self, scaled: Array) -> float:
        """The whole segment, or a step of length 1."""
        if self.direction == "vertex":
            return 1.0 / self.grow
        return 1.0 / max(float(np.linalg.norm(scaled, axis=(1, 2)).max()), SMALLEST)

    def certificate(self, problem: MatrixProblem, point: Array, evaluation: Evaluation) -> Certificate:
        """Gap and stationarity: both 0 exactly where no direction lowers every loss."""
        tables = task_tables(problem, evaluation)
        return common_certificate(np.zeros(len(tables)), tables, point, problem)


@dataclass(frozen=True)
class PCGrad(Solver):
    """Gradient surgery: each task's gradient loses its part against any other's, then all are added.

    lr: step size; seed: the order in which a gradient meets the others, drawn anew in each iteration. The certificate
    is that of the tasks' weighted sum, which the surgery does not minimize in general: it says how far apart they are.
    """

    lr: float = 0.05
    seed: int = 0
    source: ClassVar[str] = "Yu et al. (2020), Gradient Surgery for Multi-Task Learning, algorithm 1"
    needs_task_scores: ClassVar[bool] = True
    may_rest: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self, "lr", 0, math.inf, closed="neither")
        check_number(self, "seed", 0, math.inf, closed="left", integer=True)

    def check(self, problem: MatrixProblem) -> None:
        """Refuse a scalarized problem."""
        refuse_scalarized("pcgrad", problem)

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Λ ← Π(Λ − lr Σ_t w_t g_t) with g_t the gradients after surgery."""
        tables = task_tables(problem, evaluation)
        rng = np.random.default_rng([self.seed, clock.iteration])
        mended, conflicts = surgery(tables.reshape(len(tables), -1), rng)
        direction = (np.asarray(problem.task_weights) @ mended).reshape(state.coefficients.shape)
        moved = problem.domain.project(state.coefficients - self.lr * direction)
        return Step(State(moved), self.lr, extra={"conflicts": conflicts})


def surgery(gradients: Array, rng: np.random.Generator) -> tuple[Array, int]:
    """Return the gradients [T, d] without what points against another one, and how often that was."""
    mended, squares, conflicts = gradients.copy(), np.sum(gradients**2, axis=1), 0
    for task in range(len(gradients)):
        for other in rng.permutation(len(gradients)):
            product = float(mended[task] @ gradients[other])
            if other != task and product < 0:
                mended[task] -= product / squares[other] * gradients[other]
                conflicts += 1
    return mended, conflicts


def task_tables(problem: MatrixProblem, evaluation: Evaluation) -> Array:
    """Return the scores by task [T, rows, n] of an evaluation that was asked for them."""
    if evaluation.task_scores is None:
        raise OptionError(f"{type(problem).__name__} gave no scores by task, which a solver for many tasks needs.")
    return evaluation.task_scores


def common_certificate(values: Array, tables: Array, point: Array, problem: MatrixProblem) -> Certificate:
    """Return max_t a_t − min_V max_t (a_t + ⟨S_t, V − Λ⟩), and ‖Λ − Π(Λ − Σ p_t S_t)‖ with the prices p of that.

    On the free domain, where there is no minimum, the prices are those of the proximal step with s = 1.
    """
    domain = problem.domain
    if isinstance(domain, Free):
        return Certificate(None, float(np.linalg.norm(proximal_maximum(values, tables, point, domain, 1.0).step)))
    saddle = least_maximum(values, tables, point, domain)
    mixed = np.tensordot(saddle.prices, tables, axes=1)
    return Certificate(max(0.0, float(values.max()) - saddle.lower), domain.stationarity(point, mixed))


def refuse_scalarized(solver: str, problem: MatrixProblem) -> None:
    """Raise OptionError for a problem that has made one number of its tasks already."""
    if isinstance(problem, Scalarized):
        raise OptionError(
            f"The solver '{solver}' weighs the tasks itself, so it takes no scalarization. Leave it out, or choose a "
            "solver of one objective, such as 'projected-gradient', or 'minimax' for the worst task."
        )


def min_norm(points: Array) -> Array:
    """Return the convex weights p [T] of the point of least norm in the hull of ``points`` [T, d], to rounding.

    Wolfe's method: a corral of points whose affine hull's nearest point to 0 lies inside their hull; add the point that
    supports the current one least, drop what gets a negative weight. Finite, since norms fall from corral to corral.
    """
    tasks = len(points)
    scale = float(np.linalg.norm(points, axis=1).max())
    if scale == 0.0:
        return np.full(tasks, 1 / tasks)
    x: Any = points / scale
    if x.shape[1] > tasks:
        # A rotation: inner products stay, and there are at most T coordinates.
        x = np.asarray(np.linalg.qr(x.T, mode="r")).T
    corral = [int(np.argmin(np.sum(x**2, axis=1)))]
    shares = np.ones(1)
    for _ in range(100 * tasks):
        current = shares @ x[corral]
        products = x @ current
        worst = int(np.argmin(products))
        norm = float(np.linalg.norm(current))
        if worst in corral or norm**2 - products[worst] <= 1e-15 * norm:
            break
        corral, shares = [*corral, worst], np.append(shares, 0.0)
        while True:
            affine = nearest_affine(x[corral])
            if (affine > 0).all():
                shares = affine
                break
            falling = affine <= 0
            ratios = np.where(falling, shares / np.where(falling, np.maximum(shares - affine, SMALLEST), 1.0), np.inf)
            shares = shares + min(1.0, float(ratios.min())) * (affine - shares)
            shares[int(np.argmin(ratios))] = 0.0
            keep = shares > 0
            corral, shares = [i for i, kept in zip(corral, keep, strict=True) if kept], shares[keep]
            shares = shares / shares.sum()
    weights = np.zeros(tasks)
    weights[corral] = shares
    return weights


def nearest_affine(points: Array) -> Array:
    """Return the weights, of sum 1, of the point of least norm in the affine hull of ``points`` [k, d]."""
    found = np.linalg.lstsq((points[1:] - points[0]).T, -points[0], rcond=None)[0]
    return np.concatenate([[1.0 - found.sum()], found])
