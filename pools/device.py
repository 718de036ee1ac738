"""The operator on an accelerator: task vectors stacked there once, combine and correlate as matrix products.

    layout      stack [n, P], base [P]: all tensors behind one another, each padded with zeros to ALIGNMENT
    combine     θ[a:b] = base[a:b] + stack[:, a:b]ᵀ λ          for each run [a, b) of tensors that share a row of Λ
    correlate   S[row] = Σ_segments stack[:, segment] g[segment]      float32 in a segment, float64 over segments

A run is as long as the blocks allow (the whole model, a layer, a tensor), so few kernels are launched, each at the
bandwidth of the memory; blocks with a row for each leading index are one batched product a tensor. Scores stay on the
device until the end: one synchronization a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from .blocks import Blocks, make_blocks
from .memory import readable
from .operator import SEGMENT, Matrix, Piece, Weights, pieces
from .resident import ALIGNMENT, padded
from .sources import Scratch, TaskVectors
from .workers import Workers


@dataclass(frozen=True)
class Run:
    """Elements [start, stop) of the layout and the rows of Λ that they use: one, or `rows` of equal width."""

    start: int
    stop: int
    rows: slice

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.rows.stop - self.rows.start


class DeviceStack:
    """Base and task vectors of a source in one piece of device memory.

    Raises torch.OutOfMemoryError that says how much was needed, and what to do.
    """

    def __init__(self, source: TaskVectors, workers: Workers, device: torch.device) -> None:
        self.n = source.n
        self.shapes = dict(source.shapes)
        self.offsets: dict[str, int] = {}
        total = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = total
            total += padded(prod(shape), ALIGNMENT)
        try:
            self.stack = torch.zeros(source.n, total, device=device)
            self.base = torch.zeros(total, device=device)
        except torch.OutOfMemoryError:
            needed = readable(4 * (source.n + 1) * total)
            raise torch.OutOfMemoryError(
                f'pool: {device} has no room for {needed} of task vectors; use backend="streaming" or fewer experts.'
            ) from None
        everyone = range(source.n)

        def load(piece: Piece, scratch: Scratch) -> None:
            at = self.offsets[piece.name]
            columns = slice(at + piece.start, at + piece.stop)
            base = source.base(piece.name, piece.start, piece.stop, scratch)
            self.base[columns] = base.to(device)
            for positions, delta in source.deltas(piece.name, everyone, piece.start, piece.stop, scratch, base):
                self.stack[positions, columns] = delta.to(device)

        work = pieces(source, make_blocks("tensor", source.shapes), list(self.shapes), workers.limit)
        workers.run(work, load, serial=source.serial)
        self._finite = all(bool(row.isfinite().all()) for row in self.stack)

    def combine(
        self,
        coefficients: Matrix,
        blocks: Blocks,
        *,
        with_base: bool = True,
        since: tuple[Matrix, Weights] | None = None,
    ) -> Weights:
        """Return θ0 + Σ_i Λ[b,i] τ_{i,b}, or only the sum.

        With `since` = (Λ_old, weights of Λ_old) those weights are written to, where rows of Λ changed.
        """
        on_device = torch.from_numpy(coefficients).to(self.base.device, torch.float32)
        flat = None if since is None else self._shared(since[1])
        in_place = flat is not None
        if flat is None:
            flat = torch.empty_like(self.base)
        changed: list[Run] = []
        with torch.no_grad(), _full_precision():
            for run in self._runs(blocks):
                if since is not None and np.array_equal(coefficients[run.rows], since[0][run.rows]):
                    continue
                changed.append(run)
                self._combine_run(run, coefficients[run.rows], on_device[run.rows], with_base, flat)
            if since is None:
                return {name: self._view(flat, name) for name in self.shapes}
            if not in_place:
                starts = [name for name in self.shapes if any(r.start <= self.offsets[name] < r.stop for r in changed)]
                for name in starts:
                    since[1][name].detach().copy_(self._view(flat, name))
        return since[1]

    def _combine_run(
        self, run: Run, rows: Matrix, on_device: torch.Tensor, with_base: bool, flat: torch.Tensor
    ) -> None:
        out, base = flat[run.start : run.stop], self.base[run.start : run.stop]
        active = np.flatnonzero(rows.any(axis=0))
        if len(active) == 0:
            if with_base:
                out.copy_(base)
            else:
                out.zero_()
            return
        columns = self.stack[:, run.start : run.stop]
        if not self._finite and len(active) < self.n:
            # 0 · nan is nan: an expert without weight must not be touched.
            columns, on_device = columns[active.tolist()], on_device[:, active.tolist()]
        scale = 1 if with_base else 0  # 0 makes the product ignore the base
        if run.count == 1:
            torch.addmv(base, columns.t(), on_device[0], beta=scale, out=out)
        else:
            by_row = columns.view(len(columns), run.count, -1).transpose(0, 1)  # [rows, n, width]
            shape = (run.count, 1, -1)
            torch.baddbmm(base.view(shape), on_device.unsqueeze(1), by_row, beta=scale, out=out.view(shape))

    def correlate(self, gradients: Sequence[Mapping[str, torch.Tensor]], blocks: Blocks) -> Matrix:
        """Return ⟨G_b, τ_{i,b}⟩ for each gradient, row and expert [k, rows, n]."""
        flat = torch.zeros(len(gradients), len(self.base), device=self.base.device)
        scores = torch.zeros(len(gradients), blocks.count, self.n, dtype=torch.float64, device=self.base.device)
        with torch.no_grad(), _full_precision():
            into = [
                self._view(row, name)
                for row, g in zip(flat, gradients, strict=True)
                for name in g
                if name in self.shapes
            ]
            given = [g[name].detach().to(self.base.device) for g in gradients for name in g if name in self.shapes]
            if given:
                torch._foreach_copy_(into, given)  # one launch for many small tensors
            for run in self._runs(blocks):
                columns, g = self.stack[:, run.start : run.stop], flat[:, run.start : run.stop]
                if run.count == 1:
                    scores[:, run.rows.start] += _segmented(g, columns)
                else:
                    by_row = columns.view(self.n, run.count, -1).transpose(0, 1)
                    gradient_rows = g.view(len(g), run.count, -1).permute(1, 2, 0)  # [rows, width, k]
                    scores[:, run.rows] += torch.bmm(by_row, gradient_rows).permute(2, 0, 1).double()
        return np.asarray(scores.cpu().numpy())

    def gram(self, blocks: Blocks) -> Matrix:
        """Return ⟨τ_{i,b}, τ_{j,b}⟩ [rows, n, n]."""
        found = torch.zeros(blocks.count, self.n, self.n, dtype=torch.float64, device=self.base.device)
        with torch.no_grad(), _full_precision():
            for run in self._runs(blocks):
                columns = self.stack[:, run.start : run.stop]
                if run.count == 1:
                    found[run.rows.start] += _segmented(columns, columns)
                else:
                    by_row = columns.view(self.n, run.count, -1).transpose(0, 1)
                    found[run.rows] += torch.bmm(by_row, by_row.transpose(1, 2)).double()
        return np.asarray(0.5 * (found + found.transpose(1, 2)).cpu().numpy())

    def _view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        at, shape = self.offsets[name], self.shapes[name]
        return flat[at : at + prod(shape)].view(shape)

    def _shared(self, weights: Weights) -> torch.Tensor | None:
        """Return the flat tensor that weights made by `combine` are views of, or None for weights from elsewhere."""
        first = weights[next(iter(self.shapes))].detach()
        storage = first.untyped_storage()
        if storage.nbytes() != 4 * len(self.base):
            return None
        flat = torch.empty(0, device=first.device).set_(storage, 0, (len(self.base),), (1,))
        same = all(weights[name].data_ptr() == self._view(flat, name).data_ptr() for name in self.shapes)
        return flat if same else None

    def _runs(self, blocks: Blocks) -> list[Run]:
        """Neighbouring tensors that share one row of Λ join, padding included: it is 0 everywhere."""
        runs: list[Run] = []
        for name, shape in self.shapes.items():
            start, size, rows = self.offsets[name], prod(shape), blocks.rows[name]
            if size == 0:
                continue
            if rows.stop - rows.start > 1:
                runs.append(Run(start, start + size, rows))
            elif runs and runs[-1].rows == rows and runs[-1].count == 1:
                runs[-1] = Run(runs[-1].start, start + size, rows)
            else:
                runs.append(Run(start, start + size, rows))
        return runs


def _segmented(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a bᵀ of [k, elements] and [n, elements], float64 [k, n]: many short products also fill the device."""
    even = a.shape[1] // SEGMENT * SEGMENT
    left, right = (x[:, :even].view(len(x), -1, SEGMENT).transpose(0, 1) for x in (a, b))
    products = torch.bmm(left, right.transpose(1, 2)).sum(0, dtype=torch.float64)
    return products + torch.mm(a[:, even:], b[:, even:].t()).double()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switch TF32 off: it keeps ten bits of the task vectors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
