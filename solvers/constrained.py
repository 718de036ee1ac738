"""``solve_constrained``: minimize f over a domain subject to g ≤ ε, by the augmented Lagrangian around any solver.

    Λ ← argmin L(Λ; μ, ρ) by the inner solver,     μ ← max(0, μ + ρ (g(Λ) − ε))

ρ grows only where the constraint lags: g is held without ρ → ∞ and the ill-conditioning that brings, and μ is the price
of retention, by how much f would fall for each unit that ε grows. The gradient of L at the multiplier before the update
is that of the Lagrangian f + μ g after it, so the solver's certificate is the one that counts. For convex f and g it
bounds what is left: f(Λ) − f* ≤ gap + |μ (g − ε)|, over all points with g ≤ ε.
Source: Bertsekas (1982), Constrained Optimization and Lagrange Multiplier Methods; Nocedal and Wright (2006), ch. 17;
the measure that ρ follows and its first value: Birgin and Martínez (2014), Practical Augmented Lagrangian Methods.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .domains import FEASIBILITY
from .driver import CHECKPOINT, MESSAGES, RUNNING, Callback, check_limits, identify, solve
from .errors import OptionError, check_number
from .files import plain, read_arrays, write_arrays
from .loop import INTERRUPTED, MAX_ITER, NONFINITE, OPTIMAL, STALLED, TIME_LIMIT
from .points import start_point
from .problem import Evaluation, MatrixProblem
from .registry import make_solver
from .result import COEFFICIENTS, RESULT, TRACE, Result
from .solver import Certificate, Solver
from .trace import TraceFile, read_trace

Array = np.ndarray[Any, Any]
Known = tuple[str, Array, float]  # name, coefficients, and g there on all the data
SHRINK = 0.25
GROWTH = 10.0
BISECTIONS = 30
ROUNDS = "rounds"  # of a run's folder: what the outer loop knows, and a folder a round for the solver's own


class Lagrangian(Protocol):
    """What the objective of a constrained problem has besides what any has: L(θ; μ, ρ), with the outer loop's knobs.

    With ρ = 0 it is the Lagrangian f + μ (g − ε). constraint_task names the task whose loss is what is added to f.
    """

    multiplier: float
    penalty: float
    first_draw: int
    bound: float
    constraint_task: str

    def constraint_value(self, weights: Any) -> float:
        """Return g on all the data."""


@dataclass
class ConstrainedResult(Result):
    """The outcome of a constrained solve: a result whose objective is f alone, without the constraint.

    constraint: g at ``coefficients`` on all the data; bound: ε; violation: max(0, g − ε); multiplier: μ ≥ 0;
    penalty: ρ of the last round; complementarity: |μ (g − ε)|. gap, stationarity: of the Lagrangian f + μ g.
    history: a record a round, with g, f, μ and ρ after it. repair: None, or the share of the way to a feasible point
    ("toward": "start", "base" or "round K") that the last point was moved, and its g before. least: where g > ε, a
    lower bound of g over the whole domain if g is convex (None if there is none, as on the free domain): above ε, it
    proves that no point holds the constraint. nit: of all rounds.
    """

    constraint: float = math.nan
    bound: float = math.nan
    violation: float = math.nan
    multiplier: float = math.nan
    penalty: float = math.nan
    complementarity: float = math.nan
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    repair: dict[str, Any] | None = None
    least: float | None = None


@dataclass(frozen=True)
class Limits:
    """The options of the outer loop that are numbers, with their ranges."""

    rounds: int
    multiplier: float
    penalty: float | None
    factor: float | None
    feasibility_tol: float

    def __post_init__(self) -> None:
        check_number(self, "rounds", 1, math.inf, closed="left", integer=True)
        check_number(self, "multiplier", 0, math.inf, closed="left")
        if self.penalty is not None:
            check_number(self, "penalty", 0, math.inf, closed="neither")
        if self.factor is not None:
            check_number(self, "factor", 1, math.inf, closed="left")
        check_number(self, "feasibility_tol", 0, math.inf, closed="left")


Limits.__name__ = "solve_constrained"  # the owner that messages name


@dataclass
class Outer:
    """Where the outer loop is: the round to come, the points known so far, ρ, μ, and what g did in the last round.

    data: samples that went through the model in earlier processes, without those that the round's own checkpoint
    counts; data_at_end: all of them, when the last round had ended.
    """

    known: list[Known]
    rho: float
    multiplier: float
    outer: int = 0
    last: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    peak: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    data: dict[str, int] = field(default_factory=dict)
    data_at_end: dict[str, int] = field(default_factory=dict)

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Write the checkpoint of the outer loop atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"known.{k}": point for k, (_, point, _) in enumerate(self.known)}
        content = {name: value for name, value in vars(self).items() if name != "known"}
        known = [[name, value] for name, _, value in self.known]
        write_arrays(path, arrays, {"identity": identity, "outer": content, "known": known})

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, Any]) -> Outer:
        """Read a checkpoint. Raises OptionError if it belongs to another solve, naming what differs."""
        arrays, metadata = read_arrays(path)
        expected, found = plain(identity), metadata["identity"]
        different = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
        if different:
            raise OptionError(
                f"{path} belongs to another solve: {', '.join(sorted(different))} differ from those of this one. "
                "Resume with the recipe in the run folder, or solve into a new folder."
            )
        known = [(name, arrays[f"known.{k}"], value) for k, (name, value) in enumerate(metadata["known"])]
        return cls(known=known, **metadata["outer"])


def solve_constrained(
    problem: MatrixProblem,
    solver: Solver | str | Mapping[str, Any],
    *,
    start: str | np.ndarray | Result = "average",
    rounds: int = 8,
    max_iter: int = 100,
    multiplier: float = 0.0,
    penalty: float | None = None,
    factor: float | None = None,
    tol: float = 1e-6,
    rtol: float = 0.0,
    feasibility_tol: float = 1e-6,
    repair: bool = False,
    time_limit: float = math.inf,
    callback: Callback | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
) -> ConstrainedResult:
    """Minimize f subject to g ≤ ε over the domain, for a problem whose objective is an augmented Lagrangian.

    solver, start, time_limit (of all rounds), callback, checkpoint_every: as for :func:`.solve`. rounds: outer
    iterations, max_iter: iterations of the solver in each, which starts where the last one ended. multiplier: μ ≥ 0
    to start from, as an earlier result has it. penalty: ρ > 0 to start from; None: |f| / max(|g|, |ε|)² at the start,
    so that the iterates
    do not depend on the units of f and g. factor: by which ρ grows where max(g − ε, −μ/ρ) kept its sign and did not
    fall to a quarter; None: 10, and 1 on minibatches, whose noise it would multiply.

    Optimal when the certificate of the Lagrangian and |μ (g − ε)| are at most max(tol, rtol·|f|), in the units of f,
    and g − ε at most feasibility_tol, in the units of g; all three on all the data, also where the solver saw
    minibatches. repair: move the last point, if g > ε there, along the segment to the nearest known point with g ≤ ε
    (of the rounds and the start, else the base), by bisection, until g ≤ ε; at most 30 values of g.
    run: folder for trace, checkpoints and result; the lines of the trace are numbered over all rounds, and say of which
    round ("outer") they are which iteration ("inner"). resume: go on from the folder's checkpoints.
    Ctrl-C ends it as ``interrupted``, with what the rounds so far have found.
    The objective keeps the last multiplier and penalty. Raises OptionError for what cannot be solved.
    """
    Limits(rounds, multiplier, penalty, factor, feasibility_tol)
    solver = make_solver(solver)
    problem = solver.view(problem)
    check_limits(max_iter, tol, rtol, time_limit, checkpoint_every)
    if resume and run is None:
        raise OptionError("resume=True needs run=FOLDER, the folder of the run to go on with.")
    lagrangian = lagrangian_of(problem)
    solver.check(problem)
    point = start_point(problem, start)
    problem.check(point, "the starting point")
    folder = Path(run) if run is not None else None
    saved = folder / ROUNDS / CHECKPOINT if folder is not None else None

    lagrangian.multiplier, lagrangian.penalty, lagrangian.first_draw = float(multiplier), 0.0, 0
    identity = identify(problem, solver, point, max_iter)
    identity["constrained"] = plain({"bound": lagrangian.bound, "multiplier": multiplier, "penalty": penalty})
    begun = time.monotonic()
    if resume and saved is not None and saved.exists():
        at = Outer.load(saved, identity)
        if at.outer >= rounds:
            raise OptionError(f"{folder} has done {at.outer} rounds already. Give more rounds to go on.")
        for name, count in at.counts.items():
            setattr(problem.counts, name, count)
    else:
        resume = False
        value = constraint_at(problem, point)
        at = Outer([("start", point, value)], float(penalty or 0.0), float(multiplier))
        if penalty is None:
            at.rho = first_penalty(problem, point, value)
    growth = (1.0 if problem.stochastic else GROWTH) if factor is None else factor
    began = begun - at.seconds
    known, history = at.known, at.history
    point = known[-1][1]
    lagrangian.multiplier = at.multiplier
    trace: list[dict[str, Any]] = []
    status = MAX_ITER
    inner: Result | None = None
    with ExitStack() as stack:
        file = None
        if folder is not None and saved is not None:
            folder.mkdir(parents=True, exist_ok=True)
            kept: list[dict[str, Any]] = []
            if resume:
                done = carry_over(at, saved, identity)
                lines = read_trace(folder / TRACE)[1]
                trace = [line for line in lines if line["outer"] < at.outer]
                kept = [line for line in lines if line["outer"] == at.outer and line["inner"] < done]
            else:
                shutil.rmtree(folder / ROUNDS, ignore_errors=True)
                for stale in (RESULT, COEFFICIENTS):
                    (folder / stale).unlink(missing_ok=True)
                at.counts, at.data_at_end = asdict(problem.counts), samples(problem, at)
                at.save(saved, identity)
            file = stack.enter_context(TraceFile(folder / TRACE, identity, [*trace, *kept]))
        try:
            for outer in range(at.outer, rounds):

                def tagged(line: dict[str, Any], outer: int = outer, before: int = len(trace)) -> None:
                    tag(line, outer, before)
                    if file is not None:
                        file.write(line)
                    if callback is not None:
                        callback(line)

                lagrangian.penalty, lagrangian.first_draw = at.rho, len(trace)
                inner = solve(
                    problem,
                    solver,
                    start=point,
                    max_iter=max_iter,
                    tol=tol,
                    rtol=rtol,
                    time_limit=max(0.0, time_limit - (time.monotonic() - began)),
                    callback=tagged,
                    run=None if folder is None else folder / ROUNDS / str(outer),
                    resume=resume,
                    checkpoint_every=checkpoint_every,
                )
                resume = False
                for line in inner.trace:  # of a resumed round, some were not made now
                    tag(line, outer, len(trace))
                trace += inner.trace
                at.peak = max(at.peak, inner.peak_memory)
                value = constraint_at(problem, inner.coefficients)
                if inner.status == NONFINITE or not math.isfinite(value):
                    status = NONFINITE
                    break
                rested, point = np.array_equal(inner.coefficients, point), inner.coefficients
                known.append((f"round {outer}", point, value))
                before, mu = (
                    lagrangian.multiplier,
                    max(0.0, lagrangian.multiplier + at.rho * (value - lagrangian.bound)),
                )
                lagrangian.multiplier = mu
                loss = inner.objective - inner.tasks[lagrangian.constraint_task]
                found = {"outer": outer, "constraint": value, "objective": loss, "multiplier": mu, "penalty": at.rho}
                history.append({**found, "nit": inner.nit})
                if inner.status == INTERRUPTED:
                    status = INTERRUPTED
                    break
                # The solver certified ∇f + m ∇g, and m at the end of the round is the new multiplier.
                kkt = Optimality(Certificate(inner.gap, inner.stationarity), value - lagrangian.bound, mu)
                if inner.status == TIME_LIMIT and not kkt.holds(max(tol, rtol * abs(loss)), feasibility_tol):
                    status = TIME_LIMIT
                    break
                change = (mu - before) / at.rho  # max(g − ε, −μ/ρ): 0 where g ≤ ε and μ (g − ε) = 0
                if change * at.last > 0 and abs(change) > SHRINK * abs(at.last):
                    at.rho *= growth
                at.last, at.multiplier, at.outer = change, mu, outer + 1
                if saved is not None:
                    at.seconds, at.counts = time.monotonic() - began, asdict(problem.counts)
                    at.data_at_end = samples(problem, at)
                    at.save(saved, identity)
                    shutil.rmtree(saved.parent / str(outer), ignore_errors=True)
                if kkt.holds(max(tol, rtol * abs(loss)), feasibility_tol):
                    status = OPTIMAL
                    break
                if time.monotonic() - began >= time_limit:
                    status = TIME_LIMIT
                    break
                if rested and mu == before and not problem.stochastic:
                    status = STALLED
                    break
        except KeyboardInterrupt:
            if inner is None:
                raise
            status = INTERRUPTED
    assert inner is not None

    moved = None
    if repair and known[-1][2] > lagrangian.bound:
        point, moved = repaired(problem, known, feasibility_tol)

    value = constraint_at(problem, point)
    excess, mu = value - lagrangian.bound, lagrangian.multiplier
    final, certificate = evaluate_lagrangian(problem, solver, point)
    least = None
    if mu > 0 and excess > feasibility_tol and status != NONFINITE:
        least = least_possible(problem, solver, point, value, final.scores)
    kkt = Optimality(certificate, excess, mu)
    holds = kkt.holds(max(tol, rtol * abs(final.value)), feasibility_tol)
    if status not in (NONFINITE, INTERRUPTED):
        status = OPTIMAL if holds else STALLED if status == OPTIMAL else status
    about = {
        **vars(inner),
        "coefficients": point,
        "objective": final.value,
        "tasks": final.task_values,
        "gap": certificate.gap,
        "stationarity": certificate.stationarity,
        "status": status,
        "message": explain(status, excess > feasibility_tol, lagrangian.bound, known, moved, least),
        "nit": sum(line["nit"] for line in history),
        "best_iteration": sum(line["nit"] for line in history[:-1]) + inner.best_iteration,
        "peak_memory": at.peak,
        "counts": asdict(problem.counts),
        "data": {**problem.data_used, **samples(problem, at)},
        "seconds": time.monotonic() - began,
        "trace": trace,
    }
    result = ConstrainedResult(
        **about,
        constraint=value,
        bound=lagrangian.bound,
        violation=max(0.0, excess),
        multiplier=mu,
        penalty=lagrangian.penalty,
        complementarity=abs(mu * excess),
        history=history,
        repair=moved,
        least=least,
    )
    if folder is not None:
        result.save(folder)
    return result


def tag(line: dict[str, Any], outer: int, before: int) -> None:
    """Number a line of a round's trace over all rounds, `before` lines after the first, and say where it is from."""
    if "outer" not in line:
        line.update(outer=outer, inner=line["iteration"], iteration=line["iteration"] + before)


def samples(problem: MatrixProblem, at: Outer) -> dict[str, int]:
    """Return the samples that went through the model, in this process and before it was resumed."""
    used = problem.data_used
    return {key: used[key] + at.data.get(key, 0) for key in RUNNING if key in used}


def carry_over(at: Outer, saved: Path, identity: Mapping[str, Any]) -> int:
    """Count what the killed process did, and return the iterations of its last round that need not be done again."""
    checkpoint = saved.parent / str(at.outer) / CHECKPOINT
    if not checkpoint.exists():  # nothing of the round is left: it begins anew, after the rounds before
        at.data = dict(at.data_at_end)
        at.save(saved, identity)
        return 0
    # The round's own checkpoint counts since its process began; what was before that, it does not know.
    metadata = read_arrays(checkpoint)[1]
    at.data = {key: at.data.get(key, 0) + int(metadata["data"].get(key, 0)) for key in RUNNING}
    return int(metadata["iteration"])


class Optimality(NamedTuple):
    """What a solution has: a certificate of the Lagrangian, g − ε ≤ 0, and μ (g − ε) = 0."""

    certificate: Certificate
    excess: float
    multiplier: float

    def holds(self, tol: float, feasibility_tol: float) -> bool:
        """Whether all three hold, to the tolerance in the units of f and that in the units of g."""
        return (
            self.certificate.holds(tol) and self.excess <= feasibility_tol and abs(self.multiplier * self.excess) <= tol
        )


def lagrangian_of(problem: MatrixProblem) -> Lagrangian:
    """Return the problem's objective. Raises OptionError if it has no constraint."""
    objective = getattr(problem, "objective", None)
    if not all(hasattr(objective, name) for name in ("multiplier", "penalty", "bound", "constraint_value")):
        raise OptionError(
            f"solve_constrained needs an objective with a constraint, AugmentedLagrangian(objective, constraint, "
            f"bound); this problem's is {type(objective).__name__}. Without a constraint, use solve."
        )
    return objective  # type: ignore[return-value]


def constraint_at(problem: MatrixProblem, point: Array) -> float:
    """Return g at Λ on all the data, from weights that depend on Λ alone: one pass of A and one value."""
    problem.refresh()
    return float(lagrangian_of(problem).constraint_value(problem.weights(point)))  # type: ignore[attr-defined]


def evaluate_lagrangian(problem: MatrixProblem, solver: Solver, point: Array) -> tuple[Evaluation, Certificate]:
    """Return f with its values by task, and the certificate of f + μ g, at Λ on all the data."""
    lagrangian = lagrangian_of(problem)
    penalty, lagrangian.penalty = lagrangian.penalty, 0.0
    try:
        problem.draw(None)
        problem.refresh()
        evaluation = problem.evaluate(point, tasks=solver.certifies_by_task)
    finally:
        lagrangian.penalty = penalty
    tasks = dict(evaluation.task_values)
    loss = evaluation.value - tasks.pop(lagrangian.constraint_task)
    return Evaluation(loss, evaluation.scores, tasks), solver.certificate(problem, point, evaluation)


def least_possible(problem: MatrixProblem, solver: Solver, point: Array, value: float, scores: Array) -> float | None:
    """Return g(Λ) − max_V ⟨∂g/∂Λ, Λ − V⟩, below which no point of the domain goes if g is convex.

    scores: of f + μ g at Λ [rows, n]; without those of f, which are evaluated here, they are those of μ g.
    """
    lagrangian = lagrangian_of(problem)
    multiplier, lagrangian.multiplier = lagrangian.multiplier, 0.0
    try:
        alone, _ = evaluate_lagrangian(problem, solver, point)
    finally:
        lagrangian.multiplier = multiplier
    gap = problem.domain.gap(point, (scores - alone.scores) / multiplier)
    return None if gap is None else value - gap


def first_penalty(problem: MatrixProblem, point: Array, value: float) -> float:
    """Return |f| / max(|g|, |ε|)² at Λ; 1 in the place of f or g where it is 0 or not finite."""
    lagrangian = lagrangian_of(problem)
    multiplier, lagrangian.multiplier, lagrangian.penalty = lagrangian.multiplier, 0.0, 0.0
    try:
        problem.draw(None)
        loss = abs(problem.value(point))
    finally:
        lagrangian.multiplier = multiplier
    scale = max(abs(value), abs(lagrangian.bound))
    loss, scale = (x if 0 < x < math.inf else 1.0 for x in (loss, scale))
    return loss / scale**2


def repaired(
    problem: MatrixProblem, known: Sequence[Known], feasibility_tol: float
) -> tuple[Array, dict[str, Any] | None]:
    """Return the first point with g ≤ ε on the segment from the last known point to the nearest known one with g ≤ ε.

    None as the second value: no such point is known, and the last one is returned.
    """
    bound = lagrangian_of(problem).bound
    _, point, value = known[-1]
    feasible = [candidate for candidate in known if candidate[2] <= bound]
    base = np.zeros_like(point)
    if not feasible and problem.domain.violation(base).max() <= FEASIBILITY:
        feasible = [candidate for candidate in [("base", base, constraint_at(problem, base))] if candidate[2] <= bound]
    if not feasible:
        return point, None
    name, target, at_end = min(feasible, key=lambda candidate: float(np.linalg.norm(candidate[1] - point)))
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        if bound - at_end <= feasibility_tol:
            break
        middle = (low + high) / 2
        found = constraint_at(problem, point + middle * (target - point))
        if found <= bound:
            high, at_end = middle, found
        else:
            low = middle
    return point + high * (target - point), {"toward": name, "share": high, "constraint_before": value}


def explain(
    status: str, violated: bool, bound: float, known: Sequence[Known], moved: dict[str, Any] | None, least: float | None
) -> str:
    """Return the message of the result; where g > ε, with the least g that was found and that is possible."""
    message = MESSAGES[status]
    if moved is not None and status == STALLED:
        message = "the point was moved to hold the constraint, and there the certificate does not hold; raise tol"
    if not violated:
        return message
    name, _, found = min(known, key=lambda candidate: candidate[2])
    where = "the start" if name == "start" else f"the end of {name}"
    message += f". The constraint is violated: the least value found is {found:.6g}, at {where}"
    if found <= bound:
        return f"{message}, within the bound {bound:.6g}: repair=True moves the last point until it holds, too"
    if least is not None and least > bound:
        return f"{message}, and if the constraint is convex none is below {least:.6g}: the bound {bound:.6g} is too low"
    return f"{message}, against the bound {bound:.6g}: add rounds, or raise the bound if no point holds it"
