"""Frank-Wolfe: move toward the vertex that the linearized objective likes best.

    V = argmin_{V in domain} ⟨V, S⟩,   Λ ← Λ + γ (V − Λ),   gap = ⟨Λ − V, S⟩

One vertex a block: with blocks "model" the oracle is task-wise (a whole expert), with "layer" or "tensor" it is
layer-wise (a product of hulls). Every iterate is a convex combination of few experts. Choose it for a sparse,
certified merge of a large pool; near the optimum it zig-zags, where projected gradient is faster.
Source: FW-Merging, algorithm 1 and eq. 10; Frank and Wolfe (1956); Jaggi (2013).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .problem import Evaluation, MatrixProblem
from .solver import Clock, Solver, State, Step, move, require_oracle
from .step_rules import StepRule, make_step_rule


@dataclass(frozen=True)
class FrankWolfe(Solver):
    """Frank-Wolfe with the hard oracle: one vertex a block, a step rule for γ.

    step_rule: by object, name or mapping ("line-search", {"name": "open-loop", "offset": 2}, ...).
    """

    step_rule: Any = "line-search"
    source: ClassVar[str] = "FW-Merging (Chen et al. 2025), algorithm 1"
    promise: ClassVar[str] = "sublinear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_rule", make_step_rule(self.step_rule))

    def check(self, problem: MatrixProblem) -> None:
        """Refuse domains without an oracle."""
        require_oracle(problem)

    def init(self, problem: MatrixProblem, start: np.ndarray) -> State:
        """Start with an empty memory for the step rule."""
        return State(start)

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Move toward the minimizer of the linearization."""
        rule: StepRule = self.step_rule
        direction = problem.domain.minimizer(evaluation.scores) - state.coefficients
        point, size = move(rule, problem, state, evaluation, direction, 1.0, clock.iteration)
        vertices = problem.domain.vertices(evaluation.scores) if problem.domain.has_vertices else None
        return Step(State(point, state.memory), size, vertices)
