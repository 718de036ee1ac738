"""Transforms that compare experts entry by entry: sign election, and the consensus of TALL masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..sources import TaskVectors
from ..workers import Workers
from .transform import Apply, Transform, check_fraction, check_integer


@dataclass(frozen=True)
class Elect(Transform):
    """Keep the entries whose sign is that of the sum over experts: τ̂_i = τ_i · 1[sgn τ_i = sgn Σ_j τ_j].

    Where the sum is 0 nothing is kept. After `trim`, this makes of a pool the one that TIES averages.
    Source: Yadav et al. (2023), TIES-Merging, section 4.
    """

    joint: ClassVar[bool] = True

    def prepare(self, source: TaskVectors, workers: Workers, names: Sequence[str]) -> Apply:
        """Nothing is needed of whole models."""
        return _elect


def _elect(
    name: str, start: int, base: torch.Tensor | None, deltas: torch.Tensor, experts: Sequence[int]
) -> torch.Tensor:
    return deltas * (deltas.sign() == deltas.sum(0).sign())


def tall_masks(deltas: torch.Tensor, tall: float, scale: float) -> torch.Tensor:
    """Return the TALL masks [n, m]: |τ_i| ≥ tall · |scale · Σ_j τ_j − τ_i| (equation 4)."""
    return deltas.abs() >= tall * (scale * deltas.sum(0) - deltas).abs()


@dataclass(frozen=True)
class Consensus(Transform):
    """Keep the entries that at least `agree` experts need, by the TALL masks of the pool (equation 6).

    Source: Wang et al. (2024), Localizing Task Information for Improved Model Merging and Compression.
    """

    joint: ClassVar[bool] = True

    tall: float = 0.4
    agree: int = 2
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_fraction(self, "tall", high=float("inf"))
        check_integer(self, "agree", 1)
        check_fraction(self, "scale", high=float("inf"))

    def prepare(self, source: TaskVectors, workers: Workers, names: Sequence[str]) -> Apply:
        """Nothing is needed of whole models."""

        def apply(
            name: str, start: int, base: torch.Tensor | None, deltas: torch.Tensor, experts: Sequence[int]
        ) -> torch.Tensor:
            return deltas * (tall_masks(deltas, self.tall, self.scale).sum(0) >= self.agree)

        return apply
