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
TransformFunction = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""fn(name, base [*shape], task_vectors [n, *shape]) -> task vectors [n, *shape], float32."""


def scratch_nbytes(limit: int) -> int:
    """Return the bytes of one worker's buffers, without `Scratch.stack`."""
    return (8 + 8 + 4 + 4) * limit


class Scratch:
    """One worker's reusable buffers, for pieces of up to `limit` elements, and its count of bytes read."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.raw = Buffer(8 * limit)
        self.base = Buffer(8 * limit)
        self.delta = Buffer(4 * limit)
        self.sum = Buffer(4 * limit)
        self._stack = Buffer(0)
        self.bytes_read = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers as they are now."""
        return sum(len(buffer.bytes) for buffer in (self.raw, self.base, self.delta, self.sum, self._stack))

    def stack(self, count: int, size: int) -> torch.Tensor:
        """Return a reusable [count, size] float32 matrix.

        Allocating one for each piece would leave holes in the heap between the small results that stay.
        """
        if 4 * count * size > len(self._stack.bytes):
            self._stack = Buffer(4 * count * size)
        return self._stack.floats(count * size).view(count, size)


class TaskVectors(Protocol):
    """Task vectors of n experts over named tensors, in pieces."""

    n: int
    shapes: Mapping[str, Shape]
    serial: bool
    """Pieces must be taken in order by one thread (a transform works on whole tensors, one at a time)."""
    frozen: int
    """Elements of the tensors that are identical in all models, which are not among `shapes`."""

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


Piecewise = Callable[[int, int, Buffer, Scratch], torch.Tensor]


def float32_reader(checkpoint: Checkpoint, name: str) -> Piecewise:
    """Return a function that reads pieces of a tensor as float32 and counts their bytes.

    Its result may alias the buffer it is given or the checkpoint.
    """
    read, dtype = checkpoint.reader(name), checkpoint.tensors[name].dtype
    size = dtype.itemsize

    def direct(start: int, stop: int, into: Buffer, scratch: Scratch) -> torch.Tensor:
        scratch.bytes_read += (stop - start) * size
        return read(start, stop, into)

    def converted(start: int, stop: int, into: Buffer, scratch: Scratch) -> torch.Tensor:
        scratch.bytes_read += (stop - start) * size
        return into.floats(stop - start).copy_(read(start, stop, scratch.raw))

    return direct if dtype == torch.float32 else converted


class Stored:
    """Task vectors formed from checkpoints as they are read (the `streaming` backend)."""

    serial = False

    def __init__(
        self, base: Checkpoint, experts: Sequence[Checkpoint], shapes: Mapping[str, Shape], frozen: int = 0
    ) -> None:
        self.n = len(experts)
        self.shapes = shapes
        self.frozen = frozen
        self._base = {name: float32_reader(base, name) for name in shapes}
        self._experts = {name: [float32_reader(expert, name) for expert in experts] for name in shapes}

    def base(self, name: str, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        """Read the base."""
        return self._base[name](start, stop, scratch.base, scratch)

    def expert(
        self, name: str, expert: int, start: int, stop: int, scratch: Scratch, into: Buffer | None = None
    ) -> torch.Tensor:
        """Read elements [start, stop) of an expert itself, float32, flat; not to be written to."""
        return self._experts[name][expert](start, stop, scratch.delta if into is None else into, scratch)

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
        out = scratch.delta.floats(stop - start)
        row = out.unsqueeze(0)
        readers, into = self._experts[name], scratch.delta
        for position, expert in enumerate(experts):
            torch.sub(readers[expert](start, stop, into, scratch), base, out=out)
            yield slice(position, position + 1), row


class Transformed:
    """Task vectors after a function of each whole tensor's base and task vectors.

    The tensor that was last asked for is held, [n, numel], until its last piece has been taken.
    """

    serial = True

    def __init__(self, source: TaskVectors, transform: TransformFunction, label: str) -> None:
        self._source = source
        self._transform = transform
        self._label = label
        self._held: tuple[str, torch.Tensor] | None = None
        self.n = source.n
        self.shapes = source.shapes
        self.frozen = source.frozen

    def base(self, name: str, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        """Return the base, which a transform leaves alone."""
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
        """Yield a piece of the transformed task vectors, all experts asked for at once."""
        if self._held is None or self._held[0] != name:
            self._held = None  # free it before the next is formed
            self._held = name, self._tensor(name, scratch)
        piece = self._held[1][:, start:stop]
        if stop == self._held[1].shape[1]:
            self._held = None
        yield slice(0, len(experts)), piece if list(experts) == list(range(self.n)) else piece[list(experts)]

    def _tensor(self, name: str, caller: Scratch) -> torch.Tensor:
        """Return the transformed task vectors of one tensor, [n, numel]."""
        scratch = Scratch(caller.limit)  # the caller may hold a piece of the base in its own
        shape = self.shapes[name]
        base, stack = gather(self._source, name, scratch)
        caller.bytes_read += scratch.bytes_read
        with torch.no_grad():
            result = self._transform(name, base.view(shape), stack.view(self.n, *shape))
        if not isinstance(result, torch.Tensor) or tuple(result.shape) != (self.n, *shape):
            found = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            raise PoolError(
                f"pool: the transform {self._label!r} returned {found} for {name!r}; expected task vectors of shape "
                f"{[self.n, *shape]}."
            )
        return result.detach().to("cpu", torch.float32).contiguous().view(self.n, -1)


def gather(source: TaskVectors, name: str, scratch: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a whole tensor's base [numel] and task vectors [n, numel], freshly allocated, float32."""
    size = prod(source.shapes[name])
    base = torch.empty(size)
    stack = torch.empty(source.n, size)
    for start in range(0, size, scratch.limit):
        stop = min(start + scratch.limit, size)
        base[start:stop] = source.base(name, start, stop, scratch)
        for positions, delta in source.deltas(name, range(source.n), start, stop, scratch, base[start:stop]):
            stack[positions, start:stop] = delta
    return base, stack


class Narrowed:
    """Some of the tensors of another source."""

    def __init__(self, source: TaskVectors, shapes: Mapping[str, Shape]) -> None:
        self.n = source.n
        self.shapes = shapes
        self.frozen = 0
        self.serial = source.serial
        self.base = source.base
        self.deltas = source.deltas


class Selected:
    """Some of the experts of another source, in a given order."""

    def __init__(self, source: TaskVectors, experts: Sequence[int]) -> None:
        self._source = source
        self._experts = tuple(experts)
        self.n = len(experts)
        self.shapes = source.shapes
        self.frozen = source.frozen
        self.serial = source.serial

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
