"""copt and TorchJD on our test problems: iterations and accuracy, from the same points, judged from outside.

    pip install copt torchjd

copt's Frank-Wolfe has two variants, vanilla and pairwise, with the backtracked step of its authors; ours run with the
same rule. The gap of each of its iterates is recomputed here. TorchJD's MGDA looks for the least norm by at most 100
Frank-Wolfe steps; ours is Wolfe's finite method.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mergesolve.solvers import solve
from mergesolve.solvers.instances import INSTANCES, Instance
from mergesolve.solvers.mgda import min_norm

Array = np.ndarray[Any, Any]
LIMIT = 1000
TOLERANCE = 1e-8
SINGLE = ("one block", "duplicates", "mean expert", "dominated", "ill-conditioned", "quartic", "100 experts")
"""Problems with one block on the simplex: copt's vertices are single coordinates."""


@dataclass(frozen=True)
class Race:
    """Iterations to the tolerance (None: not within the limit), and f − f* at the end."""

    iterations: int | None
    excess: float

    @property
    def cell(self) -> str:
        """Iterations, and accuracy; a value below f* by rounding has reached it."""
        reached = f"> {LIMIT}" if self.iterations is None else str(self.iterations)
        return f"{reached} ({max(self.excess, 0.0):.0e})"


class Watch:
    """A copt callback that keeps the last iterate, and stops where our gap is within the tolerance."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.iterations = -1
        self.gap = math.inf
        self.value = math.inf

    def function(self, x: Array) -> tuple[float, Array]:
        """Value and gradient of a point [n]."""
        value, scores = self.instance.function(x[None])
        return value, scores[0]

    def __call__(self, state: Mapping[str, Any]) -> bool:
        """Judge the iterate; False ends the run."""
        if self.gap <= TOLERANCE:
            return False  # copt calls once more at its end
        point = np.array(state["x"])[None]
        self.value, scores = self.instance.function(point)
        gap = self.instance.domain.gap(point, scores)
        assert gap is not None
        self.gap, self.iterations = gap, self.iterations + 1
        return gap > TOLERANCE

    def race(self) -> Race:
        """What was seen."""
        return Race(self.iterations if self.gap <= TOLERANCE else None, self.value - self.instance.value)


def ours(instance: Instance, solver: Mapping[str, Any], start: Array) -> Race:
    """One of our solvers, with the same limit and tolerance."""
    result = solve(instance.problem(), solver, start=start, max_iter=LIMIT, tol=TOLERANCE)
    return Race(result.nit if result.status == "optimal" else None, result.objective - instance.value)


def copt_frank_wolfe(instance: Instance, variant: str, start: Array) -> Race:
    """``copt.minimize_frank_wolfe`` with its backtracking, from a vertex."""
    import copt

    vertices, watch = np.eye(instance.shape[1]), Watch(instance)

    def vanilla(u: Array, x: Array, active: object) -> tuple[Array, int, None, float]:
        best = int(np.argmax(u))
        return vertices[best] - x, best, None, 1.0

    def pairwise(u: Array, x: Array, active: Mapping[int, float]) -> tuple[Array, int, int, float]:
        best = int(np.argmax(u))
        away = min((vertex for vertex, weight in active.items() if weight > 0), key=lambda vertex: u[vertex])
        return vertices[best] - vertices[away], best, away, active[away]

    copt.minimize_frank_wolfe(
        watch.function,
        start[0],
        pairwise if variant == "pairwise" else vanilla,
        x0_rep=int(np.argmax(start[0])),
        variant=variant,
        jac=True,
        lipschitz=instance.smoothness,
        max_iter=LIMIT,
        tol=0.0,
        callback=watch,
    )
    return watch.race()


def copt_proximal(instance: Instance, start: Array) -> Race:
    """``copt.minimize_proximal_gradient``, accelerated, with its projection onto the simplex."""
    import copt
    import copt.constraint

    watch = Watch(instance)
    copt.minimize_proximal_gradient(
        watch.function,
        start[0],
        copt.constraint.SimplexConstraint().prox,
        jac=True,
        accelerated=True,
        max_iter=LIMIT,
        tol=0.0,
        callback=watch,
    )
    return watch.race()


def frank_wolfe_rows() -> tuple[list[str], list[list[str]]]:
    """Ours and copt's on each problem, from the first expert."""
    header = ["problem"]
    rows = []
    rule = {"step_rule": "backtracking"}
    columns: dict[str, Callable[[Instance, Array], Race]] = {
        "vanilla, copt": lambda instance, start: copt_frank_wolfe(instance, "vanilla", start),
        "vanilla, ours": lambda instance, start: ours(instance, {"name": "frank-wolfe", **rule}, start),
        "pairwise, copt": lambda instance, start: copt_frank_wolfe(instance, "pairwise", start),
        "pairwise, ours": lambda instance, start: ours(instance, {"name": "pairwise-frank-wolfe", **rule}, start),
        "accelerated gradient, copt": copt_proximal,
        "accelerated gradient, ours": lambda instance, start: ours(instance, {"name": "projected-gradient"}, start),
    }
    header += list(columns)
    for name in SINGLE:
        instance = INSTANCES[name]
        start = np.zeros(instance.shape)
        start[0, 0] = 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # copt divides by 0 where two of its values are equal
            rows.append([f"`{name}`", *(column(instance, start).cell for column in columns.values())])
    return header, rows


def gradients(tasks: int, size: int, active: int, seed: int) -> tuple[Array, float]:
    """Return task gradients [T, d] and the least norm in their hull, known by construction.

    With a vector d, weights p > 0 of sum 1 and residuals h_t ⟂ d with Σ p_t h_t = 0, the first ``active`` gradients are
    g_t = d + h_t, so Σ p_t g_t = d; the others have ⟨g_t, d⟩ > ‖d‖². Then ⟨x, d⟩ ≥ ‖d‖² for all x in the hull.
    """
    rng = np.random.default_rng(seed)
    d = rng.normal(size=size)
    d *= 0.3 / np.linalg.norm(d)
    h = rng.normal(size=(tasks, size))
    weights = rng.dirichlet(np.full(active, 2.0))
    h[:active] -= weights @ h[:active]
    h -= np.outer(h @ d, d) / (d @ d)
    above = np.concatenate([np.ones(active), 1 + rng.uniform(0.1, 2.0, tasks - active)])
    return above[:, None] * d + h, float(np.linalg.norm(d))


def min_norm_rows() -> tuple[list[str], list[list[str]]]:
    """By how much the norm of each method's combination exceeds the least one, for 20 tasks."""
    import torch
    from torchjd.aggregation import MGDA

    rows = []
    for active in (3, 10, 20):
        points, least = gradients(20, 60, active, active)
        tensor = torch.from_numpy(points)
        cells = [float(np.linalg.norm(min_norm(points) @ points)) - least]
        for theirs in (MGDA(), MGDA(epsilon=1e-12, max_iters=10_000)):
            cells.append(float(theirs(tensor).norm()) - least)
        rows.append([f"20 tasks, {active} in the solution", *(f"{max(cell, 0.0):.0e}" for cell in cells)])
    return ["gradients", "ours", "TorchJD, as it comes", "TorchJD, 10 000 steps"], rows
