"""How far to go along a direction: one small class a rule.

A rule sees a :class:`Search` (the restriction φ(γ) = f(Λ + γD), its value and slope at 0) and returns γ in [0, limit];
what it must remember to the next iteration it keeps in a plain dictionary of arrays, which the driver saves with the
state. A rule says by its traits what it relies on, and a solver refuses the traits that it cannot work with:

    SCHEDULE   γ is known before f is: no step is promised to descend
    SEARCH     f or its slope is evaluated along a direction that must descend for that same f
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .construct import construct, describe
from .errors import OptionError, check_number

Memory = dict[str, np.ndarray]
SCHEDULE = "schedule"
SEARCH = "search"
HALVINGS = 60


@dataclass(frozen=True)
class Search:
    """What a step rule may know.

    iteration: counted from 0, a fraction where a step moves a part of the blocks; value: f at γ = 0; slope: ⟨S, D⟩,
    negative along a descent direction; squared_norm: ‖D‖²; limit: the largest feasible γ; along: γ -> f(Λ + γD), one
    evaluation each call; resolution: relative noise of f; slope_along: γ -> ⟨S(Λ + γD), D⟩, one gradient each call;
    quadratic: f is known to be a quadratic.
    """

    iteration: float
    value: float
    slope: float
    squared_norm: float
    limit: float
    along: Callable[[float], float]
    resolution: float = 0.0
    slope_along: Callable[[float], float] | None = None
    quadratic: bool = False

    @property
    def slack(self) -> float:
        """By how much two values may differ and yet be the same."""
        return self.resolution * abs(self.value)

    def slope_at(self, step: float) -> float:
        """Return φ'(γ). Raises OptionError where the lines of the problem have no slope."""
        if self.slope_along is None:
            raise OptionError(
                "This step rule reads the slope along the line, and the problem offers values only. "
                "Use 'line-search', 'brent', 'armijo' or 'backtracking'."
            )
        return self.slope_along(step)


@dataclass(frozen=True)
class StepRule:
    """Common part of the step rules."""

    source: ClassVar[str] = ""
    traits: ClassVar[frozenset[str]] = frozenset()

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
    traits: ClassVar[frozenset[str]] = frozenset({SEARCH})

    def __post_init__(self) -> None:
        check_number(self, "evaluations", 2, math.inf, closed="left", integer=True)
        check_number(self, "xtol", 0, 1, closed="neither")

    def __call__(self, search: Search, memory: Memory) -> float:
        """Try the end of the segment, then the minimum of a quadratic, then Brent; keep the lowest value seen."""
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
        brent(value, end, self.xtol, max(1, self.evaluations - len(trials) + 1))
        return lowest(trials)


@dataclass(frozen=True)
class Brent(StepRule):
    """γ = argmin f(Λ + γD) on [0, limit] by bounded Brent from the start, without a quadratic guess.

    evaluations: at most; xtol: relative to the limit. For segments along which f is far from a quadratic.
    """

    evaluations: int = 15
    xtol: float = 1e-4
    source: ClassVar[str] = "Brent (1973), chapter 5; scipy.optimize.minimize_scalar"
    traits: ClassVar[frozenset[str]] = frozenset({SEARCH})

    def __post_init__(self) -> None:
        check_number(self, "evaluations", 3, math.inf, closed="left", integer=True)
        check_number(self, "xtol", 0, 1, closed="neither")

    def __call__(self, search: Search, memory: Memory) -> float:
        """Try the limit, which Brent never does, then search inside; keep the lowest value seen."""
        trials = {0.0: search.value, search.limit: search.along(search.limit)}

        def value(step: float) -> float:
            trials[step] = search.along(step)
            return trials[step]

        brent(value, search.limit, self.xtol, self.evaluations - 1)
        return lowest(trials)


@dataclass(frozen=True)
class OpenLoop(StepRule):
    """γ_t = scale · offset / (t + offset), without looking at the objective."""

    offset: float = 2.0
    scale: float = 1.0
    source: ClassVar[str] = "Jaggi (2013); Wirth, Kerdreux and Pokutta (2023) for offset ≠ 2"
    traits: ClassVar[frozenset[str]] = frozenset({SCHEDULE})

    def __post_init__(self) -> None:
        check_number(self, "offset", 0, math.inf, closed="neither")
        check_number(self, "scale", 0, 1, closed="right")

    def __call__(self, search: Search, memory: Memory) -> float:
        """Return the scheduled step, cut at the limit."""
        return min(self.scale * self.offset / (search.iteration + self.offset), search.limit)


@dataclass(frozen=True)
class Logarithmic(StepRule):
    """γ_t = (2 + log(t + 1)) / (t + 2 + log(t + 1)): an open loop whose offset grows, for any rate that f allows.

    The offset ℓ of the open loop caps its rate at t^−ℓ; one that grows like log t caps it at no power.
    """

    source: ClassVar[str] = "Pokutta (2024), The Frank-Wolfe algorithm: a short introduction"
    traits: ClassVar[frozenset[str]] = frozenset({SCHEDULE})

    def __call__(self, search: Search, memory: Memory) -> float:
        """Return the scheduled step, cut at the limit."""
        grown = math.log(search.iteration + 1)
        return min((2 + grown) / (search.iteration + 2 + grown), search.limit)


@dataclass(frozen=True)
class SquareRoot(StepRule):
    """γ_t = scale / √(t + 1): the schedule for objectives that are not convex, where the gap falls like 1/√t.

    scale: of every step.
    """

    scale: float = 1.0
    source: ClassVar[str] = "Reddi, Sra, Poczos and Smola (2016); Lacoste-Julien (2016)"
    traits: ClassVar[frozenset[str]] = frozenset({SCHEDULE})

    def __post_init__(self) -> None:
        check_number(self, "scale", 0, 1, closed="right")

    def __call__(self, search: Search, memory: Memory) -> float:
        """Return the scheduled step, cut at the limit."""
        return min(self.scale / math.sqrt(search.iteration + 1), search.limit)


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
    traits: ClassVar[frozenset[str]] = frozenset({SEARCH})

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
        for _ in range(HALVINGS):
            step = min(-search.slope / (smoothness * search.squared_norm), search.limit)
            bound = search.value + step * search.slope + 0.5 * step**2 * smoothness * search.squared_norm
            if search.along(step) <= bound + search.slack:
                memory["smoothness"] = np.array(smoothness)
                return step
            smoothness *= self.grow
        return 0.0

    def jointly(
        self,
        slopes: np.ndarray,
        squared_norms: np.ndarray,
        value: float,
        along: Callable[[np.ndarray], float],
        slack: float,
        memory: Memory,
    ) -> np.ndarray:
        """Return one γ in [0, 1] for each of several directions D_b [k] of different blocks, with one M for all.

        f(Λ + Σ γ_b D_b) ≤ f(Λ) + Σ (γ_b ⟨S, D_b⟩ + γ_b² M‖D_b‖²/2): one evaluation a trial, however many directions.
        """
        falling = np.where(squared_norms > 0, np.maximum(-slopes, 0.0), 0.0)
        if not falling.any():
            return np.zeros_like(slopes)
        norms = np.where(squared_norms > 0, squared_norms, 1.0)
        if "smoothness" in memory:
            smoothness = float(memory["smoothness"]) * self.shrink
        else:
            smoothness = float(falling.sum() / squared_norms.sum())
        for _ in range(HALVINGS):
            steps: np.ndarray = np.minimum(falling / (smoothness * norms), 1.0)
            bound = value + float(np.sum(steps * slopes + 0.5 * steps**2 * smoothness * squared_norms))
            if along(steps) <= bound + slack:
                memory["smoothness"] = np.array(smoothness)
                return steps
            smoothness *= self.grow
        return np.zeros_like(slopes)


@dataclass(frozen=True)
class Armijo(StepRule):
    """The first γ of limit, β limit, β² limit, ... with f(Λ + γD) ≤ f(Λ) + σ γ ⟨S, D⟩.

    shrink: β; decrease: σ, the share of the linear decrease that is asked for.
    """

    shrink: float = 0.5
    decrease: float = 0.1
    source: ClassVar[str] = "Armijo (1966); Dunn (1980) for Frank-Wolfe"
    traits: ClassVar[frozenset[str]] = frozenset({SEARCH})

    def __post_init__(self) -> None:
        check_number(self, "shrink", 0, 1, closed="neither")
        check_number(self, "decrease", 0, 1, closed="neither")

    def __call__(self, search: Search, memory: Memory) -> float:
        """Shrink from the limit; 0 if the direction does not descend."""
        step = search.limit
        for _ in range(HALVINGS if search.slope < 0 else 0):
            if search.along(step) <= search.value + self.decrease * step * search.slope + search.slack:
                return step
            step *= self.shrink
        return 0.0


@dataclass(frozen=True)
class Secant(StepRule):
    """The zero of the slope φ'(γ) = ⟨S(Λ + γD), D⟩ on [0, limit] by secants in a bracket; one gradient a trial.

    Slopes resolve what values cannot: near an optimum f changes by the square of the step. The first trial uses the
    curvature of the last search; a known quadratic needs no more. evaluations: trials at most; tol: accepts
    |φ'(γ)| ≤ tol |φ'(0)|.
    """

    evaluations: int = 8
    tol: float = 1e-3
    source: ClassVar[str] = "Hendrych, Besançon, Martínez-Rubio and Pokutta (2025), Secant line search for Frank-Wolfe"
    traits: ClassVar[frozenset[str]] = frozenset({SEARCH})

    def __post_init__(self) -> None:
        check_number(self, "evaluations", 1, math.inf, closed="left", integer=True)
        check_number(self, "tol", 0, 1, closed="left")

    def __call__(self, search: Search, memory: Memory) -> float:
        """Keep low (φ' < 0) and high (φ' > 0 or not finite) around the zero, and try where the secant crosses 0."""
        if search.slope >= 0:
            return 0.0
        low, high = (0.0, search.slope), (search.limit, math.nan)
        trial = search.limit
        if "curvature" in memory:
            trial = min(trial, -search.slope / (float(memory["curvature"]) * search.squared_norm))
        for _ in range(self.evaluations):
            last, slope = low, search.slope_at(trial)
            curvature = (slope - search.slope) / (trial * search.squared_norm)
            if math.isfinite(curvature) and curvature > 0:
                memory["curvature"] = np.array(curvature)
                if search.quadratic:
                    return min(-search.slope / (curvature * search.squared_norm), search.limit)
            if abs(slope) <= self.tol * abs(search.slope) or (slope <= 0 and trial == search.limit):
                return trial
            if slope < 0:
                low = (trial, slope)
            else:
                high = (trial, slope)
            if math.isfinite(high[1]):
                width = high[0] - low[0]
                inside = low[0] - low[1] * width / (high[1] - low[1])
                trial = min(max(inside, low[0] + 0.01 * width), high[0] - 0.01 * width)
            elif slope < 0:  # no upper end yet: extrapolate
                steeper = slope <= last[1]
                trial = high[0] if steeper else min(trial - slope * (trial - last[0]) / (slope - last[1]), high[0])
            else:  # not finite there: look closer
                trial = 0.5 * (low[0] + trial)
        return low[0]


@dataclass(frozen=True)
class Exact(StepRule):
    """γ = −⟨S, D⟩ / ⟨D, H D⟩, the minimizer along the line of a quadratic, cut at the limit; one gradient.

    ⟨D, H D⟩ = (φ'(limit) − φ'(0)) / limit, whatever H is. Where f is not known to be a quadratic, one evaluation checks
    the step, and halves it while f is above f(Λ).
    """

    source: ClassVar[str] = "Levitin and Polyak (1966); Lacoste-Julien and Jaggi (2015), line search on quadratics"
    traits: ClassVar[frozenset[str]] = frozenset({SEARCH})

    def __call__(self, search: Search, memory: Memory) -> float:
        """Read the curvature from the slopes at both ends."""
        if search.slope >= 0:
            return 0.0
        end = search.limit
        while not math.isfinite(slope := search.slope_at(end)):
            end /= 4  # the model overflows far out: look closer
            if end < search.limit * 4.0**-HALVINGS:
                return 0.0
        curvature = (slope - search.slope) / end
        step = min(-search.slope / curvature, search.limit) if curvature > 0 else end
        return step if search.quadratic else halved(step, search)


@dataclass(frozen=True)
class Monotone(StepRule):
    """Any rule, its step halved until f does not increase: f(Λ + γD) ≤ f(Λ).

    rule: the step rule to keep in check.
    """

    rule: Any = "open-loop"
    source: ClassVar[str] = "Carderera, Besançon and Pokutta (2021), Simple steps are all you need"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", make_step_rule(self.rule))
        if isinstance(self.rule, Monotone):
            raise OptionError("The 'rule' parameter of Monotone must be another rule; it is monotone already.")

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        """Those of the rule, and the evaluations."""
        found: frozenset[str] = self.rule.traits
        return found | {SEARCH}

    def __call__(self, search: Search, memory: Memory) -> float:
        """Ask the rule, then halve."""
        return halved(self.rule(search, memory), search)


@dataclass(frozen=True)
class Fixed(StepRule):
    """The same γ in every iteration."""

    step: float = 0.1
    source: ClassVar[str] = "Freund and Grigas (2016)"
    traits: ClassVar[frozenset[str]] = frozenset({SCHEDULE})

    def __post_init__(self) -> None:
        check_number(self, "step", 0, 1, closed="right")

    def __call__(self, search: Search, memory: Memory) -> float:
        """Return the step, cut at the limit."""
        return min(self.step, search.limit)


def brent(value: Callable[[float], float], end: float, xtol: float, evaluations: int) -> None:
    """Evaluate ``value`` where bounded Brent on [0, end] looks."""
    from scipy.optimize import minimize_scalar  # half of what `mergesolve list` would take

    options = {"xatol": xtol * end, "maxiter": evaluations}
    minimize_scalar(value, bounds=(0.0, end), method="bounded", options=options)


def lowest(trials: dict[float, float]) -> float:
    """Return the step of the lowest finite value, the shortest of them."""
    return min(trials, key=lambda step: (trials[step] if math.isfinite(trials[step]) else math.inf, step))


def halved(step: float, search: Search) -> float:
    """Return ``step`` halved until f is at most f(Λ), or 0 if that never comes."""
    for _ in range(HALVINGS // 2 if step > 0 else 0):  # further down, rounding alone would accept a step
        if search.along(step) <= search.value + search.slack:
            return step
        step /= 2
    return 0.0


STEP_RULES: dict[str, type[StepRule]] = {
    "line-search": LineSearch,
    "exact": Exact,
    "secant": Secant,
    "brent": Brent,
    "armijo": Armijo,
    "backtracking": Backtracking,
    "short-step": ShortStep,
    "open-loop": OpenLoop,
    "logarithmic": Logarithmic,
    "square-root": SquareRoot,
    "fixed": Fixed,
    "monotone": Monotone,
}


def make_step_rule(spec: object) -> StepRule:
    """Return a step rule from an instance, a name, or a mapping with a name and options."""
    return construct("step rule", STEP_RULES, spec)
