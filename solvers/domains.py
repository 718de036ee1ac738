"""Feasible sets of the coefficients Λ [rows, experts]: a product of one small set a row.

Each domain knows its projection Π (Euclidean), its linear minimization oracle V = argmin_{V in domain} ⟨V, S⟩,
and with it the Frank-Wolfe gap ⟨Λ, S⟩ − ⟨V, S⟩, which is nonnegative, zero only at a stationary point, and an upper
bound of f(Λ) − f* when f is convex (FW-Merging, eq. 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .construct import construct, describe
from .errors import OptionError, check_number

Array = np.ndarray[Any, Any]
FEASIBILITY = 1e-9
BASE = -1  # the index of the base among the vertices of a domain that contains it
START = -2  # the index of the starting point, where a solver counts it among its vertices


@dataclass(frozen=True)
class Domain:
    """Common part of the domains. ``has_vertices``: its rows are convex hulls of experts (and base)."""

    source: ClassVar[str] = ""
    has_vertices: ClassVar[bool] = False
    has_base: ClassVar[bool] = False
    convex: ClassVar[bool] = True  # a step between two points of the domain stays in it

    def bind(
        self, experts: Sequence[str], rows: Sequence[str], layers: Mapping[str, Sequence[int] | Array] | None = None
    ) -> Domain:
        """Return the domain of a problem with these columns, rows and layers of rows; itself if it names none."""
        return self

    def cells(self, rows: int) -> Array:
        """Return the number of the factor of the product that each row belongs to [rows]: rows that move alone."""
        return np.arange(rows)

    def project(self, point: Array) -> Array:
        """Return the nearest point of the domain, row by row [rows, n]."""
        raise NotImplementedError

    def violation(self, point: Array) -> Array:
        """Return by how much each row breaks its worst constraint [rows]; 0 inside."""
        raise NotImplementedError

    def minimizer(self, scores: Array) -> Array:
        """Return argmin ⟨V, scores⟩ over the domain [rows, n]: the hard linear minimization oracle."""
        raise NotImplementedError

    def atom(self, scores: Array) -> Array:
        """Return the same vertex as ``minimizer`` as a key, compact where there is one: equal keys, equal vertices."""
        return self.minimizer(scores)

    def matrix(self, atom: Array, n: int) -> Array:
        """Return the vertex [rows, n] of a key that :meth:`atom` gave."""
        return atom

    def products(self, atoms: Array, scores: Array) -> Array:
        """Return ⟨V_k, scores⟩ of the vertices of keys [k, ...] -> [k]."""
        return np.array([np.sum(self.matrix(atom, scores.shape[1]) * scores) for atom in atoms])

    def blend(self, atoms: Array, weights: Array, rows: int, n: int) -> Array:
        """Return Σ_k w_k V_k [rows, n] of the vertices of keys [k, ...]."""
        point = np.zeros((rows, n))
        for atom, weight in zip(atoms, weights, strict=True):
            point += weight * self.matrix(atom, n)
        return point

    def vertices(self, scores: Array, k: int = 1) -> Array:
        """Return the k best vertices of each row, best first [k, rows]: the soft oracle. BASE stands for the base."""
        raise OptionError(
            f"The domain {self.name!r} has no experts as vertices; the soft oracle needs 'simplex' or 'capped'."
        )

    def gap(self, point: Array, scores: Array) -> float | None:
        """Return the Frank-Wolfe gap max_V ⟨scores, point − V⟩ ≥ 0, or None where the domain is unbounded."""
        gap = math.fsum(np.sum((point - self.minimizer(scores)) * scores, axis=1))
        return 0.0 if gap < 0 else gap  # of a feasible point it is negative by rounding only; nan stays nan

    def stationarity(self, point: Array, scores: Array) -> float:
        """Return ‖Λ − Π(Λ − S)‖, zero exactly at the stationary points of any domain."""
        return float(np.linalg.norm(point - self.project(point - scores)))

    def breach(self, point: Array, row: int) -> str:
        """Return in words how a row of ``point`` [rows, n] leaves the domain."""
        least, most = point[row].min(), point[row].max()
        return f"its coefficients sum to {point[row].sum():.6g} and lie in [{least:.6g}, {most:.6g}]"

    @property
    def name(self) -> str:
        """Name in the registry."""
        return next(name for name, cls in DOMAINS.items() if cls is type(self))

    def describe(self) -> dict[str, Any]:
        """Return name and options."""
        return describe(self, DOMAINS)


@dataclass(frozen=True)
class Simplex(Domain):
    """Λ ≥ 0 with rows that sum to 1: the convex hull of the experts."""

    source: ClassVar[str] = "FW-Merging, eq. 5; projection: Held, Wolfe and Crowder (1974)"
    has_vertices: ClassVar[bool] = True

    def project(self, point: Array) -> Array:
        """Sort each row, find the threshold τ with Σ max(λ − τ, 0) = 1, and shift by it."""
        n = point.shape[1]
        point = point - point.max(axis=1, keepdims=True)  # the projection is the same, and large numbers lose nothing
        descending = -np.sort(-point, axis=1)
        thresholds = (np.cumsum(descending, axis=1) - 1.0) / np.arange(1, n + 1)
        support = np.count_nonzero(descending > thresholds, axis=1)
        threshold = np.take_along_axis(thresholds, support[:, None] - 1, axis=1)
        projected = np.maximum(point - threshold, 0.0)
        return projected / projected.sum(axis=1, keepdims=True)

    def violation(self, point: Array) -> Array:
        """Largest of the negative parts and the distance of the sum from 1."""
        return np.maximum(np.abs(point.sum(axis=1) - 1.0), np.maximum(-point.min(axis=1), 0.0))

    def minimizer(self, scores: Array) -> Array:
        """One expert a row: the smallest score."""
        return self.matrix(self.atom(scores), scores.shape[1])

    def atom(self, scores: Array) -> Array:
        """Index of the smallest score of each row [rows]; ties go to the first in the pool."""
        return np.argmin(scores, axis=1)

    def matrix(self, atom: Array, n: int) -> Array:
        """The rows e_i of the chosen experts."""
        return indicator(atom, n)

    def products(self, atoms: Array, scores: Array) -> Array:
        """Sums of the chosen scores."""
        return gather(atoms, scores)

    def blend(self, atoms: Array, weights: Array, rows: int, n: int) -> Array:
        """Weights added where they belong."""
        return scatter(atoms, weights, rows, n)

    def vertices(self, scores: Array, k: int = 1) -> Array:
        """Experts by ascending score; ties go to the first in the pool."""
        return np.argsort(scores, axis=1, kind="stable")[:, :k].T


@dataclass(frozen=True)
class Capped(Domain):
    """Λ ≥ 0 with rows that sum to at most 1: the convex hull of the experts and the base."""

    source: ClassVar[str] = "FW-Merging, section 3.2 (the hull with θ0 added)"
    has_vertices: ClassVar[bool] = True
    has_base: ClassVar[bool] = True

    def project(self, point: Array) -> Array:
        """Clip at 0; rows that then sum to more than 1 go to the simplex."""
        clipped = np.maximum(point, 0.0)
        over = clipped.sum(axis=1) > 1.0
        if over.any():
            clipped[over] = Simplex().project(point[over])
        return clipped

    def violation(self, point: Array) -> Array:
        """Largest of the negative parts and the excess of the sum over 1."""
        return np.maximum(np.maximum(point.sum(axis=1) - 1.0, 0.0), np.maximum(-point.min(axis=1), 0.0))

    def minimizer(self, scores: Array) -> Array:
        """One expert a row, or the base (a row of zeros) where no score is negative."""
        return self.matrix(self.atom(scores), scores.shape[1])

    def atom(self, scores: Array) -> Array:
        """Index of the smallest score of each row [rows], or BASE where none is negative."""
        best = np.argmin(scores, axis=1)
        return np.where(np.take_along_axis(scores, best[:, None], axis=1)[:, 0] < 0, best, BASE)

    def matrix(self, atom: Array, n: int) -> Array:
        """The rows e_i of the chosen experts, and rows of zeros for the base."""
        return indicator(atom, n)

    def products(self, atoms: Array, scores: Array) -> Array:
        """Sums of the chosen scores; the base scores 0."""
        return gather(atoms, scores)

    def blend(self, atoms: Array, weights: Array, rows: int, n: int) -> Array:
        """Weights added where they belong; those of the base nowhere."""
        return scatter(atoms, weights, rows, n)

    def vertices(self, scores: Array, k: int = 1) -> Array:
        """Experts and base by ascending score; the base scores 0, since its task vector is 0."""
        with_base = np.hstack([np.zeros((len(scores), 1)), scores])
        return np.argsort(with_base, axis=1, kind="stable")[:, :k].T - 1


@dataclass(frozen=True)
class Box(Domain):
    """Every coefficient between ``lower`` and ``upper`` (AdaMerging, clamped)."""

    lower: float = 0.0
    upper: float = 1.0
    source: ClassVar[str] = "AdaMerging (Yang et al. 2024), clamped coefficients"

    def __post_init__(self) -> None:
        check_number(self, "lower", -math.inf, math.inf, closed="neither")
        check_number(self, "upper", self.lower, math.inf, closed="neither")

    def project(self, point: Array) -> Array:
        """Clip."""
        return np.clip(point, self.lower, self.upper)

    def violation(self, point: Array) -> Array:
        """Largest excess over a bound."""
        return np.maximum(np.maximum(self.lower - point, point - self.upper).max(axis=1), 0.0)

    def minimizer(self, scores: Array) -> Array:
        """Upper bound where the score is negative, else the lower one."""
        return self.matrix(self.atom(scores), scores.shape[1])

    def atom(self, scores: Array) -> Array:
        """Whether each coefficient is at its upper bound [rows, n]."""
        return scores < 0

    def matrix(self, atom: Array, n: int) -> Array:
        """The bounds themselves."""
        return np.where(atom, self.upper, self.lower)


@dataclass(frozen=True)
class Free(Domain):
    """No constraint. There is no linear oracle and no gap; ‖S‖ certifies stationarity."""

    source: ClassVar[str] = "AdaMerging (Yang et al. 2024)"

    def project(self, point: Array) -> Array:
        """Everything is feasible."""
        return point

    def violation(self, point: Array) -> Array:
        """No row can break anything."""
        return np.zeros(len(point))

    def minimizer(self, scores: Array) -> Array:
        """Refuse: a linear function has no minimum without constraints."""
        raise OptionError(
            "The domain 'free' is unbounded, so it has no linear minimization oracle. "
            "Frank-Wolfe needs 'simplex', 'capped' or 'box'; use projected gradient or AdaMerging on 'free'."
        )

    def gap(self, point: Array, scores: Array) -> float | None:
        """None: the gap of an unbounded domain is infinite unless the scores are 0."""
        return None


def indicator(vertices: Array, n: int) -> Array:
    """Return the rows e_i of the chosen vertices [rows, n]; a row of zeros for BASE."""
    rows = np.zeros((len(vertices), n))
    chosen = vertices != BASE
    rows[np.flatnonzero(chosen), vertices[chosen]] = 1.0
    return rows


def gather(atoms: Array, scores: Array) -> Array:
    """Return Σ_r scores[r, atoms[k, r]] [k], where BASE counts 0."""
    chosen = scores[np.arange(len(scores)), atoms]
    found: Array = np.where(atoms == BASE, 0.0, chosen).sum(axis=1)
    return found


def scatter(atoms: Array, weights: Array, rows: int, n: int) -> Array:
    """Return Σ_k w_k Σ_r e_r e_{atoms[k, r]}ᵀ [rows, n], where BASE adds nothing."""
    point = np.zeros((rows, n + 1))  # the last column takes what belongs to BASE (−1)
    index = np.arange(rows)
    for atom, weight in zip(atoms, weights, strict=True):
        point[index, atom] += weight
    return np.ascontiguousarray(point[:, :n])


def check_feasible(domain: Domain, point: Array, row_names: tuple[str, ...], what: str) -> None:
    """Raise OptionError if ``point`` leaves the domain by more than 1e-9, naming the worst row."""
    violation = domain.violation(point)
    worst = int(np.argmax(violation))
    if violation[worst] > FEASIBILITY:
        raise OptionError(
            f"{what} is outside the domain '{domain.name}' at block '{row_names[worst]}': "
            f"{domain.breach(point, worst)}, a violation of {violation[worst]:.3g}. "
            "Start at the nearest point of the domain ('nearest:average', 'nearest:base'), or choose a domain that "
            "contains the point ('capped' contains the base, 'free' everything)."
        )


def make_domain(spec: object) -> Domain:
    """Return a domain from an instance, a name, or a mapping with a name and options."""
    if isinstance(spec, Domain):  # maybe one that is bound to names, which no table has
        return spec
    return construct("domain", DOMAINS, spec)


from .l1_ball import L1Ball  # noqa: E402 (kinds of Domain, which has to exist first)
from .polytope import Polytope  # noqa: E402
from .sparse import Sparse  # noqa: E402

DOMAINS: dict[str, type[Domain]] = {
    "simplex": Simplex,
    "capped": Capped,
    "box": Box,
    "l1-ball": L1Ball,
    "polytope": Polytope,
    "sparse": Sparse,
    "free": Free,
}
