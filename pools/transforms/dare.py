"""DARE: drop each entry at random and rescale the others, so that the task vector keeps its mean.

    τ̂ = m · τ / density,   m ~ Bernoulli(density);   E[τ̂] = τ,   E‖τ̂ − τ‖² = (1/density − 1) ‖τ‖²

`rescale="l1"` divides so that each tensor keeps its L1 norm instead, "none" does not rescale.
Source: Yu et al. (2024), Language Models are Super Mario: Absorbing Abilities from Homologous Models, equation 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import torch

from ..sources import Scratch, TaskVectors
from ..workers import Workers
from .random_masks import keep, random_words
from .transform import Apply, Transform, by_expert, check_densities, check_fraction, check_integer, check_word
from .trim import unchanged


@dataclass(frozen=True)
class Dare(Transform):
    """Keep each entry with probability `density`; the mask follows from `seed`, the expert's name and the tensor's."""

    density: float = 0.1
    rescale: Literal["density", "l1", "none"] = "density"
    seed: int = 0
    densities: Mapping[str, float] | None = None
    """Densities of single experts, by name, instead."""

    def __post_init__(self) -> None:
        check_fraction(self, "density")
        check_densities(self, self.densities)
        check_word(self, "rescale", ("density", "l1", "none"))
        check_integer(self, "seed", 0)

    @property
    def passes(self) -> int:  # type: ignore[override]
        """L1 norms take one pass."""
        return 1 if self.rescale == "l1" and (self.density < 1 or self.densities) else 0

    def prepare(self, source: TaskVectors, workers: Workers, names: Sequence[str]) -> Apply:
        """Find the scales of the tensors, where they are not the same for all."""
        densities = by_expert(self.density, self.densities, names)
        if all(density == 1 for density in densities):
            return unchanged
        masks = Masks(self.seed, densities, names)
        if self.rescale == "density":
            masks.scale = 1 / np.array(densities)
        elif self.rescale == "l1":
            norms = l1_norms(source, workers, masks)
            masks.scales = {
                name: np.divide(whole, kept, out=np.ones_like(whole), where=kept > 0)
                for name, (whole, kept) in norms.items()
            }
        return masks


class Masks:
    """Drops by the random masks and rescales."""

    def __init__(self, seed: int, densities: Sequence[float], names: Sequence[str]) -> None:
        self._seed = seed
        self._densities = densities
        self._names = tuple(names)
        self.scale = np.ones(len(self._names))
        self.scales: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}

    def __call__(
        self, name: str, start: int, base: torch.Tensor | None, deltas: torch.Tensor, experts: Sequence[int]
    ) -> torch.Tensor:
        """Drop and rescale."""
        scale = self.scales.get(name, self.scale)
        result = torch.empty_like(deltas)
        for row, expert in enumerate(experts):
            torch.mul(deltas[row], self.mask(name, start, deltas.shape[1], expert), out=result[row])
            if scale[expert] != 1:
                result[row] *= float(scale[expert])
        return result

    def mask(self, name: str, start: int, size: int, expert: int) -> torch.Tensor:
        """Return which of the elements [start, start + size) are kept."""
        words = random_words(self._seed, self._names[expert], name, start, start + size)
        return torch.from_numpy(keep(words, self._densities[expert]))


def l1_norms(
    source: TaskVectors, workers: Workers, masks: Masks
) -> dict[str, tuple[np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.float64]]]]:
    """Return the L1 norms [n] of each tensor before and after the masks, in one pass."""
    found = {name: (np.zeros(source.n), np.zeros(source.n)) for name in source.shapes}
    items = [
        (name, start, min(start + workers.limit, prod(shape)))
        for name, shape in source.shapes.items()
        for start in range(0, prod(shape), workers.limit)
    ]

    def measure(item: tuple[str, int, int], scratch: Scratch) -> list[tuple[float, float]]:
        name, start, stop = item
        part = []
        for positions, delta in source.deltas(name, range(source.n), start, stop, scratch):
            for row, expert in enumerate(range(source.n)[positions]):
                size = delta[row].abs()
                kept = size * masks.mask(name, start, stop - start, expert)
                part.append((float(size.sum(dtype=torch.float64)), float(kept.sum(dtype=torch.float64))))
        return part

    def add(item: tuple[str, int, int], part: list[tuple[float, float]]) -> None:
        whole, kept = found[item[0]]
        whole += [norm for norm, _ in part]
        kept += [norm for _, norm in part]

    workers.run(items, measure, then=add, serial=source.serial)
    return found
