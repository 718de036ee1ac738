"""What a solver sees: a function of one matrix Λ [blocks, experts], its value, its scores S = ∂f/∂Λ, and its segments.

:class:`Problem` makes that function out of a pool and an objective:

    f(Λ) = objective(θ0 + A Λ),      S = Aᵀ ∇objective      (A = combine, Aᵀ = correlate)

No automatic differentiation runs through A, so memory is one model, its gradient, and during a line search the
direction: independent of the number of experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .domains import Domain, check_feasible, make_domain
from .errors import OptionError

if TYPE_CHECKING:
    from ..pools import Blocks, Pool

Array = np.ndarray[Any, Any]


class ObjectiveEvaluation(Protocol):
    """What an objective returns."""

    @property
    def loss(self) -> float:
        """Σ_t w_t loss_t."""

    @property
    def task_losses(self) -> Mapping[str, float]:
        """loss_t by task."""

    @property
    def gradient(self) -> Any:
        """One tensor a parameter, or a list of that: one gradient a task."""


class Objective(Protocol):
    """A loss over weights; :mod:`mergesolve.objectives` has those that come with the package."""

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the tasks."""

    @property
    def task_weights(self) -> Array:
        """Weights w [T] of the tasks in the loss."""

    @property
    def stochastic(self) -> bool:
        """Whether batches differ from one iteration to the next."""

    @property
    def data_used(self) -> Mapping[str, Any]:
        """What was consumed: labelled and unlabelled examples, whether test inputs were seen, samples."""

    def draw(self, iteration: int | None) -> None:
        """Fix the batch of all calls that follow; None means all the data."""

    def value_and_grad(self, weights: dict[str, Any], *, per_task: bool = False) -> ObjectiveEvaluation:
        """Return loss and gradient at ``weights``."""

    def value(self, weights: dict[str, Any]) -> float:
        """Return the loss at ``weights``."""

    def describe(self) -> Mapping[str, Any]:
        """Return class, options and tasks, for the record of a run."""


@dataclass(frozen=True)
class RawInner:
    """Inner products with raw checkpoints by tensor, for the oracle of the released FW-Merging code.

    gradient_task: ⟨g, τ_i⟩ [k, tensors, n]; gradient_base: ⟨g, θ0⟩ [k, tensors]; gradient_norm: ‖g‖ [k, tensors].
    """

    gradient_task: Array
    gradient_base: Array
    gradient_norm: Array


@dataclass(frozen=True)
class RawGeometry:
    """Norms of raw checkpoints by tensor: ‖θ0‖² [tensors], ⟨θ0, τ_i⟩ [tensors, n], Gram [tensors, n, n]."""

    base_squared: Array
    base_task: Array
    gram: Array


@dataclass(frozen=True)
class Evaluation:
    """f at one point: value, scores [rows, n], and on request scores a task [tasks, rows, n].

    Scores of experts that were not asked for are nan. Where only the value was asked for, scores is None; that never
    reaches a solver whose steps read scores.
    """

    value: float
    scores: Array
    task_values: dict[str, float] = field(default_factory=dict)
    task_scores: Array | None = None
    raw: RawInner | None = None


class Line(Protocol):
    """The restriction γ -> f(Λ + γD) of a problem."""

    def value(self, step: float) -> float:
        """f(Λ + γD)."""

    def task_values(self, step: float) -> dict[str, float]:
        """The loss of each task at Λ + γD."""

    def slope(self, step: float) -> float:
        """d/dγ f(Λ + γD) = ⟨S(Λ + γD), D⟩, by one gradient."""

    def task_slopes(self, step: float) -> tuple[dict[str, float], Array]:
        """The loss of each task at Λ + γD, and its derivative [T], by one gradient a task."""

    def accept(self, step: float, point: Array | None = None) -> None:
        """Keep what is known at γ = step: the solver goes there, to ``point`` if that differs in rounding."""


@dataclass
class Counts:
    """Work done so far: evaluations of the value, of the gradient, passes of A and Aᵀ, bytes read from the pool."""

    evaluations: int = 0
    gradients: int = 0
    combines: int = 0
    correlates: int = 0
    bytes_read: int = 0


def cosines(gram: Array) -> Array:
    """Return the cosines [n, n] of vectors with these inner products; one of norm 0 is orthogonal to all others."""
    norms = np.sqrt(np.diagonal(gram))
    scale = np.where(norms > 0, norms, 1.0)
    found: Array = np.clip(gram / np.outer(scale, scale), -1.0, 1.0)
    np.fill_diagonal(found, 1.0)
    return found


class MatrixProblem:
    """A differentiable function of Λ [rows, n] over a domain. Subclasses give ``evaluate``, ``value`` and ``line``."""

    rows: int
    domain: Domain
    experts: tuple[str, ...]
    stochastic: bool = False
    quadratic: bool = False  # f is known to be a polynomial of degree two: rules that rely on it may be used
    has_gradient: bool = True  # False: ``evaluate`` cannot be called, ``value`` can
    resolution: float = 1e-15  # relative noise of the values, below which a difference means nothing
    cheap_to_refresh: bool = True  # the weights of a point can be rebuilt in every iteration without reading files
    tasks: tuple[str, ...] = ()
    task_weights: Array
    counts: Counts

    @property
    def n(self) -> int:
        """Number of experts."""
        return len(self.experts)

    @property
    def row_names(self) -> Sequence[str]:
        """Names of the rows."""
        return tuple(f"block{row}" for row in range(self.rows))

    @property
    def layers(self) -> dict[str, Array]:
        """Rows of Λ by layer, for records and pictures."""
        return {name: np.array([row]) for row, name in enumerate(self.row_names)}

    @property
    def similarity(self) -> Array:
        """Cosines of the task vectors [n, n]; unless they are known, of vectors that have nothing in common."""
        return np.eye(self.n)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Where the time went so far, by part."""
        return {}

    def draw(self, iteration: int | None) -> None:
        """Fix the batch of the evaluations that follow; None means all the data."""

    def refresh(self) -> None:
        """Forget everything derived from earlier points, so that the next value depends on Λ alone."""

    def evaluate(
        self, point: Array, *, tasks: bool = False, raw: bool = False, experts: Sequence[int] | None = None
    ) -> Evaluation:
        """Return value and scores at ``point`` [rows, n]."""
        raise NotImplementedError

    def value(self, point: Array) -> float:
        """Return the value at ``point``."""
        raise NotImplementedError

    def look(self, point: Array) -> Evaluation:
        """Return the value at ``point`` without scores, and by task where that costs no more."""
        return Evaluation(self.value(point), None)  # type: ignore[arg-type]

    def task_values(self, point: Array) -> dict[str, float]:
        """Return the loss of each task at ``point``, in the order of ``tasks``; without a gradient where possible."""
        return dict(self.evaluate(point).task_values)

    def line(self, point: Array, direction: Array) -> Line:
        """Return the restriction to point + γ·direction."""
        return PointwiseLine(self, point, direction)

    def describe(self) -> dict[str, Any]:
        """Return what identifies the problem: blocks, pool fingerprint, objective, seed."""
        return {"blocks": "row", "fingerprint": "", "objective": {}, "seed": None}

    @property
    def data_used(self) -> dict[str, Any]:
        """Return what the objective has consumed so far."""
        return {}

    def check(self, point: Array, what: str) -> None:
        """Raise OptionError unless ``point`` has the right shape and is feasible."""
        if point.shape != (self.rows, self.n):
            raise OptionError(
                f"{what} has shape {list(point.shape)}, but the problem has {self.rows} blocks and {self.n} experts: "
                f"expected [{self.rows}, {self.n}]. Coefficients belong to one pool and one choice of blocks."
            )
        if not np.isfinite(point).all():
            raise OptionError(f"{what} contains NaN or infinite coefficients.")
        check_feasible(self.domain, point, tuple(self.row_names), what)


@dataclass
class PointwiseLine:
    """A line evaluated point by point."""

    problem: MatrixProblem
    point: Array
    direction: Array

    def value(self, step: float) -> float:
        """f(Λ + γD)."""
        return self.problem.value(self.point + step * self.direction)

    def task_values(self, step: float) -> dict[str, float]:
        """The loss of each task at Λ + γD."""
        return self.problem.task_values(self.point + step * self.direction)

    def slope(self, step: float) -> float:
        """⟨S(Λ + γD), D⟩."""
        return float(np.sum(self.problem.evaluate(self.point + step * self.direction).scores * self.direction))

    def task_slopes(self, step: float) -> tuple[dict[str, float], Array]:
        """The losses at Λ + γD, and ⟨S_t(Λ + γD), D⟩ [T]."""
        found = self.problem.evaluate(self.point + step * self.direction, tasks=True)
        if found.task_scores is None:
            return dict(found.task_values), np.full(len(self.problem.tasks), math.nan)
        return dict(found.task_values), np.sum(found.task_scores * self.direction, axis=(1, 2))

    def accept(self, step: float, point: Array | None = None) -> None:
        """Nothing is kept between points."""


class FunctionProblem(MatrixProblem):
    """A problem given by a plain function Λ -> (value, scores): for studies and tests, without any model."""

    def __init__(
        self,
        value_and_scores: Any,
        rows: int,
        n: int,
        domain: Domain | str = "simplex",
        *,
        resolution: float = 1e-15,
        quadratic: bool = False,
    ) -> None:
        self._function = value_and_scores
        self.rows = rows
        self.experts = tuple(f"expert{i}" for i in range(n))
        self.domain = make_domain(domain).bind(self.experts, self.row_names, self.layers)
        self.resolution = resolution
        self.quadratic = quadratic
        self.tasks = ("objective",)
        self.task_weights = np.ones(1)
        self.counts = Counts()

    def evaluate(
        self, point: Array, *, tasks: bool = False, raw: bool = False, experts: Sequence[int] | None = None
    ) -> Evaluation:
        """Call the function once."""
        self.counts.gradients += 1
        value, scores = self._function(point)
        return Evaluation(
            float(value), np.asarray(scores), {"objective": float(value)}, np.asarray(scores)[None] if tasks else None
        )

    def value(self, point: Array) -> float:
        """Call the function and drop the scores."""
        self.counts.evaluations += 1
        return float(self._function(point)[0])

    def task_values(self, point: Array) -> dict[str, float]:
        """The value, by the name of the only task."""
        return {"objective": self.value(point)}


class Problem(MatrixProblem):
    """min f(Λ) = objective(θ0 + A Λ) over a domain.

    pool: the experts; objective: a loss over weights; blocks: "model", "layer", "tensor", "row", patterns, or a
    ``Blocks``; domain: "simplex", "capped", "box", "free", or a ``Domain``.
    Raises OptionError for unknown names.
    """

    resolution = 1e-6  # models run in float32

    def __init__(
        self,
        pool: Pool,
        objective: Objective,
        blocks: str | Sequence[str] | Blocks = "layer",
        domain: str | Domain = "simplex",
    ) -> None:
        self.pool = pool
        self.objective = objective
        self.blocks: Blocks = pool.blocks(blocks) if isinstance(blocks, (str, Sequence)) else blocks
        self.rows = self.blocks.count
        self.experts = tuple(pool.names)
        self.domain = make_domain(domain).bind(self.experts, self.row_names, self.layers)
        self.tasks = tuple(objective.tasks)
        self.task_weights = np.asarray(objective.task_weights, dtype=np.float64)
        self.stochastic = bool(objective.stochastic)
        self.quadratic = bool(getattr(objective, "quadratic", False))
        self.has_gradient = bool(getattr(objective, "has_gradient", True))
        self.cheap_to_refresh = pool.backend == "resident"
        self.counts = Counts()
        self.seconds = {"combine": 0.0, "objective": 0.0, "correlate": 0.0}
        self._bytes_seen = pool.bytes_read
        self._at: tuple[Array, dict[str, Any]] | None = None  # the last point and its weights
        self._raw_geometry: RawGeometry | None = None
        self._base: dict[str, Any] | None = None  # kept only for the released variants, which score raw checkpoints

    @property
    def row_names(self) -> Sequence[str]:
        """Names of the blocks."""
        return tuple(self.blocks.names)

    @cached_property
    def similarity(self) -> Array:  # type: ignore[override]
        """Cosines of the task vectors over the whole model [n, n]; one pass over the pool."""
        return cosines(self.pool.gram(self.pool.blocks("model"))[0])

    @property
    def layers(self) -> dict[str, Array]:
        """Rows of Λ by layer."""
        return dict(self.blocks.layers)

    def describe(self) -> dict[str, Any]:
        """Return what identifies the problem: blocks, pool fingerprint, objective, seed."""
        return {
            "blocks": self.blocks.kind,
            "backend": self.pool.backend,  # the two round differently
            "fingerprint": self.pool.fingerprint,
            "objective": dict(self.objective.describe()),
            "seed": getattr(self.objective, "seed", None),
        }

    @property
    def data_used(self) -> dict[str, Any]:
        """Return what the objective has consumed so far."""
        return dict(self.objective.data_used)

    def draw(self, iteration: int | None) -> None:
        """Let the objective fix its batch."""
        self.objective.draw(iteration)

    def refresh(self) -> None:
        """Drop the cached weights: the next point is combined from the checkpoints, not from its predecessor."""
        self._at = None

    def weights(self, point: Array) -> dict[str, Any]:
        """Return θ0 + A Λ, reusing what the last point left: experts whose coefficients are unchanged are not read."""
        if self._at is None or not np.array_equal(self._at[0], point):
            at, self._at = self._at, None  # combine works in place, so the old pair must not outlive a failure
            with self.timed("combine"):
                self._at = (point.copy(), self.pool.combine(point, self.blocks, since=at))
            self.counts.combines += 1
            self._count_bytes()
        return self._at[1]

    def evaluate(
        self, point: Array, *, tasks: bool = False, raw: bool = False, experts: Sequence[int] | None = None
    ) -> Evaluation:
        """One gradient of the objective and one pass of Aᵀ over the pool (or over ``experts`` only)."""
        weights = self.weights(point)
        with self.timed("objective"):
            evaluation = self.objective.value_and_grad(weights, per_task=tasks)
        self.counts.gradients += 1
        if not math.isfinite(evaluation.loss):
            return Evaluation(
                float(evaluation.loss), np.full((self.rows, self.n), np.nan), dict(evaluation.task_losses)
            )
        with self.timed("correlate"):
            scores = self.pool.correlate(evaluation.gradient, self.blocks, experts=experts)
        self.counts.correlates += 1
        gradients = evaluation.gradient if tasks else [evaluation.gradient]
        raw_inner = self._raw_inner(gradients) if raw else None
        self._count_bytes()
        return Evaluation(
            float(evaluation.loss),
            np.tensordot(self.task_weights, scores, axes=1) if tasks else scores,
            dict(evaluation.task_losses),
            scores if tasks else None,
            raw_inner,
        )

    def value(self, point: Array) -> float:
        """One forward pass of the objective."""
        self.counts.evaluations += 1
        weights = self.weights(point)
        with self.timed("objective"):
            return float(self.objective.value(weights))

    def look(self, point: Array) -> Evaluation:
        """One forward pass of the objective."""
        if not hasattr(self.objective, "task_losses"):
            return super().look(point)
        losses = self.task_values(point)
        value = sum(float(w) * losses[task] for task, w in zip(self.tasks, self.task_weights, strict=True))
        return Evaluation(value, None, losses)  # type: ignore[arg-type]

    def task_values(self, point: Array) -> dict[str, float]:
        """One forward pass of the objective; with a gradient if it does not tell losses by task without one."""
        self.counts.evaluations += 1
        weights = self.weights(point)
        with self.timed("objective"):
            return self._task_losses(weights)

    def _task_losses(self, weights: dict[str, Any]) -> dict[str, float]:
        """The objective's losses by task at these weights."""
        if hasattr(self.objective, "task_losses"):
            return dict(self.objective.task_losses(weights))
        return dict(self.objective.value_and_grad(weights).task_losses)

    def line(self, point: Array, direction: Array) -> Line:
        """Form A D once, so that every trial along the line costs no reading at all."""
        return WeightLine(self, point, direction)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the block to `seconds`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began

    def _raw_inner(self, gradients: Sequence[dict[str, Any]]) -> RawInner:
        blocks, base = self.pool.blocks("tensor"), self._base_weights()
        self.counts.correlates += 1
        names = list(self.pool.tensors)
        products = np.array([[float((g[t] * base[t]).sum()) for t in names] for g in gradients])
        norms = np.array([[float(g[t].norm()) for t in names] for g in gradients])
        return RawInner(self.pool.correlate(list(gradients), blocks), products, norms)

    def _base_weights(self) -> dict[str, Any]:
        if self._base is None:
            self._base = self.pool.base_weights()
        return self._base

    def raw_geometry(self) -> RawGeometry:
        """Return the norms of the raw checkpoints by tensor: two passes over the pool, once."""
        if self._raw_geometry is None:
            blocks, base = self.pool.blocks("tensor"), self._base_weights()
            squared = np.array([float((base[name] ** 2).sum()) for name in self.pool.tensors])
            task = self.pool.correlate({name: base[name] for name in self.pool.tensors}, blocks)
            self._raw_geometry = RawGeometry(squared, task, self.pool.gram(blocks))
        return self._raw_geometry

    def _count_bytes(self) -> None:
        self.counts.bytes_read += self.pool.bytes_read - self._bytes_seen
        self._bytes_seen = self.pool.bytes_read


class WeightLine:
    """f(Λ + γD) through θ + γ·(A D): one direction and one trial buffer, whatever the number of experts."""

    def __init__(self, problem: Problem, point: Array, direction: Array) -> None:
        self._problem = problem
        self._point = point
        self._direction = direction
        self._weights = problem.weights(point)
        ends = {1: point + direction, -1: point - direction}
        used = {sign: np.any(end, axis=0).sum() for sign, end in ends.items()}
        sign = 1 if used[1] <= used[-1] else -1
        with problem.timed("combine"):
            if used[sign] < np.any(direction, axis=0).sum():
                # A Frank-Wolfe step moves every active expert, but where it goes to, or for an away step comes from,
                # is one vertex: reading that is enough.
                moved = problem.pool.combine(ends[sign], problem.blocks)
                for name, tensor in moved.items():
                    tensor.sub_(self._weights[name])
                    if sign < 0:
                        tensor.neg_()
            else:
                moved = problem.pool.displacement(direction, problem.blocks)
        problem.counts.combines += 1
        problem._count_bytes()
        self._moved: dict[str, Any] = moved
        self._trial: dict[str, Any] = {}
        self._trial_step: float | None = None

    def value(self, step: float) -> float:
        """One forward pass of the objective at θ + γ·(A D)."""
        self._move(step)
        self._problem.counts.evaluations += 1
        with self._problem.timed("objective"):
            return float(self._problem.objective.value(self._trial))

    def task_values(self, step: float) -> dict[str, float]:
        """The loss of each task at θ + γ·(A D): one forward pass."""
        self._move(step)
        self._problem.counts.evaluations += 1
        with self._problem.timed("objective"):
            return self._problem._task_losses(self._trial)

    def slope(self, step: float) -> float:
        """One gradient of the objective at θ + γ·(A D), and its inner product with A D: nothing is read."""
        found = self._gradient(step, per_task=False)
        return self._along(found.gradient) if math.isfinite(found.loss) else math.nan

    def task_slopes(self, step: float) -> tuple[dict[str, float], Array]:
        """The same by task."""
        found = self._gradient(step, per_task=True)
        if not math.isfinite(found.loss):
            return dict(found.task_losses), np.full(len(self._problem.tasks), math.nan)
        return dict(found.task_losses), np.array([self._along(gradient) for gradient in found.gradient])

    def _gradient(self, step: float, *, per_task: bool) -> ObjectiveEvaluation:
        self._move(step)
        self._problem.counts.gradients += 1
        with self._problem.timed("objective"):
            return self._problem.objective.value_and_grad(self._trial, per_task=per_task)

    def _along(self, gradient: Mapping[str, Any]) -> float:
        return math.fsum(float((tensor.double() * self._moved[name]).sum()) for name, tensor in gradient.items())

    def accept(self, step: float, point: Array | None = None) -> None:
        """Make the point at ``step`` the one that the problem remembers."""
        if step == 0.0:
            return
        if self._trial:
            self._move(step)
        else:  # nothing was tried: the step is taken in place, without a third copy of the model
            for name, tensor in self._weights.items():
                tensor.add_(self._moved[name], alpha=step)
            self._trial = self._weights
        reached = self._point + step * self._direction if point is None else point.copy()
        self._problem._at = (reached, self._trial)

    def _move(self, step: float) -> None:
        if step == self._trial_step:
            return
        for name, tensor in self._weights.items():
            if name not in self._trial:
                self._trial[name] = tensor.clone()
            else:
                self._trial[name].copy_(tensor)
            self._trial[name].add_(self._moved[name], alpha=step)
        self._trial_step = step


class Restriction(MatrixProblem):
    """The hull of a point and a few vertices, as a problem of its own: the inner problem of soft Frank-Wolfe.

        Λ(w) = Λ + Σ_j w_j (V_j − Λ),   ∂f/∂w_j = ⟨S, V_j − Λ⟩

    With Σ_j w_j ≤ 1 the point itself keeps the weight 1 − Σ_j w_j; with Σ_j w_j = 1 it would be forgotten.
    vertices: matrices V_j [k, rows, n]. shared: one w for all blocks, else one a block. first_draw: number of the
    parent's batch for the first inner iteration; None keeps one batch throughout.
    Source: FW-Merging, eq. 9.
    """

    def __init__(
        self,
        parent: MatrixProblem,
        point: Array,
        vertices: Array,
        domain: Domain,
        *,
        shared: bool,
        first_draw: int | None = None,
    ) -> None:
        self.parent = parent
        self.first_draw = first_draw
        self.point = point
        self.offsets = vertices - point  # [k, rows, n]
        self.shared = shared
        self.domain = domain
        self.rows = 1 if shared else parent.rows
        self.experts = tuple(f"vertex{j}" for j in range(len(vertices)))
        self.stochastic = parent.stochastic
        self.resolution = parent.resolution
        self.tasks, self.task_weights = parent.tasks, parent.task_weights
        self.counts, self.seconds = parent.counts, parent.seconds
        self._read = np.flatnonzero(np.any(self.offsets, axis=(0, 1)))

    def draw(self, iteration: int | None) -> None:
        """Keep the parent's batch, or with ``first_draw`` take a new one for each inner iteration."""
        if self.first_draw is not None and iteration is not None:
            self.parent.draw(self.first_draw + iteration)

    def lift(self, weights: Array) -> Array:
        """Return Λ(w) [rows, n] for w [rows or 1, k]."""
        return self.point + np.einsum("rk,krn->rn", np.broadcast_to(weights, (len(self.point), self.n)), self.offsets)

    def evaluate(
        self, point: Array, *, tasks: bool = False, raw: bool = False, experts: Sequence[int] | None = None
    ) -> Evaluation:
        """One evaluation of the parent, correlated with the experts that matter only."""
        evaluation = self.parent.evaluate(self.lift(point), experts=self._read)  # type: ignore[arg-type]
        scores = np.where(np.isnan(evaluation.scores), 0.0, evaluation.scores)
        inner = np.einsum("rn,krn->rk", scores, self.offsets)
        if not math.isfinite(evaluation.value):
            inner = np.full_like(inner, np.nan)
        return Evaluation(
            evaluation.value, inner.sum(axis=0, keepdims=True) if self.shared else inner, evaluation.task_values
        )

    def value(self, point: Array) -> float:
        """One value of the parent."""
        return self.parent.value(self.lift(point))

    def task_values(self, point: Array) -> dict[str, float]:
        """One value of the parent, by task."""
        return self.parent.task_values(self.lift(point))


def layer_means(layers: Mapping[str, Array], matrix: Array) -> Array:
    """Return the mean of ``matrix`` [rows, n] over the rows of each layer [layers, n]."""
    return np.array([matrix[rows].mean(axis=0) for rows in layers.values()])
