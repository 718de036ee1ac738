"""What a solver is: a frozen record of options that turns one state into the next.

The driver (:mod:`.driver`) owns the loop: it draws the batch, evaluates f and S at the state's coefficients, computes
the certificate, tests for the end, and only then asks for a step. So a solver cannot get a status wrong, and never
writes a loop, a trace or a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .construct import describe
from .domains import Domain
from .errors import OptionError
from .problem import Evaluation, Line, MatrixProblem
from .step_rules import Memory, Search, StepRule

Array = np.ndarray[Any, Any]

PROMISES = {
    "linear": "on strongly convex objectives over polytopes, the gap falls by a constant factor in an iteration",
    "sublinear": "with L the smoothness and D the diameter, f − f* ≤ 2LD²/(t + 2) after t iterations",
    "none": "feasible iterates and a gap that bounds f − f*",
}


@dataclass(frozen=True)
class State:
    """Everything that the next step depends on: the coefficients and the solver's own arrays (float64)."""

    coefficients: Array
    memory: Memory = field(default_factory=dict)


class Clock(NamedTuple):
    """Where the loop is: the iteration, counted from 0, and how many there will be at most."""

    iteration: int
    max_iter: int


class Step(NamedTuple):
    """What a solver returns: the next state, the step size, and the vertices it moved to [k, rows].

    BASE (−1) stands for the base and START (−2) for the starting point. extra: what else the trace shall say of it.
    """

    state: State
    size: float
    vertices: Array | None = None
    finished: bool = False  # the solver has nothing left to do
    extra: dict[str, Any] | None = None


class Certificate(NamedTuple):
    """Optimality at a point: Frank-Wolfe gap (None on an unbounded domain) and projected-gradient norm."""

    gap: float | None
    stationarity: float

    def holds(self, tolerance: float) -> bool:
        """Whether the point is optimal to ``tolerance``: by the gap, or where there is none, by stationarity."""
        return (self.stationarity if self.gap is None else self.gap) <= tolerance


@dataclass(frozen=True)
class Solver:
    """Common part of the solvers."""

    source: ClassVar[str] = ""
    promise: ClassVar[str] = "none"  # how fast it is on convex objectives (PROMISES), as every test problem checks
    needs_scores: ClassVar[bool] = True  # False: its steps read values only, so the objective needs no gradient
    certifies_iterates: ClassVar[bool] = True  # False: where steps need no scores, none are computed on the way either
    needs_task_scores: ClassVar[bool] = False
    needs_raw_inner: ClassVar[bool] = False
    may_rest: ClassVar[bool] = False  # a step may leave Λ as it is without the solve being stuck
    scheduled: ClassVar[bool] = False  # its steps depend on max_iter
    certifies_by_task: ClassVar[bool] = False  # its certificate needs scores a task
    compares_values: ClassVar[bool] = False  # of different iterations: it needs one batch throughout
    equivariant: ClassVar[bool] = True  # another order of the experts gives the same merge
    resamples: ClassVar[bool] = False  # as an inner solver, wants a new batch for each of its iterations

    def view(self, problem: MatrixProblem) -> MatrixProblem:
        """Return the problem that this solver minimizes, where that is another function of the tasks' losses."""
        return problem

    def check(self, problem: MatrixProblem) -> None:
        """Raise OptionError if this solver cannot run on ``problem``."""

    def init(self, problem: MatrixProblem, start: Array) -> State:
        """Return the state before the first step."""
        return State(start)

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Return the next state from the value and scores at ``state.coefficients``."""
        raise NotImplementedError

    def certificate(self, problem: MatrixProblem, point: Array, evaluation: Evaluation) -> Certificate:
        """Return gap and stationarity by their definitions."""
        domain: Domain = problem.domain
        return Certificate(domain.gap(point, evaluation.scores), domain.stationarity(point, evaluation.scores))

    def describe(self) -> dict[str, Any]:
        """Return name and options, from which the registry makes the solver again."""
        from .registry import SOLVERS  # the table lists this class's children

        return describe(self, SOLVERS)


def seek(
    rule: StepRule,
    problem: MatrixProblem,
    state: State,
    evaluation: Evaluation,
    direction: Array,
    limit: float,
    iteration: int,
) -> tuple[Line, float]:
    """Return the line Λ + γD and the rule's γ in [0, limit]; the rule remembers in ``state.memory``."""
    line = problem.line(state.coefficients, direction)
    search = Search(
        iteration=iteration,
        value=evaluation.value,
        slope=float(np.sum(direction * evaluation.scores)),
        squared_norm=float(np.sum(direction**2)),
        limit=limit,
        along=line.value,
        resolution=problem.resolution,
        slope_along=getattr(line, "slope", None),
        quadratic=problem.quadratic,
    )
    return line, rule(search, state.memory)


def move(
    rule: StepRule,
    problem: MatrixProblem,
    state: State,
    evaluation: Evaluation,
    direction: Array,
    limit: float,
    iteration: int,
) -> tuple[Array, float]:
    """Return Λ + γD and γ, with γ in [0, limit] from the step rule."""
    if not np.any(direction):
        return state.coefficients, 0.0
    line, size = seek(rule, problem, state, evaluation, direction, limit, iteration)
    line.accept(size)
    return state.coefficients + size * direction, size


def require_traits(solver: Solver, rule: StepRule, refused: Mapping[str, str]) -> None:
    """Raise OptionError if the rule relies on something that the solver cannot offer: ``refused`` {trait: reason}."""
    for trait, reason in refused.items():
        if trait in rule.traits:
            name = rule.describe()["name"]
            raise OptionError(f"The step rule {name!r} cannot drive {type(solver).__name__}: {reason}.")


def require_oracle(problem: MatrixProblem) -> None:
    """Raise OptionError unless the domain is convex and has a linear minimization oracle."""
    if not problem.domain.convex:
        raise OptionError(
            f"Frank-Wolfe moves along segments between points of the domain, and those leave {problem.domain.name!r}, "
            "which is not convex. Use 'projected-gradient', which projects each step."
        )
    nothing = np.zeros((problem.rows, problem.n))
    if problem.domain.gap(nothing, nothing) is None:  # no gap, no oracle; asked first, since a choice may cost uploads
        problem.domain.minimizer(nothing)


def require_vertices(solver: str, problem: MatrixProblem) -> None:
    """Raise OptionError unless the domain's extreme points are experts."""
    if not problem.domain.has_vertices:
        raise OptionError(
            f"{solver} moves between experts and needs the domain 'simplex' or 'capped'; got {problem.domain.name!r}."
        )
