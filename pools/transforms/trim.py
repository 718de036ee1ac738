"""Trim: keep the entries of largest magnitude and set the others to 0.

    τ̂ = τ · 1[|τ| among the k largest],   k = density · size

`per="model"` counts over all tensors of an expert, those that no expert has changed too, as the paper and its code do:
int(density · size) + 1 entries, and what ties with the last of them. `per="tensor"` keeps exactly int(density · size),
at least 1, of each tensor.
Source: Yadav et al. (2023), TIES-Merging: Resolving Interference When Merging Models, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from ..magnitudes import Cut, model_cuts, tensor_cuts
from ..sources import TaskVectors
from ..workers import Workers
from .transform import Apply, Transform, by_expert, check_densities, check_fraction, check_word


@dataclass(frozen=True)
class Trim(Transform):
    """Keep the fraction `density` of entries that are largest in magnitude, per "tensor" or per "model"."""

    density: float = 0.2
    per: Literal["tensor", "model"] = "tensor"
    densities: Mapping[str, float] | None = None
    """Densities of single experts, by name, instead."""

    def __post_init__(self) -> None:
        check_fraction(self, "density")
        check_densities(self, self.densities)
        check_word(self, "per", ("tensor", "model"))

    @property
    def passes(self) -> int:  # type: ignore[override]
        """One pass for thresholds of tensors, two for those of a model."""
        return 0 if self.density == 1 and not self.densities else 1 if self.per == "tensor" else 2

    def prepare(self, source: TaskVectors, workers: Workers, names: Sequence[str]) -> Apply:
        """Find the thresholds."""
        densities = by_expert(self.density, self.densities, names)
        if all(density == 1 for density in densities):
            return unchanged
        if self.per == "model":
            total = source.frozen + sum(prod(shape) for shape in source.shapes.values())
            whole = model_cuts(source, workers, [int(density * total) + 1 for density in densities])
            return Threshold(dict.fromkeys(source.shapes, whole))
        cuts = tensor_cuts(source, workers, lambda shape, expert: [max(1, int(densities[expert] * prod(shape)))])
        return Threshold({name: [found for (found,) in by_expert] for name, by_expert in cuts.items()})


class Threshold:
    """Keeps what is above a cut for each tensor and expert."""

    def __init__(self, cuts: dict[str, list[Cut]]) -> None:
        self._cuts = cuts

    def __call__(
        self, name: str, start: int, base: torch.Tensor | None, deltas: torch.Tensor, experts: Sequence[int]
    ) -> torch.Tensor:
        """Set the entries below the cut to 0."""
        magnitudes = deltas.abs()
        result = torch.empty_like(deltas)
        for row, expert in enumerate(experts):
            torch.mul(deltas[row], self._cuts[name][expert].above(magnitudes[row], start), out=result[row])
        return result


def unchanged(
    name: str, start: int, base: torch.Tensor | None, deltas: torch.Tensor, experts: Sequence[int]
) -> torch.Tensor:
    """Keep everything."""
    return deltas
