"""Fully corrective Frank-Wolfe: after each new vertex, the best weights of all vertices that are held.

    A ← A ∪ {argmin ⟨V, S⟩},   w ← argmin f(Σ_k w_k V_k) over the simplex,   A ← {V_k : w_k > 0}

The fewest vertices and iterations of all variants; what an iteration costs is its inner problem. On a quadratic it is
exact: with Λ0 the start, M_kl = ⟨V_k − Λ0, H (V_l − Λ0)⟩ grows by one row a new vertex, read from one gradient there,
H (V − Λ0) = S(V) − S(Λ0), and the weights of min ⟨S, Σ w_k V_k⟩ + ½ (w − w_t)ᵀ M (w − w_t) need no further evaluation.
Otherwise accelerated projected gradient on the weights, each of its steps one gradient and a few values, read from the
experts of the active set only; inexact: until its gap is a fraction of the outer one.
Source: Holloway (1974); Lacoste-Julien and Jaggi (2015), algorithm 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from .active_set import NEGLIGIBLE, ActiveSet
from .domains import Simplex
from .errors import OptionError, check_choice, check_number
from .loop import iterate
from .problem import Evaluation, MatrixProblem
from .projected_gradient import ProjectedGradient
from .simplex_qp import minimize_on_simplex
from .solver import Clock, Solver, State, Step, require_oracle

Array = np.ndarray[Any, Any]
AUTO, QUADRATIC, GRADIENT = "auto", "quadratic", "projected-gradient"


@dataclass(frozen=True)
class CorrectiveFrankWolfe(Solver):
    """Fully corrective Frank-Wolfe: the best weights of the active vertices in every iteration.

    inner: "quadratic" (exact, for objectives known to be quadratic), "projected-gradient", or "auto", which takes the
    first where it may; inner_iterations: of projected gradient at most; inner_accuracy: it ends when its gap is below
    this share of the outer gap.
    """

    inner: str = AUTO
    inner_iterations: int = 30
    inner_accuracy: float = 0.1
    source: ClassVar[str] = "Holloway (1974); Lacoste-Julien and Jaggi (2015), algorithm 4"
    promise: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        check_choice(self, "inner", (AUTO, QUADRATIC, GRADIENT))
        check_number(self, "inner_iterations", 1, math.inf, closed="left", integer=True)
        check_number(self, "inner_accuracy", 0, 1, closed="left")

    def exact(self, problem: MatrixProblem) -> bool:
        """Whether the weights are found from a Gram matrix; across minibatches there is none."""
        return self.inner != GRADIENT and problem.quadratic and not problem.stochastic

    def check(self, problem: MatrixProblem) -> None:
        """Refuse domains without an oracle, and the exact inner solve where it would not be exact."""
        require_oracle(problem)
        if self.inner == QUADRATIC and not self.exact(problem):
            raise OptionError(
                "The inner solve 'quadratic' of CorrectiveFrankWolfe needs an objective that is known to be quadratic "
                "and the same in every iteration (its `quadratic` is true, its `stochastic` false). "
                "Use inner 'projected-gradient' or 'auto'."
            )

    def init(self, problem: MatrixProblem, start: Array) -> State:
        """Start from the atoms of the starting point: for the exact solve one, since each costs a gradient."""
        if not self.exact(problem):
            return State(start, ActiveSet.begin(problem.domain, start).arrays())
        return State(start, {**ActiveSet.begin(problem.domain, start, split=False).arrays(), "gram": np.zeros((1, 1))})

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Add the oracle's vertex, weigh all, and drop those without weight."""
        domain, scores = problem.domain, evaluation.scores
        held = ActiveSet.load(domain, state.coefficients.shape, state.memory)
        active, newest = held.with_vertex(domain.atom(scores))
        products = active.products(scores)
        extra: dict[str, Any] = {"strong_gap": float(held.products(scores).max() - products[newest])}
        if self.exact(problem):
            weights, memory = self.solve_exactly(problem, state, evaluation, active, newest, len(active) > len(held))
        else:
            weights, memory, extra["inner_iterations"] = self.descend(problem, state, evaluation, active)
        moved = 0.5 * float(np.abs(weights - active.weights).sum())
        if moved == 0.0:
            return Step(state, 0.0, extra={**extra, "active": len(held), "kind": "corrective"})
        fitted = active.weighted(weights)
        kind = "drop" if len(fitted) < len(active) else "corrective"
        extra |= {"active": len(fitted), "kind": kind}
        return Step(State(fitted.point(), {**memory, **fitted.arrays()}), moved, active.vertex(newest), extra=extra)

    def solve_exactly(
        self, problem: MatrixProblem, state: State, evaluation: Evaluation, active: ActiveSet, newest: int, grown: bool
    ) -> tuple[Array, dict[str, Array]]:
        """Return the best weights on a quadratic, and Gram matrix, reference point and its scores to remember."""
        origin = state.memory.get("origin", state.coefficients)
        slope = state.memory.get("slope", evaluation.scores)
        gram = state.memory["gram"]
        if grown:
            there = problem.evaluate(active.matrix(newest))
            if not math.isfinite(there.value):
                return active.weights, {}
            curved = there.scores - slope  # H (V − Λ0)
            row = active.products(curved) - float(np.sum(origin * curved))
            gram = np.insert(np.insert(gram, newest, 0.0, axis=0), newest, 0.0, axis=1)
            gram[newest], gram[:, newest] = row, row
        linear = active.products(evaluation.scores) - gram @ active.weights
        weights = minimize_on_simplex(gram, linear, active.weights)
        kept = np.flatnonzero(weights > NEGLIGIBLE)
        return weights, {"gram": gram[np.ix_(kept, kept)], "origin": origin, "slope": slope}

    def descend(
        self, problem: MatrixProblem, state: State, evaluation: Evaluation, active: ActiveSet
    ) -> tuple[Array, dict[str, Array], int]:
        """Return the best weights that projected gradient finds, its step size to remember, and its iterations."""
        hull = Hull(problem, active, evaluation)
        solver = ProjectedGradient()
        begin = solver.init(hull, active.weights[None])
        if "inner_size" in state.memory:
            begin = State(begin.coefficients, {**begin.memory, "size": state.memory["inner_size"]})
        gap = problem.domain.gap(state.coefficients, evaluation.scores)
        assert gap is not None  # the domain has an oracle
        # Among points that do not go up, the one of least gap: near the optimum values cannot tell them apart.
        best, weights, size, done = math.inf, active.weights, state.memory.get("inner_size"), 0
        highest = evaluation.value + problem.resolution * abs(evaluation.value)
        for visit in iterate(hull, solver, begin, max_iter=self.inner_iterations, tol=self.inner_accuracy * gap):
            inner_gap = visit.certificate.gap
            if visit.evaluation.value <= highest and inner_gap is not None and inner_gap < best:
                best, weights = inner_gap, visit.state.coefficients[0]
            size, done = visit.state.memory.get("size", size), visit.iteration
        return weights, {} if size is None else {"inner_size": size}, done


class Hull(MatrixProblem):
    """f(Σ_k w_k V_k) over the simplex of weights [1, k] of an active set."""

    def __init__(self, parent: MatrixProblem, active: ActiveSet, known: Evaluation) -> None:
        self.parent, self.active, self.known = parent, active, known
        self.domain, self.rows = Simplex(), 1
        self.experts = tuple(f"atom{k}" for k in range(len(active)))
        self.resolution = parent.resolution
        self.quadratic = parent.quadratic
        self.tasks, self.task_weights, self.counts = parent.tasks, parent.task_weights, parent.counts
        used = np.zeros(active.n, dtype=bool)
        for k in range(len(active)):
            used |= np.any(active.matrix(k), axis=0)
        self._read = np.flatnonzero(used)

    def lift(self, weights: Array) -> Array:
        """Return Λ(w) [rows, n]."""
        return replace(self.active, weights=weights[0]).point()

    def evaluate(
        self, point: Array, *, tasks: bool = False, raw: bool = False, experts: Sequence[int] | None = None
    ) -> Evaluation:
        """One gradient of the parent, correlated with the experts of the atoms only; the iterate's own is known."""
        if np.array_equal(point[0], self.active.weights):
            found = self.known
        else:
            found = self.parent.evaluate(self.lift(point), experts=self._read)  # type: ignore[arg-type]
        if not math.isfinite(found.value):
            return Evaluation(found.value, np.full((1, self.n), np.nan))
        scores = np.where(np.isnan(found.scores), 0.0, found.scores)
        return Evaluation(found.value, self.active.products(scores)[None], found.task_values)

    def value(self, point: Array) -> float:
        """One value of the parent."""
        return self.parent.value(self.lift(point))
