"""What the published FW-Merging code does, which is not what the paper prints, for comparison.

The score of an expert is Σ_tensors cos(gradient, raw checkpoint) instead of ⟨gradient, θ_i⟩; the step follows a fixed
schedule without line search or gap; the hard variant adds its starting point (task arithmetic with 0.3) to the pool;
the soft one gives each task another expert and fits unconstrained weights, one a tensor, by Adam. Neither stays in the
hull nor must it descend, so both run on the free domain, where there is no gap.
Source: the authors' repository (hmarkc/FW-Merging) as read for FW-Merging (Chen et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .domains import START, Simplex
from .errors import OptionError
from .problem import Evaluation, MatrixProblem, Problem, Restriction
from .soft_frank_wolfe import PER_TASK, SoftFrankWolfe, best_per_table
from .solver import Clock, Solver, State, Step, move
from .step_rules import StepRule, make_step_rule

Array = np.ndarray[Any, Any]


def raw_cosine_scores(problem: MatrixProblem, evaluation: Evaluation, points: Array) -> Array:
    """Return Σ_tensors cos(g, θ(Λ)) for each gradient and each matrix of ``points`` [m, 1, n] -> [k, m].

    With θ(λ) = θ0 + Σ λ_i τ_i per tensor, everything follows from ⟨g, θ0⟩, ⟨g, τ_i⟩, ⟨θ0, τ_i⟩ and the Gram matrix.
    """
    if not isinstance(problem, Problem) or evaluation.raw is None:
        raise OptionError("The released variants compare gradients with checkpoints, so they need a pool of models.")
    raw, geometry = evaluation.raw, problem.raw_geometry()
    coefficients = points[:, 0, :]
    inner = raw.gradient_base[:, :, None] + np.einsum("ktn,mn->ktm", raw.gradient_task, coefficients)
    squared = (
        geometry.base_squared[:, None]
        + 2 * np.einsum("tn,mn->tm", geometry.base_task, coefficients)
        + np.einsum("mi,tij,mj->tm", coefficients, geometry.gram, coefficients)
    )
    norms = raw.gradient_norm[:, :, None] * np.sqrt(np.maximum(squared, 0.0))
    return np.sum(np.divide(inner, norms, out=np.zeros_like(inner), where=norms > 0), axis=1)


def require_merge(solver: Solver, problem: MatrixProblem) -> None:
    """Raise OptionError unless the problem is a pool of models on the free domain."""
    if not isinstance(problem, Problem):
        raise OptionError("The released variants compare gradients with checkpoints, so they need a pool of models.")
    if problem.domain.name != "free":
        raise OptionError(
            f"The released variants leave the hull of the pool; they need the domain 'free', got "
            f"{problem.domain.name!r}. For iterates inside it use 'frank-wolfe' or 'soft-frank-wolfe'."
        )


@dataclass(frozen=True)
class ReleasedFrankWolfe(Solver):
    """Hard FW-Merging as published in code: raw-cosine oracle, scheduled steps, the start as one more vertex."""

    step_rule: Any = None
    source: ClassVar[str] = "hmarkc/FW-Merging, as released"
    needs_raw_inner: ClassVar[bool] = True

    def __post_init__(self) -> None:
        rule = {"name": "open-loop", "offset": 2, "scale": 0.03} if self.step_rule is None else self.step_rule
        object.__setattr__(self, "step_rule", make_step_rule(rule))

    def check(self, problem: MatrixProblem) -> None:
        """Refuse anything but whole models on the free domain."""
        require_merge(self, problem)

    def init(self, problem: MatrixProblem, start: Array) -> State:
        """Remember the start: it is a vertex."""
        return State(start, {"start": start})

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Move by the schedule toward the candidate with the smallest raw cosine."""
        rule: StepRule = self.step_rule
        start = state.memory["start"]
        candidates = np.concatenate([np.eye(problem.n)[:, None, :], start.mean(axis=0)[None, None, :]])
        scores = raw_cosine_scores(problem, evaluation, candidates)[0]
        best = int(np.argmin(scores))
        target = start if best == problem.n else np.broadcast_to(candidates[best], start.shape)
        direction = target - state.coefficients
        point, size = move(rule, problem, state, evaluation, direction, 1.0, clock.iteration)
        vertex = np.full((1, problem.rows), START if best == problem.n else best)
        return Step(State(point, state.memory), size, vertex)


@dataclass(frozen=True)
class ReleasedSoftFrankWolfe(SoftFrankWolfe):
    """Soft FW-Merging as published in code: another expert for each task by raw cosine, free weights by Adam."""

    distinct: bool = True
    inner: Any = "adaptive"
    inner_domain: Any = "free"
    inner_iterations: int = 500
    first_weight: float = 0.3
    source: ClassVar[str] = "hmarkc/FW-Merging, as released"
    needs_raw_inner: ClassVar[bool] = True

    def check(self, problem: MatrixProblem) -> None:
        """Refuse anything but a pool of models on the free domain."""
        require_merge(self, problem)

    def choose(self, problem: MatrixProblem, evaluation: Evaluation) -> Array:
        """Return for each task the expert with the smallest raw cosine that no task before it took."""
        scores = raw_cosine_scores(problem, evaluation, np.eye(problem.n)[:, None, :])
        if self.vertices == PER_TASK:
            chosen = best_per_table(scores[:, None, :], Simplex(), distinct=self.distinct)
        else:
            chosen = Simplex().vertices(scores.sum(axis=0, keepdims=True), self.vertices)
        return np.broadcast_to(chosen, (len(chosen), problem.rows))

    def inner_start(self, restriction: Restriction, clock: Clock) -> Array:
        """Start from ``first_weight`` in the first round, from 0 later."""
        weight = self.first_weight if clock.iteration == 0 else 0.0
        return np.full((restriction.rows, restriction.n), weight)
