"""Distillation from experts, for inputs without labels: ℓ(x) = T² Σ_c p_c (log p_c − log q_c), p = teacher, q = merged.

p and q are softmaxes of logits divided by the temperature T; T² keeps the size of the gradient over T. A task's teacher
is as a rule its own expert; with the base as the teacher it is `Retention`.
Source: Hinton, Vinyals and Dean (2015), Distilling the Knowledge in a Neural Network, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .models import Model
from .objective import checked_positive
from .task import Indices, Task
from .teachers import TaughtObjective, Teacher


class Distillation(TaughtObjective):
    """Mean KL divergence from the teachers' predictions to the merged model's; labels are not looked at.

    temperature: T > 0. The other parameters are those of `TaughtObjective`.
    """

    def __init__(
        self,
        model: Model,
        tasks: Task | Sequence[Task],
        teachers: Mapping[str, Teacher],
        batch_size: int | None = None,
        microbatch: int = 256,
        seed: int = 0,
        temperature: float = 1.0,
        *,
        task_weights: Mapping[str, float] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.temperature = checked_positive(temperature, "temperature", type(self).__name__)
        super().__init__(
            model, tasks, teachers, batch_size, microbatch, seed, task_weights=task_weights, progress=progress
        )

    def sample_losses(self, outputs: Tensor, task: Task, indices: Indices) -> Tensor:
        """T² KL(teacher || merged) [B]."""
        log_p = (self.targets(task, indices, outputs) / self.temperature).log_softmax(dim=-1)
        log_q = (outputs / self.temperature).log_softmax(dim=-1)
        return self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1)

    def describe(self) -> dict[str, Any]:
        """The record of `TaskObjective`, and the temperature."""
        return {**super().describe(), "temperature": self.temperature}
