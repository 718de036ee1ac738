"""Solvers as server steps: minimize the server's objective over the hull of the clients' models, θ_t and θ_0.

    min_Λ f(θ_t + A Λ)                            plain
    min_Λ f(θ_t + A Λ) + w · r(θ_t + A Λ)         retention as a penalty
    min_Λ f(θ_t + A Λ)  subject to  r ≤ ε         retention as a constraint

r says how far the model is from θ_0: the KL divergence of its predictions on reference inputs from those of θ_0, or,
without any inputs, half the squared distance to θ_0, plain or in the metric of its Fisher information.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..pools import KINDS, Pool
from ..solvers import PRESETS, Problem, Result, Solver, make_domain, make_solver, solve, start_point
from ..solvers.constrained import ConstrainedResult, constraint_at, evaluate_lagrangian, repaired
from ..solvers.construct import construct, describe
from ..solvers.domains import Domain
from ..solvers.errors import check_choice, check_number, unknown
from .errors import FederationError
from .merging import Preparation
from .replies import Weights
from .screening import ORIGIN
from .step import Proposal, Round, ServerData, ServerStep

Array = np.ndarray[Any, Any]
Spec = Mapping[str, Any]
LABELLED, UNLABELLED, TEACHERS, WEIGHTS = "labelled", "unlabelled", "teachers", "weights"
OBJECTIVES = {
    "cross-entropy": LABELLED,
    "accuracy": LABELLED,
    "entropy": UNLABELLED,
    "distillation": TEACHERS,
    "proximity": WEIGHTS,
}
"""Objectives of a server, and what they take: labelled samples a client, inputs a client, or the models alone.

"proximity" is half the squared distance to the clients' average, which is as near to all of them as can be.
"""
MULTIPLIER = "multiplier"  # what a constrained step leaves for the next round: the price of retention


@dataclass(frozen=True)
class Retention:
    """How the server holds on to θ_0: r weighed by `weight`, or r ≤ `bound`; exactly one of them.

    by: "reference" (KL divergence on reference inputs, nats), "euclidean" or "fisher" (half the squared distance).
    batch_size: reference inputs an iteration; None: all. outer: updates of the multiplier in a round.
    """

    by: str = "reference"
    weight: float | None = None
    bound: float | None = None
    batch_size: int | None = None
    outer: int = 4

    def __post_init__(self) -> None:
        check_choice(self, "by", ("reference", "euclidean", "fisher"))
        if (self.weight is None) == (self.bound is None):
            raise FederationError(
                "Retention is either a penalty (weight) or a constraint (bound). "
                f"Got weight={self.weight!r} and bound={self.bound!r}."
            )
        for name in ("weight", "bound"):
            if getattr(self, name) is not None:
                check_number(self, name, 0, np.inf, closed="left")
        if self.batch_size is not None:
            check_number(self, "batch_size", 1, np.inf, integer=True)
        check_number(self, "outer", 1, np.inf, integer=True)

    def check(self, data: ServerData) -> None:
        """Raise FederationError if the server lacks what it takes."""
        if self.by == "reference" and (data.model is None or data.reference is None):
            raise FederationError(
                "retention by reference inputs needs some at the server, and there are none. Give them (--reference), "
                "or retain by 'euclidean' or 'fisher', which take no inputs."
            )
        if self.by == "fisher" and data.fisher is None:
            raise FederationError(
                "retention by 'fisher' needs the diagonal Fisher information at the first model, and the server has "
                "none. Give it (fisher), or retain by 'euclidean'."
            )

    def loss(self, round: Round, seed: int) -> Any:
        """Return r as an objective."""
        from ..objectives import Distillation, Proximity

        data, origin = round.data, _floats(round.origin)
        if self.by != "reference":
            metric = None if self.by == "euclidean" or data.fisher is None else dict(data.fisher)
            return Proximity(origin, metric, device=round.pool.device)
        assert data.model is not None
        assert data.reference is not None
        task = data.reference.without_labels()
        return Distillation(data.model, task, {task.name: origin}, batch_size=self.batch_size, seed=seed)


@dataclass(frozen=True)
class SolveStep(ServerStep):
    """A solver over the round's pool.

    objective: of `OBJECTIVES`, with options such as batch_size. blocks, domain, solver, start, max_iter, tol: as in
    `mergesolve.solvers`. prepare: selection and transforms of the clients' models. origin: make θ_0 a vertex.
    mixed: distil on this many inputs a client, what the server holds and mixtures of two of it, drawn anew each round.
    """

    objective: Spec = field(default_factory=lambda: {"name": "distillation"})
    blocks: Any = "layer"
    domain: Any = "capped"
    solver: Any = "projected-gradient"
    start: str = "average"
    max_iter: int = 30
    tol: float = 1e-6
    retention: Retention | None = None
    origin: bool = False
    mixed: int | None = None
    prepare: Preparation = field(default_factory=Preparation)
    name: str = "solve"
    source: ClassVar[str] = "Frank-Wolfe merging (Chen et al. 2025), AdaMerging (Yang et al. 2024), as server steps"

    def __post_init__(self) -> None:
        spec = {"name": self.objective} if isinstance(self.objective, str) else dict(self.objective)
        if spec.get("name") not in OBJECTIVES:
            raise unknown("objective of a server step", spec.get("name"), OBJECTIVES)
        known = objective_options(str(spec["name"]))
        for option in spec:
            if option != "name" and option not in known:
                raise unknown(f"option of the objective {spec['name']!r}:", option, known or ["(it has none)"])
        object.__setattr__(self, "objective", spec)
        object.__setattr__(self, "solver", make_solver(self.solver))
        object.__setattr__(self, "domain", make_domain(self.domain))
        if self.retention is not None:
            given = {"name": "retention", **self.retention} if isinstance(self.retention, Mapping) else self.retention
            object.__setattr__(self, "retention", construct("retention", {"retention": Retention}, given))
        check_number(self, "max_iter", 0, np.inf, integer=True)
        check_number(self, "tol", 0, np.inf, closed="left")
        if self.mixed is not None:
            check_number(self, "mixed", 1, np.inf, integer=True)
            if OBJECTIVES[spec["name"]] != TEACHERS:
                raise FederationError(
                    f"the server step {self.name!r}: 'mixed' inputs have no labels, so only an objective with teachers "
                    "can judge them. Take the objective 'distillation', or leave 'mixed' out."
                )
        if isinstance(self.blocks, str) and self.blocks not in KINDS:
            raise unknown("kind of blocks", self.blocks, KINDS)
        if not isinstance(self.start, str):
            raise FederationError(f"start: a server step begins at a point with a name. Got {self.start!r} instead.")
        if self.start.startswith("run:"):
            raise FederationError("a server step begins anew in every round; start: run: is for single solves.")

    # Data

    def check(self, data: ServerData) -> None:
        """Find out before the first round that data are missing."""
        kind = OBJECTIVES[self.objective["name"]]
        if kind != WEIGHTS and (data.model is None or not data.tasks):
            what = "labelled samples" if kind == LABELLED else "inputs"
            raise FederationError(
                f"the server step {self.name!r} minimizes {self.objective['name']}, which needs {what} at the server, "
                "and there are none. Give some (--server-images), or choose a step without data, such as 'fedavg', "
                "'ties', 'quadratic', or the objective 'proximity'."
            )
        unlabelled = [name for name, task in data.tasks.items() if task.labels is None]
        if kind == LABELLED and unlabelled:
            raise FederationError(
                f"the server step {self.name!r} minimizes {self.objective['name']}, which needs labels, and the "
                f"server's samples for {unlabelled[0]!r} have none. Give labels, or minimize 'distillation' or "
                "'entropy'."
            )
        if self.retention is not None:
            self.retention.check(data)

    def loss(self, round: Round, pool: Pool, seed: int) -> Any:
        """Return f as an objective."""
        from ..objectives import Proximity
        from ..objectives.registry import objective

        options = {"seed": seed, **self.objective}
        name = options.pop("name")
        kind = OBJECTIVES[name]
        clients = [client for client in pool.names if client != ORIGIN]
        if kind == WEIGHTS:
            # The mean of ½‖θ − θ̂_i‖² is ½‖θ − mean θ̂‖² and a constant: one model in memory, however many clients.
            row = np.array([[float(name != ORIGIN) / len(clients) for name in pool.names]])
            return Proximity(pool.combine(row, pool.blocks("model")), device=pool.device)
        data = round.data
        tasks = [data.tasks[client] for client in sorted(data.tasks)]
        if kind != LABELLED:
            tasks = [task.without_labels() for task in tasks]
        if kind == TEACHERS:
            if self.mixed is not None:
                tasks = [task.mixed(self.mixed, seed) for task in tasks]
            # A client that is absent keeps what θ_t knows of its task: nothing is lost.
            options["teachers"] = {
                data.tasks[client].name: _teacher(round, client if client in clients else None)
                for client in sorted(data.tasks)
            }
        return objective(name)(data.model, tasks, **options)

    # The step

    def propose(self, round: Round) -> Proposal:
        """Solve."""
        self.check(round.data)
        with round.watch.timed("read"):
            pool = self.prepare(round.models(origin=self.origin, backend=round.backend), round)
        seed = round.draw
        objective = self.loss(round, pool, seed)
        if self.retention is not None and self.retention.by == "fisher":
            round.ledger["unlabelled"] += round.data.fisher_samples
        if self.retention is not None and self.retention.weight is not None:
            from ..objectives import WeightedSum

            objective = WeightedSum([(1.0, objective), (self.retention.weight, self.retention.loss(round, seed))])
        if self.retention is not None and self.retention.bound is not None:
            return self._constrained(round, pool, objective, self.retention, seed)
        problem = Problem(pool, objective, self.blocks, self.domain)
        result = solve(
            problem,
            self.solver,
            start=self._start(problem),
            max_iter=self.max_iter,
            tol=self.tol,
            callback=_follow(round, self.max_iter + 1),
        )
        return self._proposal(round, pool, problem, result, {}, {})

    def _constrained(self, round: Round, pool: Pool, objective: Any, retention: Retention, seed: int) -> Proposal:
        from ..objectives import AugmentedLagrangian
        from ..solvers import solve_constrained

        assert retention.bound is not None
        lagrangian = AugmentedLagrangian(objective, retention.loss(round, seed), retention.bound)
        problem = Problem(pool, lagrangian, self.blocks, self.domain)
        inner = max(1, self.max_iter // retention.outer)
        found = solve_constrained(
            problem,
            self.solver,
            rounds=retention.outer,
            max_iter=inner,
            start=self._start(problem),
            multiplier=float(round.memory.get(MULTIPLIER, 0.0)),
            tol=self.tol,
            repair=True,
            callback=_follow(round, (inner + 1) * retention.outer),
        )
        if found.constraint > found.bound and ORIGIN in problem.experts:
            found = self._towards_origin(problem, found)
        details = {
            "bound": retention.bound,
            "reference_loss": found.constraint,
            "multiplier": found.multiplier,
            "penalty": found.penalty,
            "violation": found.violation,
            "repair": found.repair,
        }
        memory = {MULTIPLIER: np.array(found.multiplier)}
        return self._proposal(round, pool, problem, found, details, memory)

    def _towards_origin(self, problem: Problem, found: ConstrainedResult) -> ConstrainedResult:
        """Hold the bound where neither start nor base do, by moving on the segment to θ_0, which forgets nothing."""
        assert isinstance(self.solver, Solver)
        vertex = np.zeros_like(found.coefficients)
        vertex[:, problem.experts.index(ORIGIN)] = 1.0
        vertex = problem.domain.project(vertex)
        ends = [(ORIGIN, vertex, constraint_at(problem, vertex)), ("last", found.coefficients, found.constraint)]
        point, moved = repaired(problem, ends, 0.0)
        if moved is None:
            return found
        value = constraint_at(problem, point)
        evaluation, certificate = evaluate_lagrangian(problem, self.solver, point)
        return replace(
            found,
            coefficients=point,
            objective=evaluation.value,
            tasks=evaluation.task_values,
            gap=certificate.gap,
            stationarity=certificate.stationarity,
            constraint=value,
            violation=max(0.0, value - found.bound),
            complementarity=abs(found.multiplier * (value - found.bound)),
            repair=moved,
        )

    def _start(self, problem: Problem) -> Array:
        """Return the starting point; the origin has no part in averages and sums of the clients."""
        point = start_point(problem, self.start)
        if ORIGIN in problem.experts and self.start.startswith(("average", "task-arithmetic")):
            column = problem.experts.index(ORIGIN)
            point[:, column] = 0.0
            if self.start == "average" and problem.n > 1:
                point *= problem.n / (problem.n - 1)
        return problem.domain.project(point)

    def _proposal(
        self,
        round: Round,
        pool: Pool,
        problem: Problem,
        result: Result,
        details: Mapping[str, Any],
        memory: Mapping[str, Array],
    ) -> Proposal:
        for part, seconds in problem.seconds.items():
            round.watch.add(part, seconds)
        with round.watch.timed("combine"):
            weights = pool.combine(result.coefficients, problem.blocks)
        found = {
            "objective": result.objective,
            "gap": result.gap,
            "stationarity": result.stationarity if math.isfinite(result.stationarity) else None,  # without gradients
            "status": result.status,
            "iterations": result.nit,
            **details,
        }
        means = dict(zip(pool.names, result.coefficients.mean(axis=0).tolist(), strict=True))
        return Proposal(weights, means, found, dict(problem.data_used), memory)

    def describe(self) -> dict[str, Any]:
        """Return every option."""
        solver, domain = self.solver, self.domain
        assert isinstance(solver, Solver)
        assert isinstance(domain, Domain)
        return {
            "name": self.name,
            "objective": dict(self.objective),
            "blocks": self.blocks,
            "domain": domain.describe(),
            "solver": solver.describe(),
            "start": self.start,
            "max_iter": self.max_iter,
            "tol": self.tol,
            "retention": None if self.retention is None else _plain(self.retention),
            "origin": self.origin,
            # Absent where no one asked for it, so that runs from before it go on.
            **({} if self.mixed is None and "mixed" not in PRESETS.get(self.name, {}) else {"mixed": self.mixed}),
            **self.prepare.describe(),
        }


def objective_options(name: str) -> list[str]:
    """Return what may be chosen of an objective of a server: not its model, tasks and teachers, nor its centre."""
    from ..objectives.registry import objective

    if OBJECTIVES[name] == WEIGHTS:
        return []
    return [option for option in signature(objective(name)).parameters if option not in ("model", "tasks", "teachers")]


def expert_weights(pool: Pool, name: str) -> Weights:
    """Return the merged tensors of one expert, float32."""
    row = np.zeros((1, pool.n))
    row[0, pool.names.index(name)] = 1.0
    return pool.combine(row, pool.blocks("model"))


def _teacher(round: Round, client: str | None) -> Any:
    pool = round.pool
    if client is None:
        return lambda: pool.combine(np.zeros((1, pool.n)), pool.blocks("model"))
    return lambda: expert_weights(pool, client)


def _floats(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in weights.items() if tensor.is_floating_point()}


def _follow(round: Round, total: int) -> Any:
    if round.progress is None:
        return None
    done = 0
    tell = round.progress

    def callback(record: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        tell(done, total)

    return callback


def _plain(retention: Retention) -> dict[str, Any]:
    found = describe(retention, {"retention": Retention})
    found.pop("name")
    return found
