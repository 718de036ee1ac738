"""Local training of a client: AdamW on the cross-entropy of its own data, from the weights that the server sent.

    min_θ  1/B Σ CE(logits(θ, x), y) + μ/2 ‖θ − θ_t‖²

with decoupled weight decay, linear warm-up and a cosine to zero. The head is the model's and stays frozen. μ > 0 is
FedProx (Li et al. 2020, Federated Optimization in Heterogeneous Networks, eq. 2); μ = 0 is plain local training.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..objectives.models import Model
from ..objectives.task import Indices, Task
from .errors import FederationError
from .replies import Weights

Losses = Callable[[int, float], Any]
"""(epoch, its mean training loss)"""


@dataclass(frozen=True)
class Training:
    """Settings of a client's training; the defaults are those of continual federated merging with CLIP ViT-B/32.

    epochs: passes over the data in a round. batch: samples a step; the last batch of an epoch may be smaller.
    lr: learning rate after `warmup` steps of a linear rise; a cosine takes it to 0 at the round's last step.
    weight_decay: decoupled, of every trained tensor. proximal: μ of FedProx. max_grad_norm: longer gradients are
    shortened to it. seed: of the order of the samples, with the client's name, the round and the epoch.

    AdamW normalizes what it is given, so a large μ keeps the weights within some steps of size lr of θ_t, not at θ_t.
    """

    epochs: int = 10
    batch: int = 128
    lr: float = 1e-5
    weight_decay: float = 0.1
    warmup: int = 0
    proximal: float = 0.0
    seed: int = 0
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 1), ("warmup", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise FederationError(f"Training: {name} must be an integer of at least {least}, got {value!r}.")
        for name, open_end in (("lr", True), ("weight_decay", False), ("proximal", False), ("max_grad_norm", True)):
            value = getattr(self, name)
            if name == "max_grad_norm" and value is None:
                continue
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0 or (open_end and value == 0):
                bound = "above 0" if open_end else "of at least 0"
                raise FederationError(f"Training: {name} must be a finite number {bound}, got {value!r}.")

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with at this step of so many."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1.0 + math.cos(math.pi * (step - self.warmup) / max(1, steps - self.warmup)))

    def order(self, samples: int, *, client: str, round: int, epoch: int) -> Indices:
        """In which order an epoch goes through the samples; depends on nothing else."""
        rng = np.random.default_rng([self.seed, zlib.crc32(client.encode()), round, epoch])
        return rng.permutation(samples).astype(np.int64)

    def batches(self, samples: int, *, client: str, round: int, epoch: int) -> Iterator[Indices]:
        """The batches of an epoch; each sample is in one of them."""
        order = self.order(samples, client=client, round=round, epoch=epoch)
        for start in range(0, samples, self.batch):
            yield order[start : start + self.batch]


class _PlainAttention:
    """Attention as plain matrix products while anybody wants it. The setting is the process's, not the thread's, so the
    first one in makes it and the last one out takes it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._setting = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._setting.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._setting.close()


_PLAIN = _PlainAttention()


def attention(model: Model) -> AbstractContextManager[None]:
    """The attention kernel to train with: plain matrix products for bf16 on a CPU, torch's own choice otherwise.

    The fused one takes most of the time in bf16 there: 57 ms a step with it and 27 ms without, for a tower of 1 M
    parameters on 50 images of 17 tokens (63 ms in fp32, with either).
    """
    plain = model.device.type == "cpu" and getattr(model, "precision", "fp32") == "bf16"
    return _PLAIN if plain else nullcontext()


def train(
    model: Model,
    task: Task,
    weights: Weights,
    options: Training,
    *,
    round: int,
    client: str,
    losses: Losses | None = None,
) -> tuple[dict[str, Tensor], int]:
    """A client's model after a round of training from these weights, and the number of steps that it took.

    The weights are not changed, and the result has their names, dtypes and devices: half precision is trained in
    float32 and rounded at the end. What is no parameter of the model (integers, running statistics) comes back as is.
    A `CLIP` with precision='bf16' computes in half precision, on weights, gradients and moments in float32.
    Raises FederationError for a task without labels or weights without parameters, DataError for weights and tasks that
    the model cannot take.
    """
    if task.labels is None:
        raise FederationError(
            f"client {client!r}: task {task.name!r} has no labels, so there is nothing to train on; give the labels, "
            "or leave the client out."
        )
    model.check(weights)
    model.check_task(task)
    with torch.inference_mode(False), torch.enable_grad(), attention(model):
        current: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            precise = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            dtype = precise if tensor.is_floating_point() else tensor.dtype
            current[name] = tensor.detach().to(model.device, dtype, copy=True)
        trained = {
            n: t.requires_grad_() for n, t in current.items() if t.is_floating_point() and model.differentiable(n)
        }
        if not trained:
            raise FederationError(
                f"client {client!r}: the weights hold no parameter of the model, so there is nothing to train."
            )
        steps = _descend(model, task, current, list(trained.values()), options, round, client, losses)
    found = {}
    for name, tensor in weights.items():
        result = trained[name].detach() if name in trained else tensor.detach().clone()
        found[name] = result.to(tensor.device, tensor.dtype)
    return found, steps


def _descend(
    model: Model,
    task: Task,
    current: dict[str, Tensor],
    leaves: list[Tensor],
    options: Training,
    round: int,
    client: str,
    losses: Losses | None,
) -> int:
    assert task.labels is not None
    labels = task.labels.to(model.device)
    anchor = [leaf.detach().clone() for leaf in leaves] if options.proximal else []
    fused = model.device.type in ("cpu", "cuda")  # one pass over each tensor in place of a dozen
    optimizer = torch.optim.AdamW(leaves, lr=options.lr, weight_decay=options.weight_decay, fused=fused)
    steps = options.epochs * math.ceil(len(task) / options.batch)
    step = 0
    for epoch in range(options.epochs):
        total = torch.zeros((), device=model.device)
        for rows in options.batches(len(task), client=client, round=round, epoch=epoch):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * options.factor(step, steps)
            logits = model.logits(current, task.batch(rows), task)
            loss = F.cross_entropy(logits, labels[torch.from_numpy(rows)])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if anchor:
                with torch.no_grad():
                    for leaf, start in zip(leaves, anchor, strict=True):
                        if leaf.grad is not None:
                            leaf.grad.add_(leaf - start, alpha=options.proximal)
            if options.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(leaves, options.max_grad_norm)
            optimizer.step()
            total += loss.detach() * len(rows)
            step += 1
        if losses is not None:
            losses(epoch, float(total) / len(task))
    return step
