"""One task's data dealt out to several clients: evenly, or skewed by label.

    p_c ~ Dir(α, .., α) over the clients, for every class c; client i gets the share p_ci of the class.

Large α: every client sees the classes as they are. Small α: every class goes to one client, so that most clients know
few. Source: Hsu, Qi and Brown (2019), Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification; the split class by class, which uses every sample once, is that of Yurochkin et al. (2019), Bayesian
Nonparametric Federated Learning of Neural Networks, section 4.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..objectives.task import Indices, Task
from .errors import FederationError


def dirichlet(task: Task, clients: int, alpha: float, seed: int, minimum: int = 1) -> list[Task]:
    """The task split into one for each client, by label: every sample is in exactly one of them.

    minimum: clients that got fewer samples take them, at random, from whoever has most.
    The parts are called NAME-0, NAME-1, ... and keep the task's classes and its head.
    Raises FederationError for a task without labels, and for more clients than the samples suffice for.
    """
    _check(task, clients, seed, minimum)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise FederationError(
            f"dirichlet: alpha must be a finite number above 0, got {alpha!r}; for the same data everywhere take iid."
        )
    if task.labels is None:
        raise FederationError(f"dirichlet: task {task.name!r} has no labels to split by; take iid.")
    rng = np.random.default_rng([seed, 0xD1E])
    labels = task.labels.numpy()
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, float(alpha)))
        ends = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, ends), strict=True):
            part.extend(piece.tolist())
    for part in parts:
        while len(part) < minimum:
            most = max(parts, key=len)
            part.append(most.pop(int(rng.integers(len(most)))))
    return _tasks(task, [np.sort(np.array(part, dtype=np.int64)) for part in parts])


def iid(task: Task, clients: int, seed: int) -> list[Task]:
    """The task split at random into one for each client; their sizes differ by one sample at most."""
    _check(task, clients, seed, 1)
    order = np.random.default_rng([seed, 0x11D]).permutation(len(task))
    return _tasks(task, [np.sort(part) for part in np.array_split(order, clients)])


def _tasks(task: Task, parts: list[Indices]) -> list[Task]:
    digits = len(str(len(parts) - 1))
    # The parts have names of their own; the head is found by the name in the class texts, which stays.
    whole = replace(task, parts=task.texts)
    return [replace(whole.take(part), name=f"{task.name}-{i:0{digits}d}") for i, part in enumerate(parts)]


def _check(task: Task, clients: int, seed: int, minimum: int) -> None:
    for name, value, least in (("clients", clients, 1), ("minimum", minimum, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise FederationError(f"a partition's {name} must be an integer of at least {least}, got {value!r}.")
    if clients * minimum > len(task):
        raise FederationError(
            f"task {task.name!r} has {len(task)} samples, too few for {clients} clients with at least {minimum} each; "
            f"take at most {len(task) // minimum} clients."
        )
