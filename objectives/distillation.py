"""Distillation from experts, for inputs without labels: ℓ(x) = T² Σ_c p_c (log p_c − log q_c), p = teacher, q = merged.

p and q are softmaxes of logits divided by the temperature T; T² keeps the size of the gradient over T. A task's teacher
is as a rule its own expert; its logits on all inputs of the task are computed once, when first needed, and kept.

With the base as the teacher on reference inputs this is retention: the price of forgetting what the base knew
(`WeightedSum([(1.0, to_the_experts), (0.5, to_the_base)])`).
Source: Hinton, Vinyals and Dean (2015), Distilling the Knowledge in a Neural Network, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import DataError
from .models import Model, Weights
from .objective import TaskObjective, frozen_randomness, is_number, readable_out_of_memory
from .task import Indices, Task
from .teachers import Teacher, checked_teachers


class Distillation(TaskObjective):
    """Mean KL divergence from the teachers' predictions to the merged model's; labels are not looked at.

    teachers: task name -> weights, or a callable that returns them (called once, and let go after use: one teacher's
        weights are in memory at a time).
    temperature: T > 0.
    progress: called as progress(task name, samples done, samples in all) while a teacher predicts.
    The other parameters are those of `TaskObjective`.
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
        if not (is_number(temperature) and math.isfinite(temperature) and temperature > 0):
            raise DataError(
                f"The 'temperature' parameter of Distillation must be a float in the range (0, inf). "
                f"Got {temperature!r} instead."
            )
        self.temperature = float(temperature)
        self._progress = progress
        self._logits: dict[str, Tensor] = {}
        self._teacher_samples = 0
        super().__init__(model, tasks, batch_size, microbatch, seed, task_weights=task_weights)
        self._teachers = checked_teachers(teachers, self.tasks, type(self).__name__)

    def predict(self) -> None:
        """Let the teachers predict now, for all tasks that they have not predicted yet."""
        for task in self._tasks:
            self._teacher_logits(task)

    def prepare(self, weights: Weights) -> None:
        """Check the weights, then let the teachers predict where they have not yet."""
        super().prepare(weights)
        self.predict()

    @torch.no_grad()
    def _teacher_logits(self, task: Task) -> Tensor:
        """Logits [N, C] of the task's teacher, float32 on the CPU."""
        if task.name in self._logits:
            return self._logits[task.name]
        weights = self._teachers[task.name]()
        self.model.check(weights)
        tensors = {name: tensor.detach().to(self.device) for name, tensor in weights.items()}
        logits = torch.empty(len(task), len(task.classes))
        every = torch.arange(len(task)).numpy()
        with frozen_randomness(self.seed, None, self.device):
            for start in range(0, len(task), self.microbatch):
                chunk = every[start : start + self.microbatch]
                with readable_out_of_memory(len(chunk), task.name, self.device):
                    logits[start : start + len(chunk)] = self.model.logits(tensors, task.batch(chunk), task)
                if self._progress is not None:
                    self._progress(task.name, start + len(chunk), len(task))
        if not torch.isfinite(logits).all():
            raise DataError(
                f"Distillation: the teacher of task {task.name!r} gives logits that are not finite; check its "
                f"checkpoint."
            )
        self._teacher_samples += len(task)
        self._logits[task.name] = logits
        return logits

    def sample_losses(self, logits: Tensor, task: Task, indices: Indices) -> Tensor:
        """T² KL(teacher || merged) [B]."""
        targets = self._logits[task.name][torch.from_numpy(indices)].to(logits.device, torch.float64)
        log_p = (targets / self.temperature).log_softmax(dim=-1)
        log_q = (logits / self.temperature).log_softmax(dim=-1)
        return self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1)

    @property
    def data_used(self) -> dict[str, Any]:
        """The ledger of `TaskObjective`; samples_seen counts the teachers' predictions, too (teacher_samples)."""
        used = super().data_used
        used["samples_seen"] += self._teacher_samples
        return {**used, "teacher_samples": self._teacher_samples}

    def describe(self) -> dict[str, Any]:
        """The record of `TaskObjective`, and the temperature."""
        return {**super().describe(), "temperature": self.temperature}
