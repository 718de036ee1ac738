"""Away-step Frank-Wolfe: toward the best vertex, or away from the worst active one, whichever descends faster.

    V = argmin ⟨V, S⟩,  A = argmax over the active set ⟨V_k, S⟩
    D = V − Λ with γ ≤ 1   if ⟨S, Λ − V⟩ ≥ ⟨S, A − Λ⟩,   else D = Λ − A with γ ≤ w_A / (1 − w_A)

A step that goes as far as it can drops a vertex. Linear rate on strongly convex objectives over polytopes, where the
vanilla method zig-zags. An away step reads the one vertex that it leaves. Choose it for its sparse iterates.
Source: Guélat and Marcotte (1986); Lacoste-Julien and Jaggi (2015), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .active_set import ORACLE, ActiveSetSolver, Choice, highest

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class AwayFrankWolfe(ActiveSetSolver):
    """Away-step Frank-Wolfe: drops vertices that turned out bad, and so converges linearly.

    step_rule: any that descends.
    """

    source: ClassVar[str] = "Guélat and Marcotte (1986); Lacoste-Julien and Jaggi (2015), algorithm 1"

    def choose(self, products: Array, weights: Array, current: float, best: float) -> Choice:
        """Take the steeper of the two directions."""
        worst = highest(products, weights)
        if current - best >= float(products[worst]) - current:
            return Choice(ORACLE, None, "toward")
        return Choice(None, worst, "away")
