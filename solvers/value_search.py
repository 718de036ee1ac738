"""Search by values alone: what the solvers without gradients share.

A strategy proposes points z of the unit cube and is told f(Λ(z)), one candidate an iteration. The cube has few axes,
and each of its points is a feasible merge:

    over            axes        Λ(z), with x = lower + (upper − lower) z
    scale           1           Λ[b, i] = x                    task arithmetic
    blocks          rows        Λ[b, i] = x_b                  one scale a block
    experts         n           Λ[b, i] = x_i                  one coefficient an expert
    coefficients    rows · n    Λ[b, i] = x_bi

and where that leaves the domain, its projection. The interval of x is the box's own; for scales on the capped simplex
[0, 1/n], which ends at the average; else [0, 1].

The state of such a solver is the history of candidates and values. A strategy is a function of the start, the seed and
the values, so a resumed solve tells it the old values again and goes on with the same candidates.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .domains import FEASIBILITY, Box, Domain, Simplex
from .errors import OptionError, check_choice, check_number
from .problem import Evaluation, MatrixProblem
from .solver import Clock, Solver, State, Step

Array = np.ndarray[Any, Any]
SCALE, BLOCKS, EXPERTS, COEFFICIENTS = OVER = ("scale", "blocks", "experts", "coefficients")
Candidates = Generator[Array, float, None]  # yields z, is sent f(Λ(z)), returns when there is nothing left to try


@dataclass(frozen=True)
class Cube:
    """The unit cube z [size], mapped into a domain of matrices [rows, n]."""

    over: str
    rows: int
    n: int
    domain: Domain
    lower: float
    upper: float

    @property
    def size(self) -> int:
        """Number of axes."""
        return {SCALE: 1, BLOCKS: self.rows, EXPERTS: self.n, COEFFICIENTS: self.rows * self.n}[self.over]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of x as a matrix that broadcasts to [rows, n]."""
        rows = self.rows if self.over in (BLOCKS, COEFFICIENTS) else 1
        return rows, self.size // rows

    def raw(self, z: Array) -> Array:
        """Return what z says, [rows, n], inside the domain or not."""
        x = self.lower + (self.upper - self.lower) * z
        return np.broadcast_to(x.reshape(self.shape), (self.rows, self.n)).copy()

    def inside(self, z: Array) -> bool:
        """Whether z is in the cube, and in the domain as it is."""
        in_cube = bool(((z >= 0) & (z <= 1)).all())
        return in_cube and bool(self.domain.violation(self.raw(z)).max() <= FEASIBILITY)

    def merge(self, z: Array) -> Array:
        """Return Λ(z) [rows, n]; what is feasible as it is stays as it is."""
        return self.raw(z) if self.inside(z) else self.domain.project(self.raw(z))

    def nearest(self, point: Array) -> Array:
        """Return the z [size] whose x are means of Λ over what they stand for, clipped to the cube."""
        rows, columns = self.shape
        groups = point.reshape(rows, self.rows // rows, columns, self.n // columns)
        parts = groups.swapaxes(1, 2).reshape(self.size, -1)
        same = (parts == parts[:, :1]).all(axis=1)
        x = np.where(same, parts[:, 0], parts.mean(axis=1))  # a mean of equal numbers may round
        return np.clip((x - self.lower) / (self.upper - self.lower), 0.0, 1.0)


@dataclass(frozen=True)
class ValueSearch(Solver):
    """Common part: the cube, the history, and one candidate an iteration."""

    over: str = EXPERTS
    lower: float | None = None
    upper: float | None = None
    needs_scores: ClassVar[bool] = False
    certifies_iterates: ClassVar[bool] = False
    compares_values: ClassVar[bool] = True
    may_rest: ClassVar[bool] = True
    equivariant: ClassVar[bool] = False  # candidates are drawn, or tried, axis by axis
    most_axes: ClassVar[int] = 0  # beyond which it would not get anywhere

    def __post_init__(self) -> None:
        check_choice(self, "over", OVER)
        for name in ("lower", "upper"):
            if getattr(self, name) is not None:
                check_number(self, name, -math.inf, math.inf, closed="neither")

    def check(self, problem: MatrixProblem) -> None:
        """Refuse too many axes, and intervals that are empty or lead nowhere."""
        self.cube(problem)

    def cube(self, problem: MatrixProblem) -> Cube:
        """Return the cube over the problem's domain. Raises OptionError where there is none."""
        domain, name = problem.domain, type(self).__name__
        scales = self.over in (SCALE, BLOCKS)
        if scales and isinstance(domain, Simplex):
            raise OptionError(
                f"{name} over {self.over!r} has nothing to choose on the domain 'simplex', where equal coefficients "
                "are 1/n each. Search over 'experts', or take the domain 'capped', 'box' or 'free'."
            )
        low, high = 0.0, 1.0 / problem.n if scales and domain.has_base else 1.0
        if isinstance(domain, Box):
            low, high = domain.lower, domain.upper
        bounded = isinstance(domain, Box) or domain.has_vertices
        if self.lower is not None:
            low = max(low, self.lower) if bounded else self.lower
        if self.upper is not None:
            high = min(high, self.upper) if bounded else self.upper
        if not low < high:
            raise OptionError(
                f"{name} has the empty interval [{low:g}, {high:g}] to search: its 'lower' and 'upper', within the "
                f"domain {domain.name!r}. Give lower < upper."
            )
        cube = Cube(self.over, problem.rows, problem.n, domain, low, high)
        if cube.size > self.most_axes:
            raise OptionError(
                f"{name} over {self.over!r} would search {cube.size} numbers by values alone, and is lost beyond "
                f"{self.most_axes}. Search over 'experts' or 'scale', take coarser blocks, or a solver with gradients."
            )
        return cube

    def init(self, problem: MatrixProblem, start: Array) -> State:
        """Begin at the point of the cube that is nearest to the start."""
        cube = self.cube(problem)
        z = cube.nearest(start)
        return State(cube.merge(z), {"candidates": z[None], "values": np.zeros(0)})

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Add the value to the history, and go to the next candidate."""
        candidates = state.memory["candidates"]
        values = np.append(state.memory["values"], evaluation.value)
        cube = self.cube(problem)
        z, live = self.propose(cube, state, candidates, values)
        if z is None:
            return Step(state, 0.0, finished=True)
        memory = {"candidates": np.vstack([candidates, z]), "values": values}
        size = float(np.linalg.norm(z - candidates[-1]))
        return Step(LiveState(cube.merge(z), memory, live), size)

    @abstractmethod
    def propose(self, cube: Cube, state: State, candidates: Array, values: Array) -> tuple[Array | None, Live | None]:
        """Return the candidate after ``candidates`` [t, size] with ``values`` [t], or None at the end."""


class Live:
    """A strategy that runs, and how many values it has been told."""

    def __init__(self, strategy: Candidates) -> None:
        self._strategy = strategy
        self.first = next(strategy)
        self.told = 0

    def tell(self, value: float) -> Array | None:
        """Return the next candidate, or None at the end."""
        self.told += 1
        try:
            return self._strategy.send(value)
        except StopIteration:
            return None


@dataclass(frozen=True)
class LiveState(State):
    """A state that carries the running strategy along; one that was read from disk has none, and it is begun anew."""

    live: Live | None = field(default=None, compare=False)


@dataclass(frozen=True)
class StrategySearch(ValueSearch):
    """Common part of the searches whose strategy remembers more than the history."""

    @abstractmethod
    def strategy(self, start: Array, inside: Callable[[Array], bool]) -> Candidates:
        """Yield ``start``, then candidates in the cube; decide by nothing but these, the options and the values sent.

        inside: whether a point of the cube is a merge as it is; others are projected.
        """

    def propose(self, cube: Cube, state: State, candidates: Array, values: Array) -> tuple[Array | None, Live | None]:
        """Tell the strategy the last value; one that is not there, or was told something else, hears all of them."""
        live = state.live if isinstance(state, LiveState) else None
        if live is None or live.told != len(values) - 1:
            live = Live(self.strategy(candidates[0], cube.inside))
            for value, expected in zip(values[:-1], candidates[1:], strict=True):
                if not np.array_equal(live.tell(float(value)), expected):  # type: ignore[arg-type]
                    raise OptionError(
                        f"{type(self).__name__} does not repeat the candidates of the run that it should go on with: "
                        "another version of its library, or another machine, made them. Solve into a new folder, from "
                        "the best of the old run."
                    )
        return live.tell(float(values[-1])), live
