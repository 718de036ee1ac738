"""Pareto sets: one merge a preference, from one warm start to the next, and what their front is worth.

A point is dominated if another is nowhere worse and somewhere better. Preferences are weights of the tasks on a grid of
the simplex (Das and Dennis), visited along a path, each solve beginning at the nearest preference that is solved: with
a weighted sum, or with Chebyshev around the ideal point, which also reaches where a front is not convex. The worth of
a front is its hypervolume: the volume of what it dominates, up to a reference point.
Source: Das and Dennis (1998); Zitzler and Thiele (1999) for the hypervolume; While, Bradstreet and Barone (2012), WFG,
for its computation; Rewarded Soups (Ramé et al. 2023) and MAP (Li et al. 2024) for fronts of merges.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from .driver import Callback, solve
from .errors import OptionError, check_choice, check_number
from .files import plain, read_arrays, write_arrays, write_bytes, write_json
from .loop import INTERRUPTED
from .problem import Array, MatrixProblem
from .registry import make_solver
from .result import COEFFICIENTS, RESULT, Result
from .scalarization import SMOOTHING, Scalarized
from .solver import Solver
from .surrogate import Surrogate, fit_surrogate

FRONT, TABLE = "front.json", "front.csv"
EXACT = 4  # tasks up to which the hypervolume is computed exactly
MARGIN = 1.1


@dataclass
class Front:
    """Merges along preferences, with what they are worth.

    tasks: names [T]; preferences [K, T], rows of sum 1; losses [K, T], true ones; coefficients [K, rows, n];
    records: a mapping a point with name, status, gap and nit; ideal, reference: points [T] of losses, the best of each
    task and what the hypervolume is measured to; hypervolume, with hypervolume_error (0 where it is exact, else one
    standard deviation); predicted: losses [K, T] on a surrogate, or None; about: what made it.
    """

    tasks: tuple[str, ...]
    experts: tuple[str, ...]
    preferences: Array
    losses: Array
    coefficients: Array
    records: list[dict[str, Any]]
    ideal: Array
    reference: Array
    hypervolume: float
    hypervolume_error: float = 0.0
    predicted: Array | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def nondominated(self) -> Array:
        """Which points no other point dominates [K], bool."""
        return nondominated(self.losses)

    def save(self, folder: str | Path) -> None:
        """Write front.json, front.csv and coefficients.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_arrays(folder / COEFFICIENTS, {"coefficients": self.coefficients}, {"experts": self.experts})
        content = {name: value for name, value in vars(self).items() if name != "coefficients"}
        write_json(folder / FRONT, {**content, "nondominated": self.nondominated})
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        predicted = [f"predicted {task}" for task in self.tasks] if self.predicted is not None else []
        losses = [f"loss {task}" for task in self.tasks]
        weights = [f"preference {task}" for task in self.tasks]
        writer.writerow(["name", *weights, *losses, *predicted, "nondominated", "status", "gap"])
        for k, (record, kept) in enumerate(zip(self.records, self.nondominated, strict=True)):
            guess = self.predicted[k].tolist() if self.predicted is not None else []
            numbers = [*self.preferences[k].tolist(), *self.losses[k].tolist(), *guess]
            writer.writerow([record["name"], *numbers, int(kept), record["status"], record["gap"]])
        write_bytes(folder / TABLE, text.getvalue().encode())

    @classmethod
    def load(cls, folder: str | Path) -> Front:
        """Read a saved front. Raises OptionError if the folder holds none."""
        folder = Path(folder)
        try:
            content = json.loads((folder / FRONT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise OptionError(
                f"{folder} holds no front: {FRONT} is missing. Give the folder that `mergesolve pareto` wrote; if it "
                "was killed, go on with it."
            ) from None
        arrays, _ = read_arrays(folder / COEFFICIENTS)
        content.pop("nondominated")
        for name in ("preferences", "losses", "ideal", "reference", "predicted"):
            if content[name] is not None:
                content[name] = np.array(content[name], dtype=np.float64)
        content["tasks"], content["experts"] = tuple(content["tasks"]), tuple(content["experts"])
        return cls(coefficients=arrays["coefficients"], **content)


@dataclass(frozen=True)
class Plan:
    """How the points of a front are found.

    method: "weighted-sum" or "chebyshev"; smoothing: of the latter. solver, max_iter, tol: of each solve. warm: begin
    at the nearest preference that is solved, instead of at `start`.
    """

    method: str = "chebyshev"
    smoothing: float = SMOOTHING
    solver: Any = "projected-gradient"
    start: Any = "average"
    max_iter: int = 50
    tol: float = 1e-4
    warm: bool = True

    def __post_init__(self) -> None:
        check_choice(self, "method", ("weighted-sum", "chebyshev"))
        check_number(self, "smoothing", 0, math.inf, closed="neither")
        check_number(self, "max_iter", 0, math.inf, closed="left", integer=True)
        check_number(self, "tol", 0, math.inf, closed="left")
        object.__setattr__(self, "solver", make_solver(self.solver))


def pareto_front(
    problem: MatrixProblem,
    preferences: Array | int | None = None,
    plan: Plan | None = None,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    reference: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
    callback: Callback | None = None,
) -> Front:
    """Solve for one merge a preference, and return their front.

    preferences: weights [K, T] ≥ 0, an integer for a grid with so many divisions of the simplex, or None for the finest
    grid of at most 15 points. The tasks alone (the corners) are solved first: their losses are the ideal point of
    Chebyshev. run: a folder with one run a preference beside front.json and front.csv; resume: keep the runs that ended
    there. reference: task -> loss that the hypervolume is measured to; unless told the worst losses of the front, a
    tenth of its range further out. seed: of the hypervolume's samples, for more than four tasks. progress: called with
    (solves done, in all, name). Raises OptionError for preferences that do not fit, KeyboardInterrupt where it is
    interrupted.
    """
    plan = Plan() if plan is None else plan
    tasks = len(problem.tasks)
    weights = preference_grid(preferences, tasks)
    check_reference(reference, problem.tasks)
    folder = Path(run) if run is not None else None
    if resume and folder is None:
        raise OptionError("resume=True needs run=FOLDER, the folder of the front to go on with.")
    corners = np.eye(tasks)
    interior = [row for row in path(weights) if row.max() < 1.0]
    asked = [row for row in corners if (weights == row).all(axis=1).any()]
    total, done = tasks + len(interior), 0
    solved: list[tuple[Array, Result]] = []

    def one(row: Array, spec: Mapping[str, Any]) -> Result:
        nonlocal done
        name = preference_name(row, problem.tasks)
        if progress is not None:
            progress(done, total, name)
        result = _solve_one(problem, plan, row, spec, solved, folder, name, resume, callback)
        solved.append((row, result))
        done += 1
        return result

    for row in corners:
        one(row, {"name": "weighted-sum", "preferences": dict(zip(problem.tasks, row.tolist(), strict=True))})
    ideal = np.array([solved[t][1].tasks[task] for t, task in enumerate(problem.tasks)])
    levels = dict(zip(problem.tasks, ideal.tolist(), strict=True))
    for row in interior:
        spec: dict[str, Any] = {"name": plan.method, "preferences": dict(zip(problem.tasks, row.tolist(), strict=True))}
        if plan.method == "chebyshev":
            spec.update(ideal=levels, smoothing=plan.smoothing / tasks)  # in the units of w_t (f_t − z_t), with Σ w = 1
        one(row, spec)
    if progress is not None:
        progress(total, total, "")
    kept = [(row, r) for row, r in solved if row.max() < 1 or any((row == corner).all() for corner in asked)]
    losses = np.array([[result.tasks[task] for task in problem.tasks] for _, result in kept])
    records = [
        {
            "name": preference_name(row, problem.tasks),
            "status": result.status,
            "gap": result.gap,
            "nit": result.nit,
            "gradients": result.counts["gradients"],
        }
        for row, result in kept
    ]
    front = make_front(
        problem,
        np.array([row for row, _ in kept]),
        losses,
        np.array([result.coefficients for _, result in kept]),
        records,
        ideal,
        reference,
        seed,
    )
    solver: Solver = plan.solver
    front.about = {
        "method": plan.method,
        "smoothing": plan.smoothing,
        "solver": solver.describe(),
        "max_iter": plan.max_iter,
        "tol": plan.tol,
        "warm": plan.warm,
        "problem": plain(problem.describe()),
        "data": dict(problem.data_used),
        "counts": dict(vars(problem.counts)),
    }
    if folder is not None:
        front.save(folder)
    return front


def _solve_one(
    problem: MatrixProblem,
    plan: Plan,
    row: Array,
    spec: Mapping[str, Any],
    solved: Sequence[tuple[Array, Result]],
    folder: Path | None,
    name: str,
    resume: bool,
    callback: Callback | None,
) -> Result:
    """Solve for one preference, or read what an earlier process found for it."""
    place = folder / name if folder is not None else None
    scalarized = Scalarized(problem, dict(spec))
    if resume and place is not None and (place / RESULT).exists():
        found = Result.load(place)
        wanted = scalarized.describe()
        same = found.described_objective == plain(wanted["objective"]) and found.fingerprint == wanted["fingerprint"]
        if not same or found.solver != plain(plan.solver.describe()):
            raise OptionError(
                f"{place} was solved for another problem or with another solver. Write the front into a new folder."
            )
        if found.status != INTERRUPTED:
            return found
    start = plan.start
    if plan.warm and solved:
        start = min(solved, key=lambda item: float(np.abs(item[0] - row).sum()))[1].coefficients
    result = solve(
        scalarized,
        plan.solver,
        start=start,
        max_iter=plan.max_iter,
        tol=plan.tol,
        run=place,
        resume=resume,
        callback=callback,
    )
    if result.status == INTERRUPTED:
        raise KeyboardInterrupt
    return result


def surrogate_front(
    problem: MatrixProblem,
    preferences: Array | int | None = None,
    plan: Plan | None = None,
    *,
    samples: int | None = None,
    seed: int = 0,
    run: str | Path | None = None,
    reference: Mapping[str, float] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    model: Surrogate | None = None,
) -> tuple[Front, Surrogate]:
    """Fit a quadratic to each task, solve the front of the model, and evaluate its points on the problem itself.

    The losses of the front are true ones, those of the model are `predicted`; its gaps are the model's. Costs `samples`
    gradients and one value a point, whatever the number of preferences. Raises OptionError as `fit_surrogate` does.
    """
    plan = Plan() if plan is None else plan
    preferences = preference_grid(preferences, len(problem.tasks))
    check_reference(reference, problem.tasks)

    def fitting(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total, "fit")

    if model is None:
        model = fit_surrogate(problem, samples, seed=seed, progress=fitting)
    start = problem.domain.project(np.full((problem.rows, problem.n), 1 / problem.n))
    cheap = Plan(plan.method, plan.smoothing, "projected-gradient", start, max(plan.max_iter, 500), 1e-7, plan.warm)
    guess = pareto_front(model.problem, preferences, cheap, seed=seed)
    losses = []
    problem.draw(None)
    for k, point in enumerate(guess.coefficients):
        if progress is not None:
            progress(k, len(guess.coefficients), "verify")
        found = problem.task_values(point)
        losses.append([found[task] for task in problem.tasks])
    true = np.array(losses)
    front = make_front(
        problem, guess.preferences, true, guess.coefficients, guess.records, true.min(axis=0), reference, seed
    )
    front.predicted = guess.losses
    front.about = {
        "method": plan.method,
        "smoothing": plan.smoothing,
        "surrogate": {
            "samples": model.samples,
            "held_out": model.held_out,
            "gradients": model.gradients,
            "r2": model.r2,
            "error": model.error,
        },
        "problem": plain(problem.describe()),
        "data": dict(problem.data_used),
        "counts": dict(vars(problem.counts)),
    }
    if run is not None:
        front.save(run)
    return front, model


def make_front(
    problem: MatrixProblem,
    preferences: Array,
    losses: Array,
    coefficients: Array,
    records: list[dict[str, Any]],
    ideal: Array,
    reference: Mapping[str, float] | None,
    seed: int,
) -> Front:
    """Return a front with its reference point and hypervolume."""
    best, worst = np.minimum(ideal, losses.min(axis=0)), losses.max(axis=0)
    point = best + MARGIN * (worst - best)
    for task, level in (reference or {}).items():
        point[problem.tasks.index(task)] = float(level)
    volume, error = hypervolume(losses, point, seed=seed)
    return Front(
        tuple(problem.tasks),
        tuple(problem.experts),
        preferences,
        losses,
        coefficients,
        records,
        best,
        point,
        volume,
        error,
    )


def check_reference(reference: Mapping[str, float] | None, tasks: Sequence[str]) -> None:
    """Raise OptionError, before anything is solved, for a reference that is not of these tasks or not finite."""
    for task, level in (reference or {}).items():
        if task not in tasks:
            raise OptionError(f"The reference names '{task}', which is no task. Tasks: {', '.join(tasks)}.")
        if not math.isfinite(level):
            raise OptionError(
                f"The reference of the hypervolume must be a finite loss for each task. Got {level!r} for '{task}'."
            )


def preference_grid(preferences: Array | int | None, tasks: int) -> Array:
    """Return preferences [K, T] with rows of sum 1, from a matrix, a number of divisions, or None."""
    if preferences is None:
        divisions = 1
        while math.comb(divisions + tasks, tasks - 1) <= 15 and tasks > 1:
            divisions += 1
        preferences = divisions
    if isinstance(preferences, (int, np.integer)) and not isinstance(preferences, bool):
        if preferences < 1:
            raise OptionError(f"A grid of preferences needs at least 1 division. Got {preferences!r} instead.")
        return das_dennis(tasks, int(preferences))
    matrix = np.asarray(preferences, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] != tasks or len(matrix) == 0:
        raise OptionError(
            f"Preferences must be a matrix [K, {tasks}], a weight for each task; got {list(matrix.shape)}."
        )
    if not np.isfinite(matrix).all() or (matrix < 0).any() or (matrix.sum(axis=1) <= 0).any():
        raise OptionError("Preferences must be finite and not negative, and no row of them all 0.")
    return matrix / matrix.sum(axis=1, keepdims=True)


def das_dennis(tasks: int, divisions: int) -> Array:
    """Return the C(divisions + T − 1, T − 1) points of the simplex whose coordinates are multiples of 1/divisions."""
    rows = []
    for bars in combinations(range(divisions + tasks - 1), tasks - 1):
        edges = (-1, *bars, divisions + tasks - 1)
        rows.append([edges[k + 1] - edges[k] - 1 for k in range(tasks)])
    return np.array(rows, dtype=np.float64) / divisions


def path(preferences: Array) -> list[Array]:
    """Return the rows in the order of a path: from the most balanced one always to the nearest that is left."""
    left = list(preferences)
    order = [left.pop(int(np.argmin([np.sum(row**2) for row in left])))]
    while left:
        order.append(left.pop(int(np.argmin([np.abs(row - order[-1]).sum() for row in left]))))
    return order


def preference_name(row: Array, tasks: Sequence[str]) -> str:
    """Return a short name for the folder of a preference, unique to it."""
    digest = hashlib.sha256(np.round(row, 9).tobytes()).hexdigest()[:6]
    numbers = "-".join(f"{weight:.2f}" for weight in row[:6])
    only = [task for task, weight in zip(tasks, row, strict=True) if weight == 1.0]
    return f"only-{only[0]}" if only else f"{numbers}-{digest}"


def nondominated(losses: Array) -> Array:
    """Return which rows of ``losses`` [K, T] no other row dominates; of equal rows all are kept."""
    no_worse = np.all(losses[:, None, :] <= losses[None, :, :], axis=2)
    better = np.any(losses[:, None, :] < losses[None, :, :], axis=2)
    found: Array = ~np.any(no_worse & better, axis=0)
    return found


def hypervolume(
    losses: Array, reference: Array, *, samples: int = 200_000, seed: int = 0, exact: int = EXACT
) -> tuple[float, float]:
    """Return the volume between the rows of ``losses`` [K, T] and ``reference`` [T], and its standard deviation.

    Exact (deviation 0) up to ``exact`` tasks; beyond, from random points between the ideal and the reference point.
    """
    inside = losses[(losses < reference).all(axis=1)]
    if len(inside) == 0:
        return 0.0, 0.0
    inside = np.unique(inside[nondominated(inside)], axis=0)
    if losses.shape[1] <= exact:
        return _volume(inside, reference), 0.0
    low = inside.min(axis=0)
    rng = np.random.default_rng(seed)
    hits, step = 0, 10_000
    for begin in range(0, samples, step):
        drawn = rng.uniform(low, reference, size=(min(step, samples - begin), len(reference)))
        hits += int(np.any(np.all(drawn[:, None, :] >= inside[None], axis=2), axis=1).sum())
    share, box = hits / samples, float(np.prod(reference - low))
    return share * box, box * math.sqrt(share * (1 - share) / samples)


def _volume(points: Array, reference: Array) -> float:
    """Sum of what each point adds to those after it: the points after it, limited to its own box, are taken away."""
    if points.shape[1] == 1:
        return float(reference[0] - points.min())
    ordered = points[np.argsort(-points[:, -1], kind="stable")]
    total = 0.0
    for k, point in enumerate(ordered):
        total += float(np.prod(reference - point))
        limited = np.maximum(ordered[k + 1 :], point)
        if len(limited):
            total -= _volume(np.unique(limited[nondominated(limited)], axis=0), reference)
    return total
