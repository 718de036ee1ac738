"""Constraints as linear inequalities: low ≤ ⟨a, vec(Λ)⟩ ≤ high for the experts and the blocks of a problem.

A constraint that no other block matters to is a :class:`Local` one, the same in all its blocks; one over several blocks
(a mean, an equality between blocks) is a :class:`Coupling`.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .constraints import (
    Coefficient,
    Comparison,
    ConstraintError,
    Linear,
    Mean,
    Over,
    Span,
    check_size,
    expand,
    linear,
    scaled,
)
from .errors import OptionError

Array = np.ndarray[Any, Any]
MOST_ENTRIES = 20_000_000  # numbers that one constraint may become
ROUNDING = 1e-13  # of the factors of a constraint, relative to their sum


@dataclass(frozen=True)
class Local:
    """low ≤ ⟨weights, Λ_b⟩ ≤ high in each block b of ``rows``; ``source`` numbers the constraint it comes from."""

    source: int
    weights: Array
    rows: Array
    low: float
    high: float


@dataclass(frozen=True)
class Coupling:
    """low ≤ Σ_k values[k] Λ[rows[k], columns[k]] ≤ high, over several blocks."""

    source: int
    rows: Array
    columns: Array
    values: Array
    low: float
    high: float


class Names:
    """The experts, groups and blocks that constraints may name."""

    def __init__(
        self,
        experts: Sequence[str],
        groups: Mapping[str, Iterable[str]],
        rows: Sequence[str],
        layers: Mapping[str, Sequence[int] | Array] | None = None,
    ) -> None:
        self.experts = {name: column for column, name in enumerate(experts)}
        self.rows = tuple(rows)
        self.row_index = {name: row for row, name in enumerate(self.rows)}
        self.layers = {name: np.asarray(indices, dtype=int) for name, indices in (layers or {}).items()}
        self.groups: dict[str, list[int]] = {}
        for group, patterns in groups.items():
            if group in self.experts:
                raise OptionError(f"group '{group}': an expert has that name. Call the group otherwise.")
            members: list[int] = []
            for pattern in patterns:
                found = self._matching(pattern)
                if not found:
                    raise OptionError(f"group '{group}': no expert is called '{pattern}'.{self._hint(pattern)}")
                members += found
            self.groups[group] = sorted(set(members))

    def _matching(self, pattern: str) -> list[int]:
        if pattern in self.experts:
            return [self.experts[pattern]]
        if not any(c in pattern for c in "*?"):
            return []
        glob = re.compile(fnmatch.translate(pattern.replace("[", "[[]")))
        return [column for name, column in self.experts.items() if glob.match(name)]

    def _hint(self, name: str) -> str:
        known = [*self.experts, *self.groups]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        groups = f"; groups: {_listed(self.groups)}" if self.groups else ""
        return f"{hint} Experts: {_listed(self.experts)}{groups}."

    def column(self, leaf: Coefficient, text: str) -> int:
        """The column of one expert."""
        if leaf.name in self.experts:
            return self.experts[leaf.name]
        if leaf.name in self.groups:
            raise ConstraintError(
                text,
                leaf.at,
                f"'{leaf.name}' is a group: write sum({leaf.name}), or each({leaf.name}) for every member.",
            )
        minus = " If a difference is meant, put spaces around the minus." if "-" in leaf.name else ""
        here = text[leaf.at[0] :]
        longer = next((n for n in self.experts if here.startswith(n) and len(n) > len(leaf.name)), None)
        if longer is not None:  # such as sun-397, which reads as a difference
            minus = f' If {longer} is meant, write it in quotes: "{longer}".'
        raise ConstraintError(text, leaf.at, f"unknown expert '{leaf.name}'.{self._hint(leaf.name)}{minus}")

    def columns(self, leaf: Over, text: str) -> list[int]:
        """The columns of the experts, groups and globs of a sum, each once."""
        found: list[int] = []
        for item, place in zip(leaf.items, leaf.places or (leaf.at,) * len(leaf.items), strict=True):
            columns = self.groups[item] if item in self.groups else self._matching(item)
            if not columns:
                what = "no expert matches" if any(c in item for c in "*?") else "unknown expert or group"
                raise ConstraintError(text, place, f"{what} '{item}'.{self._hint(item)}")
            found += columns
        return sorted(set(found))

    def blocks(self, pattern: str, text: str, at: Span) -> Array:
        """The rows that a selector matches: a block, a layer, or a glob over both."""
        if pattern in self.row_index:
            return np.array([self.row_index[pattern]])
        if pattern in self.layers:
            return self.layers[pattern]
        glob = re.compile(fnmatch.translate(pattern.replace("[", "[[]")))
        found = {row for row, name in enumerate(self.rows) if glob.match(name)}
        for name, indices in self.layers.items():
            if glob.match(name):
                found.update(indices.tolist())
        if not found:
            near = difflib.get_close_matches(pattern.strip("*"), [*self.layers, *self.rows[:1000]], n=1, cutoff=0.4)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConstraintError(text, at, f"no block matches '{pattern}'.{hint} Blocks: {_listed(self.rows)}.")
        return np.array(sorted(found))


def _listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    rest = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def bind(constraint: Comparison, source: int, names: Names) -> list[Local | Coupling]:
    """The rows of a constraint. Raises ConstraintError for names that are not there, and for what says nothing."""
    text = constraint.text or str(constraint)
    forms = linear(constraint)
    check_size(forms, text)
    repeated = next(
        (leaf for f in forms for _, leaf in f.terms if isinstance(leaf, Over) and leaf.function == "each"), None
    )
    columns: Sequence[int | None] = [None] if repeated is None else names.columns(repeated, text)
    made: list[Local | Coupling] = []
    for column in columns:
        if constraint.same:
            made += _tied(forms[0], source, names, text, column)
            continue
        for left, operator, right in zip(forms, constraint.operators, forms[1:], strict=False):
            difference = Linear(left.terms + scaled(right, -1.0).terms, left.constant - right.constant)
            low = 0.0 - difference.constant if operator in (">=", "==") else -math.inf
            high = 0.0 - difference.constant if operator in ("<=", "==") else math.inf
            made += _rows(difference, low, high, source, names, text, column)
    return made


def _weights(leaf: Coefficient | Over, names: Names, text: str, column: int | None) -> Array:
    """⟨weights, Λ_b⟩ is the leaf in block b [n]."""
    weights = np.zeros(len(names.experts))
    if isinstance(leaf, Coefficient):
        weights[names.column(leaf, text)] = 1.0
    elif leaf.function == "each":
        weights[column] = 1.0
    else:
        weights[names.columns(leaf, text)] = 1.0
    return weights


def _inside(form: Linear, names: Names, text: str) -> tuple[Array, float]:
    total = np.zeros(len(names.experts))
    for weight, leaf in form.terms:
        assert not isinstance(leaf, Mean)
        total += weight * _weights(leaf, names, text, None)
    return _without_rounding(total, form), form.constant


def _without_rounding(weights: Array, form: Linear) -> Array:
    """What is left where terms cancel, as in 0.1*a + 0.2*a - 0.3*a, is 0 and no weight."""
    size = math.fsum(abs(weight) for weight, _ in form.terms)
    return np.where(np.abs(weights) <= ROUNDING * size, 0.0, weights)


def _rows(
    form: Linear, low: float, high: float, source: int, names: Names, text: str, column: int | None
) -> list[Local | Coupling]:
    """low ≤ form ≤ high as rows: of each block by itself where nothing ties it to others."""
    n, count = len(names.experts), len(names.rows)
    here = np.zeros(n)  # weights in the block that the constraint is said of
    fixed: list[tuple[Array, Array]] = []  # weights in blocks of their own: (rows, weights)
    selectors = {leaf.block for _, leaf in form.terms if not isinstance(leaf, Mean)}
    chosen = {pattern for pattern in selectors if pattern is not None}
    everywhere = np.arange(count)
    where = everywhere
    for weight, leaf in form.terms:
        if isinstance(leaf, Mean):
            inner, constant = _inside(expand(leaf.inner, text, inside=True), names, text)
            rows = everywhere if leaf.block is None else names.blocks(leaf.block, text, leaf.at)
            fixed.append((rows, weight * inner / len(rows)))
            low, high = low - weight * constant, high - weight * constant
            continue
        weights = weight * _weights(leaf, names, text, column)
        if leaf.block is not None:
            rows = names.blocks(leaf.block, text, leaf.at)
            if len(chosen) > 1:  # blocks that differ: each is one, and they are coupled
                if len(rows) != 1:
                    raise ConstraintError(
                        text,
                        leaf.at,
                        f"[{leaf.block}] is {len(rows)} blocks. Where a constraint names different blocks, each of "
                        "them is a single one, as in digits[layer.1] == digits[layer.2].",
                    )
                fixed.append((rows, weights))
                continue
            where = rows
        elif len(chosen) > 1:
            raise ConstraintError(text, leaf.at, "of which block? The other terms name blocks that differ.")
        here += weights
    here = _without_rounding(here, form)
    if not fixed:
        return [_local(here, where, low, high, source, text)]
    rows = np.concatenate([np.repeat(rows, n) for rows, _ in fixed])
    columns = np.concatenate([np.tile(np.arange(n), len(rows)) for rows, _ in fixed])
    values = np.concatenate([np.tile(weights, len(rows)) for rows, weights in fixed])
    if not here.any():
        return [_coupling(n, rows, columns, values, low, high, source, text)]
    if len(where) * np.count_nonzero(values) > MOST_ENTRIES:
        raise ConstraintError(
            text,
            (0, len(text)),
            f"in each of {len(where)} blocks it names all of them, {len(where) * len(values)} numbers. "
            "Compare the mean with a number.",
        )
    at = np.arange(n)
    return [
        _coupling(
            n,
            np.append(rows, np.full(n, row)),
            np.append(columns, at),
            np.append(values, here),
            low,
            high,
            source,
            text,
        )
        for row in where
    ]


def _tied(form: Linear, source: int, names: Names, text: str, column: int | None) -> list[Local | Coupling]:
    """form(b) = form(b + 1) along the blocks that are tied."""
    n = len(names.experts)
    weights = np.zeros(n)
    selectors = {leaf.block for _, leaf in form.terms}
    if len(selectors) > 1:
        raise ConstraintError(text, (0, len(text)), "all terms before '== same' name the same blocks.")
    pattern = selectors.pop()
    rows = np.arange(len(names.rows)) if pattern is None else names.blocks(pattern, text, form.terms[0][1].at)
    for weight, leaf in form.terms:
        assert not isinstance(leaf, Mean)
        weights += weight * _weights(leaf, names, text, column)
    weights = _without_rounding(weights, form)
    if not weights.any():
        raise ConstraintError(text, (0, len(text)), "its terms cancel, so it says nothing.")
    used = np.flatnonzero(weights)
    return [
        Coupling(
            source,
            np.repeat([one, next_], len(used)),
            np.tile(used, 2),
            np.append(weights[used], -weights[used]),
            0.0,
            0.0,
        )
        for one, next_ in itertools.pairwise(rows)
    ]


def _local(weights: Array, rows: Array, low: float, high: float, source: int, text: str) -> Local:
    if not weights.any():
        raise ConstraintError(text, (0, len(text)), "its terms cancel, so it says nothing.")
    return Local(source, weights, rows, low, high)


def _coupling(
    n: int, rows: Array, columns: Array, values: Array, low: float, high: float, source: int, text: str
) -> Local | Coupling:
    """Entries of the same coefficient added up, zeros left out; a Local where one block is left."""
    keys, places = np.unique(rows * n + columns, return_inverse=True)
    totals = np.bincount(places.ravel(), weights=values)
    keys, totals = keys[totals != 0], totals[totals != 0]
    if not len(keys):
        raise ConstraintError(text, (0, len(text)), "its terms cancel, so it says nothing.")
    rows, columns = keys // n, keys % n
    if len(np.unique(rows)) == 1:
        weights = np.zeros(n)
        weights[columns] = totals
        return Local(source, weights, rows[:1], low, high)
    return Coupling(source, rows, columns, totals, low, high)
