"""The pool as a linear operator: combine (A), its adjoint correlate (Aᵀ), and the Gram matrices.

    combine:    θ_b = θ0_b + Σ_i Λ[b,i] τ_{i,b}
    correlate:  S[b,i] = ⟨G_b, τ_{i,b}⟩
    gram:       K[b,i,j] = ⟨τ_{i,b}, τ_{j,b}⟩

Tensors are cut into pieces that stay in cache; within a piece the arithmetic is float32 on task vectors, sums over
pieces are float64 and taken in a fixed order, so that results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from .blocks import Blocks
from .sources import Scratch, TaskVectors
from .workers import Workers

PIECE = 1 << 17  # elements: 512 kB each of base, task vector and gradient stay in cache
SEGMENT = 4096  # elements of a sum of squares that float32 is trusted with

Weights = dict[str, torch.Tensor]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a tensor, and the rows of Λ that they use.

    `width` is the number of elements a row takes in this piece, or None if one row covers all of it.
    """

    name: str
    start: int
    stop: int
    rows: slice
    width: int | None


def pieces(source: TaskVectors, blocks: Blocks, names: Sequence[str], limit: int) -> list[Piece]:
    """Cut tensors into pieces of at most `limit` elements, at row boundaries where rows fit."""
    found: list[Piece] = []
    for name in names:
        size = prod(source.shapes[name])
        rows = blocks.rows[name]
        count = rows.stop - rows.start
        if size == 0:
            continue
        if count == 1:
            found += [Piece(name, a, min(a + limit, size), rows, None) for a in range(0, size, limit)]
            continue
        width = size // count
        if width <= limit:
            step = limit // width
            for r in range(0, count, step):
                end = min(r + step, count)
                found.append(Piece(name, r * width, end * width, slice(rows.start + r, rows.start + end), width))
        else:
            for r in range(count):
                row = slice(rows.start + r, rows.start + r + 1)
                for a in range(r * width, (r + 1) * width, limit):
                    found.append(Piece(name, a, min(a + limit, (r + 1) * width), row, None))
    return found


def correlate(
    source: TaskVectors,
    workers: Workers,
    gradients: Sequence[Mapping[str, torch.Tensor]],
    blocks: Blocks,
    experts: Sequence[int],
) -> Matrix:
    """Return ⟨G_b, τ_{i,b}⟩ for each gradient, row and expert asked for: [k, rows, len(experts)]."""
    names = [name for name in source.shapes if any(name in gradient for gradient in gradients)]
    flat = {
        name: [
            gradient[name].detach().to("cpu", torch.float32).contiguous().view(-1) if name in gradient else None
            for gradient in gradients
        ]
        for name in names
    }
    work = pieces(source, blocks, names, workers.limit)
    partial = Partial(work, (len(gradients), len(experts)))

    def do(index: int, scratch: Scratch) -> None:
        piece, out = work[index], partial[index]
        stacked = _stack([g if g is None else g[piece.start : piece.stop] for g in flat[piece.name]], scratch)
        transposed = stacked.t()
        for positions, delta in source.deltas(piece.name, experts, piece.start, piece.stop, scratch):
            if piece.width is None:
                out[0, :, positions] = torch.mm(delta, transposed).numpy().T
            else:
                _row_dots(stacked, delta, piece.width, out[:, :, positions])

    workers.run(range(len(work)), do, serial=source.serial)
    return np.ascontiguousarray(partial.sum(blocks.count).swapaxes(0, 1))


class Partial:
    """Sums over single pieces, float64, [rows of the piece, *shape], in one array.

    One array, because small ones made between the large temporary ones of the pieces would pin the heap.
    """

    def __init__(self, work: Sequence[Piece], shape: tuple[int, ...]) -> None:
        self._work = work
        self._ends = np.cumsum(
            [0] + [1 if piece.width is None else piece.rows.stop - piece.rows.start for piece in work]
        )
        self._values = np.empty((int(self._ends[-1]), *shape))

    def __getitem__(self, index: int) -> Matrix:
        """Return the part of one piece, to be filled."""
        return self._values[self._ends[index] : self._ends[index + 1]]

    def sum(self, count: int) -> Matrix:
        """Add up the pieces, in order, by row: [count, *shape]."""
        result = np.zeros((count, *self._values.shape[1:]))
        for index, piece in enumerate(self._work):
            result[piece.rows] += self[index]
        return result


def _stack(parts: Sequence[torch.Tensor | None], scratch: Scratch) -> torch.Tensor:
    """Stack pieces of gradients, zeros for those that lack the tensor: [k, elements]."""
    if len(parts) == 1 and parts[0] is not None:
        return parts[0].unsqueeze(0)
    size = next(len(part) for part in parts if part is not None)
    stacked = scratch.stack(len(parts), size)
    for row, part in zip(stacked, parts, strict=True):
        if part is None:
            row.zero_()
        else:
            row.copy_(part)
    return stacked


def _row_dots(stacked: torch.Tensor, delta: torch.Tensor, width: int, out: Matrix) -> None:
    """Write the inner products row by row of [k, r·w] and [m, r·w] to out [r, k, m]."""
    g = stacked.numpy().reshape(len(stacked), -1, width)
    d = delta.numpy().reshape(len(delta), -1, width)
    for i in range(len(g)):
        for j in range(len(d)):
            out[:, i, j] = np.einsum("rw,rw->r", g[i], d[j])


def combine(
    source: TaskVectors,
    workers: Workers,
    coefficients: Matrix,
    blocks: Blocks,
    device: torch.device,
    *,
    with_base: bool = True,
    since: tuple[Matrix, Weights] | None = None,
    names: Sequence[str] | None = None,
) -> Weights:
    """Return θ0 + Σ_i Λ[b,i] τ_{i,b}, or only the sum.

    With `since` = (Λ_old, weights of Λ_old) the weights are updated in place: pieces whose rows did not change are left
    alone, and of the others only the experts whose coefficients changed are read, unless starting from the base reads
    no more than that.
    """
    names = list(source.shapes) if names is None else names
    weights = {name: torch.empty(source.shapes[name], device=device) for name in names} if since is None else since[1]
    flat = {name: weights[name].detach().view(-1) for name in names}
    change = None if since is None else coefficients - since[0]
    work = pieces(source, blocks, names, workers.limit)

    def do(piece: Piece, scratch: Scratch) -> None:
        out = flat[piece.name][piece.start : piece.stop]
        rows = coefficients[piece.rows]
        active = np.flatnonzero(rows.any(axis=0))
        if change is not None:
            changed = np.flatnonzero(change[piece.rows].any(axis=0))
            if len(changed) == 0:
                return
            if len(changed) < len(active):
                out += _weighted_sum(source, piece, change[piece.rows], changed, scratch, None).to(device)
                return
        if not with_base:
            if len(active) == 0:
                out.zero_()
            else:
                out.copy_(_weighted_sum(source, piece, rows, active, scratch, None))
            return
        base = source.base(piece.name, piece.start, piece.stop, scratch)
        if len(active) == 0:
            out.copy_(base)
        else:
            total = _weighted_sum(source, piece, rows, active, scratch, base)
            if out.is_cpu:
                torch.add(base, total, out=out)
            else:
                out.copy_(total.add_(base))

    workers.run(work, do, serial=source.serial)
    return weights


def _weighted_sum(
    source: TaskVectors,
    piece: Piece,
    rows: Matrix,
    experts: NDArray[np.intp],
    scratch: Scratch,
    base: torch.Tensor | None,
) -> torch.Tensor:
    """Return Σ_i λ_i τ_i over one piece, in the scratch buffer where it fits."""
    size = piece.stop - piece.start
    total = scratch.sum.floats(size)
    asked = experts.tolist()
    first = True
    for positions, delta in source.deltas(piece.name, asked, piece.start, piece.stop, scratch, base):
        for tau, expert in zip(delta, asked[positions], strict=True):
            if piece.width is None:
                weight = float(rows[0, expert])
                if first:
                    torch.mul(tau, weight, out=total)
                else:
                    total.add_(tau, alpha=weight)
            else:
                column = torch.from_numpy(rows[:, expert].astype(np.float32)).unsqueeze(1)
                if first:
                    torch.mul(tau.view(-1, piece.width), column, out=total.view(-1, piece.width))
                else:
                    total.view(-1, piece.width).addcmul_(tau.view(-1, piece.width), column)
            first = False
    return total


def gram(source: TaskVectors, workers: Workers, blocks: Blocks) -> Matrix:
    """Return ⟨τ_{i,b}, τ_{j,b}⟩: [rows, n, n].

    The products of a piece are as large as those of a row, so they are added up as they come, in order.
    """
    n = source.n
    result = np.zeros((blocks.count, n, n))

    def products(piece: Piece, scratch: Scratch) -> torch.Tensor:
        stack = piece_stack(source, piece, scratch)
        if piece.width is None:
            return segmented_gram(stack)
        by_row = stack.view(n, -1, piece.width).transpose(0, 1)
        if piece.width <= SEGMENT:
            return torch.bmm(by_row, by_row.transpose(1, 2))
        return torch.stack([segmented_gram(row) for row in by_row])

    def add(piece: Piece, found: torch.Tensor) -> None:
        result[piece.rows] += found.numpy()

    work = pieces(source, blocks, list(source.shapes), gram_limit(workers.limit, n))
    workers.run(work, products, then=add, serial=source.serial)
    for matrix in result:  # float32 products are symmetric only to rounding
        matrix[:] = 0.5 * (matrix + matrix.T)
    return result


def gram_limit(limit: int, n: int) -> int:
    """Return the length of pieces of which all n experts are held at once, in the memory of four ordinary pieces."""
    return max(1024, min(limit, 4 * limit // n))


def segmented_gram(stack: torch.Tensor) -> torch.Tensor:
    """Return the inner products of rows [n, elements], float64 [n, n].

    Sums of squares only grow, so float32 is left to short segments.
    """
    even = stack.shape[1] // SEGMENT * SEGMENT
    segments = stack[:, :even].reshape(len(stack), -1, SEGMENT).transpose(0, 1)
    rest = stack[:, even:]
    return torch.bmm(segments, segments.transpose(1, 2)).sum(0, dtype=torch.float64) + torch.mm(rest, rest.t()).double()


def piece_stack(source: TaskVectors, piece: Piece, scratch: Scratch, base: torch.Tensor | None = None) -> torch.Tensor:
    """Return all experts' task vectors of a piece, [n, elements], valid until the next.

    `base` is the piece of the base, if it was read.
    """
    stack = scratch.stack(source.n, piece.stop - piece.start)
    for positions, delta in source.deltas(piece.name, range(source.n), piece.start, piece.stop, scratch, base):
        if len(delta) == source.n:
            return delta
        stack[positions] = delta
    return stack
