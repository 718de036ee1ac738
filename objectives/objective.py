"""An objective: a loss and its gradient over weights, on batches that it draws itself.

    loss(θ) = Σ_t w_t · mean_{x in batch of task t} ℓ_t(θ; x)

No graph runs through the merge: weights come in as plain tensors, and the gradients of all microbatches and tasks are
added up in one buffer. Memory is one model, one gradient, and the activations of one microbatch.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
        """Fix the batch of all later calls, by a pure function of the seed and the iteration; None is all data."""
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


@dataclass(frozen=True)
class Term:
    """One summand w · ℓ of a loss: `accumulate(tensors, scale)` gives ℓ, and adds scale · ∇ℓ into the leaves' gradients
    unless scale is None."""

    name: str
    weight: float
    accumulate: Callable[[Weights, float | None], float]


@dataclass(frozen=True)
class Source:
    """Distinct examples at an objective's disposal. `key` is the same for the same examples in two objectives."""

    key: Hashable
    samples: int
    labelled: bool
    test: bool


class SumObjective(ABC):
    """Loss and gradient of a sum of terms, one a task; what the sum is made of is up to the subclass."""

    tasks: tuple[str, ...]
    task_weights: NDArray[np.float64]
    device: torch.device
    has_gradient: bool = True

    def __init__(self) -> None:
        self.gradient_samples = 0
        self.value_samples = 0

    @abstractmethod
    def terms(self) -> Sequence[Term]:
        """The terms of the loss on the batch that is drawn, in the order of the tasks."""

    @abstractmethod
    def prepare(self, weights: Weights) -> None:
        """Check the weights, and make ready whatever takes memory of its own before an evaluation starts."""

    @abstractmethod
    def differentiable(self, name: str) -> bool:
        """Whether the loss has a gradient with respect to this tensor of the weights."""

    @abstractmethod
    def sources(self) -> Sequence[Source]:
        """The examples that the loss is made of."""

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether batches differ from one iteration to the next."""

    @abstractmethod
    def draw(self, iteration: int | None) -> None:
        """Fix the batch of all following calls; None is all the data. Before the first draw it is all the data."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Class, options and tasks, for the record of a run."""

    @torch.enable_grad()
    def value_and_grad(self, weights: Weights, *, per_task: bool = False) -> Evaluation:
        """Loss and gradient on the batch drawn; the gradient has the names, shapes and device of the weights."""
        self.prepare(weights)
        leaves = self._leaves(weights)
        task_losses: dict[str, float] = {}
        gradients: list[Weights] = []
        for term in self.terms():
            task_losses[term.name] = term.accumulate(leaves, 1.0 if per_task else term.weight)
            if per_task:
                gradients.append(_collect(leaves, weights))
        gradient = gradients if per_task else _collect(leaves, weights)
        return Evaluation(self._total(task_losses), task_losses, gradient)

    def value(self, weights: Weights) -> float:
        """Loss on the batch that is drawn."""
        return self._total(self.task_losses(weights))

    @torch.no_grad()
    def task_losses(self, weights: Weights) -> dict[str, float]:
        """The loss of each task on the batch that is drawn."""
        self.prepare(weights)
        tensors = {name: tensor.detach().to(self.device) for name, tensor in weights.items()}
        return {term.name: term.accumulate(tensors, None) for term in self.terms()}

    def _total(self, task_losses: Mapping[str, float]) -> float:
        return float(sum(w * task_losses[name] for name, w in zip(self.tasks, self.task_weights, strict=True)))

    def _leaves(self, weights: Weights) -> Weights:
        """The weights as leaves of a new graph, sharing their storage where they are on the model's device."""
        leaves = {name: tensor.detach().to(self.device) for name, tensor in weights.items()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(leaf.is_floating_point() and self.differentiable(name))
        if not any(leaf.requires_grad for leaf in leaves.values()):
            raise DataError("The weights hold no parameter of the model, so there is nothing to differentiate.")
        return leaves

    def _count(self, samples: int, scale: float | None) -> None:
        if scale is None:
            self.value_samples += samples
        else:
            self.gradient_samples += samples

    @property
    def data_used(self) -> dict[str, Any]:
        """What was consumed.

        labelled, unlabelled: distinct examples at the objective's disposal; test_inputs: whether some are from a test
        split; samples_seen: forwarded so far, of which gradient_samples with a gradient, value_samples without.
        """
        return {
            **examples(self.sources()),
            "samples_seen": self.gradient_samples + self.value_samples,
            "gradient_samples": self.gradient_samples,
            "value_samples": self.value_samples,
        }


class TaskObjective(SumObjective):
    """The loop that objectives on tasks share: a subclass says what the loss of a row of the model's outputs is.

    model: logits as a function of weights. tasks: one or more, with distinct names.
    batch_size: samples a task and iteration, drawn without replacement from one permutation an epoch; None: all.
    microbatch: samples a forward pass; the result does not depend on it (to rounding), memory does.
    task_weights: w_t by task name; 1/T each without it.
    """

    needs_labels: ClassVar[bool] = False
    taught: ClassVar[bool] = False  # whether other models say what is right, which they can of any input

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
        super().__init__()
        owner = type(self).__name__
        self._tasks = checked_tasks(tasks, owner)
        self.tasks = tuple(task.name for task in self._tasks)
        self.model = model
        self.device = model.device
        self.batch_size = None if batch_size is None else checked_count(batch_size, "batch_size", owner)
        self.microbatch = checked_count(microbatch, "microbatch", owner)
        self.seed = checked_count(seed, "seed", owner, least=0)
        self.task_weights = checked_task_weights(task_weights, self.tasks, owner)
        for task in self._tasks:
            self.check_task(task)
        self._iteration: int | None = None

    def check_task(self, task: Task) -> None:
        """Raise DataError for a task that this objective or the model cannot use."""
        if self.needs_labels and task.labels is None:
            raise DataError(
                f"{type(self).__name__} needs labels, and task {task.name!r} has none; give labels, or use an "
                f"objective without: Entropy, or Distillation from an expert."
            )
        self.model.check_task(task)

    def outputs(self, tensors: Weights, inputs: Tensor, task: Task) -> Tensor:
        """What the loss is a function of, [B, ...]: the logits, unless a subclass says otherwise."""
        return self.model.logits(tensors, inputs, task)

    def sample_losses(self, outputs: Tensor, task: Task, indices: Indices) -> Tensor:
        """Losses [B], float64, of the outputs [B, ...], float64, of these samples of the task."""
        raise NotImplementedError

    @property
    def stochastic(self) -> bool:
        """Whether some task has more samples than a batch."""
        return self.batch_size is not None and any(len(task) > self.batch_size for task in self._tasks)

    def draw(self, iteration: int | None) -> None:
        """Fix the batch of all following calls; None is all the data."""
        self._iteration = iteration

    def batch_indices(self, task: Task) -> Indices:
        """The samples of this task in the batch that is drawn."""
        return epoch_batch(len(task), self.batch_size, self._iteration, self.seed, task.name)

    def terms(self) -> Sequence[Term]:
        """One term a task: its mean loss over the batch."""
        return [
            Term(task.name, float(weight), partial(self._accumulate, task))
            for task, weight in zip(self._tasks, self.task_weights, strict=True)
        ]

    def prepare(self, weights: Weights) -> None:
        """Check that the weights fit the model."""
        self.model.check(weights)

    def differentiable(self, name: str) -> bool:
        """Whether the tensor is a parameter of the model."""
        return self.model.differentiable(name)

    def _accumulate(self, task: Task, tensors: Weights, scale: float | None) -> float:
        indices = self.batch_indices(task)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with frozen_randomness(self.seed, self._iteration, self.device):
            for start in range(0, len(indices), self.microbatch):
                chunk = indices[start : start + self.microbatch]
                with readable_out_of_memory(len(chunk), task.name, self.device):
                    outputs = self.outputs(tensors, task.batch(chunk), task)
                    # A row of outputs is small: its loss in float64 costs nothing and keeps differences exact.
                    loss = self.sample_losses(outputs.double(), task, chunk).sum() / len(indices)
                    if scale is not None:
                        add_gradient(loss, scale)
                total += loss.detach()
        self._count(len(indices), scale)
        return float(total)

    def sources(self) -> Sequence[Source]:
        """The tasks, labelled where their labels are used."""
        found = []
        for task in self._tasks:
            inputs, samples = task.examples
            found.append(Source((task.name, task.split, id(inputs)), samples, self.needs_labels, task.split == "test"))
        return found

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
                    "fingerprint": task.fingerprint,
                }
                for task in self._tasks
            ],
            **self.model.describe(),
        }


def checked_positive(value: float, name: str, owner: str) -> float:
    """A finite number above 0, or DataError."""
    if not (is_number(value) and math.isfinite(value) and value > 0):
        raise DataError(
            f"The {name!r} parameter of {owner} must be a float in the range (0, inf). Got {value!r} instead."
        )
    return float(value)


def checked_device(device: torch.device) -> torch.device:
    """The device as tensors on it name it: 'cuda' and 'cuda:0' are one device under two names."""
    return torch.empty(0, device=device).device


def is_number(value: object) -> bool:
    """Whether an option is a plain number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def epoch_batch(samples: int, size: int | None, iteration: int | None, seed: int, stream: str) -> Indices:
    """The samples of the batch of iteration t: positions t·b to (t+1)·b of one permutation after the other.

    Each permutation is from the seed, the stream's name and the epoch, and an epoch meets every sample once. Where the
    batch holds all of them, they come in order.
    """
    if iteration is None or size is None or size >= samples:
        return np.arange(samples)
    taken: list[Indices] = []
    position, end = iteration * size, (iteration + 1) * size
    while position < end:
        epoch, offset = divmod(position, samples)
        order = np.random.default_rng([seed, zlib.crc32(stream.encode()), epoch]).permutation(samples)
        taken.append(order[offset : offset + end - position])
        position += len(taken[-1])
    return np.concatenate(taken)


def add_gradient(loss: Tensor, scale: float) -> None:
    """Add scale · ∇loss into the leaves' gradients, tensor by tensor: there is never a second gradient in memory."""
    if loss.requires_grad:  # a loss without any of the weights in it adds nothing
        (loss * scale).backward()  # type: ignore[no-untyped-call]


def _collect(leaves: Weights, weights: Weights) -> Weights:
    """Take the gradient out of the leaves; a tensor that the loss does not depend on has gradient 0."""
    gradient = {}
    for name, leaf in leaves.items():
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        gradient[name] = grad.detach().to(weights[name].device)
        leaf.grad = None
    return gradient


@contextmanager
def frozen_randomness(seed: int, iteration: int | None, device: torch.device) -> Iterator[None]:
    """The same random numbers and kernels in every evaluation of one draw: line searches compare like with like."""
    cuda = device.type == "cuda"
    state = (seed * 1_000_003 + (iteration or 0)) % 2**63
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # For models that draw random numbers in spite of eval mode. Only the generators saved above are seeded.
        torch.default_generator.manual_seed(state)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(state)
        # Without a gradient, attention would take a fused kernel that rounds differently from the one with a gradient.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def examples(sources: Iterable[Source]) -> dict[str, Any]:
    """The ledger of distinct examples: the same ones count once, as labelled if anything uses their labels."""
    distinct: dict[Hashable, Source] = {}
    test = False
    for source in sources:
        test = test or source.test
        if source.labelled or source.key not in distinct:
            distinct[source.key] = source
    return {
        "labelled": sum(s.samples for s in distinct.values() if s.labelled),
        "unlabelled": sum(s.samples for s in distinct.values() if not s.labelled),
        "test_inputs": test,
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


def checked_count(value: int, name: str, owner: str, least: int = 1) -> int:
    """An integer of at least `least`, or DataError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise DataError(
            f"The {name!r} parameter of {owner} must be an int in the range [{least}, inf). Got {value!r} instead."
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
