"""Server optimizers: what another step proposes is a pseudo-gradient, Δ = θ' − θ_t, along which the server steps.

    momentum   m ← β1 m + Δ                                        θ_{t+1} = θ_t + lr · m
    adagrad    m ← β1 m + (1 − β1) Δ,  v ← v + Δ²                  θ_{t+1} = θ_t + lr · m / (√v + adaptivity)
    adam       the same m,  v ← β2 v + (1 − β2) Δ²
    yogi       the same m,  v ← v − (1 − β2) Δ² sign(v − Δ²)

Momentum with β1 = 0 and lr = 1 is the inner step itself. As published, v starts at adaptivity², and moments are not
corrected for their start.
Source: Reddi et al. (2021), Adaptive Federated Optimization, algorithm 2; Hsu, Qi and Brown (2019) for FedAvgM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from ..solvers.errors import check_choice, check_number
from .step import Proposal, Round, ServerData, ServerStep

METHODS = ("momentum", "adagrad", "adam", "yogi")
FIRST, SECOND, INNER = "first/", "second/", "inner/"


@dataclass(frozen=True)
class ServerOptimizer(ServerStep):
    """An optimizer over the updates that `step` proposes, FedAvg unless another one is given.

    method: of `METHODS`; lr: server learning rate; momentum: β1; decay: β2 of adam and yogi; adaptivity: what is added
    to √v, in the units of Δ: the larger, the less adaptive.
    """

    step: ServerStep
    method: str = "momentum"
    lr: float = 1.0
    momentum: float = 0.9
    decay: float = 0.99
    adaptivity: float = 1e-3
    source: ClassVar[str] = "Reddi et al. (2021), Adaptive Federated Optimization, algorithm 2"

    def __post_init__(self) -> None:
        check_choice(self, "method", METHODS)
        check_number(self, "lr", 0, math.inf, closed="neither")
        check_number(self, "momentum", 0, 1, closed="left")
        check_number(self, "decay", 0, 1, closed="left")
        check_number(self, "adaptivity", 0, math.inf, closed="neither")

    def check(self, data: ServerData) -> None:
        """What the inner step needs."""
        self.step.check(data)

    def propose(self, round: Round) -> Proposal:
        """Step along the moments of the updates."""
        inner_memory = {n.removeprefix(INNER): v for n, v in round.memory.items() if n.startswith(INNER)}
        inner = self.step.propose(replace(round, memory=inner_memory))
        memory: dict[str, Any] = {INNER + name: value for name, value in inner.memory.items()}
        weights = {}
        # A tensor that no client changed this time keeps moving by its momentum.
        held = {n.removeprefix(FIRST) for n in round.memory if n.startswith(FIRST)}
        with round.watch.timed("combine"):
            for name in sorted({*inner.weights, *held}):
                anchor = round.anchor[name].detach().cpu().float()
                delta = inner.weights[name].cpu() - anchor if name in inner.weights else torch.zeros_like(anchor)
                first = self._moment(round, FIRST, name, delta)
                first = self.momentum * first + (delta if self.method == "momentum" else (1 - self.momentum) * delta)
                memory[FIRST + name] = first.numpy()
                move = first
                if self.method != "momentum":
                    second = self._second(self._moment(round, SECOND, name, delta, self.adaptivity**2), delta**2)
                    memory[SECOND + name] = second.numpy()
                    move = first / (second.sqrt() + self.adaptivity)
                weights[name] = anchor + self.lr * move
        details = {"inner": dict(inner.details)}
        return replace(inner, weights=weights, coefficients=None, details=details, memory=memory)

    @staticmethod
    def _moment(round: Round, kind: str, name: str, like: torch.Tensor, start: float = 0.0) -> torch.Tensor:
        found = round.memory.get(kind + name)
        return torch.full_like(like, start) if found is None else torch.from_numpy(np.asarray(found))

    def _second(self, second: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
        if self.method == "adagrad":
            return second + squared
        if self.method == "adam":
            return self.decay * second + (1 - self.decay) * squared
        return second - (1 - self.decay) * squared * torch.sign(second - squared)

    def describe(self) -> dict[str, Any]:
        """Return every option."""
        options: dict[str, Any] = {"lr": self.lr, "momentum": self.momentum}
        if self.method in ("adam", "yogi"):
            options["decay"] = self.decay
        if self.method != "momentum":
            options["adaptivity"] = self.adaptivity
        return {"name": "optimizer", "step": self.step.describe(), "method": self.method, **options}
