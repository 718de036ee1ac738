"""One number out of the losses of many tasks, so that every solver can minimize it.

    weighted sum   φ(f) = Σ_t w_t f_t / Σ_t w_t
    Chebyshev      φ(f) = max_t w_t (f_t − z_t)               w: preferences, z: ideal point
    worst task     φ(f) = max_t f_t

The maximum has kinks, so it is smoothed: with u_t = w_t (f_t − z_t),

    φ_μ(u) = μ log Σ_t exp(u_t/μ),     max_t u_t ≤ φ_μ(u) ≤ max_t u_t + μ log T,     ∂φ_μ/∂u = softmax(u/μ)

If the losses are convex, a gap of φ_μ therefore bounds how far the largest u_t is above the least possible one:

    max_t u_t(Λ) − min_Λ max_t u_t ≤ max_t u_t(Λ) − φ_μ(Λ) + gap + μ log T ≤ gap + μ log T

Every weight ∂φ_μ/∂f_t of a task with w_t > 0 is positive, so minimizers of φ_μ are Pareto optimal, and on a front that
is not convex Chebyshev reaches the points that no weighted sum does.
Source: Miettinen (1999), Nonlinear Multiobjective Optimization, sections 3.1 and 3.4; Nesterov (2005), Smooth
minimization of non-smooth functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .construct import construct, describe
from .errors import OptionError, check_number, unknown
from .problem import Array, Evaluation, Line, MatrixProblem

SMOOTHING = 0.01


@dataclass(frozen=True)
class Scalarization:
    """Common part of the scalarizations: φ as a function of u_t = w_t (f_t − z_t)."""

    source: ClassVar[str] = ""

    def weights(self, tasks: Sequence[str]) -> Array:
        """Return w [T]."""
        return np.ones(len(tasks))

    def levels(self, tasks: Sequence[str]) -> Array:
        """Return z [T]."""
        return np.zeros(len(tasks))

    def value(self, scaled: Array) -> float:
        """Return φ at u [T]."""
        raise NotImplementedError

    def slopes(self, scaled: Array) -> Array:
        """Return ∂φ/∂u [T], at a kink one subgradient."""
        raise NotImplementedError

    def slack(self, tasks: int) -> float:
        """Return by how much φ may be above what it stands for."""
        return 0.0

    def describe(self) -> dict[str, Any]:
        """Return name and options."""
        return describe(self, SCALARIZATIONS)


@dataclass(frozen=True)
class WeightedSum(Scalarization):
    """Mean of the losses, weighted by preferences.

    preferences: task -> w_t ≥ 0, relative to one another; 1 for a task that is not named.
    """

    preferences: Any = None
    source: ClassVar[str] = "Zadeh (1963); Miettinen (1999), section 3.1"

    def __post_init__(self) -> None:
        check_preferences(self, self.preferences)

    def weights(self, tasks: Sequence[str]) -> Array:
        """Preferences, divided by their sum."""
        weights = by_task("preferences", self.preferences, tasks, 1.0)
        return weights / weights.sum()

    def value(self, scaled: Array) -> float:
        """Σ_t u_t."""
        return float(scaled.sum())

    def slopes(self, scaled: Array) -> Array:
        """1 for each."""
        return np.ones_like(scaled)


@dataclass(frozen=True)
class Maximum(Scalarization):
    """Common part of the two maxima; smoothing: μ ≥ 0 in the units of u; 0 is the maximum with its kinks."""

    smoothing: float = SMOOTHING

    def __post_init__(self) -> None:
        check_number(self, "smoothing", 0, math.inf, closed="left")

    def value(self, scaled: Array) -> float:
        """μ log Σ exp(u/μ), shifted so that nothing overflows."""
        highest = float(scaled.max())
        if self.smoothing == 0 or not math.isfinite(highest):
            return highest
        return highest + self.smoothing * math.log(float(np.exp((scaled - highest) / self.smoothing).sum()))

    def slopes(self, scaled: Array) -> Array:
        """Softmax(u/μ); without smoothing 1 for the first of the largest."""
        if self.smoothing == 0:
            return np.eye(len(scaled))[int(np.argmax(scaled))]
        powers = np.exp((scaled - scaled.max()) / self.smoothing)
        found: Array = powers / powers.sum()
        return found

    def slack(self, tasks: int) -> float:
        """μ log T."""
        return self.smoothing * math.log(tasks)


@dataclass(frozen=True)
class Worst(Maximum):
    """Largest loss of any task, smoothed by log-sum-exp."""

    source: ClassVar[str] = "Wald (1945), minimax; Nesterov (2005), smoothing"


@dataclass(frozen=True)
class Chebyshev(Maximum):
    """Largest weighted distance from an ideal point, smoothed by log-sum-exp.

    preferences: task -> w_t ≥ 0, as they are; 1 for a task that is not named. ideal: task -> z_t, the loss that would
    be ideal; 0 for a task that is not named.
    """

    preferences: Any = None
    ideal: Any = None
    source: ClassVar[str] = "Bowman (1976); Miettinen (1999), section 3.4"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preferences(self, self.preferences)
        for task, level in check_mapping(self, "ideal", self.ideal).items():
            if not is_number(level):
                raise OptionError(
                    f"The 'ideal' parameter of Chebyshev must give a finite loss for each task. Got {level!r} for "
                    f"{task!r} instead."
                )

    def weights(self, tasks: Sequence[str]) -> Array:
        """The preferences."""
        return by_task("preferences", self.preferences, tasks, 1.0)

    def levels(self, tasks: Sequence[str]) -> Array:
        """The ideal point."""
        return by_task("ideal", self.ideal, tasks, 0.0)


SCALARIZATIONS: dict[str, type[Scalarization]] = {
    "weighted-sum": WeightedSum,
    "chebyshev": Chebyshev,
    "worst": Worst,
}


def make_scalarization(spec: object) -> Scalarization:
    """Return a scalarization from an instance, a name, or a mapping with a name and options."""
    return construct("scalarization", SCALARIZATIONS, spec)


class Scalarized(MatrixProblem):
    """φ(f_1(Λ), ..., f_T(Λ)) of a problem's tasks as a problem of its own: S = Σ_t (∂φ/∂f_t) S_t.

    Values and scores by task stay those of the problem. The price of a constraint, if its objective has one
    (`solve_constrained`), is added to φ and not scalarized. Costs one gradient a task in memory.
    """

    def __init__(self, parent: MatrixProblem, scalarization: Scalarization | str | Mapping[str, Any]) -> None:
        self.parent = parent
        self.scalarization = make_scalarization(scalarization)
        self.rows, self.domain, self.experts = parent.rows, parent.domain, parent.experts
        self.stochastic, self.resolution = parent.stochastic, parent.resolution
        self.cheap_to_refresh, self.has_gradient = parent.cheap_to_refresh, parent.has_gradient
        self.tasks, self.task_weights = tuple(parent.tasks), parent.task_weights
        self.counts = parent.counts
        price = getattr(getattr(parent, "objective", None), "constraint_task", None)
        self.priced = [k for k, task in enumerate(self.tasks) if task == price]
        others = [k for k, task in enumerate(self.tasks) if task != price]
        names = [self.tasks[k] for k in others]
        weights, levels = self.scalarization.weights(names), self.scalarization.levels(names)
        # A task without weight has no say: its u_t = 0 would be the maximum wherever the others are below their levels.
        kept = weights > 0
        self.chosen = [k for k, has in zip(others, kept, strict=True) if has]
        self._weights, self._levels = weights[kept], levels[kept]

    @property
    def row_names(self) -> Sequence[str]:
        """Names of the rows."""
        return self.parent.row_names

    @property
    def layers(self) -> dict[str, Array]:
        """Rows of Λ by layer."""
        return self.parent.layers

    @property
    def similarity(self) -> Array:
        """Cosines of the task vectors."""
        return self.parent.similarity

    @property
    def seconds(self) -> dict[str, float]:
        """Where the problem's time went."""
        return self.parent.seconds

    @property
    def objective(self) -> Any:
        """The objective whose tasks these are; AttributeError if the problem has none."""
        return self.parent.objective  # type: ignore[attr-defined]

    def weights(self, point: Array) -> Any:
        """The weights of a model at Λ, for problems that have one."""
        return self.parent.weights(point)  # type: ignore[attr-defined]

    def draw(self, iteration: int | None) -> None:
        """Draw the problem's batch."""
        self.parent.draw(iteration)

    def refresh(self) -> None:
        """Refresh the problem."""
        self.parent.refresh()

    def describe(self) -> dict[str, Any]:
        """The problem's record, with the scalarization beside the objective's."""
        about = self.parent.describe()
        found = {"scalarization": self.scalarization.describe(), "slack": self.slack}
        return {**about, "objective": {**about["objective"], **found}}

    @property
    def data_used(self) -> dict[str, Any]:
        """What the objective has consumed."""
        return self.parent.data_used

    @property
    def slack(self) -> float:
        """By how much φ may be above the maximum that it smooths: μ log T, of the T tasks with a weight."""
        return self.scalarization.slack(len(self.chosen))

    def scaled(self, losses: Mapping[str, float]) -> Array:
        """Return u of the tasks with a weight, without the price of a constraint."""
        values = np.array([losses[self.tasks[k]] for k in self.chosen])
        found: Array = self._weights * (values - self._levels)
        return found

    def reduce(self, losses: Mapping[str, float]) -> float:
        """Return φ of the losses by task, and the price."""
        if not all(math.isfinite(loss) for loss in losses.values()):
            return math.nan
        return self.scalarization.value(self.scaled(losses)) + sum(losses[self.tasks[k]] for k in self.priced)

    def pieces(self, evaluation: Evaluation) -> tuple[Array, Array]:
        """Return u [T'] and its scores [T', rows, n] of the T' tasks with a weight, each with a constraint's price."""
        assert evaluation.task_scores is not None
        price = sum(evaluation.task_values[self.tasks[k]] for k in self.priced)
        tables = self._weights[:, None, None] * evaluation.task_scores[self.chosen]
        return self.scaled(evaluation.task_values) + price, tables + evaluation.task_scores[self.priced].sum(axis=0)

    def slopes(self, losses: Mapping[str, float]) -> Array:
        """Return ∂φ/∂f_t [T]."""
        found = np.zeros(len(self.tasks))
        found[self.priced] = 1.0
        found[self.chosen] = self._weights * self.scalarization.slopes(self.scaled(losses))
        return found

    def evaluate(
        self, point: Array, *, tasks: bool = False, raw: bool = False, experts: Sequence[int] | None = None
    ) -> Evaluation:
        """One evaluation of the problem by task."""
        found = self.parent.evaluate(point, tasks=True, raw=raw, experts=experts)
        value = self.reduce(found.task_values)
        if found.task_scores is None or not math.isfinite(value):
            return Evaluation(value, np.full((self.rows, self.n), np.nan), found.task_values)
        scores = np.tensordot(self.slopes(found.task_values), found.task_scores, axes=1)
        return Evaluation(value, scores, found.task_values, found.task_scores if tasks else None, found.raw)

    def value(self, point: Array) -> float:
        """φ of the losses by task."""
        return self.reduce(self.parent.task_values(point))

    def task_values(self, point: Array) -> dict[str, float]:
        """The losses by task."""
        return self.parent.task_values(point)

    def line(self, point: Array, direction: Array) -> Line:
        """The problem's line, with φ as its value."""
        return ScalarizedLine(self, self.parent.line(point, direction))


@dataclass
class ScalarizedLine:
    """γ -> φ(f_1, ..., f_T) along a line of the problem whose tasks these are."""

    problem: Scalarized
    line: Line

    def value(self, step: float) -> float:
        """φ at Λ + γD."""
        return self.problem.reduce(self.line.task_values(step))

    def task_values(self, step: float) -> dict[str, float]:
        """The losses at Λ + γD."""
        return self.line.task_values(step)

    def task_slopes(self, step: float) -> tuple[dict[str, float], Array]:
        """The losses at Λ + γD, and their derivatives [T]."""
        return self.line.task_slopes(step)

    def slope(self, step: float) -> float:
        """The derivative of φ, by one gradient a task."""
        losses, slopes = self.line.task_slopes(step)
        if not math.isfinite(self.problem.reduce(losses)):
            return math.nan
        return float(self.problem.slopes(losses) @ slopes)

    def accept(self, step: float, point: Array | None = None) -> None:
        """Go there."""
        self.line.accept(step, point)


def worst_gap(result: Any) -> float | None:
    """Return by how much the largest u_t of a scalarized result may be above the least possible, if losses are convex.

    The gap, and what smoothing adds to it, and what a bound does, of which the gap is that of the Lagrangian; None
    without a gap, and for results that no maximum was minimized for.
    """
    about = result.described_objective
    spec = about.get("scalarization")
    if spec is None or result.gap is None or not isinstance(made := make_scalarization(spec), Maximum):
        return None
    tasks = list(result.tasks)
    weights = made.weights(tasks)
    kept = weights > 0
    scaled = weights[kept] * (np.array(list(result.tasks.values())) - made.levels(tasks))[kept]
    above = scaled.max() - made.value(scaled) + result.gap + about["slack"]
    return float(above + getattr(result, "complementarity", 0.0))


def is_number(value: object) -> bool:
    """Whether an option is a plain finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_mapping(owner: object, name: str, value: object) -> Mapping[str, Any]:
    """Return the mapping of an option, empty for None. Raises OptionError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise OptionError(
            f"The '{name}' parameter of {type(owner).__name__} must be a mapping of tasks to numbers. "
            f"Got {value!r} instead."
        )
    return value


def check_preferences(owner: object, preferences: object) -> None:
    """Raise OptionError unless ``preferences`` maps tasks to numbers of at least 0, or is None."""
    for task, weight in check_mapping(owner, "preferences", preferences).items():
        if not is_number(weight) or weight < 0:
            raise OptionError(
                f"The 'preferences' parameter of {type(owner).__name__} must give a number in [0, inf) for each task. "
                f"Got {weight!r} for {task!r} instead."
            )


def by_task(name: str, given: Mapping[str, float] | None, tasks: Sequence[str], default: float) -> Array:
    """Return an option by task [T]. Raises OptionError for tasks that there are not, and if all preferences are 0."""
    given = given or {}
    for task in given:
        if task not in tasks:
            raise unknown(f"task in '{name}':", task, tasks)
    found = np.array([float(given.get(task, default)) for task in tasks])
    if name == "preferences" and not found.any():
        raise OptionError("The 'preferences' of all tasks are 0. Give one of them a positive preference.")
    return found
