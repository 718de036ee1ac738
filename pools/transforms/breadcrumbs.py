"""Breadcrumbs: drop the largest entries of each tensor, which are outliers, and the smallest, which are noise.

    τ̂ = τ · 1[top · size ≤ rank of |τ| from the largest < (top + density) · size]

Where top + density exceeds 1, fewer of the largest are dropped, so that the density holds.
Source: Davari and Belilovsky (2024), Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks, equation 2
(there β = 1 − top − density is the fraction of small entries that is dropped, and γ = 1 − top).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..magnitudes import Cut, tensor_cuts
from ..sources import Shape, TaskVectors
from ..workers import Workers
from .transform import Apply, Transform, by_expert, check_densities, check_fraction
from .trim import unchanged


@dataclass(frozen=True)
class Breadcrumbs(Transform):
    """Keep the fraction `density` of each tensor's entries, next in magnitude to the fraction `top` of largest ones."""

    density: float = 0.14
    top: float = 0.01
    densities: Mapping[str, float] | None = None
    """Densities of single experts, by name, instead."""

    def __post_init__(self) -> None:
        check_fraction(self, "density")
        check_densities(self, self.densities)
        check_fraction(self, "top", open_low=False)

    @property
    def passes(self) -> int:  # type: ignore[override]
        """One pass for the thresholds."""
        return 0 if self.density == 1 and not self.densities else 1

    def prepare(self, source: TaskVectors, workers: Workers, names: Sequence[str]) -> Apply:
        """Find the two thresholds of each tensor."""
        densities = by_expert(self.density, self.densities, names)
        if all(density == 1 for density in densities):
            return unchanged
        return Band(tensor_cuts(source, workers, lambda shape, expert: self._counts(shape, densities[expert])))

    def _counts(self, shape: Shape, density: float) -> Sequence[int]:
        """Return how many entries are above the lower threshold, and how many above the upper one."""
        size = prod(shape)
        kept = int(density * size)
        dropped = min(int(self.top * size), size - kept)
        return [kept + dropped, dropped]


class Band:
    """Keeps what is above the first cut and not above the second."""

    def __init__(self, cuts: dict[str, list[list[Cut]]]) -> None:
        self._cuts = cuts

    def __call__(
        self, name: str, start: int, base: torch.Tensor | None, deltas: torch.Tensor, experts: Sequence[int]
    ) -> torch.Tensor:
        """Set the other entries to 0."""
        magnitudes = deltas.abs()
        result = torch.empty_like(deltas)
        for row, expert in enumerate(experts):
            lower, upper = self._cuts[name][expert]
            band = lower.above(magnitudes[row], start) & ~upper.above(magnitudes[row], start)
            torch.mul(deltas[row], band, out=result[row])
        return result
