"""Mirror descent with the entropy: on the simplex, exponentiated gradient. Multiplies where projected gradient adds.

    λ_i ← λ_i exp(−η s_i) / Σ_j λ_j exp(−η s_j)         (in u = ∇φ(λ):   u ← u − η s)

Where scores are bounded, its regret on n experts grows with √ln n, that of projected gradient with √n. It never sets a
coefficient to 0: good experts among many are found fast, a sparse merge only in the limit. With backtracking on

    f(Λ⁺) ≤ f(Λ) + ⟨S, Λ⁺ − Λ⟩ + D(Λ⁺, Λ) / η,       D = Bregman divergence of φ,

values never rise, and for convex f after k steps f(Λ_k) − f* ≤ D(Λ*, Λ_0) / Σ η_j.
Source: Nemirovski and Yudin (1983); Kivinen and Warmuth (1997); Beck and Teboulle (2003), section 5; the bound: Lu,
Freund and Nesterov (2018), theorem 3.1, with 1/η in the place of L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .entropic import coordinates
from .errors import check_choice, check_number
from .problem import Evaluation, MatrixProblem
from .projected_gradient import SMALLEST_STEP
from .solver import Clock, Solver, State, Step

NAME = "Mirror descent"


@dataclass(frozen=True)
class MirrorDescent(Solver):
    """Mirror descent with the entropy (exponentiated gradient), with backtracked, constant or decaying steps.

    schedule: "backtracking", "constant", or "decaying": η/√(t + 1), for minibatches; size: the first η, None for
    1/max|S|; grow: factor by which backtracking tries the step larger after each success (≥ 1); mixing: by how much a
    row of the start that touches the boundary, where steps cannot lead away from 0, is moved toward the centre.
    """

    schedule: str = "backtracking"
    size: float | None = None
    grow: float = 1.5
    mixing: float = 1e-3
    promise: ClassVar[str] = "sublinear"
    source: ClassVar[str] = "Nemirovski and Yudin (1983); Beck and Teboulle (2003)"

    def __post_init__(self) -> None:
        check_choice(self, "schedule", ("backtracking", "constant", "decaying"))
        if self.size is not None:
            check_number(self, "size", 0, math.inf, closed="neither")
        check_number(self, "grow", 1, math.inf, closed="left")
        check_number(self, "mixing", 0, 1, closed="neither")

    def check(self, problem: MatrixProblem) -> None:
        """Refuse domains whose entropy is not known here."""
        coordinates(NAME, problem.domain)

    def init(self, problem: MatrixProblem, start: np.ndarray) -> State:
        """Move the start inside, and keep its coordinates u beside it."""
        space = coordinates(NAME, problem.domain)
        inside = space.interior(start, self.mixing)
        return State(inside, {"u": space.normalized(space.enter(inside))})

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """u ← u − ηS, with η halved until the bound holds, or as scheduled."""
        space = coordinates(NAME, problem.domain)
        u, scores = state.memory["u"], evaluation.scores
        lifted = space.lifted(scores)
        if "size" in state.memory:
            size = float(state.memory["size"]) * (self.grow if self.schedule == "backtracking" else 1.0)
        else:
            size = 1.0 / max(float(np.abs(scores).max()), SMALLEST_STEP) if self.size is None else self.size
        taken = size / math.sqrt(clock.iteration + 1) if self.schedule == "decaying" else size
        moved = space.normalized(u - taken * lifted)
        trial = space.leave(moved)
        if self.schedule == "backtracking":
            slack = problem.resolution * abs(evaluation.value)
            while True:
                linear = evaluation.value + float(np.sum(scores * (trial - state.coefficients)))
                if problem.value(trial) <= linear + space.divergence(moved, u) / size + slack:
                    break
                size /= 2
                if size < SMALLEST_STEP:
                    return Step(state, 0.0)
                moved = space.normalized(u - size * lifted)
                trial = space.leave(moved)
            taken = size
        return Step(State(trial, {"u": moved, "size": np.array(size)}), taken)
