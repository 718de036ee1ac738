"""Adam or SGD on the logits of a softmax: what learned soups optimize, kept in the hull without a projection.

    (base,) Λ = softmax(U / τ) by row,      ∂f/∂U_j = λ_j (S_j − ⟨λ, S⟩) / τ

On the capped simplex the base has a logit of its own; on the box every coefficient has one, through a sigmoid.
Steps shrink with λ_j, so a coefficient near 0 hardly moves: mirror descent takes the same path without that factor.
Choose it for minibatches, or to compare with soups trained that way; there is no descent guarantee.
Source: Wortsman et al. (2022), Model soups, appendix I (learned soup); Kingma and Ba (2015) for Adam.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .adaptive import AdaptiveGradient
from .entropic import coordinates
from .errors import check_number
from .problem import Evaluation, MatrixProblem
from .solver import Clock, State, Step

NAME = "Softmax gradient"


@dataclass(frozen=True)
class SoftmaxGradient(AdaptiveGradient):
    """Adam or SGD with a schedule on the logits of a softmax (learned soup).

    lr, method, schedule, momentum, decay: as for the solver 'adaptive', in units of logits. temperature: τ of the
    softmax; mixing: by how much a row of the start that touches the boundary, which no logits reach, is moved toward
    the centre.
    """

    lr: float = 0.1
    temperature: float = 1.0
    mixing: float = 1e-2
    source: ClassVar[str] = "Wortsman et al. (2022), learned soup; Kingma and Ba (2015)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "temperature", 0, math.inf, closed="neither")
        check_number(self, "mixing", 0, 1, closed="neither")

    def check(self, problem: MatrixProblem) -> None:
        """Refuse domains that are no softmax of anything."""
        coordinates(NAME, problem.domain)

    def init(self, problem: MatrixProblem, start: np.ndarray) -> State:
        """Move the start inside, and keep its logits U beside it."""
        space = coordinates(NAME, problem.domain)
        inside = space.interior(start, self.mixing)
        logits = self.temperature * space.normalized(space.enter(inside))
        return State(inside, {"logits": logits, **self.moments(logits)})

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """One Adam or heavy-ball step on U."""
        space, rate = coordinates(NAME, problem.domain), self.rate(clock)
        logits = state.memory["logits"]
        gradient = space.gradient(space.normalized(logits / self.temperature), evaluation.scores) / self.temperature
        moments, direction = self.descend(state.memory, gradient, clock)
        logits = logits - rate * direction
        point = space.leave(space.normalized(logits / self.temperature))
        return Step(State(point, {"logits": logits, **moments}), rate)
