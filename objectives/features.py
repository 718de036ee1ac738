"""What experts make of the same samples: features and predictions, and how alike two experts are by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .clip import CLIP
from .errors import DataError
from .models import Model, Weights
from .objective import checked_count, readable_out_of_memory
from .task import Task

Matrix = NDArray[np.float64]

_CHUNK = 2**22  # numbers in float64 at a time


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


def mean_feature_similarity(features: Sequence[Tensor]) -> Matrix:
    """S[i, j] = (1/N) Σ_x cos(f_i(x), f_j(x)) from the features [N, d] of each expert on the same N samples.

    Positive semidefinite, being the Gram matrix of the experts' normalized features; the diagonal is 1. A feature of
    norm 0 counts as orthogonal to all others and to itself.
    Raises DataError for features of different shapes or that are not finite.
    Source: Quality and Diversity Both Matters When Merging Models, "Similarity" (an anonymous submission). Its text
        leaves open which features the cosine compares; here they are the two experts' features of one sample.
    """
    samples, size = _checked(features, "mean_feature_similarity")
    total = np.zeros((len(features), len(features)))
    step = max(1, _CHUNK // (len(features) * size))
    for start in range(0, samples, step):
        part = torch.stack([f[start : start + step].detach().cpu().double() for f in features])
        norms = part.norm(dim=-1, keepdim=True)
        unit = (part / norms.masked_fill(norms == 0, 1)).flatten(1).numpy()
        total += unit @ unit.T
    return (total + total.T) / (2 * samples)


def agreement(predictions: Sequence[Tensor]) -> Matrix:
    """A[i, j]: the share of samples on which experts i and j predict the same class, from predictions [N, C] of each.

    Positive semidefinite, being the mean over the samples of Gram matrices of one-hot vectors; the diagonal is 1.
    Raises DataError for predictions of different shapes or that are not finite.
    """
    _checked(predictions, "agreement")
    classes = torch.stack([p.detach().argmax(dim=-1).cpu() for p in predictions]).numpy()
    return np.stack([(classes == row).mean(axis=1) for row in classes])


def _checked(rows: Sequence[Tensor], owner: str) -> tuple[int, int]:
    """[N, d] that all experts' rows share, none of them empty."""
    if len(rows) == 0:
        raise DataError(f"{owner} needs the rows of at least one expert.")
    shape = list(rows[0].shape)
    for i, expert in enumerate(rows):
        if expert.ndim != 2 or 0 in expert.shape or list(expert.shape) != shape:
            raise DataError(
                f"{owner}: expert {i} has rows of shape {list(expert.shape)}, and expert 0 of {shape}; expected "
                f"[samples, features], none of them 0 and the same for all, from one task."
            )
        if not torch.isfinite(expert).all():
            raise DataError(f"{owner}: expert {i} has values that are not finite; check its checkpoint.")
    return shape[0], shape[1]
