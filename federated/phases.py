"""How much the clients' updates interfere, and a step that sparsifies only as long as they do.

cosine: mean |cos(τ_i, τ_j)| over pairs of clients. conflict: 1 − Σ_p |Σ_i τ_ip| / Σ_p Σ_i |τ_ip|, the share of movement
that cancels: 0 where all signs agree.

Task vectors of late rounds are nearly orthogonal, and sparsifying them only loses what they hold
(Kubota et al. 2025, Analysis of Model Merging Methods for Continual Updating of Foundation Models, section 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from ..pools import Pool
from ..pools.sources import Scratch
from ..solvers.closed_form import make_merge
from ..solvers.errors import check_choice, check_number
from ..solvers.problem import cosines
from .merging import MergeStep
from .step import Proposal, Round, ServerStep

Array = np.ndarray[Any, Any]
FIRST = "interference"


def mean_cosine(gram: Array) -> float:
    """Return the mean |cosine| over pairs, from inner products [n, n]; 0 for one client."""
    n = len(gram)
    if n < 2:
        return 0.0
    return float((np.abs(cosines(gram)).sum() - n) / (n * (n - 1)))


def conflict(pool: Pool) -> float:
    """Return the share of movement that cancels; one pass over the pool."""
    source, workers = pool.stream()
    sums = np.zeros(2)
    limit = workers.limit
    items = [
        (name, start, min(start + limit, int(np.prod(shape))))
        for name, shape in pool.tensors.items()
        for start in range(0, int(np.prod(shape)), limit)
    ]

    def measure(item: tuple[str, int, int], scratch: Scratch) -> Array:
        name, start, stop = item
        total = torch.zeros(stop - start)
        moved = 0.0
        for _, deltas in source.deltas(name, range(pool.n), start, stop, scratch):
            total += deltas.sum(dim=0)
            moved += float(deltas.abs().sum(dtype=torch.float64))
        return np.array([float(total.abs().sum(dtype=torch.float64)), moved])

    def add(_: Any, found: Array) -> None:
        nonlocal sums
        sums = sums + found

    workers.run(items, measure, then=add, serial=source.serial)
    return 0.0 if sums[1] == 0 else float(1 - sums[0] / sums[1])


@dataclass(frozen=True)
class ByPhase(ServerStep):
    """A sparsifying merge whose density grows to 1 as the interference falls.

        density_t = 1 − (1 − density) · min(1, I_t / I_1)

    method: a closed-form merge with a `density`, such as "ties" or "dare"; options: its other options; density: that of
    the first round; measure: "cosine" or "conflict".
    """

    method: str = "ties"
    density: float = 0.2
    measure: str = "cosine"
    options: Mapping[str, Any] = field(default_factory=dict)
    source: ClassVar[str] = "Kubota et al. (2025), section 5, which asks for it"

    def __post_init__(self) -> None:
        check_number(self, "density", 0, 1, closed="right")
        check_choice(self, "measure", ("cosine", "conflict"))
        self.merge_at(self.density)

    def merge_at(self, density: float) -> MergeStep:
        """Return the step at a density. Raises OptionError for a method that has none."""
        return MergeStep(make_merge({"name": self.method, **self.options, "density": density}))

    def propose(self, round: Round) -> Proposal:
        """Measure, set the density, merge."""
        with round.watch.timed("read"):
            now = mean_cosine(round.gram) if self.measure == "cosine" else conflict(round.pool)
        first = float(round.memory.get(FIRST, 0.0)) or now  # of the first round with any: one client has none
        share = 1.0 if first == 0 else min(1.0, now / first)
        density = self.density + (1 - self.density) * (1 - share)  # exactly what is given where nothing has fallen
        inner = self.merge_at(density).propose(round)
        details = {**inner.details, "density": density, "interference": now}
        return Proposal(inner.weights, inner.coefficients, details, inner.data_used, {FIRST: np.array(first)})

    def describe(self) -> dict[str, Any]:
        """Return every option."""
        return {
            "name": "by-phase",
            "method": self.method,
            "density": self.density,
            "measure": self.measure,
            "options": dict(self.options),
        }
