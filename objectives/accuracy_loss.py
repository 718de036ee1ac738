"""The share of inputs that are classified wrongly: ℓ(x, y) = [argmax_c z(x)_c ≠ y], the loss that accuracy is made of.

Constant almost everywhere, so it has no gradient that leads anywhere. It is for solvers that compare values only.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .errors import DataError
from .models import Weights
from .objective import TaskObjective
from .task import Indices, Task


class AccuracyLoss(TaskObjective):
    """Mean of 1 − top-1 accuracy over the tasks, each by its labels; has no gradient.

    Parameters: those of `TaskObjective`.
    """

    needs_labels: ClassVar[bool] = True
    has_gradient = False

    def sample_losses(self, logits: Tensor, task: Task, indices: Indices) -> Tensor:
        """0 where the largest logit is the label's, else 1 [B]."""
        assert task.labels is not None
        labels = task.labels[torch.from_numpy(indices)].to(logits.device)
        return (logits.argmax(dim=-1) != labels).double()

    def _accumulate(self, task: Task, tensors: Weights, scale: float | None) -> float:
        if scale is not None:
            raise DataError(
                "AccuracyLoss has no gradient. Solve with 'cma-es', 'nelder-mead', 'bayesian' or 'scan', which read "
                "values only, or minimize CrossEntropy, which has one, on the same labels."
            )
        return super()._accumulate(task, tensors, scale)
