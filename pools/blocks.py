"""Blocks: which parameters share a row of the coefficients Λ.

    θ_b = θ0_b + Σ_i Λ[b,i] τ_{i,b}

A kind is a partition of the merged parameters: the whole `model`, a `layer`, a `tensor`, a `row` (one leading index
of a tensor: an output unit of a matrix, an entry of a vector), or regular expressions of the user's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .errors import PoolError, listing, nearest

KINDS = ("model", "layer", "tensor", "row")

# Containers whose index names a layer, also when they are nested (stages.2.blocks.3).
_CONTAINERS = r"(?:blocks?|layers?|resblocks|resnets|stages?|groups?|units?|h)"


@dataclass(frozen=True, eq=False)
class Blocks:
    """A partition of the merged tensors into the rows of Λ.

    `rows[tensor]` is the slice of Λ's rows that the tensor uses: of length 1 if all of the tensor shares one row, of
    length shape[0] if every leading index has its own. Several tensors may share one row. `layers` groups rows for
    pictures: layer name -> row indices.
    """

    kind: str
    rows: dict[str, slice]
    count: int
    layers: dict[str, NDArray[np.int64]]
    labels: tuple[str, ...]
    """One label a row, or for kind "row" one a tensor."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """One name a row; ``tensor[i]`` for kind "row"."""
        if self.kind != "row":
            return self.labels
        return tuple(f"{name}[{i}]" for name, part in self.rows.items() for i in range(part.stop - part.start))


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which ``blocks.2`` comes before ``blocks.10``."""
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name) if p)


def layer_of(name: str) -> str:
    """Return the layer of a tensor: its name up to the first index, or through nested containers, else its module.

    >>> layer_of("transformer.resblocks.3.attn.in_proj_weight")
    'transformer.resblocks.3'
    >>> layer_of("stages.2.blocks.3.mlp.fc1.weight")
    'stages.2.blocks.3'
    >>> layer_of("ln_pre.weight")
    'ln_pre'
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit() and i > 0), None)
    if first is None:
        return ".".join(parts[:-1]) or name
    end = first + 1
    for i in range(end, len(parts) - 1):
        if parts[i + 1].isdigit() and re.fullmatch(_CONTAINERS, parts[i]):
            end = i + 2
    return ".".join(parts[:end])


def make_blocks(kind: str | Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> Blocks:
    """Partition tensors of the given shapes; `kind` is one of `KINDS` or a sequence of regular expressions.

    A tensor belongs to the first expression that is found in its name (`re.search`). Raises PoolError for an unknown
    kind, an invalid expression, one that matches nothing, and tensors that none matches.
    """
    if isinstance(kind, str):
        if kind not in KINDS:
            raise PoolError(
                f"blocks: unknown kind {kind!r}; the kinds are {', '.join(KINDS)}, or a list of regular expressions."
                + nearest(kind, KINDS)
            )
        if kind == "row":
            return _row_blocks(shapes)
        if kind == "model":
            return _grouped(kind, dict.fromkeys(shapes, "model"))
        return _grouped(kind, {name: layer_of(name) if kind == "layer" else name for name in shapes})
    return _pattern_blocks(tuple(kind), shapes)


def _grouped(kind: str, group: Mapping[str, str], order: Sequence[str] | None = None) -> Blocks:
    labels = tuple(order) if order is not None else tuple(dict.fromkeys(group.values()))
    index = {label: i for i, label in enumerate(labels)}
    rows = {name: slice(index[label], index[label] + 1) for name, label in group.items()}
    layers: dict[str, list[int]] = {}
    if kind == "tensor":
        for name, part in rows.items():
            layers.setdefault(layer_of(name), []).append(part.start)
    else:
        layers = {label: [i] for label, i in index.items()}
    return Blocks(kind, rows, len(labels), {k: np.array(v, dtype=np.int64) for k, v in layers.items()}, labels)


def _row_blocks(shapes: Mapping[str, tuple[int, ...]]) -> Blocks:
    rows: dict[str, slice] = {}
    layers: dict[str, list[NDArray[np.int64]]] = {}
    count = 0
    for name, shape in shapes.items():
        extent = shape[0] if shape else 1
        rows[name] = slice(count, count + extent)
        layers.setdefault(layer_of(name), []).append(np.arange(count, count + extent, dtype=np.int64))
        count += extent
    return Blocks("row", rows, count, {k: np.concatenate(v) for k, v in layers.items()}, tuple(shapes))


def _pattern_blocks(patterns: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> Blocks:
    if len(set(patterns)) != len(patterns) or not patterns:
        raise PoolError(f"blocks: the patterns must be distinct and at least one; got {list(patterns)}.")
    compiled = [compile_pattern(pattern, "blocks") for pattern in patterns]
    group: dict[str, str] = {}
    for name in shapes:
        for pattern, expression in zip(patterns, compiled, strict=True):
            if expression.search(name):
                group[name] = pattern
                break
    unmatched = [name for name in shapes if name not in group]
    if unmatched:
        raise PoolError(
            f"blocks: no pattern matches {listing(map(repr, unmatched))}; add a last pattern '.*' for the rest."
        )
    idle = [pattern for pattern in patterns if pattern not in set(group.values())]
    if idle:
        raise PoolError(
            f"blocks: {listing(map(repr, idle))} is left without a tensor (each goes to the first pattern that matches)"
            "; remove it or put it earlier."
        )
    return _grouped("patterns", group, patterns)


def compile_pattern(pattern: object, owner: str) -> re.Pattern[str]:
    """Compile a regular expression; raise PoolError that shows it."""
    if not isinstance(pattern, str):
        raise PoolError(f"{owner}: a pattern must be a string; got {pattern!r}.")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PoolError(f"{owner}: {pattern!r} is not a regular expression ({error}).") from None
