"""All task vectors in memory: [n, P] float32 on a device.

On the CPU the operator of `operator.py` runs on slices of the stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch

from .blocks import make_blocks
from .memory import readable
from .operator import Piece, pieces
from .sources import Scratch, Shape, TaskVectors
from .workers import Workers

ALIGNMENT = 16  # elements: tensors begin on cache lines


def padded(size: int, alignment: int) -> int:
    """Round up to a multiple of the alignment."""
    return -(-size // alignment) * alignment


def resident_nbytes(n: int, shapes: Mapping[str, Shape]) -> int:
    """Memory of n task vectors and the base."""
    return 4 * (n + 1) * sum(padded(prod(shape), ALIGNMENT) for shape in shapes.values())


class Resident:
    """Task vectors stacked in memory, with the base beside them."""

    serial = False

    def __init__(self, source: TaskVectors, workers: Workers) -> None:
        self.n = source.n
        self.shapes: Mapping[str, Shape] = source.shapes
        self.frozen = source.frozen
        self.offsets: dict[str, int] = {}
        total = 0
        for name, shape in source.shapes.items():
            self.offsets[name] = total
            total += padded(prod(shape), ALIGNMENT)
        try:
            self.stack = torch.empty(source.n, total)
            self.flat_base = torch.empty(total)
        except RuntimeError as error:  # how PyTorch says that the host has no memory left
            raise MemoryError(
                f'pool: no room for {readable(4 * (source.n + 1) * total)} of task vectors; use backend="streaming".'
            ) from error
        blocks = make_blocks("tensor", source.shapes)
        everyone = range(source.n)

        def load(piece: Piece, scratch: Scratch) -> None:
            name, start, stop = piece.name, piece.start, piece.stop
            at = self.offsets[name]
            base = source.base(name, start, stop, scratch)
            self.flat_base[at + start : at + stop] = base
            for positions, delta in source.deltas(name, everyone, start, stop, scratch, base):
                self.stack[positions, at + start : at + stop] = delta

        workers.run(pieces(source, blocks, list(source.shapes), workers.limit), load, serial=source.serial)

    def base(self, name: str, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        """Return a slice."""
        at = self.offsets[name]
        return self.flat_base[at + start : at + stop]

    def deltas(
        self,
        name: str,
        experts: Sequence[int],
        start: int,
        stop: int,
        scratch: Scratch,
        base: torch.Tensor | None = None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the whole slice, or single rows where only some experts are asked for."""
        at = self.offsets[name]
        columns = self.stack[:, at + start : at + stop]
        if len(experts) == self.n and list(experts) == list(range(self.n)):
            yield slice(0, self.n), columns
            return
        for position, expert in enumerate(experts):
            yield slice(position, position + 1), columns[expert : expert + 1]
