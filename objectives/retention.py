"""Retention: what the base knew and a merge may forget, as ℓ(x) = T² KL(base(x) || merged(x)) on inputs without labels.

Beside other objectives it is the price of forgetting, on reference inputs of tasks that no expert was trained for, or
on the experts' own; as a bound it is the constraint of `AugmentedLagrangian`.
Source: Li and Hoiem (2016), Learning without Forgetting, with the base as the old model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .distillation import Distillation
from .models import Model
from .objective import checked_tasks
from .task import Task
from .teachers import Teacher


class Retention(Distillation):
    """Mean KL divergence from the base's predictions to the merged model's; labels are not looked at.

    base: its weights, or a callable that returns them. The other parameters are those of `Distillation`.
    """

    def __init__(
        self,
        model: Model,
        tasks: Task | Sequence[Task],
        base: Teacher,
        batch_size: int | None = None,
        microbatch: int = 256,
        seed: int = 0,
        temperature: float = 1.0,
        *,
        task_weights: Mapping[str, float] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        tasks = checked_tasks(tasks, type(self).__name__)
        super().__init__(
            model,
            tasks,
            {task.name: base for task in tasks},
            batch_size,
            microbatch,
            seed,
            temperature,
            task_weights=task_weights,
            progress=progress,
        )
