"""A weighted sum of objectives: loss = Σ_k a_k · loss_k, with one gradient buffer for all of them.

Cross-entropy where there are labels and entropy where there are none; distillation from experts plus retention
(distillation
from the base on reference inputs): each is a sum of what there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import DataError
from .models import Weights
from .objective import Source, SumObjective, Term, checked_device


class WeightedSum(SumObjective):
    """Σ_k a_k · loss_k of (a_k, objective) pairs, a_k ≥ 0.

    tasks: the tasks of all objectives, in order; one that is in two of them is told apart by '(2)', '(3)', ...
    task_weights: a_k times the objective's own. `draw` is passed on, so every objective draws from its own seed.
    """

    def __init__(self, parts: Sequence[tuple[float, SumObjective]]) -> None:
        super().__init__()
        if not parts:
            raise DataError("WeightedSum needs at least one (weight, objective) pair; the list is empty.")
        for weight, objective in parts:
            if not isinstance(objective, SumObjective):
                raise DataError(
                    f"WeightedSum takes (weight, objective) pairs of this package's objectives (subclasses of "
                    f"SumObjective), got {type(objective).__name__}."
                )
            if not (math.isfinite(weight) and weight >= 0):
                raise DataError(f"WeightedSum: weights must be finite and not negative, got {weight!r}.")
        devices = {str(checked_device(objective.device)) for _, objective in parts}
        if len(devices) > 1:
            raise DataError(
                f"WeightedSum: the models are on different devices ({', '.join(sorted(devices))}); use one."
            )
        self.parts = tuple((float(weight), objective) for weight, objective in parts)
        self.device = self.parts[0][1].device
        self.has_gradient = all(objective.has_gradient for _, objective in self.parts)
        names: list[str] = []
        for _, objective in self.parts:
            for task in objective.tasks:
                copies = (task, *(f"{task} ({k})" for k in range(2, len(names) + 3)))
                names.append(next(name for name in copies if name not in names))
        self.tasks = tuple(names)
        self.task_weights = np.concatenate([weight * objective.task_weights for weight, objective in self.parts])

    @property
    def stochastic(self) -> bool:
        """Whether any of the objectives is."""
        return any(objective.stochastic for _, objective in self.parts)

    def draw(self, iteration: int | None) -> None:
        """Draw in every objective."""
        for _, objective in self.parts:
            objective.draw(iteration)

    def terms(self) -> Sequence[Term]:
        """The terms of all objectives."""
        terms = [term for _, objective in self.parts for term in objective.terms()]
        return [
            Term(name, float(weight), term.accumulate)
            for name, weight, term in zip(self.tasks, self.task_weights, terms, strict=True)
        ]

    def prepare(self, weights: Weights) -> None:
        """Prepare every objective."""
        for _, objective in self.parts:
            objective.prepare(weights)

    def differentiable(self, name: str) -> bool:
        """Whether any of the objectives has a gradient with respect to the tensor."""
        return any(objective.differentiable(name) for _, objective in self.parts)

    def sources(self) -> Sequence[Source]:
        """The examples of all objectives."""
        return [source for _, objective in self.parts for source in objective.sources()]

    @property
    def data_used(self) -> dict[str, Any]:
        """Distinct examples over all objectives, and the sums of their counts of forwarded samples."""
        used = super().data_used
        for _, objective in self.parts:
            for key, count in objective.data_used.items():
                if key.endswith("_samples") or key == "samples_seen":
                    used[key] = used.get(key, 0) + count
        return used

    def describe(self) -> dict[str, Any]:
        """The weights and the records of the objectives."""
        return {
            "objective": "WeightedSum",
            "tasks": list(self.tasks),
            "task_weights": self.task_weights.tolist(),
            "parts": [{"weight": weight, **objective.describe()} for weight, objective in self.parts],
        }
