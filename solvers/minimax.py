"""Minimax: the merge whose worst task is best, with the maximum as it is, and a certificate at every iterate.

    min_Λ max_t f_t(Λ) = min_Λ max_p Σ_t p_t f_t(Λ),     p in the simplex of the tasks

Each step solves the saddle problem of the linearized losses, max_t f_t + ⟨S_t, V − Λ⟩, exactly: with ‖V − Λ‖²/2s added
(Λ is projected against the saddle's weighting of the tasks, s is found by backtracking), or over the vertices of the
domain, as Frank-Wolfe does. Its value bounds what is possible:

    gap = max_t f_t(Λ) − max_p min_V Σ_t p_t (f_t(Λ) + ⟨S_t, V − Λ⟩) ≥ max_t f_t(Λ) − min max_t f_t   for convex f_t

and is 0 exactly at the stationary points of the maximum. With one task it is the Frank-Wolfe gap. With preferences and
an ideal point (the scalarization 'chebyshev') f_t stands for w_t (f_t − z_t).
Choose it over the smoothed maximum where the certificate must be about the worst task itself.
Source: Pshenichnyi and Danilin (1975); Nesterov (2004), Introductory Lectures on Convex Optimization, section 2.3, also
for the momentum; restart: O'Donoghue and Candès (2015).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from .domains import Free
from .errors import OptionError, check_choice, check_number
from .linearized import least_maximum, proximal_maximum
from .mgda import SMALLEST, common_certificate, task_tables
from .problem import Array, Evaluation, MatrixProblem
from .scalarization import Maximum, Scalarized, Worst
from .solver import Certificate, Clock, Solver, State, Step
from .step_rules import Memory, Search, StepRule, make_step_rule


@dataclass(frozen=True)
class Minimax(Solver):
    """Best worst task: each step is the saddle point of the linearized losses.

    direction: "gradient" (projected, backtracked step), or "vertex" (toward the saddle point of the linear program over
    the domain, as far as the step rule says: few experts at a time). accelerated: the projected step has momentum, with
    restarts; without, no iterate is worse than the last. grow: factor by which the projected step is tried larger after
    each success (≥ 1). The trace has the saddle's weights of the tasks as extra.task_weights.
    """

    direction: str = "gradient"
    accelerated: bool = True
    grow: float = 1.2
    step_rule: Any = "line-search"
    source: ClassVar[str] = "Pshenichnyi and Danilin (1975); Nesterov (2004), section 2.3"
    needs_task_scores: ClassVar[bool] = True
    certifies_by_task: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice(self, "direction", ("gradient", "vertex"))
        if not isinstance(self.accelerated, bool):
            raise OptionError(
                f"The 'accelerated' parameter of Minimax must be true or false. Got {self.accelerated!r} instead."
            )
        check_number(self, "grow", 1, math.inf, closed="left")
        object.__setattr__(self, "step_rule", make_step_rule(self.step_rule))

    def view(self, problem: MatrixProblem) -> MatrixProblem:
        """The largest loss, without smoothing; with the preferences of a Chebyshev scalarization, if it has one."""
        if not isinstance(problem, Scalarized):
            return Scalarized(problem, Worst(smoothing=0.0))
        if not isinstance(problem.scalarization, Maximum):
            name = problem.scalarization.describe()["name"]
            raise OptionError(
                f"The solver 'minimax' minimizes the largest loss, so it cannot take the scalarization '{name}'. Leave "
                "that out, take 'chebyshev' or 'worst', or another solver."
            )
        if problem.scalarization.smoothing == 0:
            return problem
        return Scalarized(problem.parent, replace(problem.scalarization, smoothing=0.0))

    def check(self, problem: MatrixProblem) -> None:
        """Refuse vertices where there are none."""
        if self.direction == "vertex" and isinstance(problem.domain, Free):
            problem.domain.minimizer(np.zeros((1, 1)))

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """One step toward the saddle point."""
        assert isinstance(problem, Scalarized)
        values, tables = problem.pieces(evaluation)
        if self.direction == "vertex":
            return self._toward_vertices(problem, state, evaluation, values, tables, clock)
        point, memory = state.coefficients, state.memory
        norm = max(float(np.linalg.norm(tables, axis=(1, 2)).max()), SMALLEST)
        size = float(memory["size"]) * self.grow if "size" in memory else 1.0 / norm
        slack = problem.resolution * abs(evaluation.value)
        prices = memory.get("prices")
        while size >= SMALLEST:
            move, prices = proximal_maximum(values, tables, point, problem.domain, size, prices)
            bound = float((values + np.sum(tables * move, axis=(1, 2))).max() + np.sum(move**2) / (2 * size))
            if not np.any(move):
                break
            if problem.value(point + move) <= bound + slack:
                kept = {"size": np.array(size), "prices": prices}
                following = self._extrapolated(problem, point, point + move, memory, kept)
                return Step(State(following, kept), size, extra=weighting(problem, prices))
            size /= 2
        return Step(state, 0.0)

    def _extrapolated(self, problem: MatrixProblem, point: Array, moved: Array, memory: Memory, kept: Memory) -> Array:
        """Where to look next: `moved`, or with momentum beyond it, inside the domain. FISTA with restarts."""
        if not self.accelerated:
            return moved
        last, t = memory.get("last", moved), float(memory.get("t", 1.0))
        uphill = float(np.sum((point - moved) * (moved - last))) > 0
        t_next = 1.0 if uphill else (1 + math.sqrt(1 + 4 * t**2)) / 2
        kept.update(last=moved, t=np.array(t_next))
        return moved if uphill else problem.domain.project(moved + (t - 1) / t_next * (moved - last))

    def _toward_vertices(
        self,
        problem: Scalarized,
        state: State,
        evaluation: Evaluation,
        values: Array,
        tables: Array,
        clock: Clock,
    ) -> Step:
        point = state.coefficients
        saddle = least_maximum(values, tables, point, problem.domain)
        direction = saddle.target - point
        if not np.any(direction):
            return Step(state, 0.0)
        line = problem.line(point, direction)
        # Not a slope but a bound of it: the maximum lies below f + γ (m − f) + γ² L‖D‖²/2.
        search = Search(
            iteration=clock.iteration,
            value=evaluation.value,
            slope=saddle.upper - float(values.max()),
            squared_norm=float(np.sum(direction**2)),
            limit=1.0,
            along=line.value,
            resolution=problem.resolution,
        )
        rule: StepRule = self.step_rule
        size = rule(search, state.memory)
        line.accept(size)
        return Step(State(point + size * direction, state.memory), size, extra=weighting(problem, saddle.prices))

    def certificate(self, problem: MatrixProblem, point: Array, evaluation: Evaluation) -> Certificate:
        """The saddle gap of the linearized losses, and the stationarity of their weighted sum at the saddle."""
        if not isinstance(problem, Scalarized):
            raise OptionError("The certificate of 'minimax' is about view(problem), the largest of the losses.")
        task_tables(problem, evaluation)
        values, tables = problem.pieces(evaluation)
        return common_certificate(values, tables, point, problem)


def weighting(problem: Scalarized, prices: Array) -> dict[str, Any]:
    """Return the saddle's weights of the tasks, for the trace."""
    names = [problem.tasks[k] for k in problem.chosen]
    return {"task_weights": dict(zip(names, prices.tolist(), strict=True))}
