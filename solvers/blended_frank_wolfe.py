"""Blended pairwise Frank-Wolfe: pairwise steps inside the active set while they pay, else a step to a new vertex.

    A, B = argmax, argmin over the active set ⟨V_k, S⟩,   V = argmin ⟨V, S⟩
    D = B − A with γ ≤ w_A   if ⟨S, A − B⟩ ≥ ⟨S, Λ − V⟩,   else D = V − Λ with γ ≤ 1

No swap steps: a vertex enters only by a full Frank-Wolfe step, so active sets stay small, and the rate is linear with
a better constant than that of pairwise steps. The first choice among the variants here.
Source: Tsuji, Tanaka and Pokutta (2022), Pairwise Conditional Gradients without Swap Steps, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .active_set import ORACLE, ActiveSetSolver, Choice, highest

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class BlendedPairwiseFrankWolfe(ActiveSetSolver):
    """Blended pairwise Frank-Wolfe: rebalances the active vertices, and fetches a new one when that pays more.

    step_rule: any that descends.
    """

    source: ClassVar[str] = "Tsuji, Tanaka and Pokutta (2022), algorithm 1"

    def choose(self, products: Array, weights: Array, current: float, best: float) -> Choice:
        """Pairwise inside the set if its gap is the larger one."""
        worst, local = highest(products, weights), highest(-products, weights)
        if worst != local and float(products[worst] - products[local]) >= current - best:
            return Choice(local, worst, "pairwise")
        return Choice(ORACLE, None, "toward")
