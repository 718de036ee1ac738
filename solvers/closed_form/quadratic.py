"""The quadratic family: the point nearest to all experts, each measured by a metric of its own.

    min  Σ_t w_t (θ − θ_t)ᵀ H_t (θ − θ_t) + μ ‖θ − θ0‖²

over all θ, or over the pool's points θ = θ0 + Σ_i Λ[b,i] τ_i with Λ free, in the simplex, the capped simplex or a box.
H_t is the identity, a diagonal Fisher, or a Gram G_t of layer inputs, which acts on the rows of a matrix: for a linear
map W, (W − W_t) G_t (W − W_t)ᵀ sums the squared change of its outputs on the data of task t.

    identity                              the average, weighted by w; with w = 1 and μ = 1/α − n PAINT at α
    identity, w_t = ‖τ_t‖²                MetaGPT
    fisher                                Fisher merging; of two experts, EWC fusion
    fisher, ridge H0, μ = (1 − Σ w) H0    uncertainty-based gradient matching
    gram, off-diagonals shrunk            RegMean, and MaTS where its conjugate gradients have converged

Over θ the minimum has a closed form; over Λ it is a quadratic program of n variables a block, whose matrices take one
pass of the pool (two with Grams). Functions of tensors keep the type that they are given; solves and sums over tensors
are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from ...pools import Blocks, Pool, operator
from ...pools.operator import Piece
from ...pools.sources import Scratch, TaskVectors
from ..domains import DOMAINS, Box, Domain
from ..errors import OptionError, check_choice, check_number
from .convex import minimize
from .merge import Matrix, Merge, Part, Rule, check_weights, expert_weights, point_rule
from .norms import squared_norms

if TYPE_CHECKING:
    from ...pools.statistics import Statistics

CHUNK = 1 << 22  # elements of float64 task vectors, of all experts together, that a product with a Gram takes at once


# Functions of tensors


def diagonal(
    points: torch.Tensor, metrics: torch.Tensor, weights: torch.Tensor, *, anchor: float = 0.0, ridge: float = 0.0
) -> torch.Tensor:
    """Return δ [m] with Σ_t w_t (h_t + ridge) (δ − τ_t) + μ δ = 0 for points τ [n, m] and metrics h [n, m] ≥ 0.

    Where nothing holds an entry (all w_t h_t, ridge and anchor are 0), δ is the weighted average. Entries are scaled by
    their largest metric first, so that tiny Fishers do not underflow. `anchor` may be negative down to −ridge · Σ w.
    """
    pulls = metrics * weights.unsqueeze(1)
    total = float(weights.sum(dtype=torch.float64))
    held = max(0.0, ridge * total + anchor)
    scale = pulls.amax(0).clamp_min_(held)
    nothing = scale == 0
    scale = torch.where(nothing, 1, scale.clamp_min_(torch.finfo(scale.dtype).tiny))
    pulls = torch.where(nothing, weights.unsqueeze(1), pulls / scale)
    norm = pulls.sum(0) + held / scale
    if ridge:
        pulls += (ridge / scale) * weights.unsqueeze(1)
    return (pulls * points).sum(0) / norm


class GramSystem:
    """(Σ_t w_t H_t + μ) δ = Σ_t w_t H_t τ_t for the rows δ of a matrix [rows, d], in float64, one expert at a time.

    H_t is the Gram G_t with its off-diagonal entries times `shrink`, plus `ridge` on the diagonal. An input that is 0
    in the data of all experts (and has neither ridge nor anchor) says nothing about its column, which is averaged.
    """

    def __init__(self, anchor: float = 0.0, ridge: float = 0.0, shrink: float = 1.0) -> None:
        self._anchor, self._ridge, self._shrink = anchor, ridge, shrink
        self._weight = 0.0
        self._precision = 0.0

    def add(self, vector: torch.Tensor, gram: torch.Tensor, weight: float) -> None:
        """Add an expert: its task vector [rows, d] and its Gram [d, d]."""
        metric = gram * self._shrink if self._shrink != 1 else gram.clone()
        metric.diagonal().copy_(gram.diagonal() + self._ridge)
        self._precision = max(self._precision, torch.finfo(gram.dtype).eps)
        # A product in float32 is as good as the float32 Gram; sums over experts are not to add to its error.
        product, metric = (vector @ metric).double(), metric.double()
        if self._weight == 0:
            self._matrix, self._right, self._sum = weight * metric, weight * product, weight * vector.double()
            self._matrix.diagonal().add_(self._anchor)
        else:
            self._matrix.add_(metric, alpha=weight)
            self._right.add_(product, alpha=weight)
            self._sum.add_(vector, alpha=weight)
        self._weight += weight

    def solve(self, name: str) -> torch.Tensor:
        """Return δ [rows, d] by Cholesky's method. Raises OptionError for a singular system, naming the tensor."""
        matrix, right = self._system()
        scale = matrix.diagonal().clamp_min(0).rsqrt()  # of correlations, whose rank no unit changes
        factor, info = torch.linalg.cholesky_ex((matrix * scale).mul_(scale.unsqueeze(1)))
        limit = 4 * self._precision * math.sqrt(len(matrix))
        if int(info) or not _smallest_eigenvalue(factor) > limit:
            raise OptionError(
                f"The Grams of {name!r} are singular: their weighted sum {list(matrix.shape)} has combinations of "
                "inputs that the data never showed, so the outputs do not determine the tensor. Set 'shrink' below 1 "
                "(such as 0.9) or 'ridge' above 0, or 'anchor' where the method has it; or compute them on more "
                "samples. The method 'mats' needs none of this."
            )
        return torch.cholesky_solve((right * scale).T, factor).T * scale

    def iterate(self, start: Literal["average", "base"], tol: float, iterations: int) -> torch.Tensor:
        """Return δ [rows, d] by conjugate gradients on all rows at once.

        They stop where every row's residual is at most `tol` times its right-hand side, or after so many iterations;
        singular systems lead to the solution next to the start.
        """
        matrix, right = self._system()
        found = self._sum / self._weight if start == "average" else torch.zeros_like(right)
        limit = tol * right.norm(dim=1, keepdim=True)
        residual = right - found @ matrix
        direction = residual.clone()
        square = (residual * residual).sum(1, keepdim=True)
        for _ in range(iterations):
            going = square.sqrt() > limit
            if not bool(going.any()):
                break
            image = direction @ matrix
            curvature = (direction * image).sum(1, keepdim=True)
            step = torch.where(going & (curvature > 0), square / curvature, 0)
            found += step * direction
            residual -= step * image
            before, square = square, (residual * residual).sum(1, keepdim=True)
            direction = residual + torch.where(before > 0, square / before, 0) * direction
        return found

    def _system(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return matrix and right-hand side, with the average for inputs that are always 0."""
        diagonal = self._matrix.diagonal()
        unseen = diagonal == 0
        diagonal[unseen] = self._weight
        self._right[:, unseen] = self._sum[:, unseen]
        return self._matrix, self._right


def _smallest_eigenvalue(factor: torch.Tensor) -> float:
    """Return the smallest eigenvalue of L Lᵀ, from above, by a few inverse iterations from LAPACK's start."""
    d = len(factor)
    vector = torch.linspace(1, 2, d, dtype=factor.dtype, device=factor.device)
    vector[1::2] *= -1
    value = math.inf
    for _ in range(4):
        vector = torch.cholesky_solve((vector / vector.norm()).unsqueeze(1), factor).squeeze(1)
        value = 1 / float(vector.norm())
    return value


def as_rows(values: torch.Tensor, shape: Sequence[int], axis: int) -> torch.Tensor:
    """View a tensor [..., size] as matrices [..., rows, d] whose rows meet the inputs; see `statistics.axes`."""
    if axis == 1:
        return values.reshape(*values.shape[:-1], shape[0], -1)
    return values.reshape(*values.shape[:-1], shape[0], -1).transpose(-1, -2)


def from_rows(rows: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the flat tensor of which `as_rows` gave the matrix."""
    return (rows if axis == 1 else rows.T).reshape(-1)


# Rules


def check_masses(owner: object, weights: object) -> None:
    """Raise OptionError unless `weights` is None or a mapping of names to finite numbers that are not negative."""
    check_weights(owner, weights)
    negative = {} if weights is None else {name: w for name, w in weights.items() if w < 0}  # type: ignore[attr-defined]
    if negative:
        raise OptionError(
            f"The 'weights' parameter of {type(owner).__name__} must not be negative: a quadratic with a negative "
            f"weight has no minimum. Got {negative!r}; use task arithmetic to subtract an expert."
        )


def masses(weights: Mapping[str, float] | None, pool: Pool, owner: object) -> Matrix:
    """Return the weight of each expert [n], 1 unless given. Raises OptionError if all are 0."""
    found = expert_weights(weights, pool, owner, default=1.0)
    if not found.sum() > 0:
        raise OptionError(
            f"The 'weights' parameter of {type(owner).__name__} is 0 for every expert; give at least one a weight."
        )
    return found


def need(statistics: Statistics | None, kind: str, owner: object) -> Statistics:
    """Return the statistics. Raises OptionError if there are none, or of another kind."""
    if statistics is None or statistics.kind != kind:
        found = "none were given" if statistics is None else f"{statistics.kind} statistics were given"
        raise OptionError(
            f"{type(owner).__name__} needs {kind} statistics of every expert; {found}. Make them with "
            f"`mergesolve stats --kind {kind}` and pass Statistics.open(pool, '{kind}')."
        )
    return statistics


def diagonal_rule(
    weights: Matrix,
    *,
    anchor: float = 0.0,
    ridge: float = 0.0,
    missing: float = 1.0,
    measure: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
) -> Rule:
    """Return the rule of `diagonal` with Fishers, or with measure(Fisher, expert) in their place.

    A tensor without Fishers has the constant `missing` (without ridge unless that is 0).
    """

    def rule(part: Part) -> torch.Tensor:
        points = part.stack()
        metrics, added = torch.empty_like(points), ridge
        for expert, row in enumerate(metrics):
            found = part.statistic(expert)
            if found is None:  # of no expert: statistics are of the same tensors for all
                metrics.fill_(missing)
                added = 0.0 if missing else ridge
                break
            row.copy_(found if measure is None else measure(found, expert))
        return part.base + diagonal(points, metrics, _like(weights, points), anchor=anchor, ridge=added)

    return rule


def gram_rule(
    weights: Matrix,
    solve: Callable[[GramSystem, str], torch.Tensor],
    *,
    anchor: float = 0.0,
    ridge: float = 0.0,
    shrink: float = 1.0,
) -> Rule:
    """Return the rule that solves the `GramSystem` of a tensor; one without Grams has the identity in their place."""

    def rule(part: Part) -> torch.Tensor:
        axis = part.axis
        if axis is None:
            return part.base + _mean(part, weights, anchor)
        system = GramSystem(anchor, ridge, shrink)
        for expert in np.flatnonzero(weights).tolist():
            gram = part.statistic(expert)
            assert gram is not None  # statistics are of the same tensors for all experts
            system.add(as_rows(part.task_vector(expert), part.shape, axis), gram, float(weights[expert]))
        return part.base + from_rows(solve(system, part.name), axis).to(part.base)

    return rule


def _mean(part: Part, weights: Matrix, anchor: float) -> torch.Tensor:
    """Return Σ w τ / (Σ w + μ), one expert at a time."""
    total = torch.zeros_like(part.base)
    for expert in np.flatnonzero(weights).tolist():
        total.add_(part.task_vector(expert), alpha=float(weights[expert] / (weights.sum() + anchor)))
    return total


def _like(weights: Matrix, tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(weights).to(tensor)


# Over coefficients


class Moments:
    """Q[b,i,j] = Σ_t w_t ⟨τ_i, H_t τ_j⟩ + μ ⟨τ_i, τ_j⟩ and c[b,i] = Σ_t w_t ⟨τ_i, H_t τ_t⟩, in float64.

    The family over coefficients is min λᵀQλ − 2cᵀλ in each block b.
    """

    def __init__(
        self, weights: Matrix, *, anchor: float = 0.0, ridge: float = 0.0, shrink: float = 1.0, blocks: Blocks
    ) -> None:
        n = len(weights)
        self.weights, self.blocks = weights, blocks
        self.anchor, self.ridge, self.shrink = anchor, ridge, shrink
        self.quadratic: Matrix = np.zeros((blocks.count, n, n))
        self.linear: Matrix = np.zeros((blocks.count, n))

    def take(self, pool: Pool, statistics: Statistics | None) -> None:
        """Add up the whole pool: identity without statistics, and for tensors that have none."""
        source, workers = pool.engine()
        grams = statistics if statistics is not None and statistics.kind == "gram" else None
        whole = [name for name in source.shapes if grams is not None and name in grams.axes]
        names = [name for name in source.shapes if name not in whole]
        limit = operator.gram_limit(workers.limit, pool.n)
        cpu = torch.device("cpu")

        def products(piece: Piece, scratch: Scratch) -> Matrix:
            return self.piece(Part(source, scratch, piece.name, piece.start, piece.stop, cpu, statistics))

        work = operator.pieces(source, self.blocks, names, limit)
        workers.run(work, products, then=lambda piece, found: self._add(piece.name, found), serial=source.serial)
        with torch.no_grad():
            for name in whole:
                size, scratch = prod(source.shapes[name]), workers.scratch()
                part = Part(source, scratch, name, 0, size, pool.device, statistics)
                self._add(name, self.matrix(part, partial(_stack_of, source, scratch, name, pool.device)))
        self.quadratic = 0.5 * (self.quadratic + self.quadratic.swapaxes(1, 2))

    def piece(self, part: Part) -> Matrix:
        """Return [Q | c] [n, n + 1] of some elements, whose metric is the identity or a Fisher."""
        stack = part.stack().double()
        weights = _like(self.weights, stack)
        fishers = _fishers(part, len(stack))
        if not fishers:
            products = stack @ stack.T
            quadratic = products * (self.weights.sum() + self.anchor)
            linear = products @ weights
        else:
            metric = torch.full_like(stack[0], self.ridge * self.weights.sum() + self.anchor)
            pulled = self.ridge * (weights @ stack)
            for vector, fisher, weight in zip(stack, fishers, self.weights.tolist(), strict=True):
                metric.add_(fisher, alpha=weight)
                pulled.add_(fisher * vector, alpha=weight)
            quadratic = (stack * metric) @ stack.T
            linear = stack @ pulled
        return np.hstack([quadratic.numpy(), linear.numpy()[:, None]])

    def matrix(self, part: Part, stack: Callable[[int, int], torch.Tensor]) -> Matrix:
        """Return [Q | c] [n, n + 1] of a matrix with Grams; stack(start, stop) gives task vectors of its elements.

        Rows are taken a few at a time, of all experts; where the inputs are on axis 0, rows are not contiguous, and all
        experts' task vectors of the tensor are held.
        """
        axis, n = part.axis, len(self.weights)
        assert axis is not None
        rows, d = as_rows(part.base, part.shape, axis).shape
        metric = torch.zeros(d, d, dtype=torch.float64, device=part.base.device)
        pulled = torch.zeros(rows, d, dtype=torch.float64, device=part.base.device)
        for expert, weight in enumerate(self.weights.tolist()):
            gram = part.statistic(expert)
            assert gram is not None
            scaled = gram.to(torch.float64, copy=True).mul_(weight * self.shrink)
            scaled.diagonal().copy_((gram.diagonal().double() + self.ridge) * weight)
            metric += scaled
            pulled += as_rows(part.task_vector(expert).double(), part.shape, axis) @ scaled
        metric.diagonal().add_(self.anchor)
        held = None if axis == 1 else as_rows(part.stack(), part.shape, axis)
        step = max(1, CHUNK // (n * d))
        found = torch.zeros(n, n + 1, dtype=torch.float64, device=metric.device)
        for a in range(0, rows, step):
            b = min(a + step, rows)
            some = (stack(a * d, b * d) if held is None else held[:, a:b]).reshape(n, b - a, d).double()
            flat = some.reshape(n, -1)
            found[:, :n] += (some @ metric).view(n, -1) @ flat.T
            found[:, n] += flat @ pulled[a:b].reshape(-1)
        return found.cpu().numpy()

    def _add(self, name: str, found: Matrix) -> None:
        row = self.blocks.rows[name].start
        self.quadratic[row] += found[:, :-1]
        self.linear[row] += found[:, -1]


def _stack_of(
    source: TaskVectors, scratch: Scratch, name: str, device: torch.device, start: int, stop: int
) -> torch.Tensor:
    return Part(source, scratch, name, start, stop, device).stack()


def _fishers(part: Part, n: int) -> list[torch.Tensor]:
    """Return the Fishers of a piece, one an expert; none for a tensor without, or with other statistics."""
    if part.statistics is None or part.statistics.kind != "fisher":
        return []
    found = [part.statistic(expert) for expert in range(n)]
    return [fisher for fisher in found if fisher is not None]


# The merge


@dataclass(frozen=True)
class Quadratic(Merge):
    """The minimum of Σ_t w_t (θ − θ_t)ᵀ H_t (θ − θ_t) + μ ‖θ − θ0‖² over weights θ or coefficients Λ.

    metric: H_t; "fisher" and "gram" need statistics, and tensors without any have the identity in their place.
    weights: w by expert name (1 each unless given), "uniform", or "norms": ‖τ_t‖², scaled to a mean of 1.
    anchor: μ. ridge: added to the diagonal of every Fisher or Gram. shrink: factor of the off-diagonals of Grams.
    over: all θ ("weights"), or the pool's points ("coefficients") with one row of Λ for each of the `blocks`, in a
    `domain`: "free" (of many minima that of least norm), "simplex", "capped", or "box" from 0 to `upper`.
    """

    source: ClassVar[str] = (
        "Matena and Raffel (2022), section 3; Jin et al. (2023), section 3; Tam et al. (2024), section 3"
    )

    metric: Literal["identity", "fisher", "gram"] = "identity"
    weights: Mapping[str, float] | Literal["uniform", "norms"] = "uniform"
    anchor: float = 0.0
    ridge: float = 0.0
    shrink: float = 1.0
    over: Literal["weights", "coefficients"] = "weights"
    domain: Literal["free", "simplex", "capped", "box"] = "free"
    upper: float = 1.0
    blocks: Literal["model", "layer", "tensor"] = "layer"

    def __post_init__(self) -> None:
        check_choice(self, "metric", ("identity", "fisher", "gram"))
        check_choice(self, "over", ("weights", "coefficients"))
        check_choice(self, "domain", ("free", "simplex", "capped", "box"))
        check_choice(self, "blocks", ("model", "layer", "tensor"))
        if self.weights not in ("uniform", "norms"):
            if isinstance(self.weights, str) or self.weights is None:
                raise OptionError(
                    "The 'weights' parameter of Quadratic must be 'uniform', 'norms', or a mapping from names of "
                    f"experts to numbers. Got {self.weights!r} instead."
                )
            check_masses(self, self.weights)
        check_number(self, "anchor", 0, math.inf, closed="left")
        check_number(self, "ridge", 0, math.inf, closed="left")
        check_number(self, "shrink", 0, 1)
        check_number(self, "upper", 0, math.inf, closed="neither")
        if self.over == "weights" and self.domain != "free":
            raise OptionError(
                f"The 'domain' parameter of Quadratic constrains coefficients: with domain={self.domain!r} set "
                "over='coefficients'."
            )
        if self.upper != 1 and self.domain != "box":
            raise OptionError("The 'upper' parameter of Quadratic belongs to domain 'box'.")
        if self.metric == "identity" and self.ridge:
            raise OptionError("The 'ridge' parameter of Quadratic belongs to metric 'fisher' or 'gram'.")
        if self.metric != "gram" and self.shrink != 1:
            raise OptionError("The 'shrink' parameter of Quadratic belongs to metric 'gram'.")

    @property
    def whole(self) -> bool:  # type: ignore[override]
        """A Gram couples the entries of a row."""
        return self.metric == "gram"

    @property
    def statistics(self) -> str | None:  # type: ignore[override]
        """Those of the metric."""
        return None if self.metric == "identity" else self.metric

    @property
    def passes(self) -> int:  # type: ignore[override]
        """One for the norms, one (with Grams two) for the matrices of the program, one to merge."""
        matrices = 0 if self.over == "weights" else 2 if self.metric == "gram" else 1
        return 1 + matrices + int(self.weights == "norms")

    @property
    def held(self) -> float:  # type: ignore[override]
        """What a Gram system holds."""
        return GRAM_COPIES

    def coefficients(self, pool: Pool, statistics: Statistics | None = None) -> tuple[Matrix, Blocks]:
        """Return Λ [rows, n] of the minimum over coefficients, and the blocks that its rows belong to."""
        if self.statistics is not None:
            need(statistics, self.statistics, self)
        blocks = pool.blocks(self.blocks)
        moments = Moments(self._masses(pool), anchor=self.anchor, ridge=self.ridge, shrink=self.shrink, blocks=blocks)
        moments.take(pool, statistics if self.statistics is not None else None)
        domain = self._domain()
        rows = zip(moments.quadratic, moments.linear, blocks.names, strict=True)
        return np.stack([minimize(quadratic, linear, domain, name) for quadratic, linear, name in rows]), blocks

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the minimum's rule."""
        if self.over == "coefficients":
            return point_rule(*self.coefficients(pool, statistics))
        weights = self._masses(pool)
        if self.metric == "identity":
            row = weights / (weights.sum() + self.anchor)
            return point_rule(row[None], pool.blocks("model"))
        need(statistics, self.metric, self)
        if self.metric == "fisher":
            return diagonal_rule(weights, anchor=self.anchor, ridge=self.ridge)
        return gram_rule(weights, GramSystem.solve, anchor=self.anchor, ridge=self.ridge, shrink=self.shrink)

    def _masses(self, pool: Pool) -> Matrix:
        if self.weights == "norms":
            squares = np.sum(list(squared_norms(pool).values()), axis=0)
            return squares * (pool.n / squares.sum()) if squares.any() else np.ones(pool.n)
        return masses(None if isinstance(self.weights, str) else self.weights, pool, self)

    def _domain(self) -> Domain:
        return Box(0.0, self.upper) if self.domain == "box" else DOMAINS[self.domain]()


GRAM_COPIES = 36.0
"""Copies of a matrix that a Gram system holds, for inputs up to four times as wide as the outputs."""
