"""What a server step is: from one round's models to the next global model.

A step sees a pool whose base is θ_t and whose experts are the clients' models, the server's own data if it has any, and
the arrays that it left in the round before. It never sees a network, a file, or the test sets.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..pools import Pool
from .errors import FederationError
from .replies import Reply, Weights
from .screening import ORIGIN, pool_of

if TYPE_CHECKING:
    from ..objectives import Model, Task

Array = np.ndarray[Any, Any]
Memory = Mapping[str, Array]


@dataclass(frozen=True)
class ServerData:
    """What the server may look at: never the clients' data, never the test sets.

    model: logits as a function of weights. tasks: few samples for each client, by its name. reference: inputs like
    those of pre-training, whose labels nobody needs. fisher: diagonal Fisher information at θ_0, by tensor, of so many
    reference inputs: fisher_samples.
    """

    model: Model | None = None
    tasks: Mapping[str, Task] = field(default_factory=dict)
    reference: Task | None = None
    fisher: Weights | None = None
    fisher_samples: int = 0


class Watch:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - began)

    def add(self, part: str, seconds: float) -> None:
        """Add seconds to a part."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds


@dataclass(frozen=True)
class Round:
    """What a step sees of a round.

    number: from 1. pool: base θ_t, experts the clients, in the order of `replies`. gram: inner products of the updates
    [n, n]. anchor: θ_t. origin: θ_0. memory: what the step left last time. progress: called as (done, in all).
    backend: of pools that are read again and again; `pool` itself streams. ledger: samples of the server that were
    taken besides those of the step's own objective.
    """

    number: int
    pool: Pool
    replies: Sequence[Reply]
    gram: Array
    anchor: Weights
    origin: Weights
    data: ServerData
    memory: Memory
    seed: int = 0
    watch: Watch = field(default_factory=Watch)
    progress: Callable[[int, int], None] | None = None
    backend: str = "streaming"
    ledger: dict[str, int] = field(default_factory=lambda: {"labelled": 0, "unlabelled": 0})

    def models(self, *, origin: bool, backend: str = "streaming") -> Pool:
        """Return a pool of the clients' models, and of θ_0 as one more expert if `origin`."""
        if not origin and backend == self.pool.backend:
            return self.pool
        if origin and ORIGIN in self.pool.names:
            raise FederationError(f"a client is called {ORIGIN!r}, which means θ_0; give it another name.")
        return pool_of(self.anchor, self.replies, backend, str(self.pool.device), self.origin if origin else None)

    @property
    def draw(self) -> int:
        """A number that no other round and no other seed has: for batches and random masks."""
        return self.seed * 100_003 + self.number


@dataclass(frozen=True)
class Proposal:
    """What a step proposes: the merged tensors, and what the record of the round says of them.

    coefficients: mean coefficient by expert, where the result is a point of the pool. details: how it was found, as
    JSON. data_used: what was consumed. memory: for the next round. bytes_up: what the clients had to send for this,
    where that is not their whole models; bytes_down: what they were sent besides the model.
    """

    weights: Weights
    coefficients: Mapping[str, float] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    data_used: Mapping[str, Any] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)
    bytes_up: int | None = None
    bytes_down: int = 0


@dataclass(frozen=True)
class ServerStep(ABC):
    """Options of a server step; see `registry` for the steps by name."""

    source: ClassVar[str] = ""

    @abstractmethod
    def propose(self, round: Round) -> Proposal:
        """Return the next global model. Raises FederationError for what the round does not allow."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the mapping from which `make_step` makes it again."""

    def check(self, data: ServerData) -> None:  # noqa: B027 (most steps need no data)
        """Raise FederationError if the step needs data that the server does not have; before the first round."""


NO_DATA: dict[str, Any] = {"labelled": 0, "unlabelled": 0, "test_inputs": False, "samples_seen": 0}
"""What a step that looks at weights alone consumes."""
