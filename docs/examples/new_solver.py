"""A solver of one's own: the maths, the options, one step. The driver does the rest.

Exponentiated gradient keeps each row on the simplex by a multiplicative step, without a projection:

    Λ[b,i] ← Λ[b,i] exp(−η S[b,i]) / Σ_j Λ[b,j] exp(−η S[b,j])

Source: Kivinen and Warmuth (1997), Exponentiated Gradient versus Gradient Descent for Linear Predictors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from mergesolve.solvers import (
    Clock,
    Evaluation,
    FunctionProblem,
    MatrixProblem,
    OptionError,
    Solver,
    State,
    Step,
    solve,
)


@dataclass(frozen=True)
class ExponentiatedGradient(Solver):
    """Exponentiated gradient with a fixed rate."""

    rate: float = 0.5
    source: ClassVar[str] = "Kivinen and Warmuth (1997)"

    def check(self, problem: MatrixProblem) -> None:
        """Refuse every domain but the simplex."""
        if problem.domain.name != "simplex":
            raise OptionError(f"ExponentiatedGradient needs the domain 'simplex'; got {problem.domain.name!r}.")

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Multiply, then normalize each row."""
        weights = state.coefficients * np.exp(-self.rate * evaluation.scores)
        return Step(State(weights / weights.sum(axis=1, keepdims=True)), self.rate)


if __name__ == "__main__":
    from mergesolve.solvers import SOLVERS

    SOLVERS["exponentiated"] = ExponentiatedGradient  # in the package: one line in solvers/registry.py
    target = np.array([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])

    def distance(point: np.ndarray) -> tuple[float, np.ndarray]:
        """½‖Λ − target‖² and its gradient."""
        return 0.5 * float(np.sum((point - target) ** 2)), point - target

    result = solve(FunctionProblem(distance, rows=2, n=3), ExponentiatedGradient(rate=2.0), max_iter=2000, tol=1e-4)
    print(result.status, f"after {result.nit} iterations, gap {result.gap:.1e}")
    print(result.coefficients.round(3))
