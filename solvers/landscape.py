"""The loss between merges: segments and barriers, planes, swaps of layers, features, and what averaging gains.

    B(a, b) = sup_t [L((1−t) a + t b) − ((1−t) L(a) + t L(b))],   0 ≤ t ≤ 1                                    (barrier)
    Σ_i w_i L(θ_i) − L(Σ_i w_i θ_i)                                                                            (gain)

Points are coefficients Λ [rows, n], and an affine subset of them is an affine subset of the weights:
θ(Λ_a + Σ_k x_k D_k) = θ_a + Σ_k x_k A D_k. So A D_k is formed once, and a trial costs one forward pass and no reading.
Losses are those of the batch that the problem has drawn; `problem.draw(None)` takes all its data. Distances are those
of the weights, ‖A D‖² = Σ_b D_b G_b D_bᵀ with the Gram matrices G_b of the task vectors.

For a convex loss the barrier is 0; for L = ½‖θ − c‖²_H the gain is ½ Σ_i w_i ‖θ_i − θ̄‖²_H.

Sources: Frankle et al. (2020), Linear Mode Connectivity and the Lottery Ticket Hypothesis; Entezari et al. (2022), The
Role of Permutation Invariance in Linear Mode Connectivity (the barrier; in printed versions the supremum must cover the
whole difference); Adilova et al. (2024), Layer-wise Linear Mode Connectivity; Zhou et al. (2023), Going Beyond Linear
Mode Connectivity: The Layerwise Linear Feature Connectivity; Garipov et al. (2018) for planes through three points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .errors import OptionError
from .problem import MatrixProblem, Problem

Array = np.ndarray[Any, Any]
Measure = Callable[[dict[str, Any]], Mapping[str, float]]
Progress = Callable[[int, int], None]
FLAT = 1e-9  # relative length below which two points are one, or three lie on a line


class Metric:
    """The distance of merges in the space of weights, ‖A D‖; of a problem without a pool, the Frobenius norm of D.

    gram: inner products of the task vectors by block [rows, n, n], or one for all blocks [1, n, n].
    """

    def __init__(self, gram: Array | None) -> None:
        self._gram = gram

    @classmethod
    def of(cls, problem: MatrixProblem) -> Metric:
        """The metric of a problem; one pass over its pool."""
        return cls(problem.pool.gram(problem.blocks) if isinstance(problem, Problem) else None)

    def inner(self, first: Array, second: Array) -> float:
        """Return ⟨A D, A E⟩ for D and E [rows, n]."""
        if self._gram is None:
            return float(np.sum(first * second))
        left, right = np.flatnonzero(first.any(axis=0)), np.flatnonzero(second.any(axis=0))
        gram = np.broadcast_to(self._gram, (len(first), *self._gram.shape[1:]))[:, left][:, :, right]
        return float(np.einsum("rn,rnm,rm->", first[:, left], gram, second[:, right]))

    def distance(self, a: Array, b: Array) -> float:
        """Return ‖θ(a) − θ(b)‖."""
        return float(np.sqrt(max(self.inner(a - b, a - b), 0.0)))


class Slice:
    """The affine subset θ(x) = θ_origin + Σ_k x_k A D_k of the weights, with one trial buffer.

    origin, directions: coefficients [rows, n]. Memory: 2 + k models, whatever the number of experts.
    """

    def __init__(self, problem: MatrixProblem, origin: Array, *directions: Array) -> None:
        self._problem = problem
        self._origin, self._directions = origin, directions
        if isinstance(problem, Problem):
            with problem.timed("combine"):
                self._start = problem.pool.combine(origin, problem.blocks)
                self._moved = [problem.pool.displacement(direction, problem.blocks) for direction in directions]
            problem.counts.combines += 1 + len(directions)
            self._trial = {name: tensor.clone() for name, tensor in self._start.items()}

    def weights(self, *x: float) -> dict[str, Any]:
        """Return θ(x), in a buffer that the next call overwrites."""
        for name, tensor in self._trial.items():
            tensor.copy_(self._start[name])
            for step, moved in zip(x, self._moved, strict=True):
                tensor.add_(moved[name], alpha=float(step))
        return self._trial

    def losses(self, *x: float) -> Losses:
        """Return the loss at θ(x), in all and by task."""
        if isinstance(self._problem, Problem):
            return losses_of(self._problem, self.weights(*x))
        point = self._origin + sum(
            step * direction for step, direction in zip(x, self._directions, strict=True)
        )  # fmt: skip
        return Losses(self._problem.value(point), {})


@dataclass(frozen=True)
class Losses:
    """A loss and its tasks; an objective that has no losses by task has an empty mapping."""

    total: float
    tasks: dict[str, float]


def losses_of(problem: Problem, weights: dict[str, Any]) -> Losses:
    """One forward pass of the problem's objective."""
    problem.counts.evaluations += 1
    by_task = getattr(problem.objective, "task_losses", None)
    with problem.timed("objective"):
        if by_task is None:
            return Losses(float(problem.objective.value(weights)), {})
        tasks = {name: float(value) for name, value in by_task(weights).items()}
    return Losses(float(np.dot(problem.task_weights, [tasks[name] for name in problem.tasks])), tasks)


def losses_at(problem: MatrixProblem, point: Array) -> Losses:
    """Return the loss at one point, in all and by task."""
    if isinstance(problem, Problem):
        return losses_of(problem, problem.weights(point))
    return Losses(problem.value(point), {})


@dataclass(frozen=True)
class Barrier:
    """sup_t of the excess over the chord, which is 0 at both ends: height ≥ 0, reached at t = at (0 if there is none).

    middle: the excess at t = ½, negative where averaging gains; nan if ½ was not visited.
    """

    height: float
    at: float
    middle: float


def barrier_of(steps: ArrayLike, values: ArrayLike) -> Barrier:
    """Return the barrier of a curve of which these points are known; the first and the last are its ends.

    steps [k], increasing, and values [k]. Values that are not finite give an infinite barrier.
    """
    t, value = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    excess = excess_of(t, value)
    found = np.where(np.isfinite(excess), excess, np.inf)
    best = int(np.argmax(found))
    halfway = np.flatnonzero(np.abs(t - 0.5) < 1e-12)
    height = max(float(found[best]), 0.0)
    return Barrier(height, float(t[best]) if height > 0 else 0.0, float(excess[halfway[0]]) if len(halfway) else np.nan)


def excess_of(steps: Array, values: Array) -> Array:
    """Return L(t) − ((1−t) L(0) + t L(1)) [k]."""
    return values - ((1 - steps) * values[0] + steps * values[-1])


@dataclass(frozen=True)
class Segment:
    """The loss along (1−t) a + t b: steps t [k] increasing, values [k], tasks name -> [k], measured name -> [k].

    length: ‖θ_a − θ_b‖.
    """

    steps: Array
    values: Array
    tasks: dict[str, Array]
    measured: dict[str, Array]
    length: float

    @property
    def barrier(self) -> Barrier:
        """The barrier of the whole loss."""
        return barrier_of(self.steps, self.values)

    @property
    def task_barriers(self) -> dict[str, Barrier]:
        """The barrier of each task, on the steps that were visited."""
        return {name: barrier_of(self.steps, values) for name, values in self.tasks.items()}

    @property
    def lowest(self) -> tuple[float, float]:
        """Where the loss is lowest among the steps that were visited, and how low: (t, L)."""
        best = int(np.nanargmin(self.values)) if np.isfinite(self.values).any() else 0
        return float(self.steps[best]), float(self.values[best])

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "steps": self.steps.tolist(),
            "values": self.values.tolist(),
            "tasks": {name: values.tolist() for name, values in self.tasks.items()},
            "measured": {name: values.tolist() for name, values in self.measured.items()},
            "length": self.length,
            "barrier": vars(self.barrier),
            "task_barriers": {name: vars(barrier) for name, barrier in self.task_barriers.items()},
            "lowest": {"at": self.lowest[0], "value": self.lowest[1]},
        }


def segment(
    problem: MatrixProblem,
    a: Array,
    b: Array,
    *,
    grid: int = 11,
    refine: int = 0,
    measure: Measure | None = None,
    metric: Metric | None = None,
    progress: Progress | None = None,
) -> Segment:
    """Return the loss at ``grid`` even steps from a to b, and the barrier refined around the worst of them.

    refine: at most so many further evaluations, by bounded Brent between the neighbours of the worst step, if its
    excess is positive. A barrier narrower than the grid's spacing may be missed. measure: weights -> further numbers,
    such as accuracies, along the same steps. Raises OptionError for grids below 3.
    """
    _check_grid(grid)
    line = Slice(problem, a, b - a)
    known: dict[float, tuple[Losses, Mapping[str, float]]] = {}
    total = grid + refine

    def visit(step: float) -> float:
        found = line.losses(step)
        known[step] = found, measure(line.weights(step)) if measure is not None else {}
        if progress is not None:
            progress(len(known), total)
        return found.total

    steps = np.linspace(0.0, 1.0, grid)
    values = np.array([visit(float(step)) for step in steps])
    worst = int(np.argmax(excess_of(steps, values)))
    if refine > 0 and 0 < worst < grid - 1 and np.isfinite(values).all():
        from scipy.optimize import minimize_scalar

        first, last = values[0], values[-1]
        minimize_scalar(
            lambda step: (1 - step) * first + step * last - visit(float(step)),
            bounds=(steps[worst - 1], steps[worst + 1]),
            method="bounded",
            options={"maxiter": refine, "xatol": 1e-4},
        )
    if progress is not None:
        progress(total, total)
    visited = sorted(known)
    losses = [known[step][0] for step in visited]
    measured = [known[step][1] for step in visited]
    return Segment(
        np.array(visited),
        np.array([found.total for found in losses]),
        {name: np.array([found.tasks[name] for found in losses]) for name in losses[0].tasks},
        {name: np.array([found[name] for found in measured]) for name in measured[0]},
        (metric or Metric.of(problem)).distance(a, b),
    )


def barriers(
    problem: MatrixProblem,
    points: Mapping[str, Array],
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    grid: int = 11,
    refine: int = 8,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[tuple[str, str], Segment]:
    """Return the segments between points, each pair unless ``pairs`` names some."""
    names = list(points)
    chosen = list(pairs) if pairs is not None else [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    metric = Metric.of(problem)
    found = {}
    for done, (first, second) in enumerate(chosen):
        if progress is not None:
            progress(f"{first} to {second}", done, len(chosen))
        found[first, second] = segment(
            problem, points[first], points[second], grid=grid, refine=refine, metric=metric
        )  # fmt: skip
    if progress is not None:
        progress("", len(chosen), len(chosen))
    return found


@dataclass(frozen=True)
class Frame:
    """Orthonormal coordinates of the plane through three points, in the metric of the weights.

    origin: Λ_a; axes: two matrices [rows, n] of length 1, the first from a towards b, the second towards c's side.
    """

    origin: Array
    axes: tuple[Array, Array]
    metric: Metric

    @classmethod
    def through(cls, metric: Metric, a: Array, b: Array, c: Array) -> Frame:
        """The frame of three points. Raises OptionError if they lie on a line."""
        u, v = b - a, c - a
        length = np.sqrt(max(metric.inner(u, u), 0.0))
        scale = max(length, metric.distance(a, c))
        if length > FLAT * scale:
            u = u / length
            v = v - metric.inner(u, v) * u
            v = v - metric.inner(u, v) * u  # once more: the first time leaves rounding of the order of ‖v‖
        height = np.sqrt(max(metric.inner(v, v), 0.0))
        if length <= FLAT * scale or height <= 1e-6 * scale:
            raise OptionError(
                "The three points lie on a line of the weights (or two of them are one), so there is no plane through "
                "them. Take another third point, or draw the segment."
            )
        return cls(a, (u, v / height), metric)

    def project(self, point: Array) -> tuple[float, float, float]:
        """Return the coordinates x and y of a point's projection, and its distance from the plane."""
        offset = point - self.origin
        x, y = (self.metric.inner(offset, axis) for axis in self.axes)
        rest = offset - x * self.axes[0] - y * self.axes[1]
        return x, y, float(np.sqrt(max(self.metric.inner(rest, rest), 0.0)))


@dataclass(frozen=True)
class Plane:
    """The loss on the plane through three points: x [nx] and y [ny] in units of the weights, values [ny, nx].

    tasks: name -> [ny, nx]; points: coordinates [3, 2] of the three; paths: name -> [k, 3], the coordinates of further
    points and their distance from the plane.
    """

    x: Array
    y: Array
    values: Array
    tasks: dict[str, Array]
    points: Array
    paths: dict[str, Array]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "x": self.x.tolist(),
            "y": self.y.tolist(),
            "values": self.values.tolist(),
            "tasks": {name: values.tolist() for name, values in self.tasks.items()},
            "points": self.points.tolist(),
            "paths": {name: path.tolist() for name, path in self.paths.items()},
        }


def plane(
    problem: MatrixProblem,
    a: Array,
    b: Array,
    c: Array,
    *,
    grid: int = 15,
    margin: float = 0.25,
    paths: Mapping[str, Sequence[Array]] | None = None,
    progress: Progress | None = None,
) -> Plane:
    """Return the loss on a grid over the plane through a, b and c, around them and the projections of the paths.

    grid: points along the longer side; margin: how far the grid reaches beyond the points, in their extent. Raises
    OptionError for grids below 3 and for points on a line.
    """
    _check_grid(grid)
    frame = Frame.through(Metric.of(problem), a, b, c)
    corners = np.array([frame.project(point)[:2] for point in (a, b, c)])
    projected = {name: np.array([frame.project(point) for point in path]) for name, path in (paths or {}).items()}
    seen = np.concatenate([corners, *(path[:, :2] for path in projected.values())])
    low, high = seen.min(axis=0), seen.max(axis=0)
    reach = margin * float((high - low).max())
    sides = (high - low) + 2 * reach
    count = np.maximum(3, np.round(1 + (grid - 1) * sides / sides.max()).astype(int))
    x, y = (np.linspace(low[k] - reach, high[k] + reach, count[k]) for k in (0, 1))
    cut = Slice(problem, a, *frame.axes)
    found: list[Losses] = []
    for height in y:
        for across in x:
            found.append(cut.losses(float(across), float(height)))
            if progress is not None:
                progress(len(found), len(x) * len(y))
    shape = (len(y), len(x))
    return Plane(
        x,
        y,
        np.array([losses.total for losses in found]).reshape(shape),
        {name: np.array([losses.tasks[name] for losses in found]).reshape(shape) for name in found[0].tasks},
        corners,
        projected,
    )


@dataclass(frozen=True)
class Swap:
    """What one layer does: the loss of a with that layer of b (direction 0), and of b with that layer of a (1).

    layers: names [L]; ends: the losses of a and b [2]; swapped, halfway, together: losses [2, L] with layer l replaced,
    with layer l at the middle of a's and b's, and with the layers up to l replaced, in their order; tasks: the same by
    task, name -> {"ends", "swapped", "halfway", "together"}.
    """

    layers: tuple[str, ...]
    ends: Array
    swapped: Array
    halfway: Array
    together: Array
    tasks: dict[str, dict[str, Array]]

    @property
    def change(self) -> Array:
        """The loss that replacing one layer adds [2, L]."""
        return self.swapped - self.ends[:, None]

    @property
    def barrier(self) -> Array:
        """The excess at the middle of the segment on which only one layer moves [2, L] (layer-wise connectivity)."""
        return self.halfway - 0.5 * (self.ends[:, None] + self.swapped)

    def task_change(self, name: str) -> Array:
        """The loss of one task that replacing one layer adds [2, L]."""
        return self.tasks[name]["swapped"] - self.tasks[name]["ends"][:, None]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "layers": list(self.layers),
            "ends": self.ends.tolist(),
            "swapped": self.swapped.tolist(),
            "halfway": self.halfway.tolist(),
            "together": self.together.tolist(),
            "change": self.change.tolist(),
            "barrier": self.barrier.tolist(),
            "tasks": {name: {key: kept.tolist() for key, kept in parts.items()} for name, parts in self.tasks.items()},
        }


def layer_swap(problem: MatrixProblem, a: Array, b: Array, *, progress: Progress | None = None) -> Swap:
    """Replace one layer of a by that of b and the other way round, each layer alone, half of it, and all up to it."""
    layers = problem.layers
    ends = [a, b]
    parts: dict[str, list[Losses]] = {"ends": [losses_at(problem, a), losses_at(problem, b)]}
    done, total = 2, 2 + 6 * len(layers)
    for kind in ("swapped", "halfway", "together"):
        parts[kind] = []
        for one, other in (ends, ends[::-1]):
            point = one.copy()
            for rows in layers.values():
                if kind != "together":
                    point = one.copy()
                point[rows] = 0.5 * (one[rows] + other[rows]) if kind == "halfway" else other[rows]
                parts[kind].append(losses_at(problem, point))
                done += 1
                if progress is not None:
                    progress(done, total)

    def shaped(kind: str, values: list[float]) -> Array:
        return np.array(values) if kind == "ends" else np.array(values).reshape(2, len(layers))

    totals = {kind: shaped(kind, [found.total for found in losses]) for kind, losses in parts.items()}
    tasks = {
        name: {kind: shaped(kind, [found.tasks[name] for found in losses]) for kind, losses in parts.items()}
        for name in parts["ends"][0].tasks
    }
    return Swap(tuple(layers), totals["ends"], totals["swapped"], totals["halfway"], totals["together"], tasks)


@dataclass(frozen=True)
class FeatureConnectivity:
    """How near the features m of a merged model are to the interpolated features g = Σ_i w_i f(θ_i).

    cosine: mean over samples of cos(m, g); scale: mean of ⟨m, g⟩/‖g‖²; distance: mean of ‖m − g‖/‖g‖;
    endpoints: mean cos(m, f(θ_i)) [n], to compare with: the merge is linear in feature space where `cosine` is above
    them and close to 1.
    """

    cosine: float
    scale: float
    distance: float
    endpoints: tuple[float, ...]


def feature_connectivity(merged: ArrayLike, features: ArrayLike, weights: ArrayLike) -> FeatureConnectivity:
    """Return the measures for features of the merged model [N, d] and of the models that it is made of [n, N, d].

    weights [n]: the coefficients of the merge. Exact (1, 1, 0) where the features are linear in the weights. Features
    that the model normalizes lie on a sphere and their interpolation inside it, so there the scale is above 1.
    Source: Zhou et al. (2023), definition 1 and section 3; for more than two models, cross-task linearity.
    """
    m, f = np.asarray(merged, dtype=np.float64), np.asarray(features, dtype=np.float64)
    w = np.asarray(weights, dtype=np.float64)
    if f.ndim != 3 or m.shape != f.shape[1:] or w.shape != f.shape[:1] or not m.size:
        raise OptionError(
            f"Features of shapes {list(m.shape)} and {list(f.shape)} with weights of shape {list(w.shape)}; expected "
            "[samples, d], [models, samples, d] and [models]."
        )
    g = np.einsum("i,isd->sd", w, f)
    squared = np.maximum(np.sum(g * g, axis=1), 1e-300)
    return FeatureConnectivity(
        float(_cosines(m, g).mean()),
        float((np.sum(m * g, axis=1) / squared).mean()),
        float((np.linalg.norm(m - g, axis=1) / np.sqrt(squared)).mean()),
        tuple(float(_cosines(m, one).mean()) for one in f),
    )


def _cosines(first: Array, second: Array) -> Array:
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.sum(first * second, axis=1) / np.maximum(norms, 1e-300)


@dataclass(frozen=True)
class Gain:
    """What averaging gains: `gain` = mean − merged, with mean = Σ_i w_i L(θ_i) and merged = L(θ̄).

    By Jensen's inequality it is nonnegative where the loss is convex on the hull. spread: ½ Σ_i w_i ‖θ_i − θ̄‖², which
    times a curvature is the gain of a quadratic.
    """

    mean: float
    merged: float
    spread: float

    @property
    def gain(self) -> float:
        """Σ_i w_i L(θ_i) − L(θ̄)."""
        return self.mean - self.merged


def merging_gain(
    problem: MatrixProblem,
    points: Sequence[Array],
    weights: ArrayLike | None = None,
    *,
    values: Sequence[float] | None = None,
    metric: Metric | None = None,
) -> Gain:
    """Return the gain of the weighted average of some points (equal weights unless given).

    weights: nonnegative with sum 1; values: L at the points, where they are known already.
    """
    w = np.full(len(points), 1 / len(points)) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (len(points),) or (w < 0).any() or abs(float(w.sum()) - 1) > 1e-9:
        raise OptionError(f"The weights of {len(points)} points must be nonnegative with sum 1. Got {w.tolist()}.")
    known = [losses_at(problem, point).total for point in points] if values is None else list(values)
    average = np.einsum("i,irn->rn", w, np.stack(points))
    measure = metric or Metric.of(problem)
    spread = 0.5 * sum(float(c) * measure.distance(p, average) ** 2 for c, p in zip(w, points, strict=True))
    return Gain(float(np.dot(w, known)), losses_at(problem, average).total, spread)


def _check_grid(grid: int) -> None:
    if isinstance(grid, bool) or not isinstance(grid, int) or grid < 3:
        raise OptionError(f"The grid must be an integer of at least 3. Got {grid!r} instead.")
