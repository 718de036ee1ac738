"""Exact order statistics of magnitudes |τ|, without sorting and without holding the experts.

Over a tensor, the k-th largest magnitude is selected from one copy of its magnitudes. Over a whole model it takes two
streaming passes: magnitudes are ordered as their bit patterns are, so a histogram of the upper 15 bits finds the bin of
the k-th largest, and a histogram of the lower 16 bits of what falls in that bin finds its value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from .sources import Scratch, Shape, TaskVectors
from .workers import Workers

LOW = 16  # bits of a magnitude that the second pass resolves
BINS = 1 << (31 - LOW)


@dataclass(frozen=True)
class Cut:
    """The k-th largest magnitude, and where its ties end: k elements exceed `value`, or equal it up to index `last`.

    k = 0 is (inf, −1), so that nothing is above; k = size keeps everything.
    """

    value: float
    last: int

    def above(self, magnitudes: torch.Tensor, start: int) -> torch.Tensor:
        """Return which of the magnitudes, elements [start, start + m) of the tensor, are among the k largest."""
        if self.last >= start + magnitudes.shape[-1] - 1:
            return magnitudes >= self.value
        if self.last < start:
            return magnitudes > self.value
        kept = magnitudes > self.value
        head = self.last - start + 1
        kept[..., :head] |= magnitudes[..., :head] == self.value
        return kept


NOTHING = Cut(float("inf"), -1)
EVERYTHING = Cut(0.0, np.iinfo(np.int64).max)


def cut(magnitudes: NDArray[np.float32], k: int) -> Cut:
    """Return the cut below the k largest of a tensor's magnitudes; of equal ones, the first are taken."""
    size = len(magnitudes)
    if k <= 0:
        return NOTHING
    if k >= size:
        return EVERYTHING
    place = size - k
    ordered = np.partition(magnitudes, place)
    value = ordered[place]
    surplus = int(np.count_nonzero(ordered[:place] == value))
    if surplus == 0:
        return Cut(float(value), size)
    ties = np.flatnonzero(magnitudes == value)
    return Cut(float(value), int(ties[len(ties) - surplus - 1]))


def tensor_cuts(
    source: TaskVectors, workers: Workers, counts: Callable[[Shape, int], Sequence[int]]
) -> dict[str, list[list[Cut]]]:
    """Return the cuts below the k largest magnitudes in each tensor, k of `counts(shape, expert)`: name -> [expert][k].

    One pass; each thread holds a tensor of the base, the magnitudes of one expert's, and a partitioned copy of them.
    """
    found: dict[str, list[list[Cut]]] = {}

    def select(name: str, scratch: Scratch) -> None:
        shape = source.shapes[name]
        size, step = prod(shape), scratch.limit
        base, magnitudes = torch.empty(size), torch.empty(size)
        for start in range(0, size, step):
            stop = min(start + step, size)
            base[start:stop] = source.base(name, start, stop, scratch)
        cuts = []
        for expert in range(source.n):
            for start in range(0, size, step):
                stop = min(start + step, size)
                for _, delta in source.deltas(name, [expert], start, stop, scratch, base[start:stop]):
                    torch.abs(delta[0], out=magnitudes[start:stop])
            cuts.append([cut(magnitudes.numpy(), k) for k in counts(shape, expert)])
        found[name] = cuts

    workers.run(list(source.shapes), select, serial=source.serial)
    return found


def model_cuts(source: TaskVectors, workers: Workers, counts: Sequence[int]) -> list[Cut]:
    """Return the k-th largest magnitude of each expert over all its tensors, k of `counts`; ties are all above it.

    Two passes; memory is a histogram an expert.
    """
    sizes = {name: prod(shape) for name, shape in source.shapes.items()}
    total_size = sum(sizes.values())
    if all(k >= total_size for k in counts):
        return [EVERYTHING] * source.n
    items = [
        (name, start, min(start + workers.limit, size))
        for name, size in sizes.items()
        for start in range(0, size, workers.limit)
    ]

    def count(bins: Callable[[int, NDArray[np.int32]], NDArray[np.int32]], width: int) -> NDArray[np.int64]:
        total = np.zeros((source.n, width), dtype=np.int64)

        def histograms(item: tuple[str, int, int], scratch: Scratch) -> NDArray[np.int64]:
            name, start, stop = item
            part = np.empty((source.n, width), dtype=np.int64)
            for positions, delta in source.deltas(name, range(source.n), start, stop, scratch):
                for row, expert in enumerate(range(source.n)[positions]):
                    part[expert] = np.bincount(bins(expert, bit_patterns(delta[row])).astype(np.intp), minlength=width)
            return part

        def add(item: tuple[str, int, int], part: NDArray[np.int64]) -> None:
            nonlocal total
            total += part

        workers.run(items, histograms, then=add, serial=source.serial)
        return total

    upper = count(lambda expert, bits: bits >> LOW, BINS)
    chosen, left = zip(*(_descend(histogram, k) for histogram, k in zip(upper, counts, strict=True)), strict=True)

    def within(expert: int, bits: NDArray[np.int32]) -> NDArray[np.int32]:
        return bits[(bits >> LOW) == chosen[expert]] & ((1 << LOW) - 1)

    lower = count(within, 1 << LOW)
    cuts = []
    for k, bin_, remaining, histogram in zip(counts, chosen, left, lower, strict=True):
        if k <= 0 or k >= total_size:
            cuts.append(NOTHING if k <= 0 else EVERYTHING)
            continue
        low, _ = _descend(histogram, remaining)
        value = np.array([(bin_ << LOW) | low], dtype=np.int32).view(np.float32)[0]
        cuts.append(Cut(float(value), EVERYTHING.last))
    return cuts


def bit_patterns(values: torch.Tensor) -> NDArray[np.int32]:
    """Return the bit patterns of |values|, which are ordered as the magnitudes are."""
    bits: NDArray[np.int32] = values.contiguous().view(torch.int32).numpy() & 0x7FFFFFFF
    return bits


def _descend(histogram: NDArray[np.int64], k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th largest value, and its rank from the top within that bin."""
    from_top = np.cumsum(histogram[::-1])
    place = min(int(np.searchsorted(from_top, k)), len(histogram) - 1)
    before = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, k - before
