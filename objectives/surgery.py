"""Representation surgery: a small adapter a task that moves the merged model's features to the task's expert's.

    ẑ = z − U_t relu(D_t z),   D_t [rank, d], U_t [d, rank],   min over D_t, U_t of the mean |ẑ − z_expert|

z are the normalized image embeddings of a CLIP, and ẑ is normalized again before the head. Inputs need no labels, but
the model must be told which task an input belongs to. The merged weights stay as they are, so the features of both
models are computed once, and what is trained is two small matrices.
Source: Yang et al. (2024), Representation Surgery for Multi-Task Model Merging.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .clip import CLIP
from .errors import DataError
from .models import Model, Weights
from .objective import Source, checked_count, checked_tasks, epoch_batch, examples, is_number
from .outputs import features
from .task import Task
from .teachers import Teacher, checked_teachers


@dataclass(frozen=True)
class Adapter:
    """The two matrices of one task, D [rank, d] and U [d, rank], and their mean absolute error before and after."""

    down: Tensor
    up: Tensor
    error_before: float
    error_after: float

    def __call__(self, z: Tensor) -> Tensor:
        """z − U relu(D z) for features [B, d]."""
        return z - F.linear(F.linear(z, self.down.to(z.dtype)).relu(), self.up.to(z.dtype))


class Surgery:
    """A CLIP whose features go through each task's adapter: a model, for `evaluate` and for objectives.

    Tasks without an adapter are classified by the features as they are.
    """

    def __init__(self, model: CLIP, adapters: Mapping[str, Adapter], data_used: Mapping[str, Any]) -> None:
        self.model = model
        self.adapters = dict(adapters)
        self.data_used = dict(data_used)
        self.device = model.device
        self.parameter_names: Collection[str] = model.parameter_names

    def logits(self, weights: Mapping[str, Tensor], inputs: Tensor, task: Task) -> Tensor:
        """Logits [B, C] of images [B, 3, H, W]."""
        self.model.check_images(inputs, task)
        z = self.model.features(weights, inputs)
        adapter = self.adapters.get(task.name)
        z = z if adapter is None else F.normalize(adapter(z), dim=-1)
        logits = self.model.logit_scale.to(z.dtype).exp() * z @ self.model.head(task).to(z.dtype).T
        return logits if self.model.logit_bias is None else logits + self.model.logit_bias.to(z.dtype)

    def differentiable(self, name: str) -> bool:
        """Whether a tensor of the weights is a parameter of the CLIP."""
        return self.model.differentiable(name)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise DataError unless these weights fit the CLIP."""
        self.model.check(weights)

    def check_task(self, task: Task) -> None:
        """Raise DataError unless the task has a head."""
        self.model.check_task(task)

    def describe(self) -> dict[str, Any]:
        """The CLIP, and each adapter's rank and errors."""
        adapters = {
            name: {"rank": len(a.down), "error_before": a.error_before, "error_after": a.error_after}
            for name, a in self.adapters.items()
        }
        return {**self.model.describe(), "surgery": adapters}


def fit_surgery(
    model: Model,
    weights: Weights,
    teachers: Mapping[str, Teacher],
    tasks: Task | Sequence[Task],
    rank: int = 16,
    *,
    iterations: int = 1000,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    microbatch: int = 256,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Surgery:
    """Fit an adapter of this rank for each task, by Adam on minibatches of the tasks' inputs, and return the model.

    weights: the merged ones, which the adapters belong to. teachers: task name -> the expert's weights, or a callable
    that returns them. iterations: of Adam, a task. progress(task name, tasks done, tasks in all) follows each task.
    The result is for the same weights: `evaluate(fit_surgery(...), weights, tasks)`.
    Raises DataError for a model that is no CLIP, and for a task without a teacher.
    """
    if not isinstance(model, CLIP):
        raise DataError(
            f"fit_surgery works on the image embeddings of a CLIP, and the model is a {type(model).__name__}."
        )
    checked = checked_tasks(tasks, "fit_surgery")
    known = checked_teachers(teachers, [task.name for task in checked], "fit_surgery")
    for value, name, least in ((rank, "rank", 1), (iterations, "iterations", 0), (batch_size, "batch_size", 1)):
        checked_count(value, name, "fit_surgery", least)
    checked_count(seed, "seed", "fit_surgery", 0)
    if not (is_number(lr) and math.isfinite(lr) and lr > 0):
        raise DataError(f"The 'lr' parameter of fit_surgery must be a float in the range (0, inf). Got {lr!r} instead.")
    adapters: dict[str, Adapter] = {}
    sources = []
    seen = 0
    for done, task in enumerate(checked, start=1):
        merged = features(model, weights, task, microbatch)
        target = features(model, known[task.name](), task, microbatch)
        batches = (epoch_batch(len(task), batch_size, i, seed, task.name) for i in range(iterations))
        rows = (torch.from_numpy(batch) for batch in batches)
        adapters[task.name] = _fit(merged, target, rows, rank, lr, seed, model.device)
        inputs, samples = task.examples
        sources.append(Source((task.name, task.split, id(inputs)), samples, False, task.split == "test"))
        seen += 2 * len(task)
        if progress is not None:
            progress(task.name, done, len(checked))
    return Surgery(model, adapters, {**examples(sources), "samples_seen": seen, "teacher_samples": seen // 2})


def _fit(
    merged: Tensor, target: Tensor, batches: Any, rank: int, lr: float, seed: int, device: torch.device
) -> Adapter:
    """Adam on the mean absolute error, from D uniform in ±1/√d and U = 0, where the adapter changes nothing."""
    size = merged.shape[1]
    bound = 1 / math.sqrt(size)
    start = torch.rand(rank, size, generator=torch.Generator().manual_seed(seed)) * 2 * bound - bound
    with torch.inference_mode(False), torch.enable_grad():
        down = start.requires_grad_()
        up = torch.zeros(size, rank, requires_grad=True)
        optimizer = torch.optim.Adam([down, up], lr=lr)
        for rows in batches:
            z = merged[rows]
            optimizer.zero_grad()
            F.l1_loss(z - F.linear(F.linear(z, down).relu(), up), target[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    fitted = Adapter(down.detach(), up.detach(), float(F.l1_loss(merged, target)), 0.0)
    after = float(F.l1_loss(fitted(merged), target))
    return Adapter(fitted.down.to(device), fitted.up.to(device), fitted.error_before, after)
