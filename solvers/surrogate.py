"""A quadratic model of each task's loss in Λ, fitted from a few evaluations: a Pareto front for the price of a solve.

    f_t(Λ) ≈ c_t + ⟨b_t, Λ⟩ + ½ ⟨Λ, H_t Λ⟩,     S_t(Λ) ≈ b_t + H_t Λ

Λ is read as one vector of d = rows × experts numbers. A value alone gives one equation, a gradient d more, so that a
sample says 1 + d things about 1 + d + d(d + 1)/2 unknowns. The fit is least squares, with values held out to say how
good it is; H_t may be made positive semidefinite (the nearest such matrix), so that the front of the model can be
solved to its end. Points that are chosen on the model are to be evaluated on the problem itself.
Source: MAP (Li et al. 2024), Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation; there
from values alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .domains import Domain, Free
from .errors import OptionError, check_number
from .problem import Array, Counts, Evaluation, MatrixProblem

UNKNOWNS = 20_000  # of one task: beyond that the least squares take gigabytes
CURVATURE = 1e-8  # least eigenvalue relative to the largest where curvature is to be positive


class QuadraticTasks(MatrixProblem):
    """Tasks with quadratic losses f_t(Λ) = c_t + ⟨b_t, Λ⟩ + ½ ⟨Λ, H_t Λ⟩ over a domain.

    constants c [T]; linear b [T, d]; hessians H [T, d, d], symmetric; d = rows · n.
    """

    def __init__(
        self,
        constants: Array,
        linear: Array,
        hessians: Array,
        domain: Domain,
        *,
        experts: Sequence[str],
        tasks: Sequence[str],
        task_weights: Array | None = None,
    ) -> None:
        self.constants, self.linear, self.hessians = constants, linear, hessians
        self.domain, self.experts, self.tasks = domain, tuple(experts), tuple(tasks)
        self.rows = linear.shape[1] // len(self.experts)
        self.task_weights = np.full(len(tasks), 1 / len(tasks)) if task_weights is None else task_weights
        self.counts = Counts()

    def losses(self, point: Array) -> Array:
        """Return f [T]."""
        x = point.ravel()
        found: Array = self.constants + self.linear @ x + 0.5 * np.einsum("i,tij,j->t", x, self.hessians, x)
        return found

    def evaluate(
        self, point: Array, *, tasks: bool = False, raw: bool = False, experts: Sequence[int] | None = None
    ) -> Evaluation:
        """Values and scores by the formula."""
        self.counts.gradients += 1
        losses = self.losses(point)
        tables = (self.linear + self.hessians @ point.ravel()).reshape(len(losses), *point.shape)
        scores = np.tensordot(self.task_weights, tables, axes=1)
        return Evaluation(float(self.task_weights @ losses), scores, self._named(losses), tables if tasks else None)

    def value(self, point: Array) -> float:
        """The weighted sum by the formula."""
        self.counts.evaluations += 1
        return float(self.task_weights @ self.losses(point))

    def task_values(self, point: Array) -> dict[str, float]:
        """The losses by the formula."""
        self.counts.evaluations += 1
        return self._named(self.losses(point))

    def _named(self, losses: Array) -> dict[str, float]:
        return dict(zip(self.tasks, losses.tolist(), strict=True))
