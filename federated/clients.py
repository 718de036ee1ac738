"""Clients that live in this process: one task each, trained on in place of a device far away."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..objectives.models import Model
from ..objectives.statistics import fisher_diagonal
from ..objectives.task import Task
from .errors import FederationError
from .replies import Client, Reply, Weights
from .training import Training, train

Progress = Callable[[Reply, int, int], Any]
"""(reply that just came, clients done, of how many)"""


class TaskClient:
    """A client with the data of one task.

    model: what computes logits; it may be shared, since it keeps no weights. A task that `objectives.joint` made is
        classified among the classes of all clients, by their frozen text heads, one after the other.
    limit: train on at most so many samples, balanced over the classes, the same ones in every round.
    fisher: send the diagonal of the Fisher matrix at the trained model, estimated on so many samples of the data with
        one label each drawn from the predictions.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        task: Task,
        training: Training | None = None,
        *,
        limit: int | None = None,
        fisher: int | None = None,
    ) -> None:
        if task.labels is None:
            raise FederationError(
                f"client {name!r}: task {task.name!r} has no labels, so there is nothing to train on; give the labels, "
                "or leave the client out."
            )
        for option, value in (("limit", limit), ("fisher", fisher)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise FederationError(f"client {name!r}: {option} must be an integer of at least 1, got {value!r}.")
        self.name = name
        self.model = model
        self.training = Training() if training is None else training
        self.task = task if limit is None or limit >= len(task) else task.subset(limit, self.training.seed)
        self.fisher = fisher

    @property
    def samples(self) -> int:
        """Number of samples that it trains on."""
        return len(self.task)

    def fit(self, weights: Weights, round: int) -> Reply:
        """Train from these weights, which are not changed; metrics: mean loss of the first and the last epoch."""
        began = time.perf_counter()
        losses: list[float] = []
        found, steps = train(
            self.model,
            self.task,
            weights,
            self.training,
            round=round,
            client=self.name,
            losses=lambda _, loss: losses.append(loss),
        )
        fisher = None
        if self.fisher is not None:
            full = {n: t.float() if t.is_floating_point() and t.itemsize < 4 else t for n, t in found.items()}
            seed = self.training.seed
            kept = {"estimator": "sampled", "samples": self.fisher, "seed": seed}
            fisher = fisher_diagonal(self.model, full, self.task, **kept).tensors
        return Reply(
            self.name,
            found,
            round,
            samples=self.samples,
            steps=steps,
            seconds=time.perf_counter() - began,
            metrics={"first_loss": losses[0], "last_loss": losses[-1]},
            fisher=fisher,
        )


def fit_all(
    clients: Sequence[Client], weights: Weights, round: int, *, progress: Progress | None = None
) -> list[Reply]:
    """The replies of all clients, in their order. A client that raises has a reply without weights that says why."""
    replies = []
    for client in clients:
        began = time.perf_counter()
        try:
            reply = client.fit(weights, round)
        except Exception as error:
            seconds = time.perf_counter() - began
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            reply = Reply(client.name, None, round, samples=client.samples, steps=0, seconds=seconds, error=text)
        replies.append(reply)
        if progress is not None:
            progress(reply, len(replies), len(clients))
    return replies
