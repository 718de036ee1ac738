"""The operator on an accelerator: task vectors stacked there once, combine and correlate as matrix products.

    layout      stack [n, P], base [P]: all tensors behind one another, each padded with zeros to ALIGNMENT
    combine     θ[a:b] = base[a:b] + stack[:, a:b]ᵀ λ          for each run [a, b) of tensors that share a row of Λ
    correlate   S[row] = Σ_pieces stack[:, piece] g[piece]      float32 within a piece, float64 over pieces

A run is as long as the blocks allow (the whole model, a layer, a tensor), so few kernels are launched, each at the
bandwidth of the memory; blocks with a row for each leading index are one batched product a tensor. Scores stay on the
device until the end: one synchronization a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from .blocks import Blocks, make_blocks
from .operator import Matrix, Weights, pieces
from .resident import ALIGNMENT, padded
from .sources import Scratch, TaskVectors
from .workers import Workers

PIECE = 1 << 22  # elements: float32 sums stay short, launches few


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
    """Base and task vectors of a source in one piece of device memory."""

    def __init__(self, source: TaskVectors, workers: Workers, device: torch.device) -> None:
        self.n = source.n
        self.shapes = dict(source.shapes)
        self.offsets: dict[str, int] = {}
        total = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = total
            total += padded(prod(shape), ALIGNMENT)
        self.stack = torch.zeros(source.n, total, device=device)
        self.base = torch.zeros(total, device=device)
        everyone = range(source.n)

        def load(piece: object, scratch: Scratch) -> None:
            name, start, stop = piece.name, piece.start, piece.stop  # type: ignore[attr-defined]
            at = self.offsets[name]
            base = source.base(name, start, stop, scratch)
            self.base[at + start : at + stop] = base.to(device)
            for positions, delta in source.deltas(name, everyone, start, stop, scratch, base):
                self.stack[positions, at + start : at + stop] = delta.to(device)

        workers.run(
            pieces(source, make_blocks("tensor", source.shapes), list(self.shapes), workers.limit),
            load,
            serial=source.serial,
        )

    def combine(
        self, coefficients: Matrix, blocks: Blocks, *, with_base: bool = True, since: Weights | None = None
    ) -> Weights:
        """Return θ0 + Σ_i Λ[b,i] τ_{i,b}, or only the sum; into the tensors of `since` where they are given."""
        weights = torch.from_numpy(coefficients).to(self.base.device, torch.float32)
        flat = self.base.clone() if with_base else torch.zeros_like(self.base)
        for run in self._runs(blocks):
            columns, out = self.stack[:, run.start : run.stop], flat[run.start : run.stop]
            if run.count == 1:
                out.addmv_(columns.t(), weights[run.rows.start])
            else:
                by_row = columns.view(self.n, run.count, -1).transpose(0, 1)  # [rows, n, width]
                out.view(run.count, 1, -1).baddbmm_(weights[run.rows].unsqueeze(1), by_row)
        views = {name: self._view(flat, name) for name in self.shapes}
        if since is None:
            return views
        for name, view in views.items():
            since[name].copy_(view)
        return since

    def correlate(self, gradients: Sequence[Mapping[str, torch.Tensor]], blocks: Blocks) -> Matrix:
        """Return ⟨G_b, τ_{i,b}⟩ for each gradient, row and expert [k, rows, n]."""
        flat = torch.zeros(len(gradients), len(self.base), device=self.base.device)
        for row, gradient in zip(flat, gradients, strict=True):
            for name, tensor in gradient.items():
                if name in self.shapes:
                    self._view(row, name).copy_(tensor.detach())
        scores = torch.zeros(len(gradients), blocks.count, self.n, dtype=torch.float64, device=self.base.device)
        for run in self._runs(blocks):
            columns, g = self.stack[:, run.start : run.stop], flat[:, run.start : run.stop]
            if run.count == 1:
                for a in range(0, columns.shape[1], PIECE):
                    product = g[:, a : a + PIECE] @ columns[:, a : a + PIECE].t()
                    scores[:, run.rows.start] += product.double()
            else:
                by_row = columns.view(self.n, run.count, -1).transpose(0, 1)
                gradient_rows = g.view(len(g), run.count, -1).permute(1, 2, 0)  # [rows, width, k]
                scores[:, run.rows] += torch.bmm(by_row, gradient_rows).permute(2, 0, 1).double()
        return np.asarray(scores.cpu().numpy())

    def gram(self, blocks: Blocks) -> Matrix:
        """Return ⟨τ_{i,b}, τ_{j,b}⟩ [rows, n, n]."""
        found = torch.zeros(blocks.count, self.n, self.n, dtype=torch.float64, device=self.base.device)
        for run in self._runs(blocks):
            columns = self.stack[:, run.start : run.stop]
            if run.count == 1:
                for a in range(0, columns.shape[1], PIECE):
                    part = columns[:, a : a + PIECE]
                    found[run.rows.start] += (part @ part.t()).double()
            else:
                by_row = columns.view(self.n, run.count, -1).transpose(0, 1)
                found[run.rows] += torch.bmm(by_row, by_row.transpose(1, 2)).double()
        return np.asarray(found.cpu().numpy())

    def _view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        at, shape = self.offsets[name], self.shapes[name]
        return flat[at : at + prod(shape)].view(shape)

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
