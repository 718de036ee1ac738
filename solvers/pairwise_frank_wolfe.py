"""Pairwise Frank-Wolfe: move weight straight from the worst active vertex to the best vertex of all.

    D = V − A,   V = argmin ⟨V, S⟩,   A = argmax over the active set ⟨V_k, S⟩,   0 ≤ γ ≤ w_A

The other weights stay as they are, so a step reads the experts of two vertices. Linear rate on strongly convex
objectives over polytopes; in practice faster than away steps, although swaps (A goes, V comes) may waste steps.
Source: Lacoste-Julien and Jaggi (2015), algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .active_set import ORACLE, ActiveSetSolver, Choice, highest

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PairwiseFrankWolfe(ActiveSetSolver):
    """Pairwise Frank-Wolfe: weight goes from the worst active vertex to the best one.

    step_rule: any that descends.
    """

    source: ClassVar[str] = "Lacoste-Julien and Jaggi (2015), algorithm 2"

    def choose(self, products: Array, weights: Array, current: float, best: float) -> Choice:
        """From the worst to the oracle's vertex."""
        return Choice(ORACLE, highest(products, weights), "pairwise")
