"""What travels from a client to the server, and what a client is.

reply = client.fit(weights, round)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Protocol

from torch import Tensor

Weights = Mapping[str, Tensor]
"""Tensors by name: one model."""


@dataclass(frozen=True)
class Reply:
    """What one client sends after its local training.

    weights: its model θ̂, a state dict or the path of a checkpoint; None with an `error` that says why there is none.
    round: number of the round whose model it was trained from. samples: size of its data. steps: optimizer steps that
    it took. seconds: what it took. metrics: what it measured. fisher: diagonal Fisher information at θ̂, by tensor.
    """

    client: str
    weights: Weights | str | PathLike[str] | None
    round: int
    samples: int = 1
    steps: int = 1
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    fisher: Weights | None = None
    error: str | None = None


class Client(Protocol):
    """Holds data that stay with it, and trains on them."""

    @property
    def name(self) -> str:
        """Its name, unique in the federation."""

    @property
    def samples(self) -> int:
        """Size of its training set."""

    def fit(self, weights: Weights, round: int) -> Reply:
        """Train from these weights, which are not changed, and return the result."""
