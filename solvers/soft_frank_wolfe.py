"""Soft Frank-Wolfe: fetch several good vertices, then solve for their weights instead of searching along a line.

    Λ ← Λ + Σ_j w_j (V_j − Λ),   w = argmin over the hull of the V_j *and the current Λ*

The vertices are the k best of the objective's scores, or the best one for each task, so that no task is crowded out
by another's large gradient. The printed formula with Σ_j w_j = 1 forgets Λ; with the capped simplex it stays a vertex.
Choose it when several tasks matter and few labels exist: it moves among a handful of experts whatever the pool holds.
Source: FW-Merging, section 3.3, eq. 9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .domains import Domain, Simplex, indicator, make_domain
from .dpp import Kernel, greedy_map
from .errors import OptionError, check_choice, check_number
from .loop import iterate
from .problem import Evaluation, MatrixProblem, Restriction
from .projected_gradient import ProjectedGradient
from .solver import Clock, Solver, State, Step, require_vertices

Array = np.ndarray[Any, Any]
PER_TASK = "per-task"


@dataclass(frozen=True)
class SoftFrankWolfe(Solver):
    """Frank-Wolfe with the soft oracle: several vertices at once, weighted by an inner solve.

    vertices: "per-task", or how many of the whole objective's best; oracle: "task-wise" (whole experts), "layer-wise"
    (each block its own) or "diverse" (whole experts, good and unlike each other: a determinantal point process of the
    scores and the cosines of task vectors, so that no two copies are fetched; at most `vertices` of them); weights:
    "blockwise" (one weight a block and vertex) or "shared"; distinct: no expert may serve two tasks; inner: a solver
    for the weights; inner_domain, inner_iterations, inner_tol: its domain and when it stops.
    """

    vertices: Any = PER_TASK
    oracle: str = "task-wise"
    weights: str = "blockwise"
    distinct: bool = False
    inner: Any = "projected-gradient"
    inner_domain: Any = "capped"
    inner_iterations: int = 10
    inner_tol: float = 0.0
    source: ClassVar[str] = "FW-Merging (Chen et al. 2025), eq. 9"

    def __post_init__(self) -> None:
        from .registry import make_solver  # the table lists this class too

        if self.vertices != PER_TASK:
            if not isinstance(self.vertices, int):
                raise OptionError(
                    f"The 'vertices' parameter of {type(self).__name__} must be 'per-task' or an integer in [1, inf). "
                    f"Got {self.vertices!r} instead."
                )
            check_number(self, "vertices", 1, math.inf, closed="left", integer=True)
        check_choice(self, "oracle", ("task-wise", "layer-wise", "diverse"))
        if self.oracle == "diverse" and self.vertices == PER_TASK:
            raise OptionError("The 'diverse' oracle needs a number of 'vertices'; 'per-task' takes each task's best.")
        check_choice(self, "weights", ("blockwise", "shared"))
        check_number(self, "inner_iterations", 1, math.inf, closed="left", integer=True)
        check_number(self, "inner_tol", 0, math.inf, closed="left")
        object.__setattr__(self, "inner", make_solver(self.inner))
        object.__setattr__(self, "inner_domain", make_domain(self.inner_domain))
        if not isinstance(self.inner, ProjectedGradient) and not self.inner.resamples:
            raise OptionError(
                f"The 'inner' parameter of {type(self).__name__} must be 'projected-gradient' or 'adaptive'. "
                f"Got {self.inner.describe()['name']!r} instead."
            )

    @property
    def needs_task_scores(self) -> bool:  # type: ignore[override]
        """Scores a task are needed only to choose a vertex for each."""
        return bool(self.vertices == PER_TASK)

    def check(self, problem: MatrixProblem) -> None:
        """Refuse domains without vertices, and more vertices than there are."""
        require_vertices("Soft Frank-Wolfe", problem)
        if not self.inner_domain.has_vertices:
            raise OptionError(
                f"The 'inner_domain' of Soft Frank-Wolfe must be 'simplex' or 'capped', or its steps would leave the "
                f"hull; got {self.inner_domain.name!r}."
            )
        available = problem.n + problem.domain.has_base
        wanted = len(problem.tasks) if self.vertices == PER_TASK else self.vertices
        if (self.vertices != PER_TASK or self.distinct) and wanted > available:
            raise OptionError(
                f"Soft Frank-Wolfe was asked for {wanted} different vertices, but the pool offers {available}. "
                "Ask for fewer 'vertices', or set distinct to false."
            )

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Choose the vertices, then weight them."""
        chosen = self.choose(problem, evaluation)
        vertices = np.stack([indicator(rows, problem.n) for rows in chosen])
        return self.weigh(problem, state, vertices, chosen, clock)

    def choose(self, problem: MatrixProblem, evaluation: Evaluation) -> Array:
        """Return the vertices to move to [k, rows]; task-wise choices repeat over the rows."""
        if self.oracle == "diverse":
            chosen = diverse(evaluation.scores.sum(axis=0), problem.similarity, int(self.vertices))
            return np.broadcast_to(chosen[:, None], (len(chosen), problem.rows))
        tables = evaluation.task_scores if self.vertices == PER_TASK else evaluation.scores[None]
        assert tables is not None
        if self.oracle == "task-wise":
            tables = tables.sum(axis=1, keepdims=True)
        if self.vertices == PER_TASK:
            chosen = best_per_table(tables, problem.domain, distinct=self.distinct)
        else:
            chosen = problem.domain.vertices(tables[0], self.vertices)
        return np.broadcast_to(chosen, (len(chosen), problem.rows))

    def weigh(self, problem: MatrixProblem, state: State, vertices: Array, chosen: Array, clock: Clock) -> Step:
        """Solve for w over the hull of ``vertices`` [k, rows, n] and the iterate, and move there."""
        inner: Solver = self.inner
        restriction = Restriction(
            problem,
            state.coefficients,
            vertices,
            self.inner_domain,
            shared=self.weights == "shared",
            first_draw=clock.iteration * self.inner_iterations if inner.resamples else None,
        )
        start = inner.init(restriction, self.inner_start(restriction, clock))
        best: tuple[float, Array] | None = None
        for visit in iterate(restriction, inner, start, max_iter=self.inner_iterations, tol=self.inner_tol):
            value = visit.evaluation.value
            if best is None or value <= best[0] or (inner.resamples and math.isfinite(value)):
                best = (value, visit.state.coefficients)
        assert best is not None
        weights = best[1]
        return Step(State(restriction.lift(weights)), float(np.abs(weights).sum(axis=1).max()), chosen)

    def inner_start(self, restriction: Restriction, clock: Clock) -> Array:
        """Stay at the iterate where that is allowed, else start in the middle of the vertices."""
        middle = 1.0 / restriction.n if isinstance(restriction.domain, Simplex) else 0.0
        return restriction.domain.project(np.full((restriction.rows, restriction.n), middle))


def diverse(scores: Array, similarity: Array, count: int) -> Array:
    """Return at most `count` experts along which the loss falls [k]: greedily the largest det of diag(q) S diag(q).

    q_i = max(0, −scores_i), S are the cosines. Where the loss falls along none, the one of lowest score.
    """
    falls = np.maximum(-scores, 0.0)
    if not falls.any():
        return np.array([int(scores.argmin())])
    kernel = Kernel(falls / falls.max(), similarity)
    return np.asarray(greedy_map(kernel.matrix, min(count, kernel.rank)).indices)


def best_per_table(tables: Array, domain: Domain, *, distinct: bool) -> Array:
    """Return the best vertex of each score table [k, rows, n] -> [k, rows].

    With ``distinct`` the tables choose in turn, each among the vertices that are left in that row.
    """
    if not distinct:
        return np.stack([domain.vertices(table)[0] for table in tables])
    rows = np.arange(tables.shape[1])
    taken = np.zeros((tables.shape[1], tables.shape[2] + 1), dtype=bool)  # the last column is BASE (−1)
    chosen = []
    for table in tables:
        ranked = domain.vertices(table, table.shape[1] + domain.has_base)
        free = ~taken[rows, ranked]
        first = ranked[np.argmax(free, axis=0), rows]
        taken[rows, first] = True
        chosen.append(first)
    return np.stack(chosen)
