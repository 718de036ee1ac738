"""DELLA's MagPrune: drop entries at random, the small ones of a row more often, and rescale the others.

    p = density − ε/2 + ε · rank / m   is the probability that an entry is kept, τ̂ = Bernoulli(p) · τ / p

`rank` counts the m entries of the row (output unit) from the smallest magnitude, 1 to m; a vector is one row.
`rescale="l1"` multiplies each tensor so that it keeps its L1 norm instead, "none" does not rescale.
`window="symmetric"` lets p run over density ± ε, with the row's ends included, as mergekit does.
Source: Deep, Bhardwaj and Poria (2024), DELLA-Merging: Reducing Interference through Magnitude-Based Sampling,
section 3.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import PoolError
from ..sources import Scratch, TaskVectors
from ..workers import Workers
from .random_masks import random_words
from .transform import Apply, Prepared, Transform, by_expert, check_densities, check_fraction, check_integer, check_word
from .trim import unchanged


@dataclass(frozen=True)
class Della(Transform):
    """Keep entries with probabilities of mean `density` that rise with the rank of the magnitude in the row."""

    by_row: ClassVar[bool] = True

    density: float = 0.5
    epsilon: float = 0.2
    rescale: Literal["probability", "l1", "none"] = "probability"
    window: Literal["paper", "symmetric"] = "paper"
    seed: int = 0
    densities: Mapping[str, float] | None = None
    """Densities of single experts, by name, instead."""

    def __post_init__(self) -> None:
        check_fraction(self, "density")
        check_densities(self, self.densities)
        check_fraction(self, "epsilon", open_low=False)
        check_word(self, "rescale", ("probability", "l1", "none"))
        check_word(self, "window", ("paper", "symmetric"))
        check_integer(self, "seed", 0)
        half = self.epsilon / 2 if self.window == "paper" else self.epsilon
        for density in (self.density, *(self.densities or {}).values()):
            if density < 1 and not (density - half >= 0 and density + half <= 1):
                raise PoolError(
                    f"The 'epsilon' parameter of Della must leave probabilities in [0, 1]: density {density} ± "
                    f"{half} does not. Take a smaller epsilon."
                )

    @property
    def passes(self) -> int:  # type: ignore[override]
        """L1 norms take two passes, one before and one after the dropping."""
        return 2 if self.rescale == "l1" and (self.density < 1 or self.densities) else 0

    def prepare(self, source: TaskVectors, workers: Workers, names: Sequence[str]) -> Apply:
        """Find the scales of the tensors if they keep their L1 norms; ranks are within rows."""
        densities = by_expert(self.density, self.densities, names)
        if all(density == 1 for density in densities):
            return unchanged
        ranked = Ranked(self, densities, tuple(names), dict(source.shapes.items()))
        if self.rescale == "l1":
            dropped = Prepared(source, workers, dataclasses.replace(self, rescale="none"), names)
            whole, kept = l1_norms(source, workers), l1_norms(dropped, workers)
            ranked.scales = {
                name: np.divide(whole[name], kept[name], out=np.ones(source.n), where=kept[name] > 0) for name in whole
            }
        return ranked

    def probabilities(self, magnitudes: torch.Tensor, density: float) -> torch.Tensor:
        """Return the probability of each entry [rows, m] to be kept; of equal magnitudes the first ranks lower."""
        order = magnitudes.argsort(dim=1, stable=True)
        count = magnitudes.shape[1]
        if self.window == "paper":
            lowest, step = density - self.epsilon / 2 + self.epsilon / count, self.epsilon / count
        else:
            lowest, step = density - self.epsilon, 2 * self.epsilon / max(1, count - 1)
            if count == 1:
                lowest = density
        values = (lowest + step * torch.arange(count, dtype=torch.float64)).float()
        return torch.empty_like(magnitudes).scatter_(1, order, values.expand_as(magnitudes))


class Ranked:
    """Drops rows' entries by rank and chance, and rescales."""

    def __init__(
        self, options: Della, densities: Sequence[float], names: Sequence[str], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        self._options = options
        self._densities = densities
        self._names = names
        self._shapes = shapes
        self.scales: dict[str, NDArray[np.float64]] = {}

    def __call__(
        self, name: str, start: int, base: torch.Tensor | None, deltas: torch.Tensor, experts: Sequence[int]
    ) -> torch.Tensor:
        """Drop and rescale whole rows."""
        shape = self._shapes[name]
        width = prod(shape[1:]) if len(shape) > 1 else prod(shape)
        result = torch.empty_like(deltas)
        for row, expert in enumerate(experts):
            if self._densities[expert] == 1:
                result[row] = deltas[row]
                continue
            values = deltas[row].view(-1, width)
            probability = self._options.probabilities(values.abs(), self._densities[expert])
            words = random_words(self._options.seed, self._names[expert], name, start, start + values.numel())
            chance = torch.from_numpy(words.astype("float64")).view_as(values) * 2.0**-32
            kept = values * (chance < probability)
            if self._options.rescale == "probability":
                kept = torch.where(probability > 0, kept / probability, 0.0)
            elif name in self.scales:
                kept *= float(self.scales[name][expert])
            result[row] = kept.view(-1)
        return result


def l1_norms(source: TaskVectors, workers: Workers) -> dict[str, NDArray[np.float64]]:
    """Return the L1 norms [n] of each tensor, in one pass over pieces of whole rows, where rows are not too long."""
    found = {name: np.zeros(source.n) for name in source.shapes}
    items = []
    for name, shape in source.shapes.items():
        size, width = prod(shape), prod(shape[1:]) if len(shape) > 1 else prod(shape)
        step = workers.limit // width * width if 0 < width <= workers.limit else workers.limit
        items += [(name, start, min(start + step, size)) for start in range(0, size, step)]

    def measure(item: tuple[str, int, int], scratch: Scratch) -> NDArray[np.float64]:
        part = np.zeros(source.n)
        for positions, delta in source.deltas(item[0], range(source.n), item[1], item[2], scratch):
            part[positions] = delta.abs().sum(1, dtype=torch.float64).numpy()
        return part

    def add(item: tuple[str, int, int], part: NDArray[np.float64]) -> None:
        found[item[0]] += part

    workers.run(items, measure, then=add, serial=source.serial)
    return found
