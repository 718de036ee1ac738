"""Shannon entropy of the predictions, in nats, for inputs without labels: ℓ(x) = −Σ_c p_c log p_c, p = softmax(z(x)).

The objective of AdaMerging. On test inputs it is transductive, and `data_used` says so. A caution: logits scaled up
never raise it, so coefficients without a bound can lower it with no gain in accuracy.
Source: Yang et al. (2024), AdaMerging: Adaptive Model Merging for Multi-Task Learning.
"""

from __future__ import annotations

from torch import Tensor

from .errors import DataError
from .objective import TaskObjective
from .task import Indices, Task


class Entropy(TaskObjective):
    """Mean entropy of the predictions on the tasks' inputs; labels are not looked at.

    Parameters: those of `TaskObjective`.
    """

    def check_task(self, task: Task) -> None:
        """Refuse a task with one class, besides what the model refuses."""
        if len(task.classes) < 2:
            raise DataError(
                f"Entropy: task {task.name!r} has one class, so its entropy is 0 at all weights; leave it out, or "
                f"join it with other tasks."
            )
        super().check_task(task)

    def sample_losses(self, logits: Tensor, task: Task, indices: Indices) -> Tensor:
        """−Σ_c p_c log p_c [B]."""
        log_p = logits.log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1)
