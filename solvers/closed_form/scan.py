"""Scan a merge over a grid of its options and keep the best on validation data: one merged model in memory at a time.

The choice is made on the data of `score`, so its value there is optimistic: report another split's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...pools import Pool, Weights
from ..errors import OptionError, unknown
from .driver import merge_weights
from .merge import Merge

if TYPE_CHECKING:
    from ...pools.statistics import Statistics

SCALES = ("scale", "alpha", "t")  # options that say how far to go, under the names that methods have for them
DEFAULT_GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Trial:
    """One point of the grid: the options that were set, and the score of each task (higher is better)."""

    options: Mapping[str, float]
    scores: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean over the tasks; what the scan maximizes."""
        return math.fsum(self.scores.values()) / len(self.scores)


@dataclass(frozen=True)
class Scan:
    """All trials in the order of the grid, and the merge with the options of the best (of equal ones, the first)."""

    trials: tuple[Trial, ...]
    merge: Merge

    @property
    def best(self) -> Trial:
        """The trial of highest mean score."""
        return max(self.trials, key=lambda trial: trial.mean)


def scale_option(merge: Merge | type[Merge]) -> str | None:
    """Return the option that says how far this merge goes from the base, or None if it has none."""
    names = [field.name for field in dataclasses.fields(merge)]
    return next((name for name in SCALES if name in names), None)


def scan(
    pool: Pool,
    merge: Merge,
    grid: Mapping[str, Sequence[float]],
    score: Callable[[Weights], Mapping[str, float]],
    statistics: Statistics | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Merge at every point of the grid (the product of the options' values) and score the merged tensors.

    score(weights) -> a number for each task. progress(points done, points in all).
    Raises OptionError for options that the merge lacks and values that it refuses, before anything is merged.
    """
    known = [field.name for field in dataclasses.fields(merge)]
    for name, values in grid.items():
        if name not in known:
            raise unknown(f"option of {type(merge).__name__} to scan:", name, known)
        if not values:
            raise OptionError(f"The grid of {name!r} is empty; give at least one value.")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    merges = [dataclasses.replace(merge, **point) for point in points]
    trials = []
    for done, (point, candidate) in enumerate(zip(points, merges, strict=True), start=1):
        trials.append(Trial(point, dict(score(merge_weights(pool, candidate, statistics)))))
        if progress is not None:
            progress(done, len(points))
    found = Scan(tuple(trials), merge)
    return dataclasses.replace(found, merge=dataclasses.replace(merge, **found.best.options))
