"""An objective: a loss and its gradient over weights, on batches that it draws itself.

    loss(θ) = Σ_t w_t · mean_{x in batch of task t} ℓ_t(θ; x)

No graph runs through the merge: weights come in as plain tensors, and the gradient of microbatch after microbatch and
task after task is added up in one buffer, so that memory is one model, one gradient, and the activations of one
microbatch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import DataError, nearest, some
from .models import Model, Weights
from .task import Indices, Task


@dataclass(frozen=True)
class Evaluation:
    """loss = Σ_t w_t · task_losses[t]; gradient of the loss, or, per task, the list of the gradients of each
    task_losses[t] (not multiplied by w_t), in the order of the tasks."""

    loss: float
    task_losses: dict[str, float]
    gradient: Weights | list[Weights]


@runtime_checkable
class Objective(Protocol):
    """What a solver sees of an objective."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        ...

    @property
    def task_weights(self) -> NDArray[np.float64]:
        """The weights w [T] of the tasks."""
        ...

    @property
    def stochastic(self) -> bool:
        """Whether batches differ from one iteration to the next."""
        ...

    def draw(self, iteration: int | None) -> None:
        """Fix the batch of all calls that follow: a pure function of the seed and the iteration; None is all the
        data."""
        ...

    def value_and_grad(self, weights: Weights, *, per_task: bool = False) -> Evaluation:
        """Loss and gradient at these weights."""
        ...

    def value(self, weights: Weights) -> float:
        """Loss at these weights."""
        ...

    @property
    def data_used(self) -> dict[str, Any]:
        """What was consumed: distinct examples, labelled and not, and samples forwarded so far."""
        ...

    def describe(self) -> dict[str, Any]:
        """Class, options and tasks, for the record of a run."""
        ...


class TaskObjective:
    """The loop that cross-entropy, entropy and distillation share: a subclass says what the loss of a logit row is.

    model: logits as a function of weights. tasks: one or more, with distinct names.
    batch_size: samples a task and iteration, drawn without replacement from one permutation an epoch; None: all of
    them.
    microbatch: samples a forward pass; the result does not depend on it (to rounding), memory does.
    task_weights: w_t by task name; 1/T each without it.
    """

    needs_labels: ClassVar[bool] = False

    def __init__(
        self,
        model: Model,
        tasks: Task | Sequence[Task],
        batch_size: int | None = None,
        microbatch: int = 256,
        seed: int = 0,
        *,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        self._tasks = checked_tasks(tasks, type(self).__name__)
        self.tasks = tuple(task.name for task in self._tasks)
        self.model = model
        self.batch_size = (
            checked_count(batch_size, "batch_size", type(self).__name__) if batch_size is not None else None
        )
        self.microbatch = checked_count(microbatch, "microbatch", type(self).__name__)
        self.seed = seed
        self.task_weights = checked_task_weights(task_weights, self.tasks, type(self).__name__)
        for task in self._tasks:
            self._check_task(task)
        self._iteration: int | None = None
        self._gradient_samples = 0
        self._value_samples = 0

    def _check_task(self, task: Task) -> None:
        if self.needs_labels and task.labels is None:
            raise DataError(
                f"{type(self).__name__} needs labels, and task {task.name!r} has none; give labels, or use an "
                f"objective without: Entropy, or Distillation from an expert."
            )
        self.model.check_task(task)

    def _sample_losses(self, logits: Tensor, task: Task, indices: Indices) -> Tensor:
        """Losses [B], float64, of the logits [B, C], float64, of these samples."""
        raise NotImplementedError

    # -- batches -----------------------------------------------------------------------------------------------------

    @property
    def stochastic(self) -> bool:
        """Whether some task has more samples than a batch."""
        return self.batch_size is not None and any(len(task) > self.batch_size for task in self._tasks)

    def draw(self, iteration: int | None) -> None:
        """Fix the batch of all following calls; None is all the data."""
        self._iteration = iteration

    def batch_indices(self, task: Task) -> Indices:
        """The samples of this task in the batch that is drawn: positions t·b to (t+1)·b of one permutation after the
        other, each from the seed, the epoch and the task's name, so that an epoch meets every sample once."""
        n, b, iteration = len(task), self.batch_size, self._iteration
        if iteration is None or b is None or b >= n:
            return np.arange(n)
        stream = zlib.crc32(task.name.encode())
        taken: list[Indices] = []
        position, end = iteration * b, (iteration + 1) * b
        while position < end:
            epoch, offset = divmod(position, n)
            order = np.random.default_rng([self.seed, stream, epoch]).permutation(n)
            taken.append(order[offset : offset + end - position])
            position += len(taken[-1])
        return np.concatenate(taken)

    # -- loss and gradient -------------------------------------------------------------------------------------------

    def value_and_grad(self, weights: Weights, *, per_task: bool = False) -> Evaluation:
        """Loss and gradient on the batch that is drawn; the gradient has the names, shapes and device of the
        weights."""
        self._prepare(weights)
        leaves = self._leaves(weights)
        task_losses: dict[str, float] = {}
        gradients: list[Weights] = []
        with self._frozen_randomness():
            for task, weight in zip(self._tasks, self.task_weights, strict=True):
                scale = 1.0 if per_task else float(weight)
                task_losses[task.name] = self._accumulate(leaves, task, scale)
                if per_task:
                    gradients.append(self._collect(leaves, weights))
        gradient = gradients if per_task else self._collect(leaves, weights)
        return Evaluation(self._total(task_losses), task_losses, gradient)

    @torch.no_grad()
    def value(self, weights: Weights) -> float:
        """Loss on the batch that is drawn."""
        return self._total(self.task_losses(weights))

    @torch.no_grad()
    def task_losses(self, weights: Weights) -> dict[str, float]:
        """The loss of each task on the batch that is drawn."""
        self._prepare(weights)
        tensors = {name: tensor.detach().to(self.model.device) for name, tensor in weights.items()}
        with self._frozen_randomness():
            return {task.name: self._accumulate(tensors, task, None) for task in self._tasks}

    def _total(self, task_losses: Mapping[str, float]) -> float:
        return float(sum(w * task_losses[name] for name, w in zip(self.tasks, self.task_weights, strict=True)))

    def _prepare(self, weights: Weights) -> None:
        """Whatever must be ready before memory is taken for the evaluation."""
        self.model.check(weights)

    def _leaves(self, weights: Weights) -> Weights:
        """The weights as leaves of a new graph, sharing their storage where they are on the model's device."""
        leaves = {name: tensor.detach().to(self.model.device) for name, tensor in weights.items()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(leaf.is_floating_point() and self.model.differentiable(name))
        if not any(leaf.requires_grad for leaf in leaves.values()):
            raise DataError("The weights hold no parameter of the model, so there is nothing to differentiate.")
        return leaves

    def _accumulate(self, tensors: Weights, task: Task, scale: float | None) -> float:
        """The task's mean loss; adds its gradient times `scale` into the leaves' buffers unless scale is None."""
        indices = self.batch_indices(task)
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for start in range(0, len(indices), self.microbatch):
            chunk = indices[start : start + self.microbatch]
            with readable_out_of_memory(len(chunk), task.name, self.model.device):
                logits = self.model.logits(tensors, task.batch(chunk), task)
                # A row of logits is small: its loss in float64 costs nothing and keeps differences of losses exact.
                loss = self._sample_losses(logits.double(), task, chunk).sum() / len(indices)
                if scale is not None:
                    # AccumulateGrad adds into .grad tensor by tensor: there is never a second gradient.
                    (loss * scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if scale is None:
            self._value_samples += len(indices)
        else:
            self._gradient_samples += len(indices)
        return float(total)

    @staticmethod
    def _collect(leaves: Weights, weights: Weights) -> Weights:
        """Take the gradient out of the leaves; a tensor that the loss does not depend on has gradient 0."""
        gradient = {}
        for name, leaf in leaves.items():
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            gradient[name] = grad.detach().to(weights[name].device)
            leaf.grad = None
        return gradient

    @contextmanager
    def _frozen_randomness(self) -> Iterator[None]:
        """The same random numbers in every evaluation of one iteration, for models that draw some in spite of eval
        mode."""
        cuda = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(self.seed * 1_000_003 + (self._iteration or 0))
            # The fused inference kernels of attention round differently from those that a gradient needs; a line search
            # compares values with the loss of a gradient evaluation, so both take the same path.
            fused = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fused)

    # -- the record --------------------------------------------------------------------------------------------------

    @property
    def used_tasks(self) -> list[tuple[Task, bool]]:
        """The tasks, and whether their labels are used."""
        return [(task, self.needs_labels) for task in self._tasks]

    @property
    def data_used(self) -> dict[str, Any]:
        """labelled, unlabelled: distinct examples at the objective's disposal; test_inputs: whether some are from a
        test split; samples_seen: forwarded so far, of which gradient_samples with a gradient and value_samples
        without."""
        return {
            **examples(self.used_tasks),
            "samples_seen": self._gradient_samples + self._value_samples,
            "gradient_samples": self._gradient_samples,
            "value_samples": self._value_samples,
        }

    def describe(self) -> dict[str, Any]:
        """Class, options, model and tasks."""
        return {
            "objective": type(self).__name__,
            "batch_size": self.batch_size,
            "microbatch": self.microbatch,
            "seed": self.seed,
            "task_weights": self.task_weights.tolist(),
            "tasks": [
                {
                    "name": task.name,
                    "split": task.split,
                    "samples": len(task),
                    "classes": len(task.classes),
                    "labels_used": self.needs_labels,
                }
                for task in self._tasks
            ],
            **self.model.describe(),
        }


def examples(used: Sequence[tuple[Task, bool]]) -> dict[str, Any]:
    """The ledger of distinct examples: a task's inputs count once, as labelled if anything uses their labels."""
    sizes: dict[tuple[str, str, int], int] = {}
    labelled: set[tuple[str, str, int]] = set()
    for task, with_labels in used:
        key = (task.name, task.split, id(task.inputs))
        sizes[key] = len(task)
        if with_labels:
            labelled.add(key)
    return {
        "labelled": sum(size for key, size in sizes.items() if key in labelled),
        "unlabelled": sum(size for key, size in sizes.items() if key not in labelled),
        "test_inputs": any(task.split == "test" for task, _ in used),
    }


@contextmanager
def readable_out_of_memory(samples: int, task: str, device: torch.device) -> Iterator[None]:
    """Turn running out of memory in a forward or backward pass into the microbatch to try next."""
    try:
        yield
    except RuntimeError as error:
        # The CPU allocator raises a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        remedy = (
            f"try microbatch={max(samples // 2, 1)} (the result does not depend on it)"
            if samples > 1
            else "the model itself does not fit: take precision='bf16', device='cpu' or a streaming pool"
        )
        raise torch.OutOfMemoryError(
            f"Out of memory on {device} with {samples} samples of task {task!r} in one pass; {remedy}."
        ) from error


def checked_tasks(tasks: Task | Sequence[Task], owner: str) -> tuple[Task, ...]:
    """The tasks as a tuple; DataError if there are none or two share a name."""
    checked = (tasks,) if isinstance(tasks, Task) else tuple(tasks)
    if not checked:
        raise DataError(f"{owner} needs at least one task; the list of tasks is empty.")
    names = [task.name for task in checked]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{owner}: two tasks have the name {some(repeated)}; give each its own.")
    return checked


def checked_count(value: int, name: str, owner: str) -> int:
    """A positive integer, or DataError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise DataError(
            f"The {name!r} parameter of {owner} must be an int in the range [1, inf). Got {value!r} instead."
        )
    return int(value)


def checked_task_weights(
    task_weights: Mapping[str, float] | None, names: tuple[str, ...], owner: str
) -> NDArray[np.float64]:
    """w [T] in the order of the tasks, 1/T each where not given; DataError for unknown or missing names and for
    weights that are negative or not finite, or all 0."""
    if task_weights is None:
        return np.full(len(names), 1 / len(names))
    for name in task_weights:
        if name not in names:
            raise DataError(f"{owner}: task_weights names {name!r}, which is not a task.{nearest(name, names)}")
    missing = [name for name in names if name not in task_weights]
    if missing:
        raise DataError(f"{owner}: task_weights lacks {some(missing)}; give a weight for every task (0 leaves it out).")
    weights = np.array([task_weights[name] for name in names], dtype=np.float64)
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise DataError(f"{owner}: task_weights must be finite, not negative and not all 0, got {dict(task_weights)}.")
    return weights
