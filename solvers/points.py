"""Points that need no solve: the base, the average, task arithmetic, one expert; and the scan of a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .domains import FEASIBILITY
from .errors import OptionError, unknown
from .problem import Evaluation, MatrixProblem
from .solver import Clock, Solver, State, Step

if TYPE_CHECKING:
    from .result import Result

Array = np.ndarray[Any, Any]
FORMS = ("average", "base", "task-arithmetic:SCALE", "expert:NAME", "nearest:START")


def start_point(problem: MatrixProblem, start: str | Array | Result) -> Array:
    """Return a matrix of coefficients [rows, n].

    start: "average" (1/n each), "base" (zeros), "task-arithmetic:0.3" (0.3 each), "expert:NAME" (one expert),
    "nearest:" and one of these (the nearest point of the domain), a matrix [rows, n] or [1, n], or another result.
    Raises OptionError for anything else.
    """
    shape = (problem.rows, problem.n)
    if isinstance(start, str):
        form, _, argument = start.partition(":")
        if form == "average" and not argument:
            return np.full(shape, 1.0 / problem.n)
        if form == "base" and not argument:
            return np.zeros(shape)
        if form == "task-arithmetic":
            try:
                return np.full(shape, float(argument))
            except ValueError:
                raise OptionError(f"'{start}' needs a number after the colon, as in 'task-arithmetic:0.3'.") from None
        if form == "nearest":
            return nearest(problem, argument)
        if form == "expert":
            if argument not in problem.experts:
                raise unknown("expert", argument, problem.experts)
            point = np.zeros(shape)
            point[:, problem.experts.index(argument)] = 1.0
            return point
        raise unknown("starting point", start, FORMS)
    if not isinstance(start, np.ndarray):
        if tuple(start.experts) != tuple(problem.experts):
            raise OptionError(
                f"The result to start from was solved over the experts {', '.join(start.experts)}; this pool has "
                f"{', '.join(problem.experts)}. Use the same pool, in the same order."
            )
        start = start.coefficients
    point = np.array(start, dtype=np.float64)
    if point.ndim == 2 and point.shape == (1, problem.n):
        point = np.repeat(point, problem.rows, axis=0)
    return point


def nearest(problem: MatrixProblem, start: str | Array | Result) -> Array:
    """Return the point of the domain that is nearest to a starting point: itself where it is inside."""
    point = start_point(problem, start)
    inside: Array = problem.domain.violation(point) <= FEASIBILITY
    return point if inside.all() else problem.domain.project(point)


@dataclass(frozen=True)
class Point(Solver):
    """No step at all: evaluate, certify and record the starting point (average, task arithmetic, one expert)."""

    source: ClassVar[str] = "Wortsman et al. (2022) for the average; Ilharco et al. (2023) for task arithmetic"
    needs_scores: ClassVar[bool] = False

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Stay."""
        return Step(state, 0.0, finished=True)


@dataclass(frozen=True)
class Scan(Solver):
    """Task arithmetic over a grid of scales: the driver keeps the best of Λ = scale for every block and expert.

    scales: the grid, tried in order after the starting point.
    """

    scales: Any = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
    source: ClassVar[str] = "Ilharco et al. (2023)"
    needs_scores: ClassVar[bool] = False
    compares_values: ClassVar[bool] = True
    may_rest: ClassVar[bool] = True

    def __post_init__(self) -> None:
        scales = tuple(self.scales) if isinstance(self.scales, (list, tuple)) else None
        if not scales or not all(isinstance(s, (int, float)) and np.isfinite(s) for s in scales):
            raise OptionError(
                f"The 'scales' parameter of Scan must be a list of finite numbers. Got {self.scales!r} instead."
            )
        object.__setattr__(self, "scales", scales)

    def check(self, problem: MatrixProblem) -> None:
        """Refuse scales that the domain does not contain."""
        for scale in self.scales:
            problem.check(np.full((problem.rows, problem.n), float(scale)), f"scale {scale:g} of the scan")

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Go to the next scale; after the last one, stay."""
        if clock.iteration >= len(self.scales):
            return Step(state, 0.0, finished=True)
        scale = float(self.scales[clock.iteration])
        return Step(State(np.full_like(state.coefficients, scale)), scale)
