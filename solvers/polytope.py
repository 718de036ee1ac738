"""A domain and linear constraints of the user's: floors, caps, group budgets, ties between blocks, means over them.

    {Λ ∈ D : low ≤ ⟨a, vec(Λ)⟩ ≤ high for each constraint}

Blocks that nothing couples are solved by themselves: in closed form where all constraints are floors, caps and bounds
of the sum (:mod:`.bounded_sum`), else those with the same constraints together, as one linear or quadratic program
(:mod:`.cells`). Blocks that a constraint couples are one cell.

Constraints name experts and blocks, so a :class:`Polytope` says only what was asked for. A problem binds it to its
names; the texts are then rows of numbers, and an empty set is refused with the constraints that contradict each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .bounded_sum import BoundedSum
from .cells import Cell
from .conflicts import Conflict, System, find
from .constraint_rows import Coupling, Local, Names, bind
from .constraints import Comparison, Count, parse, selects_blocks
from .domains import Box, Capped, Domain, Free, Simplex, make_domain
from .errors import OptionError
from .l1_ball import L1Ball
from .sparse import Sparse

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Array = np.ndarray[Any, Any]
BASES = (Simplex, Capped, Box, L1Ball, Free)


@dataclass(frozen=True)
class Polytope(Domain):
    """A domain and linear constraints, such as 'sum(digits, chess) <= 0.3'.

    domain: simplex, capped, box, l1-ball or free; constraints: texts in the language of :mod:`.constraints`; groups:
    name -> experts and globs, for use in the texts.
    """

    domain: Any = "simplex"
    constraints: Any = ()
    groups: Any = field(default_factory=dict)
    source: ClassVar[str] = "Boyd and Vandenberghe (2004), ch. 8.1, for the projection"

    def __post_init__(self) -> None:
        object.__setattr__(self, "domain", make_domain(self.domain))
        if not isinstance(self.domain, BASES):
            raise OptionError(
                f"Constraints apply within 'simplex', 'capped', 'box', 'l1-ball' or 'free'; got {self.domain.name!r}."
            )
        if isinstance(self.constraints, str) or not isinstance(self.constraints, Iterable):
            raise OptionError(f"The constraints of a polytope are a list of texts; found {self.constraints!r}.")
        object.__setattr__(self, "constraints", tuple(self.constraints))
        object.__setattr__(self, "groups", read_groups(self.groups))
        for text, parsed in zip(self.constraints, self.parsed, strict=True):
            if isinstance(parsed, Count):
                raise OptionError(
                    f"constraint '{text}': a sparsity budget is not convex, and cannot be combined with other "
                    "constraints: the nearest point of both has no exact solution. Give it alone, with the domain "
                    "'simplex' or 'capped', or choose experts first with --select."
                )

    @cached_property
    def parsed(self) -> tuple[Comparison | Count, ...]:
        """The constraints, read."""
        return tuple(parse(text) for text in self.constraints)

    def bind(
        self, experts: Sequence[str], rows: Sequence[str], layers: Mapping[str, Sequence[int] | Array] | None = None
    ) -> Domain:
        """Return the polytope over these experts and blocks. Raises OptionError if it has no point, saying why."""
        return BoundPolytope(self, tuple(experts), tuple(rows), dict(layers or {}))

    def check(self, experts: Sequence[str]) -> None:
        """Raise OptionError for names that are not among the experts, and for a conflict that shows in any block.

        What depends on blocks (selectors, means, ties) is left to :meth:`bind`.
        """
        here = tuple(t for t, c in zip(self.constraints, self.parsed, strict=True) if not selects_blocks(c))
        Polytope(self.domain, here, self.groups).bind(experts, ("every block",))

    def project(self, point: Array) -> Array:
        """As the domain, where there are no constraints."""
        return self._alone().project(point)

    def violation(self, point: Array) -> Array:
        """As the domain, where there are no constraints."""
        return self._alone().violation(point)

    def minimizer(self, scores: Array) -> Array:
        """As the domain, where there are no constraints."""
        return self._alone().minimizer(scores)

    def _alone(self) -> Domain:
        if self.constraints:
            raise OptionError(
                "Constraints name experts and blocks, which a problem has: use this domain in a Problem, or "
                "bind(experts, blocks) it first."
            )
        domain: Domain = self.domain
        return domain


def read_groups(groups: object) -> dict[str, tuple[str, ...]]:
    """Groups as a mapping of names to experts and globs. Raises OptionError for anything else."""
    if not isinstance(groups, Mapping):
        raise OptionError(f"groups are a mapping of names to lists of experts; found {groups!r}.")
    read = {}
    for name, members in groups.items():
        members = (members,) if isinstance(members, str) else members
        if not isinstance(members, (list, tuple)) or not members or not all(isinstance(m, str) for m in members):
            raise OptionError(f"group '{name}' must be a list of experts or globs; found {members!r}.")
        read[str(name)] = tuple(members)
    return read


def constrain(domain: object, constraints: Sequence[str], groups: Mapping[str, Iterable[str]] | None = None) -> Domain:
    """Return the domain with constraints: itself without any, `sparse` for a budget of experts, else a polytope."""
    base = make_domain(domain)
    if not constraints:
        return base
    parsed = [parse(text) for text in constraints]
    if len(parsed) == 1 and isinstance(parsed[0], Count):
        return Sparse(parsed[0].limit, base)
    return Polytope(base, tuple(constraints), {name: tuple(members) for name, members in (groups or {}).items()})


@dataclass(frozen=True, eq=False)
class BoundPolytope(Domain):
    """A polytope over the experts and blocks of a problem."""

    asked: Polytope
    experts: tuple[str, ...]
    rows: tuple[str, ...]
    layers: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for _ in self.pieces:  # made for its errors
            pass

    @property
    def name(self) -> str:
        """As what was asked for."""
        return self.asked.name

    def describe(self) -> dict[str, Any]:
        """As what was asked for."""
        return self.asked.describe()

    def bind(
        self, experts: Sequence[str], rows: Sequence[str], layers: Mapping[str, Sequence[int] | Array] | None = None
    ) -> Domain:
        """Itself for the same names, else what was asked for over the others."""
        same = (tuple(experts), tuple(rows)) == (self.experts, self.rows)
        return self if same else self.asked.bind(experts, rows, layers)

    @property
    def base(self) -> Domain:
        """The domain without the constraints."""
        domain: Domain = self.asked.domain
        return domain

    @cached_property
    def _bound(self) -> tuple[list[Local], list[Coupling]]:
        names = Names(self.experts, self.asked.groups, self.rows, self.layers)
        local, coupled = [], []
        for source, constraint in enumerate(self.asked.parsed):
            assert isinstance(constraint, Comparison)
            for made in bind(constraint, source, names):
                if isinstance(made, Local):
                    local.append(made)
                else:
                    coupled.append(made)
        return local, coupled

    @cached_property
    def pieces(self) -> tuple[tuple[Array, Domain | BoundedSum | Cell], ...]:
        """The blocks [k, r] of each kind: k copies of a cell of r blocks, and how it is solved."""
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import connected_components

        local, coupled = self._bound
        count = len(self.rows)
        member = np.zeros((count, len(local)), dtype=bool)
        for j, rule in enumerate(local):
            member[rule.rows, j] = True
        made: list[tuple[Array, Domain | BoundedSum | Cell]] = []
        alone = np.ones(count, dtype=bool)
        if coupled:
            ends = np.concatenate([np.column_stack([c.rows[:-1], c.rows[1:]]) for c in coupled])
            links = csr_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(count, count))
            _, component = connected_components(links, directed=False)
            for number in np.unique(component[ends]):
                rows = np.flatnonzero(component == number)
                inside = [c for c in coupled if component[c.rows[0]] == number]
                made.append((rows[None], self._piece(rows, local, member, inside)))
                alone[rows] = False
        rows = np.flatnonzero(alone)
        if len(rows):
            _, kinds = np.unique(member[rows], axis=0, return_inverse=True)
            for kind in range(int(kinds.max()) + 1):
                same = rows[kinds.ravel() == kind]
                piece = self._piece(same[:1], local, member, [], same)
                made.append((same[:, None], piece))
        return tuple(made)

    def cells(self, rows: int) -> Array:
        """Blocks that a constraint couples share a number."""
        numbers = np.empty(rows, dtype=np.int64)
        used = 0
        for members, _ in self.pieces:
            numbers[members] = used + np.arange(len(members))[:, None]
            used += len(members)
        return numbers

    def _piece(
        self, rows: Array, local: list[Local], member: Array, coupled: list[Coupling], same: Array | None = None
    ) -> Domain | BoundedSum | Cell:
        """How the blocks ``rows`` are solved together. same: all the blocks of which this one is an example."""
        rules = [[local[j] for j in np.flatnonzero(member[row])] for row in rows]
        if not coupled and not rules[0]:
            return self.base
        system = self._system(rows, rules, coupled)
        conflict = find(system)
        if conflict is not None:
            raise OptionError(self._explain(conflict, rows, same))
        if not coupled:
            simple = self._bounded_sum(rules[0])
            if simple is not None:
                return simple
        return _cell(system, len(rows) * len(self.experts))

    def _bounded_sum(self, rules: list[Local]) -> BoundedSum | None:
        """The same set as floors, caps and a range of the sum, if that is what it is."""
        n = len(self.experts)
        ranges: dict[type[Domain], tuple[float, float, float, float]] = {
            Simplex: (0.0, math.inf, 1.0, 1.0),
            Capped: (0.0, math.inf, -math.inf, 1.0),
            Free: (-math.inf, math.inf, -math.inf, math.inf),
        }
        if isinstance(self.base, Box):
            least, most, low, high = self.base.lower, self.base.upper, -math.inf, math.inf
        elif type(self.base) in ranges:
            least, most, low, high = ranges[type(self.base)]
        else:
            return None
        lower, upper = np.full(n, least), np.full(n, most)
        for rule in rules:
            used = np.flatnonzero(rule.weights)
            factor = rule.weights[used[0]]
            ends = sorted((rule.low / factor, rule.high / factor))
            if len(used) == 1:
                lower[used], upper[used] = np.maximum(lower[used], ends[0]), np.minimum(upper[used], ends[1])
            elif len(used) == n and np.all(rule.weights == factor):
                low, high = max(low, ends[0]), min(high, ends[1])
            else:
                return None
        upper = np.maximum(upper, lower)  # where they cross, it is by rounding: there is a point
        return BoundedSum(lower, upper, low, max(low, high))

    def _system(self, rows: Array, rules: list[list[Local]], coupled: list[Coupling]) -> System:
        """Everything that holds in the blocks ``rows``, as rows over their coefficients (and auxiliary variables)."""
        from scipy.sparse import coo_matrix

        n, r = len(self.experts), len(rows)
        place = {int(row): position for position, row in enumerate(rows)}
        entries: list[tuple[Array, Array, Array]] = []
        low: list[float] = []
        high: list[float] = []
        sources: list[int] = []
        for position, inside in enumerate(rules):
            for rule in inside:
                used = np.flatnonzero(rule.weights)
                entries.append((np.full(len(used), len(low)), position * n + used, rule.weights[used]))
                low.append(rule.low)
                high.append(rule.high)
                sources.append(rule.source)
        for tie in coupled:
            at = np.array([place[int(row)] for row in tie.rows])
            entries.append((np.full(len(at), len(low)), at * n + tie.columns, tie.values))
            low.append(tie.low)
            high.append(tie.high)
            sources.append(tie.source)
        equal, equal_to, below, at_most = _base_rows(self.base, n, r)
        i, j, v = (np.concatenate(parts) for parts in zip(*entries, strict=True))
        made = coo_matrix((v, (i, j)), shape=(len(low), below.shape[1])).tocsr()
        return System(made, np.array(low), np.array(high), np.array(sources), equal, equal_to, below, at_most)

    def _explain(self, conflict: Conflict, rows: Array, same: Array | None) -> str:
        texts = [f"'{self.asked.constraints[source]}'" for source in conflict.sources]
        named = texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
        domain = f" within '{self.base.name}'" if conflict.domain else ""
        where = ""
        if same is not None and len(same) < len(self.rows):
            where = f" at block '{self.rows[same[0]]}'" + (f" and {len(same) - 1} more" if len(same) > 1 else "")
        largest = np.abs(conflict.weights).max()
        if largest <= 1e-9:
            why = f"they contradict each other by {conflict.miss:.6g}"
        else:
            weights, limit, least = (x / largest for x in (conflict.weights, conflict.limit, conflict.least))
            turned = weights.sum() < -1e-9 or (abs(weights.sum()) <= 1e-9 and weights[np.flatnonzero(weights)[0]] < 0)
            left = self._words(-weights if turned else weights, rows)
            asked, found = (-limit, -least) if turned else (limit, least)
            together = " together" if len(texts) > 1 else ""
            why = (
                f"{together.strip() + ' ' if together else ''}{'they' if len(texts) > 1 else 'it'} "
                f"{'ask' if len(texts) > 1 else 'asks'} for {left} {'>=' if turned else '<='} {_plain(asked)}, but "
                f"'{self.base.name}' has at {'most' if turned else 'least'} {_plain(found)}"
            )
        relax = "Relax it" if len(texts) == 1 else f"Relax one of them ({', '.join(texts)})"
        other = f", or choose another domain than '{self.base.name}'" if conflict.domain else ""
        return f"constraints: no coefficients satisfy {named}{domain}{where} ({why}). {relax}{other}."

    def _words(self, weights: Array, rows: Array) -> str:
        """⟨weights, x⟩ in the language of the constraints, shortened."""
        n = len(self.experts)
        weights = weights[: len(rows) * n]
        if len(rows) == 1 and n > 1 and np.allclose(weights, weights[0]):
            return f"{_factor(weights[0])}sum(*)"
        used = np.flatnonzero(np.abs(weights) > 1e-9)
        terms = []
        for index in used[:6]:
            block = f"[{self.rows[rows[index // n]]}]" if len(rows) > 1 else ""
            sign = "- " if weights[index] < 0 else "+ "
            terms.append(f"{sign}{_factor(abs(weights[index]))}{self.experts[index % n]}{block}")
        text = " ".join(terms).removeprefix("+ ")
        return text + (f" + … ({len(used)} terms)" if len(used) > 6 else "")

    def _each(self, matrix: Array, method: str) -> Array:
        result = np.empty_like(matrix, dtype=float)
        for rows, piece in self.pieces:
            found = getattr(piece, method)(matrix[rows].reshape(len(rows), -1))  # one line a copy of the cell
            result[rows] = found.reshape(*rows.shape, matrix.shape[1])
        return result

    def project(self, point: Array) -> Array:
        """Piece by piece; exact for floors, caps and sums, else by a quadratic program (cvxpy)."""
        return self._each(self._full(point), "project")

    def minimizer(self, scores: Array) -> Array:
        """Piece by piece: a continuous knapsack for floors, caps and sums, else a linear program (HiGHS)."""
        return self._each(self._full(scores), "minimizer")

    def _full(self, matrix: Array) -> Array:
        if matrix.shape != (len(self.rows), len(self.experts)):
            raise OptionError(
                f"These constraints are bound to {len(self.rows)} blocks and {len(self.experts)} experts; got a matrix "
                f"of shape {list(matrix.shape)}."
            )
        return matrix

    @cached_property
    def _tables(self) -> tuple[csr_matrix, Array, Array]:
        from scipy.sparse import coo_matrix

        _, coupled = self._bound
        n = len(self.experts)
        i = np.repeat(np.arange(len(coupled)), [len(c.rows) for c in coupled])
        j = np.concatenate([c.rows * n + c.columns for c in coupled])
        v = np.concatenate([c.values for c in coupled])
        matrix = coo_matrix((v, (i, j)), shape=(len(coupled), len(self.rows) * n)).tocsr()
        return matrix, np.array([c.low for c in coupled]), np.array([c.high for c in coupled])

    def excesses(self, point: Array) -> list[tuple[int, Array, Array]]:
        """Return for each row of the constraints its number, the blocks that it touches, and its excess there."""
        local, coupled = self._bound
        found = []
        for rule in local:
            value = point[rule.rows] @ rule.weights
            found.append((rule.source, rule.rows, np.maximum(rule.low - value, value - rule.high)))
        if coupled:
            matrix, low, high = self._tables
            value = matrix @ point.ravel()
            excess = np.maximum(low - value, value - high)
            found += [(tie.source, tie.rows, np.full(len(tie.rows), e)) for tie, e in zip(coupled, excess, strict=True)]
        return found

    def violation(self, point: Array) -> Array:
        """Largest excess over the domain and over each constraint that touches the block [rows]."""
        worst = self.base.violation(self._full(point)).copy()
        for _, rows, excess in self.excesses(point):
            np.maximum.at(worst, rows, excess)
        return worst

    def breach(self, point: Array, row: int) -> str:
        """The constraint that a block breaks most."""
        worst, text = float(self.base.violation(point)[row]), f"it is outside of '{self.base.name}'"
        for source, rows, excess in self.excesses(point):
            here = excess[rows == row]
            if len(here) and here.max() > worst:
                worst, text = float(here.max()), f"it breaks '{self.asked.constraints[source]}'"
        return text

    def gap(self, point: Array, scores: Array) -> float | None:
        """None where the constraints leave coefficients that may grow without end."""
        return super().gap(point, scores) if self.bounded else None

    @cached_property
    def bounded(self) -> bool:
        """Whether no coefficient can go to infinity."""
        if not isinstance(self.base, Free):
            return True
        return all(not isinstance(piece, Domain) and piece.bounded for _, piece in self.pieces)


def _base_rows(domain: Domain, n: int, r: int) -> tuple[csr_matrix, Array, csr_matrix, Array]:
    """E, f, H, k of the domain over r blocks of n; the ℓ1 ball has as many auxiliary variables t ≥ |x|."""
    from scipy.sparse import csr_matrix, eye, hstack, kron, vstack

    size = n * r
    one = eye(size, format="csr")
    sums = kron(eye(r), np.ones((1, n)), format="csr")
    none, nothing = csr_matrix((0, size)), np.zeros(0)
    if isinstance(domain, Simplex):
        return sums, np.ones(r), -one, np.zeros(size)
    if isinstance(domain, Capped):
        return none, nothing, vstack([-one, sums], format="csr"), np.append(np.zeros(size), np.ones(r))
    if isinstance(domain, Box):
        limits = np.append(np.full(size, -domain.lower), np.full(size, domain.upper))
        return none, nothing, vstack([-one, one], format="csr"), limits
    if isinstance(domain, L1Ball):
        below = vstack([hstack([one, -one]), hstack([-one, -one]), hstack([csr_matrix((r, size)), sums])], format="csr")
        limits = np.append(np.zeros(2 * size), np.full(r, domain.radius))
        return csr_matrix((0, 2 * size)), nothing, below, limits
    return none, nothing, none, nothing


def _cell(system: System, size: int) -> Cell:
    """The rows of a system, equalities apart."""
    from scipy.sparse import vstack

    tied = system.low == system.high
    above, under = ~tied & np.isfinite(system.high), ~tied & np.isfinite(system.low)
    equal = vstack([system.equal, system.rows[np.flatnonzero(tied)]], format="csr")
    below = vstack(
        [system.below, system.rows[np.flatnonzero(above)], -system.rows[np.flatnonzero(under)]], format="csr"
    )
    at_most = np.concatenate([system.at_most, system.high[above], -system.low[under]])
    return Cell(size, equal, np.append(system.equal_to, system.high[tied]), below, at_most)


def _plain(value: float) -> str:
    return f"{value + 0.0:.6g}"


def _factor(weight: float) -> str:
    return "" if abs(weight - 1.0) < 1e-9 else f"{weight:.4g}*"
