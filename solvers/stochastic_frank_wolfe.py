"""Stochastic Frank-Wolfe: the oracle sees an average of gradients instead of the noise of one minibatch.

    V = argmin ⟨V, G⟩,   Λ ← Λ + γ_t (V − Λ)          G: an estimate of the scores of all the data, with S_t on batch t

    momentum   G ← (1 − ρ_t) G + ρ_t S_t(Λ_t),   ρ_t = 4 / (t + 8)^{2/3}
    spider     G ← G + S_t(Λ_t) − S_t(Λ_{t−1}),            S on all the data every `snapshot` iterations
    svrf       G ← S(Λ_0) + S_t(Λ_t) − S_t(Λ_0),           Λ_0 the point of the last snapshot

A linear oracle amplifies noise: with plain minibatches the vertex jumps and the error does not vanish. Momentum costs
nothing more; the two with variance reduction evaluate each batch at two points and pay a pass over the data now and
then. Choose it when an objective is drawn in minibatches; on all the data, other variants are faster.
Source: momentum: Mokhtari, Hassani and Karbasi (2020), algorithm 1; spider: Yurtsever, Sra and Cevher (2019);
svrf: Hazan and Luo (2016), algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .errors import check_choice, check_number
from .problem import Evaluation, MatrixProblem
from .solver import Clock, Solver, State, Step, move, require_oracle, require_traits
from .step_rules import SEARCH, Memory, OpenLoop, make_step_rule

Array = np.ndarray[Any, Any]
MOMENTUM, SPIDER, SVRF = "momentum", "spider", "svrf"
SCHEDULE_OF_MOKHTARI = OpenLoop(offset=8.0, scale=0.25)


@dataclass(frozen=True)
class StochasticFrankWolfe(Solver):
    """Stochastic Frank-Wolfe: momentum or variance reduction for objectives drawn in minibatches.

    estimate: "momentum", "spider" or "svrf"; snapshot: iterations between gradients on all the data, for the last two;
    step_rule: a schedule (γ = 2/(t + 8) unless told), or "short-step": no batch can be searched along an estimate.
    """

    step_rule: Any = SCHEDULE_OF_MOKHTARI
    estimate: str = MOMENTUM
    snapshot: int = 10
    source: ClassVar[str] = "Mokhtari, Hassani and Karbasi (2020); Yurtsever et al. (2019); Hazan and Luo (2016)"
    may_rest: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_rule", make_step_rule(self.step_rule))
        reason = (
            "it evaluates the objective along the direction, which comes from an average over batches and need not "
            "descend on this one; use 'open-loop', 'logarithmic', 'square-root', 'fixed' or 'short-step'"
        )
        require_traits(self, self.step_rule, {SEARCH: reason})
        check_choice(self, "estimate", (MOMENTUM, SPIDER, SVRF))
        check_number(self, "snapshot", 1, math.inf, closed="left", integer=True)

    def check(self, problem: MatrixProblem) -> None:
        """Refuse domains without an oracle."""
        require_oracle(problem)

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Update the estimate, and move toward its vertex."""
        memory = dict(state.memory)
        kind, estimate = self.update(problem, state.coefficients, memory, evaluation, clock.iteration)
        if not np.isfinite(estimate).all():
            return Step(state, 0.0, finished=True)
        direction = problem.domain.minimizer(estimate) - state.coefficients
        known = Evaluation(evaluation.value, estimate)
        point, size = move(
            self.step_rule, problem, State(state.coefficients, memory), known, direction, 1.0, clock.iteration
        )
        vertices = problem.domain.vertices(estimate) if problem.domain.has_vertices else None
        extra = {"kind": kind, "estimated_gap": problem.domain.gap(state.coefficients, estimate)}
        return Step(State(point, memory), size, vertices, extra=extra)

    def update(
        self, problem: MatrixProblem, point: Array, memory: Memory, evaluation: Evaluation, iteration: int
    ) -> tuple[str, Array]:
        """Return how the estimate was made, and the estimate; what the next one needs goes to ``memory``."""
        if self.estimate == MOMENTUM:
            rate = min(1.0, 4.0 / (iteration + 8) ** (2 / 3)) if "estimate" in memory else 1.0
            before = memory.get("estimate", evaluation.scores)
            memory["estimate"] = before + rate * (evaluation.scores - before)
            return MOMENTUM, memory["estimate"]
        if iteration % self.snapshot == 0:
            scores = evaluation.scores
            if problem.stochastic:
                problem.draw(None)
                scores = problem.evaluate(point).scores
                problem.draw(iteration)
            kind, estimate = "snapshot", scores
        else:
            there = problem.evaluate(memory["anchor"]).scores  # the same batch at the other point
            kind, estimate = self.estimate, memory["estimate"] + evaluation.scores - there
        if self.estimate == SPIDER or kind == "snapshot":
            memory["estimate"], memory["anchor"] = estimate, point
        return kind, estimate
