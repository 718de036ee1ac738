"""Test problems whose optima are known by construction: what a new solver is run on first.

    f(Λ) = φ(BΛ − o) + ρ/2 ‖Λ‖² − ⟨C, Λ⟩,   φ convex and smooth (LINKS)

Any convex g becomes a problem with a chosen solution by a tilt. Take Λ* in the domain and a matrix S* with
Λ* ∈ argmin_V ⟨V, S*⟩, and set C = ∇g(Λ*) − S*. Then ∇f(Λ*) = S*, and for every Λ of the domain

    f(Λ) ≥ f(Λ*) + ⟨S*, Λ − Λ*⟩ ≥ f(Λ*)

by convexity and by the choice of S*. So f* = f(Λ*) without any solve, and S* holds the multipliers. What S* must be,
row by row (λ is a row of Λ*, s of S*):

    simplex    s_i = ν on the support of λ, ν + μ_i with μ_i ≥ 0 elsewhere
    capped     the same with ν ≤ 0, and ν = 0 where Σλ < 1
    box        s_i = 0 inside, ≥ 0 at the lower bound, ≤ 0 at the upper one
    free       s = 0
    caps       λ ≤ c in the simplex: as simplex, and s_i = ν − μ_i with μ_i ≥ 0 where λ_i = c
    l1-ball    s_i = −ν sign(λ_i) on the support, |s_i| ≤ ν elsewhere, ν ≥ 0, and ν = 0 where ‖λ‖₁ is below the radius

μ_i = 0 off the support is a degenerate optimum: strict complementarity fails. Where the minimizer is not unique,
``minimizers`` holds the extreme points of the solution set; the scores are S* at all of them.
Source: Boyd and Vandenberghe (2004), section 5.5.3 (the conditions of Karush, Kuhn and Tucker).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .domains import Box, Capped, Domain, Free, Simplex
from .l1_ball import L1Ball
from .polytope import Polytope
from .problem import FunctionProblem

Array = np.ndarray[Any, Any]


class Link(NamedTuple):
    """φ: value and gradient at z [m], and a bound of its second derivative along any unit vector (inf: none)."""

    value_and_slope: Callable[[Array], tuple[float, Array]]
    curvature: float


def square(z: Array) -> tuple[float, Array]:
    """½‖z‖²."""
    return 0.5 * float(z @ z), z


def logistic(z: Array) -> tuple[float, Array]:
    """Σ log(1 + e^z)."""
    return float(np.logaddexp(0.0, z).sum()), 0.5 * (1.0 + np.tanh(0.5 * z))


def log_sum_exp(z: Array) -> tuple[float, Array]:
    """log Σ e^z."""
    top = float(z.max())
    weights = np.exp(z - top)
    total = float(weights.sum())
    return top + math.log(total), weights / total


def quartic(z: Array) -> tuple[float, Array]:
    """¼ Σ z⁴: no curvature where z = 0."""
    return 0.25 * float(np.sum(z**4)), z**3


LINKS: dict[str, Link] = {
    "square": Link(square, 1.0),
    "logistic": Link(logistic, 0.25),
    "log-sum-exp": Link(log_sum_exp, 0.5),
    "quartic": Link(quartic, math.inf),
}


@dataclass(frozen=True, eq=False)
class Tilted:
    """f(Λ) = φ(BΛ − o) + ρ/2‖Λ‖² − ⟨C, Λ⟩. design B [m, rows, n], offset o [m], ridge ρ, tilt C [rows, n]."""

    link: str
    design: Array
    offset: Array
    ridge: float
    tilt: Array

    def __call__(self, point: Array) -> tuple[float, Array]:
        """Return f and S = ∂f/∂Λ [rows, n] at ``point``."""
        matrix = self.design.reshape(len(self.design), -1)
        value, slope = LINKS[self.link].value_and_slope(matrix @ point.ravel() - self.offset)
        value += 0.5 * self.ridge * float(np.sum(point**2)) - float(np.sum(self.tilt * point))
        return value, (slope @ matrix).reshape(point.shape) + self.ridge * point - self.tilt


@dataclass(frozen=True, eq=False)
class Instance:
    """One problem with its solution.

    minimizers: extreme points of the solution set [k, rows, n]; multipliers: S* [rows, n], the scores at each of them;
    properties: what is special about it (PROPERTIES).
    """

    name: str
    function: Tilted
    domain: Domain
    minimizers: Array
    multipliers: Array
    properties: frozenset[str] = frozenset()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and experts."""
        rows, n = self.multipliers.shape
        return rows, n

    @property
    def minimizer(self) -> Array:
        """One minimizer [rows, n]: the middle of the extreme ones."""
        return self.minimizers.mean(axis=0)

    @cached_property
    def value(self) -> float:
        """f*."""
        return self.function(self.minimizers[0])[0]

    @property
    def start(self) -> Array:
        """A feasible point [rows, n] that knows nothing of the solution: the average, projected."""
        return self.domain.project(np.full(self.shape, 1.0 / self.shape[1]))

    @cached_property
    def modulus(self) -> float:
        """A lower bound of the strong convexity of f in the Euclidean norm: the smallest eigenvalue, or ρ."""
        if self.function.link != "square":
            return self.function.ridge
        return max(0.0, float(self._spectrum[0])) + self.function.ridge

    @cached_property
    def smoothness(self) -> float:
        """An upper bound of the Lipschitz constant of ∇f over the domain in the Euclidean norm."""
        curvature = LINKS[self.function.link].curvature
        if not math.isfinite(curvature):  # of the quartic: 3 max z² over the domain, by its linear oracle
            ends = [self.domain.minimizer(sign * row) for row in self.function.design for sign in (1, -1)]
            reached = [np.tensordot(self.function.design, end, axes=2) - self.function.offset for end in ends]
            curvature = 3 * float(np.max(np.square(reached)))
        return curvature * float(self._spectrum[-1]) + self.function.ridge

    @cached_property
    def _spectrum(self) -> Array:
        matrix = self.function.design.reshape(len(self.function.design), -1)
        return np.linalg.eigvalsh(matrix.T @ matrix)

    def problem(self, resolution: float = 1e-15) -> FunctionProblem:
        """Return it as a fresh problem, with counts of its own."""
        quadratic = self.function.link == "square"
        return FunctionProblem(self.function, *self.shape, self.domain, resolution=resolution, quadratic=quadratic)


PROPERTIES = {
    "strongly convex": "the Hessian has no eigenvalue below 0.04",
    "flat": "convex, not strongly: directions without curvature at the solution",
    "vertex": "the solution is a vertex in every block",
    "edge": "it lies between two vertices in every block",
    "face": "it lies inside a proper face in every block",
    "interior": "it lies in the relative interior of the domain",
    "degenerate": "experts that are not in the solution score as well as those that are",
    "many solutions": "the minimizer is not unique",
    "duplicates": "experts that are copies of each other",
    "dominated": "experts that score worse than another one at every point",
    "ill-conditioned": "condition number 1e4",
    "product": "several blocks",
    "coupled": "the optimum of a block depends on the others",
    "scaled": "blocks whose scores differ by factors of 100",
    "base": "the base is in the solution of every block",
    "large": "100 experts, or 40 blocks",
    "single": "one expert",
}


def tilted(
    name: str,
    design: Array,
    point: Array,
    multipliers: Array,
    domain: Domain,
    *properties: str,
    link: str = "square",
    ridge: float = 0.05,
    offset: Array | None = None,
    others: tuple[Array, ...] = (),
) -> Instance:
    """Return the instance with minimizer ``point`` and scores ``multipliers`` there: C = ∇g(Λ*) − S*."""
    if offset is None:
        offset = np.zeros(len(design))
    untilted = Tilted(link, design, offset, ridge, np.zeros_like(point))
    function = Tilted(link, design, offset, ridge, untilted(point)[1] - multipliers)
    return Instance(name, function, domain, np.stack([point, *others]), multipliers, frozenset(properties))


def gaussian(rng: np.random.Generator, rows: int, n: int, *, coupled: bool = False) -> Array:
    """Return a random design [m, rows, n]: outputs of one block each, or with ``coupled`` of all of them."""
    if coupled:
        return rng.normal(size=(rows * n, rows, n)) / math.sqrt(rows * n)
    design = np.zeros((rows, n, rows, n))
    for row in range(rows):
        design[row, :, row] = rng.normal(size=(n, n)) / math.sqrt(n)
    return design.reshape(rows * n, rows, n)


def hull_row(
    rng: np.random.Generator, n: int, support: int, level: float, *, total: float = 1.0, degenerate: int = 0
) -> tuple[Array, Array]:
    """Return a row of Λ* with that many experts that sum to ``total``, and its row of S* with ν = ``level``.

    Of the experts outside the support, ``degenerate`` many have the multiplier 0.
    """
    order = rng.permutation(n)
    point, scores = np.zeros(n), np.full(n, level)
    if support:
        point[order[:support]] = total * (0.5 / support + 0.5 * rng.dirichlet(np.full(support, 2.0)))
    scores[order[support + degenerate :]] += rng.uniform(0.05, 0.5, n - support - degenerate)
    return point, scores


def hull_rows(
    rng: np.random.Generator,
    rows: int,
    n: int,
    support: int,
    *,
    base: bool = False,
    capped: bool = False,
    **options: Any,
) -> tuple[Array, Array]:
    """Return Λ* and S* [rows, n]; ``base`` puts the base into the solution, ``capped`` makes ν negative."""
    found = []
    for _ in range(rows):
        if base:
            found.append(hull_row(rng, n, support, 0.0, total=float(rng.uniform(0.3, 0.8)), **options))
        else:
            level = -float(rng.uniform(0.05, 0.5)) if capped else float(rng.normal())
            found.append(hull_row(rng, n, support, level, **options))
    return np.stack([point for point, _ in found]), np.stack([scores for _, scores in found])


def box_rows(rng: np.random.Generator, rows: int, n: int, inside: int, domain: Box) -> tuple[Array, Array]:
    """Return Λ* and S* [rows, n] with that many coefficients strictly inside the box, the others at a bound."""
    point, scores = np.zeros((rows, n)), np.zeros((rows, n))
    for row in range(rows):
        at_upper = rng.random(n) < 0.5
        point[row] = np.where(at_upper, domain.upper, domain.lower)
        scores[row] = np.where(at_upper, -1.0, 1.0) * rng.uniform(0.05, 0.5, n)
        free = rng.permutation(n)[:inside]
        point[row, free] = domain.lower + (domain.upper - domain.lower) * rng.uniform(0.2, 0.8, inside)
        scores[row, free] = 0.0
    return point, scores


def on_hulls() -> list[Instance]:
    """Return the problems on the simplex and the capped simplex that differ in where the solution lies."""
    made: list[Instance] = []
    properties: tuple[str, ...]
    rng = np.random.default_rng(20)
    for place, support in (("vertex", 1), ("edge", 2), ("face", 3), ("interior", 6)):
        point, scores = hull_rows(rng, 3, 6, support)
        properties = ("strongly convex", "product", "coupled", place)
        design = gaussian(rng, 3, 6, coupled=True)
        made.append(tilted(place, design, point, scores, Simplex(), *properties))
    for place, support, base in (
        ("base", 0, True),
        ("vertex", 1, False),
        ("face", 3, False),
        ("face with base", 3, True),
        ("interior", 6, True),
    ):
        rng_place = np.random.default_rng(30 + len(made))
        point, scores = hull_rows(rng_place, 3, 6, support, base=base, capped=True)
        kind = {"base": "vertex", "face with base": "face"}.get(place, place)
        properties = ("strongly convex", "product", "coupled", kind, *(("base",) if base else ()))
        design = gaussian(rng_place, 3, 6, coupled=True)
        made.append(tilted(f"capped {place}", design, point, scores, Capped(), *properties))
    return made


def special() -> list[Instance]:
    """Return the problems on the simplex that are hard in one way each."""
    made: list[Instance] = []
    properties: tuple[str, ...]
    rng = np.random.default_rng(40)

    point, scores = hull_rows(rng, 2, 7, 3, degenerate=2)
    properties = ("strongly convex", "product", "degenerate", "face")
    made.append(tilted("degenerate", gaussian(rng, 2, 7), point, scores, Simplex(), *properties))
    point, scores = hull_rows(rng, 2, 5, 0, base=True, degenerate=2)
    properties = ("strongly convex", "product", "degenerate", "vertex", "base")
    made.append(tilted("capped degenerate base", gaussian(rng, 2, 5), point, scores, Capped(), *properties))

    # Experts 4 and 5 are copies of the two in the solution: what an expert has, its copy may have instead.
    row, row_scores = hull_row(rng, 4, 2, 0.3)
    first, second = (int(expert) for expert in np.flatnonzero(row))
    copied = np.array([0, 1, 2, 3, first, second])
    solutions = []
    for one, other in ((first, second), (4, second), (first, 5), (4, 5)):
        solution = np.zeros((1, 6))
        solution[0, one], solution[0, other] = row[first], row[second]
        solutions.append(solution)
    design, scores = gaussian(rng, 1, 4)[:, :, copied], row_scores[None, copied]
    properties, others = ("flat", "duplicates", "many solutions"), tuple(solutions[1:])
    made.append(tilted("duplicates", design, solutions[0], scores, Simplex(), *properties, ridge=0.0, others=others))

    # Expert 5 is the mean of experts 0 and 1: as much of it as of both of them can be exchanged.
    point = np.array([[0.5, 0.3, 0.2, 0.0, 0.0, 0.0]])
    scores = np.array([[0.2, 0.2, 0.2, 0.4, 0.3, 0.2]])
    design = gaussian(rng, 1, 6)
    design[:, :, 5] = (design[:, :, 0] + design[:, :, 1]) / 2
    exchanged = np.array([[0.2, 0.0, 0.2, 0.0, 0.0, 0.6]])
    properties = ("flat", "many solutions")
    made.append(tilted("mean expert", design, point, scores, Simplex(), *properties, ridge=0.0, others=(exchanged,)))

    # Experts 4 and 5 are experts 0 and 1 with a score that is 0.1 worse wherever Λ is.
    point, scores = np.array([[0.45, 0.35, 0.2, 0.0, 0.0, 0.0]]), np.array([[0.0, 0.0, 0.0, 0.2, 0.1, 0.1]])
    design = gaussian(rng, 1, 4)[:, :, [0, 1, 2, 3, 0, 1]]
    properties = ("flat", "dominated", "face")
    made.append(tilted("dominated", design, point, scores, Simplex(), *properties, ridge=0.0))

    n = 8
    point, scores = hull_rows(rng, 1, n, 4)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    design = (left * np.geomspace(1.0, 1e-2, n) @ right)[:, None, :]  # squared: 1 to 1e-4
    made.append(tilted("ill-conditioned", design, point, scores / 10, Simplex(), "ill-conditioned", "face", ridge=0.0))

    point, scores = hull_rows(rng, 1, 6, 3)
    design = gaussian(rng, 1, 6)
    at = np.tensordot(design, point, axes=2)  # BΛ* − o = 0: the fourth powers have no curvature there
    made.append(
        tilted("quartic", design, point, scores, Simplex(), "flat", "face", link="quartic", ridge=0.0, offset=at)
    )

    point, scores = hull_rows(rng, 3, 5, 2)
    scale = np.array([1e-2, 1.0, 1e2])[:, None]
    design = gaussian(rng, 3, 5) * np.sqrt(scale)
    made.append(tilted("scaled", design, point, scores * scale, Simplex(), "scaled", "product", "edge", ridge=0.0005))

    for link, domain in (("logistic", Simplex()), ("log-sum-exp", Simplex()), ("logistic", Capped())):
        capped = isinstance(domain, Capped)
        point, scores = hull_rows(rng, 2, 6, 3, base=capped, capped=capped)
        design = 2 * gaussian(rng, 2, 6, coupled=True)
        name = f"capped {link}" if capped else link
        properties = ("strongly convex", "product", "coupled", "face", *(("base",) if capped else ()))
        made.append(tilted(name, design, point, scores, domain, *properties, link=link, offset=rng.normal(size=12)))
    return made


def sizes() -> list[Instance]:
    """Return the problems that are very small or large."""
    made: list[Instance] = []
    properties: tuple[str, ...]
    rng = np.random.default_rng(60)
    one = np.ones((1, 1))
    made.append(
        tilted("one expert", one[None], one, np.array([[0.7]]), Simplex(), "strongly convex", "single", "vertex")
    )
    half, zero = np.array([[0.4]]), np.zeros((1, 1))
    properties = ("strongly convex", "single", "interior", "base")
    made.append(tilted("capped one expert", one[None], half, zero, Capped(), *properties))
    point, scores = hull_rows(rng, 1, 5, 2)
    made.append(tilted("one block", gaussian(rng, 1, 5), point, scores, Simplex(), "strongly convex", "edge"))
    point, scores = hull_rows(rng, 1, 100, 12)
    made.append(
        tilted("100 experts", gaussian(rng, 1, 100), point, scores, Simplex(), "strongly convex", "face", "large")
    )
    point, scores = hull_rows(rng, 40, 5, 2)
    properties = ("strongly convex", "product", "edge", "large")
    made.append(tilted("40 blocks", gaussian(rng, 40, 5), point, scores, Simplex(), *properties))
    return made


def on_boxes() -> list[Instance]:
    """Return the problems on boxes and without constraints."""
    made: list[Instance] = []
    properties: tuple[str, ...]
    rng = np.random.default_rng(80)
    for name, domain, inside, place in (
        ("box corner", Box(), 0, "vertex"),
        ("box face", Box(-0.5, 1.5), 2, "face"),
        ("box interior", Box(), 5, "interior"),
    ):
        point, scores = box_rows(rng, 2, 5, inside, domain)
        properties = ("strongly convex", "product", "coupled", place)
        made.append(tilted(name, gaussian(rng, 2, 5, coupled=True), point, scores, domain, *properties))
    point = rng.normal(size=(2, 5))
    properties = ("strongly convex", "product", "coupled", "interior")
    made.append(tilted("free", gaussian(rng, 2, 5, coupled=True), point, np.zeros((2, 5)), Free(), *properties))
    return made


def on_balls() -> list[Instance]:
    """Return the problems on the ℓ1 ball, where task vectors may be subtracted."""
    made: list[Instance] = []
    rng = np.random.default_rng(90)
    for place, support, total in (("vertex", 1, 1.0), ("face", 3, 1.0), ("interior", 5, 0.6)):
        point, scores = np.zeros((2, 5)), np.zeros((2, 5))
        for row in range(2):
            signs = rng.choice([-1.0, 1.0], 5)
            level = float(rng.uniform(0.3, 0.6)) if total == 1.0 else 0.0
            share, excess = hull_row(rng, 5, support, 0.0, total=total)
            point[row] = signs * share
            scores[row] = -signs * np.maximum(level - excess, 0.0)
        properties = ("strongly convex", "product", "coupled", place)
        made.append(tilted(f"ball {place}", gaussian(rng, 2, 5, coupled=True), point, scores, L1Ball(), *properties))
    return made


def on_polytopes() -> list[Instance]:
    """Return the problem with constraints of a user's: no expert may have more than 0.4 of a block."""
    rng = np.random.default_rng(95)
    names, blocks = tuple(f"expert{i}" for i in range(6)), ("block0", "block1")
    caps = Polytope(Simplex(), ("each(*) <= 0.4",))
    domain = caps.bind(names, blocks, {name: np.array([row]) for row, name in enumerate(blocks)})
    point, scores = np.array([[0.4, 0.35, 0.25, 0.0, 0.0, 0.0]] * 2), np.zeros((2, 6))
    for row in range(2):
        scores[row] = rng.normal() + np.concatenate([[-0.2], [0.0, 0.0], rng.uniform(0.05, 0.5, 3)])
        order = rng.permutation(6)
        point[row], scores[row] = point[row, order], scores[row, order]
    properties = ("strongly convex", "product", "coupled", "face")
    return [tilted("caps", gaussian(rng, 2, 6, coupled=True), point, scores, domain, *properties)]


INSTANCES: dict[str, Instance] = {
    instance.name: instance
    for family in (on_hulls, special, sizes, on_boxes, on_balls, on_polytopes)
    for instance in family()
}
