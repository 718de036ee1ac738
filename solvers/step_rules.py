"""How far to go along a direction: one small class a rule.

A rule sees a :class:`Search` (the restriction f(Λ + γD), its value and slope at 0) and returns γ in [0, limit]; what
it must remember to the next iteration it keeps in a plain dictionary of arrays, which the driver saves with the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .construct import construct, describe
from .errors import check_number

Memory = dict[str, np.ndarray]


@dataclass(frozen=True)
class Search:
    """What a step rule may know.

    iteration: counted from 0; value: f at γ = 0; slope: ⟨S, D⟩, negative along a descent direction; squared_norm: ‖D‖²;
    limit: the largest feasible γ; along: γ -> f(Λ + γD), one evaluation each call; resolution: relative noise of f.
    """

    iteration: int
    value: float
    slope: float
    squared_norm: float
    limit: float
    along: Callable[[float], float]
    resolution: float = 0.0


@dataclass(frozen=True)
class StepRule:
    """Common part of the step rules."""

    source: ClassVar[str] = ""

    def __call__(self, search: Search, memory: Memory) -> float:
        """Return γ in [0, search.limit]; ``memory`` may be updated in place."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return name and options."""
        return describe(self, STEP_RULES)


@dataclass(frozen=True)
class LineSearch(StepRule):
    """γ = argmin f(Λ + γD) on [0, limit] by bounded Brent, at most ``evaluations`` evaluations.

    Never worse than staying: returns 0 if no trial is below f(Λ).
    """

    evaluations: int = 10
    xtol: float = 1e-4
    source: ClassVar[str] = "FW-Merging, eq. 3; Brent (1973)"

    def __post_init__(self) -> None:
        check_number(self, "evaluations", 2, math.inf, closed="left", integer=True)
        check_number(self, "xtol", 0, 1, closed="neither")

    def __call__(self, search: Search, memory: Memory) -> float:
        """Try the end of the segment, then the minimum of a quadratic, then Brent; keep the lowest value seen."""
        from scipy.optimize import minimize_scalar  # half of what `mergesolve list` would take

        trials = {0.0: search.value}

        def value(step: float) -> float:
            trials[step] = search.along(step)
            return trials[step]

        end = search.limit
        while not math.isfinite(value(end)) and len(trials) < self.evaluations // 2:
            end /= 4  # the model overflows far out: look closer
        # The quadratic through f(0), f'(0), f(end) is exact for quadratic objectives: two evaluations are all it takes.
        curvature = 2 * (trials[end] - search.value - search.slope * end) / end**2
        if math.isfinite(curvature) and curvature > 0 and 0 < -search.slope / curvature < end:
            guess = -search.slope / curvature
            predicted = search.value + 0.5 * search.slope * guess
            found = value(guess)
            if abs(found - predicted) <= 1e-3 * abs(predicted - search.value) + search.resolution * abs(found):
                return min(trials, key=trials.__getitem__)
        minimize_scalar(
            value,
            bounds=(0.0, end),
            method="bounded",
            options={"xatol": self.xtol * end, "maxiter": max(1, self.evaluations - len(trials) + 1)},
        )
        return min(trials, key=lambda step: (trials[step] if math.isfinite(trials[step]) else math.inf, step))


@dataclass(frozen=True)
class OpenLoop(StepRule):
    """γ_t = scale · offset / (t + offset), without looking at the objective."""

    offset: float = 2.0
    scale: float = 1.0
    source: ClassVar[str] = "Jaggi (2013); Wirth, Kerdreux and Pokutta (2023) for offset ≠ 2"

    def __post_init__(self) -> None:
        check_number(self, "offset", 0, math.inf, closed="neither")
        check_number(self, "scale", 0, 1, closed="right")

    def __call__(self, search: Search, memory: Memory) -> float:
        """Return the scheduled step, cut at the limit."""
        return min(self.scale * self.offset / (search.iteration + self.offset), search.limit)


@dataclass(frozen=True)
class ShortStep(StepRule):
    """γ = min(−⟨S, D⟩ / (L‖D‖²), limit): the minimizer of the quadratic upper bound with smoothness L."""

    smoothness: float = 1.0
    source: ClassVar[str] = "Demyanov and Rubinov (1970); Jaggi (2013)"

    def __post_init__(self) -> None:
        check_number(self, "smoothness", 0, math.inf, closed="neither")

    def __call__(self, search: Search, memory: Memory) -> float:
        """Return the short step; 0 if the direction does not descend."""
        if search.slope >= 0:
            return 0.0
        return min(-search.slope / (self.smoothness * search.squared_norm), search.limit)


@dataclass(frozen=True)
class Backtracking(StepRule):
    """Short steps with an estimated smoothness M: shrunk in each iteration, grown until the quadratic bound holds.

    Accepts γ = min(−⟨S, D⟩ / (M‖D‖²), limit) when f(Λ + γD) ≤ f(Λ) + γ⟨S, D⟩ + γ² M‖D‖²/2.
    """

    shrink: float = 0.9
    grow: float = 2.0
    source: ClassVar[str] = "Pedregosa, Negiar, Askari and Jaggi (2020), algorithm 2"

    def __post_init__(self) -> None:
        check_number(self, "shrink", 0, 1, closed="right")
        check_number(self, "grow", 1, math.inf, closed="neither")

    def __call__(self, search: Search, memory: Memory) -> float:
        """Search M upwards from the remembered estimate, and remember the accepted one."""
        if search.slope >= 0:
            return 0.0
        if "smoothness" in memory:
            smoothness = float(memory["smoothness"]) * self.shrink
        else:
            smoothness = -search.slope / (search.squared_norm * search.limit)
        slack = search.resolution * abs(search.value)
        for _ in range(60):
            step = min(-search.slope / (smoothness * search.squared_norm), search.limit)
            bound = search.value + step * search.slope + 0.5 * step**2 * smoothness * search.squared_norm
            if search.along(step) <= bound + slack:
                memory["smoothness"] = np.array(smoothness)
                return step
            smoothness *= self.grow
        return 0.0


@dataclass(frozen=True)
class Fixed(StepRule):
    """The same γ in every iteration."""

    step: float = 0.1
    source: ClassVar[str] = "Freund and Grigas (2016)"

    def __post_init__(self) -> None:
        check_number(self, "step", 0, 1, closed="right")

    def __call__(self, search: Search, memory: Memory) -> float:
        """Return the step, cut at the limit."""
        return min(self.step, search.limit)


STEP_RULES: dict[str, type[StepRule]] = {
    "line-search": LineSearch,
    "open-loop": OpenLoop,
    "short-step": ShortStep,
    "backtracking": Backtracking,
    "fixed": Fixed,
}


def make_step_rule(spec: object) -> StepRule:
    """Return a step rule from an instance, a name, or a mapping with a name and options."""
    return construct("step rule", STEP_RULES, spec)
