"""Teachers: weights, one set a task, whose predictions or features the merged model is to have.

A teacher's outputs on all inputs of its task are computed once, when they are first needed, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import DataError, nearest, some
from .models import Model, Weights
from .objective import TaskObjective, frozen_randomness, readable_out_of_memory
from .task import Indices, Task

Teacher = Weights | Callable[[], Weights]


def checked_teachers(
    teachers: Mapping[str, Teacher], tasks: Sequence[str], owner: str
) -> dict[str, Callable[[], Weights]]:
    """A function that returns the weights of each task's teacher; DataError where a task has none."""
    missing = [name for name in tasks if name not in teachers]
    if missing:
        raise DataError(
            f"{owner}: no teacher for task {some(missing)};{nearest(missing[0], teachers)} "
            f"Give teachers={{task name: weights, or a callable that returns them}}."
        )
    return {name: _callable(teachers[name]) for name in tasks}


def _callable(teacher: Teacher) -> Callable[[], Weights]:
    if callable(teacher):
        return teacher
    weights = teacher
    return lambda: weights


class TaughtObjective(TaskObjective):
    """The part that objectives with teachers share; a subclass says what the loss of a row and its target is.

    teachers: task name -> weights, or a callable that returns them (called once, and let go after use: one teacher's
        weights are in memory at a time).
    progress: called as progress(task name, samples done, samples in all) while a teacher predicts.
    The other parameters are those of `TaskObjective`.
    """

    taught: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        tasks: Task | Sequence[Task],
        teachers: Mapping[str, Teacher],
        batch_size: int | None = None,
        microbatch: int = 256,
        seed: int = 0,
        *,
        task_weights: Mapping[str, float] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self._progress = progress
        self._targets: dict[str, Tensor] = {}
        self._teacher_samples = 0
        super().__init__(model, tasks, batch_size, microbatch, seed, task_weights=task_weights)
        self._teachers = checked_teachers(teachers, self.tasks, type(self).__name__)

    def predict(self) -> None:
        """Let the teachers predict now, for all tasks that they have not predicted yet."""
        for task in self._tasks:
            if task.name not in self._targets:
                self._targets[task.name] = self._predicted(task)

    def prepare(self, weights: Weights) -> None:
        """Check the weights, then let the teachers predict where they have not yet."""
        super().prepare(weights)
        self.predict()

    @torch.no_grad()
    def _predicted(self, task: Task) -> Tensor:
        """The outputs [N, ...] of the task's teacher, float32 on the CPU."""
        weights = self._teachers[task.name]()
        self.model.check(weights)
        tensors = {name: tensor.detach().to(self.device) for name, tensor in weights.items()}
        every = torch.arange(len(task)).numpy()
        rows = []
        with frozen_randomness(self.seed, None, self.device):
            for start in range(0, len(task), self.microbatch):
                chunk = every[start : start + self.microbatch]
                with readable_out_of_memory(len(chunk), task.name, self.device):
                    rows.append(self.outputs(tensors, task.batch(chunk), task).float().cpu())
                if self._progress is not None:
                    self._progress(task.name, start + len(chunk), len(task))
        outputs = torch.cat(rows)
        if not torch.isfinite(outputs).all():
            raise DataError(
                f"{type(self).__name__}: the teacher of task {task.name!r} gives outputs that are not finite; check "
                f"its checkpoint."
            )
        self._teacher_samples += len(task)
        return outputs

    def targets(self, task: Task, indices: Indices, like: Tensor) -> Tensor:
        """The teacher's outputs [B, ...] for these samples, on the device and in the type of the model's."""
        return self._targets[task.name][torch.from_numpy(indices)].to(like)

    @property
    def data_used(self) -> dict[str, Any]:
        """The ledger of `TaskObjective`; samples_seen counts the teachers' predictions, too (teacher_samples)."""
        used = super().data_used
        used["samples_seen"] += self._teacher_samples
        return {**used, "teacher_samples": self._teacher_samples}
