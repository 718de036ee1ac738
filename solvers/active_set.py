"""The active set: the iterate as an explicit convex combination of vertices of the whole (product) domain.

    Λ = Σ_k w_k V_k,   w ≥ 0,   Σ_k w_k = 1

What away-step, pairwise, blended pairwise and fully corrective Frank-Wolfe know beyond Λ: where weight can be taken
from. A vertex V_k is one choice for *all* rows at once, so a step is limited by one weight, not by the smallest
weight of any row, and the linear rates hold with the geometry of the product. It is kept as the domain's key (an
index a row: 70 000 rows of 24 experts take 70 kB a vertex), weights in float64, both in the state's memory.

A start of one row is decomposed into its experts exactly, and so is a vertex of more rows (base, one expert). Any other
start is an atom of its own until its weight is gone: the average of n experts over many rows would be n vertices that
have the same expert in all rows, each to be taken away in a step of its own.
Source: Lacoste-Julien and Jaggi (2015), On the Global Linear Convergence of Frank-Wolfe Optimization Variants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .domains import BASE, START, Domain
from .problem import Evaluation, MatrixProblem
from .solver import Clock, Solver, State, Step, require_oracle, require_traits, seek
from .step_rules import SCHEDULE, Memory, make_step_rule

Array = np.ndarray[Any, Any]
NEGLIGIBLE = 1e-14  # weights that move Λ by less than rounding does in a long solve
SAME = 1e-12  # keys of reals that are the same vertex
TIE = 1e-4  # products that differ by less of their spread are as good as equal
ORACLE = -1  # in a choice: the vertex that the oracle returned
ARRAYS = ("keys", "weights", "start")


@dataclass(frozen=True)
class ActiveSet:
    """Atoms and weights. keys: [k, ...] of vertices; start: an atom [rows, n] without a key, the last one, or None.

    weights: [k] or [k + 1], nonnegative, of sum 1.
    """

    domain: Domain
    rows: int
    n: int
    keys: Array
    weights: Array
    start: Array | None = None

    @classmethod
    def begin(cls, domain: Domain, point: Array, *, split: bool = True) -> ActiveSet:
        """Return the set whose combination is ``point`` [rows, n]; split: one row into its experts."""
        rows, n = point.shape
        like = compact(domain.atom(np.zeros((rows, n))), n)
        whole = rows > 1 and not np.isin(point, (0.0, 1.0)).all()
        if split and domain.has_vertices and not whole and (point == point[0]).all():
            chosen = np.flatnonzero(point[0])
            weights = point[0, chosen]
            rest = 1.0 - weights.sum()
            if domain.has_base and rest > NEGLIGIBLE:
                chosen, weights = np.append(chosen, BASE), np.append(weights, rest)
            keys = np.broadcast_to(chosen[:, None].astype(like.dtype), (len(chosen), rows))
            return cls(domain, rows, n, keys.copy(), weights / weights.sum())
        return cls(domain, rows, n, np.empty((0, *like.shape), like.dtype), np.ones(1), point)

    @classmethod
    def load(cls, domain: Domain, shape: tuple[int, int], memory: Memory) -> ActiveSet:
        """Return the set that :meth:`arrays` made."""
        return cls(domain, *shape, memory["keys"], memory["weights"], memory.get("start"))

    def arrays(self) -> Memory:
        """Return what the state keeps."""
        arrays = {"keys": self.keys, "weights": self.weights}
        return arrays if self.start is None else {**arrays, "start": self.start}

    def __len__(self) -> int:
        return len(self.weights)

    def point(self) -> Array:
        """Return Σ_k w_k V_k [rows, n]."""
        point = self.domain.blend(self.keys, self.weights[: len(self.keys)], self.rows, self.n)
        return point if self.start is None else point + self.weights[-1] * self.start

    def products(self, scores: Array) -> Array:
        """Return ⟨V_k, S⟩ [k]."""
        found = self.domain.products(self.keys, scores)
        return found if self.start is None else np.append(found, np.sum(self.start * scores))

    def matrix(self, index: int) -> Array:
        """Return V_k [rows, n]."""
        if index == len(self.keys):
            assert self.start is not None
            return self.start
        return self.domain.matrix(self.keys[index], self.n)

    def vertex(self, index: int) -> Array | None:
        """Return atom k as the vertices of a step [1, rows], or None where vertices are not experts."""
        if not self.domain.has_vertices:
            return None
        start = index == len(self.keys)
        return np.full((1, self.rows), START) if start else self.keys[index][None].astype(np.int64)

    def find(self, key: Array) -> int | None:
        """Return the index of the atom with this key, if there is one."""
        same = np.abs(self.keys - key) <= SAME if self.keys.dtype.kind == "f" else self.keys == key
        found = np.flatnonzero(same.all(axis=tuple(range(1, same.ndim))))
        if len(found):
            return int(found[0])
        if self.start is not None and np.array_equal(self.domain.matrix(key, self.n), self.start):
            return len(self.keys)
        return None

    def with_vertex(self, key: Array) -> tuple[ActiveSet, int]:
        """Return a set that holds the vertex, with weight 0 if it is new, and its index."""
        key = compact(key, self.n)
        found = self.find(key)
        if found is not None:
            return self, found
        k = len(self.keys)
        grown = replace(self, keys=np.concatenate([self.keys, key[None]]), weights=np.insert(self.weights, k, 0.0))
        return grown, k

    def weighted(self, weights: Array) -> ActiveSet:
        """Return the set with these weights, scaled to sum 1; atoms whose weight is gone are dropped."""
        kept = weights > NEGLIGIBLE
        weights = weights[kept]
        start = self.start if self.start is not None and kept[-1] else None
        return replace(self, keys=self.keys[kept[: len(self.keys)]], weights=weights / weights.sum(), start=start)


class Choice(NamedTuple):
    """A direction: weight goes to atom ``gains`` and comes from atom ``loses``; None stands for all in proportion."""

    gains: int | None
    loses: int | None
    kind: str


@dataclass(frozen=True)
class ActiveSetSolver(Solver):
    """Common part of the variants that move weight between the atoms of an active set along one direction.

    step_rule: any rule that makes a step descend: steps are limited by weights, and a schedule would ignore that.
    """

    step_rule: Any = "secant"
    promise: ClassVar[str] = "linear"
    source: ClassVar[str] = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_rule", make_step_rule(self.step_rule))
        reason = (
            "its steps are known before the objective is, while here a step ends where a weight does, and the rate "
            "rests on each step that ends earlier being one of descent; use 'secant', 'line-search' or 'short-step'"
        )
        require_traits(self, self.step_rule, {SCHEDULE: reason})

    def check(self, problem: MatrixProblem) -> None:
        """Refuse domains without an oracle."""
        require_oracle(problem)

    def init(self, problem: MatrixProblem, start: Array) -> State:
        """Start from the atoms of the starting point."""
        return State(start, ActiveSet.begin(problem.domain, start).arrays())

    def choose(self, products: Array, weights: Array, current: float, best: float) -> Choice:
        """Return the direction from ⟨V_k, S⟩ and w_k [k], ⟨Λ, S⟩ and min ⟨V, S⟩, whose vertex is called ORACLE."""
        raise NotImplementedError

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Choose a direction, search along it, and move the weights."""
        domain, point, scores = problem.domain, state.coefficients, evaluation.scores
        active = ActiveSet.load(domain, point.shape, state.memory)
        key = domain.atom(scores)
        products, current = active.products(scores), float(np.sum(point * scores))
        best = float(domain.products(key[None], scores)[0])
        choice = self.choose(products, active.weights, current, best)
        before = len(active)
        extra: dict[str, Any] = {"strong_gap": max(0.0, float(products.max()) - best)}
        gains, loses = choice.gains, choice.loses
        if gains == ORACLE:
            active, gains = active.with_vertex(key)
        if loses == len(products) - 1 and active.start is not None:
            loses = len(active) - 1  # the start stays the last atom when a vertex is added
        target = point if gains is None else active.matrix(gains)
        origin = point if loses is None else active.matrix(loses)
        limit = longest(active.weights, gains, loses)
        memory = {name: value for name, value in state.memory.items() if name not in ARRAYS}
        direction = target - origin
        if not np.any(direction) or limit <= 0:
            return Step(state, 0.0, extra={**extra, "active": before, "kind": choice.kind})
        slope = float(np.sum(direction * scores))
        noise = problem.resolution * abs(evaluation.value)
        if loses is not None and limit**2 <= problem.resolution and -slope * limit <= noise:
            line, size = problem.line(point, direction), limit  # no value can tell what so little weight is worth
        else:
            line, size = seek(
                self.step_rule, problem, State(point, memory), evaluation, direction, limit, clock.iteration
            )
        if size <= 0:
            return Step(state, 0.0, extra={**extra, "active": before, "kind": choice.kind})
        moved = active.weighted(shifted(active.weights, gains, loses, size, exhausts=size >= limit))
        reached = moved.point()
        line.accept(size, reached)
        kind = choice.kind
        if loses is not None and size >= limit:
            kind = "drop" if len(moved) < before else "swap"
        vertices = None if gains is None else active.vertex(gains)
        extra = {**extra, "active": len(moved), "kind": kind}
        return Step(State(reached, {**memory, **moved.arrays()}), size, vertices, extra=extra)


def highest(products: Array, weights: Array) -> int:
    """Return the atom of the largest product; among those that tie, the one of the largest weight.

    After an exact step between two atoms their products are equal, and rounding must not choose between them.
    """
    spread = float(products.max() - products.min())
    return int(np.argmax(np.where(products >= products.max() - TIE * spread, weights, -1.0)))


def longest(weights: Array, gains: int | None, loses: int | None) -> float:
    """Return the largest feasible γ: 1 toward a vertex, w/(1 − w) away from an atom, w from one atom to another."""
    if loses is None:
        return 1.0
    weight = float(weights[loses])
    if gains is not None:
        return weight
    rest = float(weights.sum()) - weight
    return weight / rest if rest > 0 else 0.0


def shifted(weights: Array, gains: int | None, loses: int | None, size: float, *, exhausts: bool) -> Array:
    """Return the weights of Λ + γD for D = V_gains − V_loses, where None stands for Λ itself."""
    moved = weights.copy()
    if gains is None:
        moved *= 1.0 + size
    elif loses is None:
        moved *= 1.0 - size
    if gains is not None:
        moved[gains] += size
    if loses is not None:
        moved[loses] = 0.0 if exhausts else moved[loses] - size
    return moved


def compact(key: Array, n: int) -> Array:
    """Return an integer key in the smallest type that holds −2 ... n − 1; other keys as they are."""
    return key.astype(np.min_scalar_type(-2 * n - 2)) if key.dtype.kind == "i" else key
