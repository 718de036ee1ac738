"""The one loop: draw, evaluate, certify, stop or step. The driver and the inner problems of solvers run it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .domains import FEASIBILITY
from .problem import Evaluation, MatrixProblem
from .solver import Certificate, Clock, Solver, State, Step

OPTIMAL = "optimal"
STALLED = "stalled"
MAX_ITER = "max_iter"
TIME_LIMIT = "time_limit"
INTERRUPTED = "interrupted"
NONFINITE = "nonfinite"
UNKNOWN = Certificate(None, math.nan)  # at a point without scores
STATUSES = (OPTIMAL, STALLED, MAX_ITER, TIME_LIMIT, INTERRUPTED, NONFINITE)


@dataclass(frozen=True)
class Visit:
    """One iterate: where it was, what was found there, and the step taken from it or the status that ended the loop."""

    iteration: int
    state: State
    evaluation: Evaluation
    certificate: Certificate
    step: Step | None = None
    status: str | None = None


def iterate(
    problem: MatrixProblem,
    solver: Solver,
    state: State,
    *,
    max_iter: int,
    tol: float,
    rtol: float = 0.0,
    first: int = 0,
) -> Iterator[Visit]:
    """Yield one visit an iterate; the last one has a status.

    Ends with optimal (certificate ≤ max(tol, rtol·|f|) on a deterministic objective; on minibatches the certificate
    is an estimate and ends nothing), stalled (the solver has finished, or a step changes nothing although the objective
    is deterministic), max_iter, or nonfinite (f or S is NaN or infinite; the coefficients are those before the fault).
    """
    iteration = first
    scored = solver.needs_scores or (solver.certifies_iterates and problem.has_gradient)
    while True:
        problem.draw(iteration)
        check_step(problem, solver, state.coefficients)
        if scored:
            evaluation = problem.evaluate(
                state.coefficients, tasks=solver.needs_task_scores, raw=solver.needs_raw_inner
            )
        else:
            evaluation = problem.look(state.coefficients)
        if not is_finite(evaluation):
            yield Visit(iteration, state, evaluation, UNKNOWN, status=NONFINITE)
            return
        certificate = solver.certificate(problem, state.coefficients, evaluation) if scored else UNKNOWN
        status = None
        if not problem.stochastic and certificate.holds(max(tol, rtol * abs(evaluation.value))):
            status = OPTIMAL
        elif iteration >= max_iter:
            status = MAX_ITER
        if status is not None:
            yield Visit(iteration, state, evaluation, certificate, status=status)
            return
        step = solver.step(problem, state, evaluation, Clock(iteration, max_iter))
        stuck = not problem.stochastic and np.array_equal(step.state.coefficients, state.coefficients)
        if step.finished or (stuck and not solver.may_rest):
            yield Visit(iteration, state, evaluation, certificate, status=STALLED)
            return
        yield Visit(iteration, state, evaluation, certificate, step)
        state = step.state
        iteration += 1


def is_finite(evaluation: Evaluation) -> bool:
    """Whether the value, and the scores where there are some, are finite."""
    return math.isfinite(evaluation.value) and (evaluation.scores is None or bool(np.isfinite(evaluation.scores).all()))


def check_step(problem: MatrixProblem, solver: Solver, point: np.ndarray[Any, Any]) -> None:
    """Raise RuntimeError if a solver left the domain: its steps must be feasible by construction."""
    violation = float(problem.domain.violation(point).max())
    if violation > FEASIBILITY:
        raise RuntimeError(
            f"{type(solver).__name__} left the domain {problem.domain.name!r} by {violation:.3g}: a defect of its step."
        )
