"""Sharpness-aware value: the largest loss within a distance ρ of the weights, to first order.

    F(θ) = f(θ + ε̂),   ε̂ = ρ ∇f / ‖∇f‖ (the ascent step of f at θ),   ∇F ≈ ∇f(θ + ε̂)

A merge that is flat loses less where the pool, the quantization or the data differ a little. As published, the gradient
leaves out how ε̂ turns with θ. An evaluation costs a gradient more than that of f, also for the value alone.
Source: Foret et al. (2021), Sharpness-Aware Minimization for Efficiently Improving Generalization.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .errors import DataError
from .models import Weights
from .objective import Source, SumObjective, Term, checked_positive


class SharpnessAware(SumObjective):
    """Another objective at the worst weights within a Euclidean distance `radius` (ρ), found by one ascent step.

    The step is that of the whole objective on the batch that is drawn, and all tasks are evaluated there. Where the
    gradient is 0 there is no step. Raises DataError for what is no objective of this package.
    """

    def __init__(self, objective: SumObjective, radius: float = 0.05) -> None:
        super().__init__()
        if not isinstance(objective, SumObjective):
            raise DataError(
                f"SharpnessAware takes an objective of this package (a subclass of SumObjective), got "
                f"{type(objective).__name__}."
            )
        if not objective.has_gradient:
            raise DataError(
                f"SharpnessAware needs a gradient for its ascent step, and {type(objective).__name__} has none; wrap "
                f"one that has, such as CrossEntropy."
            )
        self.objective = objective
        self.radius = checked_positive(radius, "radius", "SharpnessAware")
        self.device, self.has_gradient = objective.device, objective.has_gradient
        self.seed = getattr(objective, "seed", None)
        self.tasks, self.task_weights = objective.tasks, objective.task_weights
        self._step: Weights = {}

    @property
    def stochastic(self) -> bool:
        """Whether the objective is."""
        return self.objective.stochastic

    def draw(self, iteration: int | None) -> None:
        """Draw in the objective."""
        self.objective.draw(iteration)

    def prepare(self, weights: Weights) -> None:
        """Find ε̂ at these weights."""
        gradient = self.objective.value_and_grad(weights).gradient
        assert isinstance(gradient, dict)
        norm = float(torch.stack([g.double().square().sum().cpu() for g in gradient.values()]).sum().sqrt())
        factor = self.radius / norm if norm > 0 else 0.0
        self._step = {name: factor * g.to(self.device) for name, g in gradient.items()}

    def terms(self) -> Sequence[Term]:
        """The objective's terms, at θ + ε̂."""
        return [Term(t.name, t.weight, partial(self._accumulate, t)) for t in self.objective.terms()]

    def _accumulate(self, term: Term, tensors: Weights, scale: float | None) -> float:
        moved = {}
        for name, tensor in tensors.items():
            moved[name] = tensor.detach() + self._step[name] if name in self._step else tensor.detach()
            if scale is not None and tensor.requires_grad:
                moved[name].requires_grad_()
        value = term.accumulate(moved, scale)
        for name, tensor in moved.items():
            if tensor.grad is not None:
                leaf = tensors[name]
                leaf.grad = tensor.grad if leaf.grad is None else leaf.grad.add_(tensor.grad)
        return value

    def differentiable(self, name: str) -> bool:
        """Whether the objective has a gradient with respect to the tensor."""
        return self.objective.differentiable(name)

    def sources(self) -> Sequence[Source]:
        """The objective's examples."""
        return self.objective.sources()

    @property
    def data_used(self) -> dict[str, Any]:
        """The objective's ledger, ascent steps included."""
        return self.objective.data_used

    def describe(self) -> dict[str, Any]:
        """The radius, and the objective's record."""
        inner = self.objective.describe()
        return {"objective": "SharpnessAware", "tasks": inner["tasks"], "radius": self.radius, "of": inner}
