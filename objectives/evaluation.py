"""Top-1 accuracy of merged weights: by task, mean, worst, and as a share of a reference such as each task's expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .errors import DataError, some
from .models import Model, Weights
from .objective import checked_count, checked_tasks, readable_out_of_memory
from .task import Task


class Scores(dict[str, float]):
    """Task name -> top-1 accuracy in [0, 1] (or, normalized, its ratio to a reference)."""

    @property
    def mean(self) -> float:
        """The mean over the tasks."""
        return sum(self.values()) / len(self)

    @property
    def worst(self) -> float:
        """The lowest of the tasks."""
        return min(self.values())

    def normalized(self, reference: Mapping[str, float]) -> Scores:
        """Each task divided by the reference's accuracy on it; DataError where the reference lacks a task or is 0."""
        missing = [name for name in self if not reference.get(name)]
        if missing:
            raise DataError(f"Scores: the reference has no accuracy above 0 for task {some(missing)}.")
        return Scores({name: accuracy / reference[name] for name, accuracy in self.items()})


@torch.inference_mode()
def accuracy(model: Model, weights: Weights, task: Task, microbatch: int = 256) -> float:
    """Share of the task's inputs whose largest logit is their label's."""
    if task.labels is None:
        raise DataError(f"evaluate: task {task.name!r} has no labels to compare predictions with.")
    checked_count(microbatch, "microbatch", "evaluate")
    model.check(weights)
    model.check_task(task)
    tensors = {name: tensor.detach().to(model.device) for name, tensor in weights.items()}
    every = torch.arange(len(task)).numpy()
    correct = torch.zeros((), dtype=torch.int64, device=model.device)
    for start in range(0, len(task), microbatch):
        chunk = every[start : start + microbatch]
        with readable_out_of_memory(len(chunk), task.name, model.device):
            logits = model.logits(tensors, task.batch(chunk), task)
        correct += (logits.argmax(dim=-1) == task.labels[chunk].to(model.device)).sum()
    return int(correct) / len(task)


def evaluate(
    model: Model,
    weights: Weights,
    tasks: Task | Sequence[Task],
    microbatch: int = 256,
    *,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Scores:
    """Top-1 accuracy of these weights on each task; progress(task name, tasks done, tasks in all) follows each."""
    checked = checked_tasks(tasks, "evaluate")
    scores = Scores()
    for done, task in enumerate(checked, start=1):
        scores[task.name] = accuracy(model, weights, task, microbatch)
        if progress is not None:
            progress(task.name, done, len(checked))
    return scores
