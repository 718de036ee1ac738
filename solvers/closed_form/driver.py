"""One driver for all closed-form merges: it streams the pool, calls the rule, and writes or returns the result.

Rules of single elements run on pieces that stay in cache, on all threads; rules of whole tensors on one tensor at a
time. Memory is the buffers of the threads, one group of tensors on its way to the disk, and what the method says that
it holds: it does not grow with the number of experts. On an accelerator, pieces are moved there and the result back.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...pools import Blocks, Pool, PoolError, Weights, operator
from ...pools.pool import GROUP
from ...pools.sources import Scratch, Stored
from ...pools.workers import MAX_THREADS, Workers
from ..errors import OptionError
from .merge import Linear, Matrix, Merge, Part, options
from .registry import describe_merge

if TYPE_CHECKING:
    from ...pools.statistics import Statistics

TEMPORARIES = 12  # stacks of all experts' pieces that a rule makes at most, those included that the allocator keeps
HISTOGRAM = 8 << 16  # bytes an expert of the counts that find thresholds of a whole model
LIBRARIES = 32 << 20  # bytes of code and workspace that PyTorch and LAPACK load when they are first used

Progress = Callable[[int, int], None]
"""progress(elements merged so far, elements in all)."""
Overrides = Sequence[tuple[str, Merge]]
"""(regular expression, merge): tensors whose names it finds take that merge instead; the first one that does wins."""
Merged = Callable[[Sequence[str]], Weights]
"""merged(names) -> the merged values of some tensors, float32, on the CPU."""


def merge_weights(
    pool: Pool,
    merge: Merge,
    statistics: Statistics | None = None,
    progress: Progress | None = None,
    *,
    overrides: Overrides = (),
) -> Weights:
    """Return the merged tensors, float32, in memory, on the pool's device."""
    found = merging(pool, merge, statistics, progress, overrides)(list(pool.tensors))
    return {name: tensor.to(pool.device) for name, tensor in found.items()}


def write_merge(
    pool: Pool,
    merge: Merge,
    path: str | Path,
    *,
    statistics: Statistics | None = None,
    overrides: Overrides = (),
    dtype: str | torch.dtype | None = None,
    max_shard_size: float = 5e9,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the merged model to a .safetensors file or a folder, tensor by tensor, and return the files.

    Names, element types, shards, files beside the weights and provenance are those of `Pool.materialize`; the metadata
    say the method with every option, too.
    """
    summary = {"merge": json.dumps(describe_merge(merge))}
    if overrides:
        summary["overrides"] = json.dumps([[pattern, describe_merge(other)] for pattern, other in overrides])
    if statistics is not None:
        summary["statistics"] = json.dumps(statistics.describe())
    merged = merging(pool, merge, statistics, progress, overrides)
    return pool.write(
        merged, path, dtype=dtype, max_shard_size=max_shard_size, metadata={**summary, **(metadata or {})}
    )


def merging(
    pool: Pool,
    merge: Merge,
    statistics: Statistics | None = None,
    progress: Progress | None = None,
    overrides: Overrides = (),
) -> Merged:
    """Return the function that merges tensors by name.

    What a method needs to know of the whole pool is taken here; with overrides, of the tensors that it merges.
    """
    total = sum(prod(shape) for shape in pool.tensors.values())
    done = 0

    def count(elements: int) -> None:
        nonlocal done
        done += elements
        if progress is not None:
            progress(done, total)

    if not overrides:
        return _merging(pool, merge, statistics, count)
    parts: dict[str, Merged] = {}
    for chosen, names in _assigned(pool, merge, overrides):
        part = _merging(pool.restrict(names), chosen, statistics, count)
        parts.update(dict.fromkeys(names, part))

    def merged(names: Sequence[str]) -> Weights:
        found: Weights = {}
        for part in dict.fromkeys(parts[name] for name in names):
            found.update(part([name for name in names if parts[name] is part]))
        return {name: found[name] for name in names}

    return merged


def _assigned(pool: Pool, merge: Merge, overrides: Overrides) -> list[tuple[Merge, list[str]]]:
    """Return each merge with the tensors that it merges; raise OptionError for a pattern that no tensor's name fits.

    A pattern may find only tensors that are identical in all models, or that patterns before it take: it has no effect.
    """
    choices = [*((pattern, other) for pattern, other in overrides), ("", merge)]
    assigned: list[list[str]] = [[] for _ in choices]
    try:
        patterns = [re.compile(pattern) for pattern, _ in choices]
    except re.error as error:
        raise OptionError(f"The pattern {error.pattern!r} of an override is no regular expression: {error}.") from None
    for name in pool.tensors:
        assigned[next(k for k, pattern in enumerate(patterns) if pattern.search(name))].append(name)
    for pattern in patterns[:-1]:
        if not any(pattern.search(name) for name in pool.candidates):
            raise OptionError(
                f"The pattern {pattern.pattern!r} of an override finds no tensor; they are named as "
                f"{next(iter(pool.tensors))!r}."
            )
    return [(other, names) for (_, other), names in zip(choices, assigned, strict=True) if names]


def _merging(pool: Pool, merge: Merge, statistics: Statistics | None, count: Callable[[int], None]) -> Merged:
    _check_merge(merge)
    merge.check(pool)
    if merge.statistics is not None and statistics is None:
        raise OptionError(
            f"{type(merge).__name__} needs {merge.statistics} statistics of every expert; make them with "
            f"`mergesolve stats --kind {merge.statistics}` and pass Statistics.open(pool, '{merge.statistics}')."
        )
    for transform in merge.transforms():
        pool = pool.transform(transform)
    source, workers = pool.stream()
    if isinstance(merge, Linear):
        matrix, blocks = merge.coefficients(pool)
        if not np.isfinite(matrix).all():
            raise PoolError(f"pool: the coefficients of {type(merge).__name__} are not all finite: {matrix.tolist()}.")

        if isinstance(source, Stored) and _convex(matrix, blocks):
            return _averaging(source, workers, matrix, blocks, count)

        def combined(names: Sequence[str]) -> Weights:
            found = operator.combine(source, workers, matrix, blocks, torch.device("cpu"), names=names)
            count(sum(tensor.numel() for tensor in found.values()))
            return found

        return combined

    rule = merge.prepare(pool, statistics)
    limit = min(workers.limit, operator.gram_limit(operator.PIECE, pool.n))  # small already where experts are compared

    def merged(names: Sequence[str]) -> Weights:
        weights = {name: torch.empty(pool.tensors[name]) for name in names}
        flat = {name: tensor.view(-1) for name, tensor in weights.items()}
        if merge.whole:
            with torch.no_grad():
                for name, out in flat.items():
                    part = Part(source, workers.scratch(), name, 0, len(out), pool.device, statistics)
                    out.copy_(rule(part).reshape(-1))
                    count(len(out))
            return weights
        items = [
            (name, start, min(start + limit, len(out)))
            for name, out in flat.items()
            for start in range(0, len(out), limit)
        ]

        def apply(item: tuple[str, int, int], scratch: Scratch) -> None:
            name, start, stop = item
            part = Part(source, scratch, name, start, stop, pool.device, statistics)
            flat[name][start:stop] = rule(part).reshape(-1)

        workers.run(items, apply, then=lambda item, _: count(item[2] - item[1]), serial=source.serial)
        return weights

    return merged


def _check_merge(merge: Merge) -> None:
    """Raise OptionError for what is no merge, and for factors beyond float32, in which models are merged."""
    if not isinstance(merge, Merge):
        raise OptionError(f"Expected a merge, such as make_merge({merge!r}) returns. Got {merge!r} instead.")
    largest = torch.finfo(torch.float32).max
    for name, value in options(merge).items():
        if name != "seed" and isinstance(value, (int, float)) and largest < abs(value) < math.inf:
            raise OptionError(
                f"The '{name}' parameter of {type(merge).__name__} must be at most {largest:.3g}, the largest number "
                f"that a model holds. Got {value!r} instead."
            )


def _convex(matrix: Matrix, blocks: Blocks) -> bool:
    """Tell whether every tensor is an average of the experts' tensors: one row, not negative, that sums to 1."""
    whole = all(rows.stop - rows.start == 1 for rows in blocks.rows.values())
    return whole and bool((matrix >= 0).all()) and bool((np.abs(matrix.sum(axis=1) - 1) < 1e-12).all())


def _averaging(
    source: Stored, workers: Workers, matrix: Matrix, blocks: Blocks, count: Callable[[int], None]
) -> Merged:
    """Return the merge by Σ_i λ_i θ_i as a running mean, which reads no base.

    After expert k, m ← m + λ_k / (λ_1 + .. + λ_k) · (θ_k − m): where all experts are equal, m is what they are.
    """

    def merged(names: Sequence[str]) -> Weights:
        weights = {name: torch.empty(source.shapes[name]) for name in names}
        flat = {name: tensor.view(-1) for name, tensor in weights.items()}

        def average(piece: operator.Piece, scratch: Scratch) -> None:
            out = flat[piece.name][piece.start : piece.stop]
            row = matrix[piece.rows.start]
            # The heaviest first: an expert far away that hardly counts must not be the mean that the others amend.
            experts = np.flatnonzero(row)
            first, *others = experts[np.argsort(-row[experts], kind="stable")].tolist()
            mean = source.expert(piece.name, first, piece.start, piece.stop, scratch, scratch.base)
            total = row[first]
            for expert in others:
                total += row[expert]
                value = source.expert(piece.name, expert, piece.start, piece.stop, scratch)
                mean = torch.lerp(mean, value, row[expert] / total, out=out)
            if not others:
                out.copy_(mean)

        work = operator.pieces(source, blocks, names, workers.limit)
        workers.run(work, average, then=lambda piece, _: count(piece.stop - piece.start))
        return weights

    return merged


@dataclass(frozen=True)
class Plan:
    """What a merge will read, write and hold; upper bounds, known from headers and options alone."""

    experts: int
    parameters: int
    passes: int
    bytes_read: int
    bytes_written: int
    host_memory: int
    device_memory: int


def plan(
    pool: Pool,
    merge: Merge,
    statistics: Statistics | None = None,
    *,
    overrides: Overrides = (),
    dtype: str | torch.dtype | None = None,
) -> Plan:
    """Return the cost of a merge without reading any data.

    Tensors that are identical in all models, which only reading tells, count as merged.
    """
    shapes = pool.candidates
    sizes = [prod(shape) for shape in shapes.values()]
    largest = max(sizes, default=0)
    merges = [merge, *(other for _, other in overrides)]
    passes = max(other.passes + sum(transform.passes for transform in other.transforms()) for other in merges)
    written = pool.written_nbytes(dtype)
    group = 4 * max(min(GROUP, sum(sizes)), largest)
    threads = min(torch.get_num_threads(), MAX_THREADS)
    stack = 4 * pool.n * operator.gram_limit(operator.PIECE, pool.n)
    rule = max(other.memory(shapes.values(), pool.n) for other in merges)
    cuts = 12 * largest * threads if any(t.passes for other in merges for t in other.transforms()) else 0
    on_device = pool.device.type != "cpu"
    return Plan(
        experts=pool.n,
        parameters=sum(sizes),
        passes=passes,
        bytes_read=passes * pool.candidate_nbytes + written + (0 if statistics is None else statistics.nbytes),
        bytes_written=written,
        host_memory=LIBRARIES
        + group
        + pool.memory_needed
        + threads * TEMPORARIES * stack
        + (threads + 1) * pool.n * HISTOGRAM
        + max(cuts, 0 if on_device else rule),
        device_memory=rule + TEMPORARIES * stack if on_device else 0,
    )
