"""Closed-form merges as server steps: θ_{t+1} = rule(θ_t; τ_1 .. τ_N), τ_i = θ̂_i − θ_t.

Weights of FedAvg and FedNova follow from what the clients report; every other one is a merge of
`mergesolve.solvers.closed_form` as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..pools import Pool, Statistics
from ..pools.transforms import make_transform
from ..solvers.closed_form import Linear, describe_merge, merge_weights
from ..solvers.closed_form.merge import Merge
from ..solvers.selection import Evidence, make_selector
from .errors import FederationError
from .replies import Weights
from .step import NO_DATA, Proposal, Round, ServerData, ServerStep

Spec = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Preparation:
    """What is done to the pool before it is merged: a selection of experts, then transforms of their task vectors."""

    select: Spec | str | None = None
    transforms: Sequence[Spec | str] = ()

    def __post_init__(self) -> None:
        if self.select is not None:
            make_selector(self.select)
        object.__setattr__(self, "transforms", tuple(self.transforms))
        for transform in self.transforms:
            make_transform(transform)

    def __call__(self, pool: Pool, round: Round) -> Pool:
        """Return the pool that is merged; the round's ledger says what choosing took."""
        if self.select is not None:
            seen: set[str] = set()
            pool = pool.subset(make_selector(self.select).select(evidence(pool, round.data, seen)).names)
            for name in seen:
                task = round.data.tasks[name]
                round.ledger["unlabelled" if task.labels is None else "labelled"] += len(task)
        for transform in self.transforms:
            pool = pool.transform(reseeded(make_transform(transform), round))
        return pool

    def describe(self) -> dict[str, Any]:
        """Return the options that are set."""
        found: dict[str, Any] = {}
        if self.select is not None:
            found["select"] = make_selector(self.select).describe()
        if self.transforms:
            found["transforms"] = list(self.transforms)
        return found


def evidence(pool: Pool, data: ServerData, seen: set[str]) -> Evidence:
    """Return what the server can measure of the clients' models; `seen` collects the clients whose samples it took."""
    from ..objectives import evaluate, features

    model = data.model
    labelled = {name: task for name, task in data.tasks.items() if task.labels is not None}

    def accuracy(weights: Weights) -> dict[str, float]:
        assert model is not None
        seen.update(labelled)
        return evaluate(model, dict(weights), list(labelled.values()))

    def represent(weights: Weights) -> np.ndarray[Any, Any]:
        assert model is not None
        seen.update(data.tasks)
        return np.concatenate([features(model, dict(weights), task).numpy() for task in data.tasks.values()])

    return Evidence(
        pool,
        accuracy=accuracy if model is not None and labelled else None,
        features=represent if model is not None and data.tasks else None,
    )


def reseeded(drawn: T, round: Round) -> T:
    """Return a merge or a transform with a seed of this round: the same random masks in all rounds would leave most of
    what the clients send behind for good."""
    if "seed" not in {field.name for field in fields(drawn)}:  # type: ignore[arg-type]
        return drawn
    return replace(drawn, seed=drawn.seed + round.draw)  # type: ignore[attr-defined, type-var]


@dataclass(frozen=True)
class MergeStep(ServerStep):
    """A closed-form merge of the clients' models; `origin` makes θ_0 one more expert of it, called "origin"."""

    merge: Merge
    prepare: Preparation = field(default_factory=Preparation)
    origin: bool = False

    def propose(self, round: Round) -> Proposal:
        """Merge."""
        with round.watch.timed("read"):
            pool = self.prepare(round.models(origin=self.origin), round)
        merge = reseeded(self.merge, round)
        details = {"merge": describe_merge(merge)}
        with round.watch.timed("combine"):
            if isinstance(merge, Linear) and not merge.transforms():  # a point of the pool, whose coefficients tell
                merge.check(pool)
                matrix, blocks = merge.coefficients(pool)
                means = dict(zip(pool.names, matrix.mean(axis=0).tolist(), strict=True))
                return Proposal(pool.combine(matrix, blocks), means, details, NO_DATA)
            statistics = None if merge.statistics is None else self._statistics(pool, round)
            return Proposal(merge_weights(pool, merge, statistics), None, details, NO_DATA)

    def _statistics(self, pool: Pool, round: Round) -> Statistics:
        kind = self.merge.statistics
        sent: dict[str, Weights] = {r.client: r.fisher for r in round.replies if r.fisher is not None}
        silent = [name for name in pool.names if name not in sent]
        if kind != "fisher" or silent:
            what = f"client {silent[0]!r} sent none" if kind == "fisher" else f"clients send no {kind} statistics"
            raise FederationError(
                f"the server step {type(self.merge).__name__} needs {kind} statistics of every client, and {what}. "
                "Let the clients send Fisher diagonals (fisher: SAMPLES), or choose another step."
            )
        tensors = {name: {t: v for t, v in table.items() if t in pool.tensors} for name, table in sent.items()}
        return Statistics.from_tensors(pool, "fisher", {name: tensors[name] for name in pool.names})

    def describe(self) -> dict[str, Any]:
        """Return method and options."""
        return {
            **describe_merge(self.merge),
            **({"origin": True} if self.origin else {}),
            **self.prepare.describe(),
        }


@dataclass(frozen=True)
class FedAvg(ServerStep):
    """θ_t + Σ_i p_i τ_i, with p_i = 1/N, or by the clients' numbers of samples."""

    by: str = "uniform"
    source: ClassVar[str] = "McMahan et al. (2017), Communication-Efficient Learning of Deep Networks, algorithm 1"

    def __post_init__(self) -> None:
        if self.by not in ("uniform", "samples"):
            raise FederationError(
                f"The 'by' parameter of FedAvg must be 'uniform' or 'samples'. Got {self.by!r} instead."
            )

    def propose(self, round: Round) -> Proposal:
        """Average."""
        return weighted(round, shares(round, self.by))

    def describe(self) -> dict[str, Any]:
        """Return name and options."""
        return {"name": "fedavg", "by": self.by}


@dataclass(frozen=True)
class FedNova(ServerStep):
    """θ_t + a Σ_i p_i τ_i / a_i, with a_i the client's optimizer steps and a = Σ_i p_i a_i: no client counts for more
    because it took more steps."""

    by: str = "samples"
    source: ClassVar[str] = "Wang et al. (2020), Tackling the Objective Inconsistency Problem, equation 6"

    def __post_init__(self) -> None:
        FedAvg(self.by)

    def propose(self, round: Round) -> Proposal:
        """Average the normalized updates."""
        share = shares(round, self.by)
        steps = np.array([reply.steps for reply in round.replies], dtype=np.float64)
        return weighted(round, float(share @ steps) * share / steps)

    def describe(self) -> dict[str, Any]:
        """Return name and options."""
        return {"name": "fednova", "by": self.by}


def shares(round: Round, by: str) -> np.ndarray[Any, Any]:
    """Return p [n], which sums to 1."""
    sizes = [reply.samples if by == "samples" else 1 for reply in round.replies]
    return np.array(sizes, dtype=np.float64) / sum(sizes)


def weighted(round: Round, coefficients: np.ndarray[Any, Any]) -> Proposal:
    """Return θ_t + Σ_i λ_i τ_i."""
    with round.watch.timed("combine"):
        merged = round.pool.combine(coefficients[None, :], round.pool.blocks("model"))
    return Proposal(merged, dict(zip(round.pool.names, coefficients.tolist(), strict=True)), {}, NO_DATA)
