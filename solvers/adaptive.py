"""Adam or SGD on the coefficients, projected after each step: AdaMerging, row-wise distillation, learned soups.

    M ← β1 M + (1 − β1) S,   V ← β2 V + (1 − β2) S²,   Λ ← Π(Λ − lr_t · M̂ / (√V̂ + ε))

Tolerates minibatches, needs no evaluation besides the gradient, and gives every coefficient its own scale, which is
what blocks as fine as rows need. There is no descent guarantee: the certificate of the result says how far it came.
Source: AdaMerging (Yang et al. 2024) for entropy; Kingma and Ba (2015) for Adam.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .errors import check_choice, check_number
from .problem import Evaluation, MatrixProblem
from .solver import Clock, Solver, State, Step
from .step_rules import Memory


@dataclass(frozen=True)
class AdaptiveGradient(Solver):
    """Adam or SGD with a schedule, projected onto the domain after each step.

    lr: step size of the first iteration; schedule: "constant", or to 0 at the last iteration by "cosine" or "linear";
    momentum: β1 of Adam, or the heavy-ball factor of SGD; decay: β2 of Adam.
    """

    lr: float = 1e-3
    method: str = "adam"
    schedule: str = "constant"
    momentum: float = 0.9
    decay: float = 0.999
    source: ClassVar[str] = "AdaMerging (Yang et al. 2024); Kingma and Ba (2015)"
    may_rest: ClassVar[bool] = True
    resamples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self, "lr", 0, math.inf, closed="neither")
        check_choice(self, "method", ("adam", "sgd"))
        check_choice(self, "schedule", ("constant", "cosine", "linear"))
        check_number(self, "momentum", 0, 1, closed="left")
        check_number(self, "decay", 0, 1, closed="left")

    def init(self, problem: MatrixProblem, start: np.ndarray) -> State:
        """Moments are 0."""
        return State(start, self.moments(start))

    def moments(self, like: np.ndarray) -> Memory:
        """Return the moments before the first step, 0 in the shape of the variables."""
        zeros = np.zeros_like(like)
        return {"first": zeros, "second": zeros} if self.method == "adam" else {"first": zeros}

    @property
    def scheduled(self) -> bool:  # type: ignore[override]
        """Whether the rate depends on how many iterations there will be."""
        return self.schedule != "constant"

    def rate(self, clock: Clock) -> float:
        """Return lr_t."""
        progress = clock.iteration / max(1, clock.max_iter)
        factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return self.lr * factor[self.schedule]

    def descend(self, moments: Memory, gradient: np.ndarray, clock: Clock) -> tuple[Memory, np.ndarray]:
        """Return the next moments, and the direction whose lr_t-fold is subtracted."""
        if self.method == "sgd":
            first = self.momentum * moments["first"] + gradient
            return {"first": first}, first
        t = clock.iteration + 1
        first = self.momentum * moments["first"] + (1 - self.momentum) * gradient
        second = self.decay * moments["second"] + (1 - self.decay) * gradient**2
        direction = (first / (1 - self.momentum**t)) / (np.sqrt(second / (1 - self.decay**t)) + 1e-8)
        return {"first": first, "second": second}, direction

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """One Adam or heavy-ball step, then the projection."""
        rate = self.rate(clock)
        moments, direction = self.descend(state.memory, evaluation.scores, clock)
        return Step(State(problem.domain.project(state.coefficients - rate * direction), moments), rate)
