"""Any `nn.Module` with any loss function: loss(θ) = Σ_b n_b · loss_fn(module(x_b; θ), y_b) / Σ_b n_b over batches b.

objective = LossObjective(module, torch.nn.functional.mse_loss, batches)
problem = Problem(pool, objective)
result = solve(problem, FrankWolfe())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from .errors import DataError
from .models import ModuleModel, Weights
from .objective import (
    Source,
    SumObjective,
    Term,
    add_gradient,
    checked_count,
    epoch_batch,
    frozen_randomness,
    readable_out_of_memory,
)
from .task import SPLITS

Batch = tuple[Any, Any]


class LossObjective(SumObjective):
    """Mean of a loss function over batches of (inputs, targets).

    module: tensors that the weights lack keep the module's values; it is put into eval mode.
    loss_fn: (outputs, targets) -> scalar, the mean over the batch's samples.
    batches: a list of (inputs, targets); inputs are a tensor, a tuple of arguments or a mapping of keyword arguments,
        and their first tensor's length counts the samples; targets may be None.
    batches_per_draw: how many batches an iteration takes, without replacement within an epoch; None: all of them.
    name, split: what the record of a run calls the data; a 'test' split is marked there.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Sequence[Batch],
        batches_per_draw: int | None = None,
        seed: int = 0,
        *,
        name: str = "data",
        split: str = "train",
    ) -> None:
        super().__init__()
        self._model = ModuleModel(module)
        self.device = self._model.device
        self._loss_fn = loss_fn
        self._batches = list(batches)
        if not self._batches:
            raise DataError("LossObjective needs at least one batch (inputs, targets); the list is empty.")
        if split not in SPLITS:
            raise DataError(f"LossObjective: the split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}.")
        self._sizes = [_samples(batch, position) for position, batch in enumerate(self._batches)]
        self._per_draw = (
            None if batches_per_draw is None else checked_count(batches_per_draw, "batches_per_draw", "LossObjective")
        )
        self.seed = checked_count(seed, "seed", "LossObjective", least=0)
        self.split = split
        self.tasks = (name,)
        self.task_weights = np.ones(1)
        self._iteration: int | None = None

    @property
    def stochastic(self) -> bool:
        """Whether there are more batches than an iteration takes."""
        return self._per_draw is not None and self._per_draw < len(self._batches)

    def draw(self, iteration: int | None) -> None:
        """Fix the batches of all following calls; None is all of them."""
        self._iteration = iteration

    def terms(self) -> Sequence[Term]:
        """One term: the mean over the samples of the batches drawn."""
        return [Term(self.tasks[0], 1.0, self._accumulate)]

    def prepare(self, weights: Weights) -> None:
        """Check that the weights fit the module."""
        self._model.check(weights)

    def differentiable(self, name: str) -> bool:
        """Whether the tensor is a parameter of the module."""
        return self._model.differentiable(name)

    def _accumulate(self, tensors: Weights, scale: float | None) -> float:
        chosen = epoch_batch(len(self._batches), self._per_draw, self._iteration, self.seed, self.tasks[0])
        samples = sum(self._sizes[i] for i in chosen)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with frozen_randomness(self.seed, self._iteration, self.device):
            for i in chosen:
                inputs, targets = self._batches[i]
                with readable_out_of_memory(self._sizes[i], self.tasks[0], self.device):
                    outputs = self._forward(tensors, _on(inputs, self.device))
                    loss = self._loss_fn(outputs, _on(targets, self.device))
                    if not isinstance(loss, Tensor) or loss.numel() != 1:
                        found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                        raise DataError(
                            f"LossObjective: the loss function must return a scalar tensor, the mean over the batch; "
                            f"it returned {found}."
                        )
                    loss = loss.double().reshape(()) * (self._sizes[i] / samples)
                    if scale is not None:
                        add_gradient(loss, scale)
                total += loss.detach()
        self._count(samples, scale)
        return float(total)

    def _forward(self, tensors: Weights, inputs: Any) -> Any:
        if isinstance(inputs, Mapping):
            return functional_call(self._model.module, tensors, (), dict(inputs))
        return functional_call(self._model.module, tensors, inputs if isinstance(inputs, tuple) else (inputs,))

    def sources(self) -> Sequence[Source]:
        """All batches, labelled where they have targets."""
        return [
            Source((id(self._batches[i][0]), self.split), size, self._batches[i][1] is not None, self.split == "test")
            for i, size in enumerate(self._sizes)
        ]

    def describe(self) -> dict[str, Any]:
        """The loss function, the module and the data."""
        loss = getattr(self._loss_fn, "__name__", type(self._loss_fn).__name__)
        return {
            "objective": "LossObjective",
            "loss": loss,
            "batches_per_draw": self._per_draw,
            "seed": self.seed,
            "tasks": [{"name": self.tasks[0], "split": self.split, "samples": sum(self._sizes)}],
            "task_weights": self.task_weights.tolist(),
            **self._model.describe(),
        }


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in _tensors(v)]
    return []


def _samples(batch: Batch, position: int) -> int:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(f"LossObjective: batch {position} is not a pair (inputs, targets).")
    first = next((t for t in _tensors(batch[0]) if t.ndim > 0), None)
    if first is None or len(first) == 0:
        raise DataError(
            f"LossObjective: batch {position} holds no samples; its inputs need a tensor [B, ...] with B > 0."
        )
    return len(first)


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _on(v, device) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_on(v, device) for v in value)
    return value
