"""Minimize f(θ) subject to g(θ) ≤ ε, as one objective: the augmented Lagrangian of an inequality.

    L(θ; μ, ρ) = f(θ) + (m² − μ²) / 2ρ,     ∇L = ∇f + m ∇g,     m = max(0, μ + ρ (g(θ) − ε))

With f what is to be learned and g what is to be kept (distillation from the base on reference inputs, `Proximity`),
ε is in the units of g, where a weighted sum would need an exchange rate between the two. The multiplier μ becomes that
rate: how much f falls for each unit that ε grows. `mergesolve.solvers.solve_constrained` finds it.
Source: Bertsekas (1982), Constrained Optimization and Lagrange Multiplier Methods; Nocedal and Wright (2006), ch. 17.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import DataError
from .models import Weights
from .objective import Source, SumObjective, Term, checked_device, is_number


class AugmentedLagrangian(SumObjective):
    """L(θ; μ, ρ) of two objectives of this package; `multiplier` μ ≥ 0 and `penalty` ρ ≥ 0 may be set at any time.

    With ρ = 0 it is the Lagrangian f + μ (g − ε), the limit. On minibatches g is that of the batch, in m too.
    tasks: `constraint_task`, whose loss is the penalty, (m² − μ²) / 2ρ, with weight 1, then those of f: so scores by
    task are defined, too. first_draw: the number of the batch that iteration 0 draws.
    Raises DataError for anything but two objectives on one device and a finite bound.
    """

    def __init__(self, objective: SumObjective, constraint: SumObjective, bound: float) -> None:
        super().__init__()
        for role, part in (("objective", objective), ("constraint", constraint)):
            if not isinstance(part, SumObjective):
                raise DataError(
                    f"AugmentedLagrangian takes objectives of this package (subclasses of SumObjective); the {role} "
                    f"is {type(part).__name__}."
                )
            if not part.has_gradient:
                raise DataError(
                    f"AugmentedLagrangian needs gradients, and {type(part).__name__}, its {role}, has none; take "
                    f"CrossEntropy on the same labels."
                )
        if not (is_number(bound) and math.isfinite(bound)):
            raise DataError(
                f"The 'bound' parameter of AugmentedLagrangian must be a finite number, the largest value that the "
                f"constraint may take. Got {bound!r} instead."
            )
        if checked_device(objective.device) != checked_device(constraint.device):
            raise DataError(
                f"AugmentedLagrangian: the objective is on {objective.device}, the constraint on {constraint.device}; "
                f"use one device."
            )
        self.objective, self.constraint, self.bound = objective, constraint, float(bound)
        self.multiplier, self.penalty = 0.0, 0.0
        self.first_draw = 0
        self.device = objective.device
        self.seed = getattr(objective, "seed", None)
        copies = ("constraint", *(f"constraint ({k})" for k in range(2, len(objective.tasks) + 3)))
        self.constraint_task = next(name for name in copies if name not in objective.tasks)
        self.tasks = (self.constraint_task, *objective.tasks)
        self.task_weights = np.concatenate([np.ones(1), objective.task_weights])
        self._batch: int | None = None

    @property
    def stochastic(self) -> bool:
        """Whether either of the two is."""
        return self.objective.stochastic or self.constraint.stochastic

    def draw(self, iteration: int | None) -> None:
        """Draw in both."""
        self._batch = None if iteration is None else self.first_draw + iteration
        self.objective.draw(self._batch)
        self.constraint.draw(self._batch)

    def constraint_value(self, weights: Weights) -> float:
        """g(θ) on all the data; the batch that is drawn stays drawn."""
        self.constraint.draw(None)
        try:
            return self.constraint.value(weights)
        finally:
            self.constraint.draw(self._batch)

    def terms(self) -> Sequence[Term]:
        """The penalty, then the terms of the objective."""
        return [Term(self.constraint_task, 1.0, self._accumulate), *self.objective.terms()]

    def _accumulate(self, tensors: Weights, scale: float | None) -> float:
        """The penalty; its gradient is that of g, scaled in place once g, and so m, is known."""
        before = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
        for name in before:
            tensors[name].grad = None
        value = sum(
            weight * term.accumulate(tensors, None if scale is None else float(weight))
            for weight, term in zip(self.constraint.task_weights, self.constraint.terms(), strict=True)
        )
        excess = float(value) - self.bound
        active = max(0.0, self.multiplier + self.penalty * excess)
        if scale is not None:
            for name, tensor in tensors.items():
                if tensor.grad is not None:
                    tensor.grad.mul_(scale * active)
                if name in before:
                    tensor.grad = before[name] if tensor.grad is None else tensor.grad.add_(before[name])
        if active == 0.0 and self.penalty > 0:
            return -(self.multiplier**2) / (2 * self.penalty)
        return self.multiplier * excess + 0.5 * self.penalty * excess**2

    def prepare(self, weights: Weights) -> None:
        """Prepare both."""
        self.objective.prepare(weights)
        self.constraint.prepare(weights)

    def differentiable(self, name: str) -> bool:
        """Whether either of the two has a gradient with respect to the tensor."""
        return self.objective.differentiable(name) or self.constraint.differentiable(name)

    def sources(self) -> Sequence[Source]:
        """The examples of both."""
        return [*self.objective.sources(), *self.constraint.sources()]

    @property
    def data_used(self) -> dict[str, Any]:
        """Distinct examples of both, and the sums of their counts of forwarded samples."""
        used = super().data_used
        for part in (self.objective, self.constraint):
            for key, count in part.data_used.items():
                if key.endswith("_samples") or key == "samples_seen":
                    used[key] = used.get(key, 0) + count
        return used

    def describe(self) -> dict[str, Any]:
        """The bound, the multiplier and penalty as they are, and the records of both."""
        return {
            "objective": "AugmentedLagrangian",
            "tasks": list(self.tasks),
            "bound": self.bound,
            "multiplier": self.multiplier,
            "penalty": self.penalty,
            "minimize": self.objective.describe(),
            "constraint": self.constraint.describe(),
        }
