"""Losses in units of what each task's own expert reaches: so that a task which is hard for everyone does not outweigh.

    ratio: f_t(θ) / max(f_t(θ_t), floor)          excess: f_t(θ) − f_t(θ_t)

The ratio is a choice of task weights, w_t / f_t(θ_t): 1 means as good as the expert. The excess moves values only, not
gradients: it is what makes the worst of several tasks a fair question.
Source: Agarwal and Zhang (2022), Minimax Regret Optimization for Robust Distribution Shift (the excess).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .errors import DataError, nearest
from .models import Weights
from .objective import Source, SumObjective, Term, checked_positive
from .teachers import Teacher, checked_teachers

KINDS = ("ratio", "excess")


class RelativeLoss(SumObjective):
    """Another objective whose task losses are measured against those of each task's expert.

    experts: task name -> weights, or a callable that returns them; each is evaluated once, on all its task's data, when
    it is first needed. kind: "ratio" or "excess". floor: the smallest loss that a ratio divides by.
    Raises DataError for what is no objective of this package, a task without an expert, and expert losses of 0 in all
    tasks where a ratio is asked for (as those of distillation from the experts are).
    """

    def __init__(
        self, objective: SumObjective, experts: Mapping[str, Teacher], kind: str = "ratio", floor: float = 0.05
    ) -> None:
        super().__init__()
        if not isinstance(objective, SumObjective):
            raise DataError(
                f"RelativeLoss takes an objective of this package (a subclass of SumObjective), got "
                f"{type(objective).__name__}."
            )
        if kind not in KINDS:
            raise DataError(f"RelativeLoss: unknown kind {kind!r}.{nearest(str(kind), KINDS)}")
        self.objective, self.kind = objective, kind
        self.floor = checked_positive(floor, "floor", "RelativeLoss")
        self.device, self.has_gradient = objective.device, objective.has_gradient
        self.seed = getattr(objective, "seed", None)
        self.tasks, self.task_weights = objective.tasks, objective.task_weights
        self._experts = checked_teachers(experts, self.tasks, "RelativeLoss")
        self._batch: int | None = None
        self._references: dict[str, float] | None = None

    @property
    def stochastic(self) -> bool:
        """Whether the objective is."""
        return self.objective.stochastic

    def draw(self, iteration: int | None) -> None:
        """Draw in the objective."""
        self._batch = iteration
        self.objective.draw(iteration)

    def prepare(self, weights: Weights) -> None:
        """Prepare the objective, and measure the experts if it was not done yet."""
        self.objective.prepare(weights)
        if self._references is None:
            self._references = self._measured()
            self.objective.prepare(weights)  # what it made ready for an expert is not what it needs now

    @property
    def references(self) -> dict[str, float]:
        """f_t(θ_t) by task, on all the data of the task; the experts are measured now if they were not yet."""
        if self._references is None:
            self._references = self._measured()
        return dict(self._references)

    @torch.no_grad()
    def _measured(self) -> dict[str, float]:
        self.objective.draw(None)
        found = {}
        try:
            for k, name in enumerate(self.tasks):
                weights = self._experts[name]()
                self.objective.prepare(weights)
                tensors = {key: tensor.detach().to(self.device) for key, tensor in weights.items()}
                found[name] = self.objective.terms()[k].accumulate(tensors, None)
        finally:
            self.objective.draw(self._batch)
        if self.kind == "ratio" and all(abs(loss) < 1e-9 for loss in found.values()):
            raise DataError(
                "RelativeLoss: the loss of every expert on its own task is 0, so there is nothing to divide by; take "
                "kind='excess', or the objective as it is."
            )
        return found

    def terms(self) -> Sequence[Term]:
        """The objective's terms, relative."""
        return [Term(t.name, t.weight, partial(self._accumulate, t)) for t in self.objective.terms()]

    def _accumulate(self, term: Term, tensors: Weights, scale: float | None) -> float:
        assert self._references is not None
        reference = self._references[term.name]
        if self.kind == "excess":
            return term.accumulate(tensors, scale) - reference
        unit = max(reference, self.floor)
        return term.accumulate(tensors, None if scale is None else scale / unit) / unit

    def differentiable(self, name: str) -> bool:
        """Whether the objective has a gradient with respect to the tensor."""
        return self.objective.differentiable(name)

    def sources(self) -> Sequence[Source]:
        """The objective's examples."""
        return self.objective.sources()

    @property
    def data_used(self) -> dict[str, Any]:
        """The objective's ledger, with the experts' evaluations."""
        return self.objective.data_used

    def describe(self) -> dict[str, Any]:
        """Kind and floor, and the objective's record."""
        inner = self.objective.describe()
        options = {"kind": self.kind, "floor": self.floor}
        return {"objective": "RelativeLoss", "tasks": inner["tasks"], **options, "of": inner}
