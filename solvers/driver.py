"""``solve``: run a solver on a problem, and own everything around the loop.

Clock, limits, statuses, callback, trace, checkpoints, the best iterate and the final certificate live here and nowhere
else. A checkpoint is taken only where the weights are rebuilt from the coefficients alone, so that a run that was
killed goes on from there to exactly the coefficients it would have had. With a resident pool that is every iteration,
and the state is saved every few seconds; with a streaming one, where rebuilding reads files, it is every tenth.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import memory
from .errors import OptionError
from .files import plain, read_arrays, write_arrays
from .loop import (
    INTERRUPTED,
    MAX_ITER,
    NONFINITE,
    OPTIMAL,
    STALLED,
    TIME_LIMIT,
    UNKNOWN,
    Visit,
    is_finite,
    iterate,
)
from .points import start_point
from .problem import MatrixProblem
from .registry import SOLVERS, make_solver
from .result import COEFFICIENTS, RESULT, TRACE, Result
from .solver import Solver, State
from .trace import TraceFile, header, read_trace, record

CHECKPOINT = "checkpoint.safetensors"
SECONDS_BETWEEN_CHECKPOINTS = 5.0
STREAMING_CHECKPOINTS = 10
# Of the data used, what adds up over resumed parts.
RUNNING = ("samples_seen", "gradient_samples", "value_samples", "teacher_samples")
Callback = Callable[[dict[str, Any]], None]

MESSAGES = {
    OPTIMAL: "the certificate is within the tolerance",
    STALLED: "no step changes the coefficients any more; the values may have reached their precision",
    MAX_ITER: "the iteration limit was reached; raise max_iter or tol",
    TIME_LIMIT: "the time limit was reached; resume the run or raise time_limit",
    INTERRUPTED: "stopped by the callback or the keyboard; resume the run to go on",
    NONFINITE: "the objective or its scores became NaN or infinite; lower the step size or inspect the pool",
}


@dataclass
class Progress:
    """How far a solve is: the state before ``iteration``, and the best iterate so far."""

    state: State
    iteration: int = 0
    best_value: float = math.inf
    best: np.ndarray | None = None
    best_iteration: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    data: dict[str, int] = field(default_factory=dict)

    def save(self, path: Path, identity: Mapping[str, Any], problem: MatrixProblem) -> None:
        """Write the checkpoint atomically."""
        arrays = {f"memory.{name}": value for name, value in self.state.memory.items()}
        arrays["coefficients"] = self.state.coefficients
        if self.best is not None:
            arrays["best"] = self.best
        metadata = {
            "identity": identity,
            "counts": asdict(problem.counts),
            "data": self.data_with(problem),
            "iteration": self.iteration,
            "best_value": self.best_value.hex(),
            "best_iteration": self.best_iteration,
            "seconds": self.seconds,
        }
        write_arrays(path, arrays, metadata)

    def data_with(self, problem: MatrixProblem) -> dict[str, Any]:
        """Return what the objective consumed, in this process and before it was resumed."""
        used = problem.data_used
        return {**used, **{key: used[key] + self.data.get(key, 0) for key in RUNNING if key in used}}

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, Any]) -> Progress:
        """Read a checkpoint. Raises OptionError if it belongs to another solve, naming what differs."""
        arrays, metadata = read_arrays(path)
        expected, found = plain(identity), metadata["identity"]
        different = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
        if different:
            raise OptionError(
                f"{path} belongs to another solve: {', '.join(sorted(different))} differ from those of this one. "
                "Resume with the recipe in the run folder, or solve into a new folder."
            )
        solver_memory = {
            name.removeprefix("memory."): value for name, value in arrays.items() if name.startswith("memory.")
        }
        return cls(
            State(arrays["coefficients"], solver_memory),
            int(metadata["iteration"]),
            float.fromhex(metadata["best_value"]),
            arrays.get("best"),
            int(metadata["best_iteration"]),
            float(metadata["seconds"]),
            metadata["counts"],
            {key: value for key, value in metadata["data"].items() if key in RUNNING},
        )


def solve(
    problem: MatrixProblem,
    solver: Solver | str | Mapping[str, Any],
    *,
    start: str | np.ndarray | Result = "average",
    max_iter: int = 100,
    tol: float = 1e-6,
    rtol: float = 0.0,
    time_limit: float = math.inf,
    callback: Callback | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
) -> Result:
    """Minimize the problem's objective over its domain.

    solver: an object, a name, or a mapping with a name and options. start: "average", "base", "task-arithmetic:0.3",
    "expert:NAME", a matrix [rows, n], or a Result. tol, rtol: optimal when the gap (on the free domain: ‖S‖) is at most
    max(tol, rtol·|f|). time_limit: seconds, tested after each iteration. callback: called with each trace record;
    raising StopIteration ends the solve as ``interrupted``, and so does Ctrl-C. run: folder for trace, checkpoints and
    result. resume: go on from the folder's checkpoint, or begin if there is none. checkpoint_every: iterations between
    checkpoints; None: every few seconds with a resident pool, every 10 iterations with a streaming one.

    On a deterministic objective the best iterate is returned; on minibatches, whose values do not compare, the last.
    Raises OptionError for what cannot be solved, before anything is computed.
    """
    solver = make_solver(solver)
    check_values(problem, solver)
    problem = solver.view(problem)
    check_limits(max_iter, tol, rtol, time_limit, checkpoint_every)
    if resume and run is None:
        raise OptionError("resume=True needs run=FOLDER, the folder of the run to go on with.")
    solver.check(problem)
    point = start_point(problem, start)
    problem.check(point, "the starting point")

    memory.reset_peak()
    folder = Path(run) if run is not None else None
    identity = identify(problem, solver, point, max_iter)
    every = checkpoint_every or (1 if problem.cheap_to_refresh else STREAMING_CHECKPOINTS)
    pause = SECONDS_BETWEEN_CHECKPOINTS if checkpoint_every is None and problem.cheap_to_refresh else 0.0
    progress = Progress(solver.init(problem, point))
    kept: list[dict[str, Any]] = []
    status, visit = MAX_ITER, None
    with ExitStack() as stack:
        file = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if resume and (folder / CHECKPOINT).exists():
                progress = Progress.load(folder / CHECKPOINT, identity)
                if progress.iteration > max_iter:
                    raise OptionError(
                        f"{folder} has done {progress.iteration} iterations already, more than max_iter={max_iter}. "
                        "Give a larger limit, or solve into a new folder."
                    )
                for name, value in progress.counts.items():
                    setattr(problem.counts, name, value)
                kept = [r for r in read_trace(folder / TRACE)[1] if r["iteration"] < progress.iteration]
                problem.seconds.update(kept[-1].get("parts", {}) if kept else {})
            else:
                for stale in (CHECKPOINT, RESULT, COEFFICIENTS):
                    (folder / stale).unlink(missing_ok=True)
            file = stack.enter_context(TraceFile(folder / TRACE, identity, kept))
        began = time.monotonic() - progress.seconds
        saved = progress.seconds
        try:
            visits = iterate(
                problem, solver, progress.state, max_iter=max_iter, tol=tol, rtol=rtol, first=progress.iteration
            )
            for visit in visits:
                progress.seconds = time.monotonic() - began
                if visit.status != NONFINITE:
                    keep_best(progress, visit, problem)
                line = record(problem, visit, progress.seconds, progress.data_with(problem).get("samples_seen"))
                kept.append(line)
                if file is not None:
                    file.write(line)
                if callback is not None:
                    callback(line)
                if visit.step is None:
                    status = visit.status or MAX_ITER
                    break
                progress.state, progress.iteration = visit.step.state, visit.iteration + 1
                if progress.iteration % every == 0:
                    problem.refresh()
                    if folder is not None and progress.seconds - saved >= pause:
                        progress.save(folder / CHECKPOINT, identity, problem)
                        saved = progress.seconds
                if progress.seconds >= time_limit:
                    status = TIME_LIMIT
                    break
        except (StopIteration, KeyboardInterrupt):
            status = INTERRUPTED
        if folder is not None and status != NONFINITE:
            # Between two rebuilds of a streaming pool, going on from here agrees with an uninterrupted run to rounding.
            progress.save(folder / CHECKPOINT, identity, problem)

    result = certify(problem, solver, progress, visit, point, status, max(tol, 0.0), rtol)
    result.trace = kept
    result.seconds = time.monotonic() - began
    result.peak_memory = memory.peak()
    if folder is not None:
        result.save(folder)
    return result


def keep_best(progress: Progress, visit: Visit, problem: MatrixProblem) -> None:
    """Remember the visit if it is the best so far; on minibatches, and when it is certified, because it is the last."""
    value = visit.evaluation.value
    if problem.stochastic or visit.status == OPTIMAL or value < progress.best_value:
        progress.best_value, progress.best, progress.best_iteration = value, visit.state.coefficients, visit.iteration


def certify(
    problem: MatrixProblem,
    solver: Solver,
    progress: Progress,
    visit: Visit | None,
    start: np.ndarray,
    status: str,
    tol: float,
    rtol: float,
) -> Result:
    """Recompute value and certificate of the returned point from scratch, on all the data, and fill the result."""
    point = progress.best if progress.best is not None else start
    problem.draw(None)
    problem.refresh()
    if problem.has_gradient:
        evaluation = problem.evaluate(point, tasks=solver.certifies_by_task)
        certificate = solver.certificate(problem, point, evaluation)
    else:
        evaluation, certificate = problem.look(point), UNKNOWN
    if not is_finite(evaluation):
        status = NONFINITE
    message = MESSAGES[status]
    certified = certificate.holds(max(tol, rtol * abs(evaluation.value)))
    if status in (STALLED, MAX_ITER, TIME_LIMIT) and certified:
        status, message = OPTIMAL, MESSAGES[OPTIMAL]
    elif status == OPTIMAL and not certified:
        status, message = STALLED, "the certificate held during the solve but not when recomputed; raise tol"
    about = problem.describe()
    return Result(
        coefficients=point,
        experts=tuple(problem.experts),
        blocks=about["blocks"],
        layers={name: np.asarray(rows).tolist() for name, rows in problem.layers.items()},
        objective=evaluation.value,
        tasks=evaluation.task_values,
        gap=certificate.gap,
        stationarity=certificate.stationarity,
        status=status,
        message=message,
        nit=visit.iteration if visit is not None else progress.iteration,
        best_iteration=progress.best_iteration,
        counts=asdict(problem.counts),
        data=progress.data_with(problem),
        seed=about["seed"],
        solver=solver.describe(),
        domain=problem.domain.describe(),
        described_objective=about["objective"],
        fingerprint=about["fingerprint"],
    )


def identify(problem: MatrixProblem, solver: Solver, start: np.ndarray, max_iter: int) -> dict[str, Any]:
    """Return what makes this solve this solve: the header of its trace, and what a checkpoint must agree with."""
    identity = {**header(problem, solver.describe()), **problem.describe()}
    identity["start"] = hashlib.sha256(np.ascontiguousarray(start).tobytes()).hexdigest()[:16]
    if solver.scheduled:
        identity["max_iter"] = max_iter
    return dict(plain(identity))


def check_values(problem: MatrixProblem, solver: Solver) -> None:
    """Raise OptionError if the objective cannot give what the solver reads."""
    if solver.needs_scores and not problem.has_gradient:
        without = ", ".join(repr(name) for name, cls in SOLVERS.items() if not cls.needs_scores)
        raise OptionError(
            f"{type(solver).__name__} needs gradients, and the objective has none. Take a solver that reads values "
            f"only ({without}), or an objective with a gradient, such as cross-entropy."
        )
    if solver.compares_values and problem.stochastic:
        raise OptionError(
            f"{type(solver).__name__} compares values of different iterations, and those of minibatches do not "
            "compare. Leave out the objective's batch_size; fewer samples a task make its values cheaper."
        )


def check_limits(max_iter: int, tol: float, rtol: float, time_limit: float, checkpoint_every: int | None) -> None:
    """Raise OptionError for limits that are not numbers in range."""
    for name, value, low, whole in (
        ("max_iter", max_iter, 0, True),
        ("tol", tol, 0, False),
        ("rtol", rtol, 0, False),
        ("time_limit", time_limit, 0, False),
        ("checkpoint_every", 1 if checkpoint_every is None else checkpoint_every, 1, True),
    ):
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value >= low:
            kind = "an integer" if whole else "a number"
            raise OptionError(f"The '{name}' parameter of solve must be {kind} in [{low}, inf). Got {value!r} instead.")
