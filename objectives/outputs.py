"""What a model makes of a task's samples: features and predictions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .clip import CLIP
from .models import Model, Weights
from .objective import checked_count, readable_out_of_memory
from .task import Task


def features(model: Model, weights: Weights, task: Task, microbatch: int = 256) -> Tensor:
    """Features [N, d] of the task's inputs, float32 on the CPU: the normalized image embeddings of a CLIP.

    Of a model that is no CLIP, the logits as they are. The task's labels and classes are not looked at by a CLIP.
    """

    def of(tensors: Weights, inputs: Tensor) -> Tensor:
        if isinstance(model, CLIP):
            model.check_images(inputs, task)
            return model.features(tensors, inputs)
        return model.logits(tensors, inputs, task)

    return _rows(of, model, weights, task, microbatch)


def predictions(model: Model, weights: Weights, task: Task, microbatch: int = 256) -> Tensor:
    """Probabilities [N, C] of the task's classes, the softmax of the logits in float32, on the CPU."""
    model.check_task(task)

    def of(tensors: Weights, inputs: Tensor) -> Tensor:
        return model.logits(tensors, inputs, task).float().softmax(dim=-1)

    return _rows(of, model, weights, task, microbatch)


@torch.no_grad()
def _rows(
    of: Callable[[Weights, Tensor], Tensor], model: Model, weights: Weights, task: Task, microbatch: int
) -> Tensor:
    """of(weights, inputs) of all inputs, one under the other."""
    checked_count(microbatch, "microbatch", "features")
    model.check(weights)
    tensors = {name: tensor.detach().to(model.device) for name, tensor in weights.items()}
    every = np.arange(len(task))
    rows = []
    for start in range(0, len(task), microbatch):
        chunk = every[start : start + microbatch]
        with readable_out_of_memory(len(chunk), task.name, model.device):
            rows.append(of(tensors, task.batch(chunk)).float().cpu())
    return torch.cat(rows)
