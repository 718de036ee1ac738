"""Lazy Frank-Wolfe: a vertex met before is good enough while it promises progress; a new one enters when none does.

    V = a cached vertex with ⟨S, Λ − V⟩ ≥ Φ,  else argmin ⟨V, S⟩ if that has it,  else Φ ← Φ/2 and again

Weak separation was made for oracles that cost much. Here the scores of all experts come with every gradient, the
certificate asks the oracle in every iteration, and that is mostly a row-wise argmin: no time is saved in it. What is
saved is reading and density: steps toward a vertex met before touch experts that are in the merge already, fewer
experts enter, and with a streaming pool fewer are read to make the next weights. The gap is exact all the same.
Source: Braun, Pokutta and Zink (2017), Lazifying Conditional Gradient Algorithms, algorithm 7 (parameter-free).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .active_set import compact
from .domains import Domain
from .errors import check_number
from .problem import Evaluation, MatrixProblem
from .solver import Clock, Solver, State, Step, move, require_oracle, require_traits
from .step_rules import SCHEDULE, make_step_rule

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LazyFrankWolfe(Solver):
    """Lazy Frank-Wolfe: keeps to vertices it has met while they promise enough, for merges of few experts.

    step_rule: any that descends; shrink: factor of Φ when neither cache nor oracle has a vertex that promises it.
    """

    step_rule: Any = "line-search"
    shrink: float = 0.5
    source: ClassVar[str] = "Braun, Pokutta and Zink (2017, 2019), algorithm 7"

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_rule", make_step_rule(self.step_rule))
        reason = (
            "a cached vertex promises less than the best one, and only a step that is fitted to the objective turns "
            "that into progress; use 'line-search', 'secant', 'backtracking' or 'short-step'"
        )
        require_traits(self, self.step_rule, {SCHEDULE: reason})
        check_number(self, "shrink", 0, 1, closed="neither")

    def check(self, problem: MatrixProblem) -> None:
        """Refuse domains without an oracle."""
        require_oracle(problem)

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Separate weakly, and move toward what was found."""
        domain, point, scores = problem.domain, state.coefficients, evaluation.scores
        memory = dict(state.memory)
        key = compact(domain.atom(scores), problem.n)
        cache = memory.get("cache", np.empty((0, *key.shape), key.dtype))
        current = float(np.sum(point * scores))
        gap = current - float(domain.products(key[None], scores)[0])
        target = float(memory["target"]) if "target" in memory else 0.5 * gap
        promises = current - domain.products(cache, scores) if len(cache) else np.zeros(0)
        while gap < target and gap > 0:
            target *= self.shrink
        best = int(np.argmax(promises)) if len(cache) else 0
        lazy = len(cache) > 0 and promises[best] >= target
        if lazy:
            key = cache[best]
        else:
            cache = np.concatenate([cache, key[None]])
        memory["cache"], memory["target"] = cache, np.array(target)
        reached, size = move(
            self.step_rule,
            problem,
            State(point, memory),
            evaluation,
            domain.matrix(key, problem.n) - point,
            1.0,
            clock.iteration,
        )
        vertices = chosen(domain, key)
        extra = {"kind": "lazy" if lazy else "toward", "cache": len(cache), "target": target}
        return Step(State(reached, memory), size, vertices, extra=extra)


def chosen(domain: Domain, key: Array) -> Array | None:
    """Return a key as the vertices of a step [1, rows], where vertices are experts."""
    return key[None].astype(np.int64) if domain.has_vertices else None
