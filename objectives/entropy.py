"""Shannon entropy of the predictions in nats, without labels: ℓ(x) = −Σ_c p_c log p_c with p = softmax(z(x) / T).

The objective of AdaMerging. On test inputs it is transductive, and `data_used` says so. A caution: logits scaled up
never raise it, so coefficients without a bound can lower it with no gain in accuracy. With `logit_norm` = r the
predictions are those of r (z − z̄) / ‖z − z̄‖ instead, whose entropy no scale can lower; `calibrate` shows what happened
to confidence, calibration and the logits' norm.
Sources: Yang et al. (2024), AdaMerging: Adaptive Model Merging for Multi-Task Learning; Wei et al. (2022), Mitigating
Neural Network Overconfidence with Logit Normalization.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .errors import DataError
from .models import Model
from .objective import TaskObjective, checked_positive
from .task import Indices, Task


class Entropy(TaskObjective):
    """Mean entropy of the predictions on the tasks' inputs; labels are not looked at.

    temperature: T > 0, by which logits are divided. logit_norm: the norm that every row of logits, centred, is brought
    to; None leaves it. The other parameters are those of `TaskObjective`.
    """

    def __init__(
        self,
        model: Model,
        tasks: Task | Sequence[Task],
        batch_size: int | None = None,
        microbatch: int = 256,
        seed: int = 0,
        temperature: float = 1.0,
        logit_norm: float | None = None,
        *,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.temperature = checked_positive(temperature, "temperature", "Entropy")
        self.logit_norm = None if logit_norm is None else checked_positive(logit_norm, "logit_norm", "Entropy")
        super().__init__(model, tasks, batch_size, microbatch, seed, task_weights=task_weights)

    def check_task(self, task: Task) -> None:
        """Refuse a task with one class, besides what the model refuses."""
        if len(task.classes) < 2:
            raise DataError(
                f"Entropy: task {task.name!r} has one class, so its entropy is 0 at all weights; leave it out, or "
                f"join it with other tasks."
            )
        super().check_task(task)

    def sample_losses(self, outputs: Tensor, task: Task, indices: Indices) -> Tensor:
        """−Σ_c p_c log p_c [B]."""
        if self.logit_norm is not None:
            outputs = self.logit_norm * F.normalize(outputs - outputs.mean(dim=-1, keepdim=True), dim=-1)
        log_p = (outputs / self.temperature).log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1)

    def describe(self) -> dict[str, Any]:
        """The record of `TaskObjective`, temperature and logit norm."""
        return {**super().describe(), "temperature": self.temperature, "logit_norm": self.logit_norm}
