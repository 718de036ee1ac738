"""One driver for all closed-form merges: it streams the pool, calls the rule, and writes or returns the result.

Rules of single elements run on pieces that stay in cache, on all threads; rules of whole tensors on one tensor at a
time. Memory is the buffers of the threads, one group of tensors on its way to the disk, and what the method says that
it holds: it does not grow with the number of experts. On an accelerator, pieces are moved there and the result back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...pools import Pool, PoolError, Weights, operator
from ...pools.pool import GROUP
from ...pools.sources import Scratch
from ..errors import OptionError
from .merge import Linear, Merge, Part
from .registry import describe_merge

if TYPE_CHECKING:
    from ...pools.statistics import Statistics

Progress = Callable[[int, int], None]
"""progress(elements merged so far, elements in all)."""


def merge_weights(
    pool: Pool, merge: Merge, statistics: Statistics | None = None, progress: Progress | None = None
) -> Weights:
    """Return the merged tensors, float32, in memory, on the pool's device."""
    viewed = view(pool, merge)
    found = merging(viewed, merge, statistics, progress)(list(viewed.tensors))
    return {name: tensor.to(pool.device) for name, tensor in found.items()}


def write_merge(
    pool: Pool,
    merge: Merge,
    path: str | Path,
    *,
    statistics: Statistics | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: float = 5e9,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the merged model to a .safetensors file or a folder, tensor by tensor, and return the files.

    Names, element types, shards, files beside the weights and provenance are those of `Pool.materialize`; the metadata
    say the method with every option, too.
    """
    viewed = view(pool, merge)
    summary = {"merge": json.dumps(describe_merge(merge)), **(metadata or {})}
    merged = merging(viewed, merge, statistics, progress)
    return viewed.write(merged, path, dtype=dtype, max_shard_size=max_shard_size, metadata=summary)


def view(pool: Pool, merge: Merge) -> Pool:
    """Return the pool after the merge's own transforms."""
    for transform in merge.transforms():
        pool = pool.transform(transform)
    return pool


def merging(
    pool: Pool, merge: Merge, statistics: Statistics | None = None, progress: Progress | None = None
) -> Callable[[Sequence[str]], Weights]:
    """Return merged(names) -> float32 tensors on the CPU, for a pool that has been transformed."""
    if merge.statistics is not None and statistics is None:
        raise OptionError(
            f"{type(merge).__name__} needs {merge.statistics} statistics of every expert; make them with "
            f"`mergesolve stats --kind {merge.statistics}` and pass Statistics.open(pool, '{merge.statistics}')."
        )
    source, workers = pool.engine()
    total = sum(prod(shape) for shape in pool.tensors.values())
    done = 0

    def count(elements: int) -> None:
        nonlocal done
        done += elements
        if progress is not None:
            progress(done, total)

    if isinstance(merge, Linear):
        matrix, blocks = merge.coefficients(pool)
        if not np.isfinite(matrix).all():
            raise PoolError(f"pool: the coefficients of {type(merge).__name__} are not all finite: {matrix.tolist()}.")

        def combined(names: Sequence[str]) -> Weights:
            found = operator.combine(source, workers, matrix, blocks, torch.device("cpu"), names=names)
            count(sum(tensor.numel() for tensor in found.values()))
            return found

        return combined

    rule = merge.prepare(pool, statistics)
    limit = operator.gram_limit(workers.limit, pool.n)

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


def plan(pool: Pool, merge: Merge, *, dtype: str | torch.dtype | None = None) -> Plan:
    """Return the cost of a merge without reading any data.

    Tensors that are identical in all models, which only reading tells, count as merged.
    """
    shapes = pool.candidates
    sizes = [prod(shape) for shape in shapes.values()]
    largest = max(sizes, default=0)
    passes = merge.passes + sum(transform.passes for transform in merge.transforms())
    written = pool.written_nbytes(dtype)
    group = 4 * max(min(GROUP, sum(sizes)), largest)
    threads = torch.get_num_threads()
    rule = int(4 * largest * merge.held) if merge.whole else 0
    cuts = 8 * largest * threads if any(transform.passes for transform in merge.transforms()) else 0
    on_device = pool.device.type != "cpu"
    return Plan(
        experts=pool.n,
        parameters=sum(sizes),
        passes=passes,
        bytes_read=passes * pool.candidate_nbytes + written,
        bytes_written=written,
        host_memory=group + pool.memory_needed + max(cuts, 0 if on_device else rule),
        device_memory=rule + 4 * pool.n * operator.gram_limit(operator.PIECE, pool.n) if on_device else 0,
    )
