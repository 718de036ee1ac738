"""Whether predictions are as sure as they are right: mean confidence, expected calibration error, size of the logits.

    ECE = Σ_m |B_m| / N · |accuracy(B_m) − confidence(B_m)|,   B_m: those whose max_c p_c is in bin m of M

Entropy can be lowered by larger logits alone: accuracy stays, confidence and ECE rise. This is where it shows.
Source: Guo et al. (2017), On Calibration of Modern Neural Networks, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .models import Model, Weights
from .objective import checked_count, checked_tasks, readable_out_of_memory
from .task import Task

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Of one task: top-1 accuracy, mean of the largest probability, expected calibration error (each in [0, 1]), and
    the mean norm of a row of centred logits."""

    accuracy: float
    confidence: float
    ece: float
    logit_norm: float


@torch.inference_mode()
def calibrate(
    model: Model,
    weights: Weights,
    tasks: Task | Sequence[Task],
    microbatch: int = 256,
    *,
    bins: int = BINS,
    progress: Callable[[str, int, int], Any] | None = None,
) -> dict[str, Calibration]:
    """Accuracy and calibration of these weights on each task, in one pass over its inputs.

    progress(task name, tasks done, tasks in all) follows each task. Raises DataError for a task without labels.
    """
    checked = checked_tasks(tasks, "calibrate")
    checked_count(microbatch, "microbatch", "calibrate")
    checked_count(bins, "bins", "calibrate")
    model.check(weights)
    tensors = {name: tensor.detach().to(model.device) for name, tensor in weights.items()}
    found = {}
    for done, task in enumerate(checked, start=1):
        if task.labels is None:
            raise DataError(f"calibrate: task {task.name!r} has no labels to compare predictions with.")
        model.check_task(task)
        rows = []
        every = np.arange(len(task))
        for start in range(0, len(task), microbatch):
            chunk = every[start : start + microbatch]
            with readable_out_of_memory(len(chunk), task.name, model.device):
                rows.append(model.logits(tensors, task.batch(chunk), task).float().cpu())
        found[task.name] = calibration_of(torch.cat(rows), task.labels, bins)
        if progress is not None:
            progress(task.name, done, len(checked))
    return found


def calibration_of(logits: Tensor, labels: Tensor, bins: int = BINS) -> Calibration:
    """Calibration of logits [N, C] for labels [N]; a bin holds the confidences in ((m − 1) / M, m / M]."""
    logits = logits.double()
    confidence, predicted = logits.softmax(dim=-1).max(dim=-1)
    right = (predicted == labels).double()
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right - confidence)
    centred = logits - logits.mean(dim=-1, keepdim=True)
    return Calibration(
        float(right.mean()),
        float(confidence.mean()),
        float(gaps.abs().sum() / len(logits)),
        float(centred.norm(dim=-1).mean()),
    )
