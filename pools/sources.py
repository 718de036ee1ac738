"""Where task vectors come from, a piece at a time.

A source hands out pieces of the base and of the task vectors τ_i = θ_i − θ0 in float32; the operator in `operator.py`
contracts them. `Stored` reads checkpoints, `Transformed` applies a function to whole tensors of another source,
`Selected` shows some of the experts, and `Resident` (in `resident.py`) holds everything on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Protocol

import torch

from .checkpoint import Buffer, Checkpoint
from .errors import PoolError

Shape = tuple[int, ...]
Transform = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""fn(name, base [*shape], task_vectors [n, *shape]) -> task vectors [n, *shape], float32."""


class Scratch:
    """One worker's reusable buffers, for pieces of up to `limit` elements, and its count of bytes read."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.raw = Buffer(8 * limit)
        self.base = Buffer(8 * limit)
        self.delta = Buffer(4 * limit)
        self.sum = Buffer(4 * limit)
        self.bytes_read = 0


class TaskVectors(Protocol):
    """Task vectors of n experts over named tensors, in pieces."""

    n: int
    shapes: Mapping[str, Shape]
    whole: bool
    """Pieces are whole tensors, taken one after the other (a transform needs that)."""

    def base(self, name: str, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        """Return elements [start, stop) of the base, float32, flat; not to be written to."""
        ...

    def deltas(
        self,
        name: str,
        experts: Sequence[int],
        start: int,
        stop: int,
        scratch: Scratch,
        base: torch.Tensor | None = None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (positions in `experts`, their task vectors [m, stop − start], float32), each valid until the next.

        `base` is what `base()` returned for the same piece, if it was asked for.
        """
        ...


def read_float32(
    checkpoint: Checkpoint, name: str, start: int, stop: int, into: Buffer, scratch: Scratch
) -> torch.Tensor:
    """Read a piece as float32; the result may alias `into` or the checkpoint."""
    info = checkpoint.tensors[name]
    scratch.bytes_read += (stop - start) * info.dtype.itemsize
    if info.dtype == torch.float32:
        return checkpoint.read(name, start, stop, into)
    return into.floats[: stop - start].copy_(checkpoint.read(name, start, stop, scratch.raw))


class Stored:
    """Task vectors formed from checkpoints as they are read (the `streaming` backend)."""

    whole = False

    def __init__(self, base: Checkpoint, experts: Sequence[Checkpoint], shapes: Mapping[str, Shape]) -> None:
        self._base = base
        self._experts = tuple(experts)
        self.n = len(experts)
        self.shapes = shapes

    def base(self, name: str, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        """Read the base."""
        return read_float32(self._base, name, start, stop, scratch.base, scratch)

    def deltas(
        self,
        name: str,
        experts: Sequence[int],
        start: int,
        stop: int,
        scratch: Scratch,
        base: torch.Tensor | None = None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Read one expert after the other into one buffer and subtract the base."""
        if base is None:
            base = self.base(name, start, stop, scratch)
        out = scratch.delta.floats[: stop - start]
        for position, expert in enumerate(experts):
            value = read_float32(self._experts[expert], name, start, stop, scratch.delta, scratch)
            yield slice(position, position + 1), torch.sub(value, base, out=out).unsqueeze(0)


class Transformed:
    """Task vectors after a function of each whole tensor's base and task vectors."""

    whole = True

    def __init__(self, source: TaskVectors, transform: Transform, label: str) -> None:
        self._source = source
        self._transform = transform
        self._label = label
        self.n = source.n
        self.shapes = source.shapes

    def base(self, name: str, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        """Return the whole base tensor, which a transform leaves alone."""
        return gather_base(self._source, name, scratch)[start:stop]

    def deltas(
        self,
        name: str,
        experts: Sequence[int],
        start: int,
        stop: int,
        scratch: Scratch,
        base: torch.Tensor | None = None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Form all experts' task vectors of the tensor, transform them, and yield those asked for."""
        shape = self.shapes[name]
        base, stack = gather(self._source, name, scratch, base)
        result = self._transform(name, base.view(shape), stack.view(self.n, *shape))
        if not isinstance(result, torch.Tensor) or tuple(result.shape) != (self.n, *shape):
            found = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            raise PoolError(
                f"pool: the transform {self._label!r} returned {found} for {name!r}; expected task vectors of shape "
                f"{[self.n, *shape]}."
            )
        stack = result.detach().to("cpu", torch.float32).contiguous().view(self.n, -1)
        yield slice(0, len(experts)), stack if list(experts) == list(range(self.n)) else stack[list(experts)]


def gather_base(source: TaskVectors, name: str, scratch: Scratch) -> torch.Tensor:
    """Return a whole tensor of the base [numel], freshly allocated, float32."""
    size = prod(source.shapes[name])
    if source.whole:
        return source.base(name, 0, size, scratch)
    out = torch.empty(size)
    for start in range(0, size, scratch.limit):
        stop = min(start + scratch.limit, size)
        out[start:stop] = source.base(name, start, stop, scratch)
    return out


def gather(
    source: TaskVectors, name: str, scratch: Scratch, base: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a whole tensor's base [numel] and task vectors [n, numel], freshly allocated, float32."""
    size = prod(source.shapes[name])
    if base is None:
        base = gather_base(source, name, scratch)
    stack = torch.empty(source.n, size)
    step = size if source.whole else scratch.limit
    for start in range(0, size, max(step, 1)):
        stop = min(start + step, size)
        for positions, delta in source.deltas(name, range(source.n), start, stop, scratch, base[start:stop]):
            stack[positions, start:stop] = delta
    return base, stack


class Selected:
    """Some of the experts of another source, in a given order."""

    def __init__(self, source: TaskVectors, experts: Sequence[int]) -> None:
        self._source = source
        self._experts = tuple(experts)
        self.n = len(experts)
        self.shapes = source.shapes
        self.whole = source.whole

    def base(self, name: str, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        """Return the base."""
        return self._source.base(name, start, stop, scratch)

    def deltas(
        self,
        name: str,
        experts: Sequence[int],
        start: int,
        stop: int,
        scratch: Scratch,
        base: torch.Tensor | None = None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Pass on to the other source under its own numbering."""
        return self._source.deltas(name, [self._experts[i] for i in experts], start, stop, scratch, base)
