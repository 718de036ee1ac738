"""Merges of matrices by their singular vectors: TSV-M, Iso-C, Iso-CTS and KnOTS.

Matrices are the tensors of two dimensions, as in the authors' code; of all others (vectors, convolutions, scalars) the
mean of the task vectors is taken. Experts are read one at a time, so memory does not grow with their number.
Directions whose singular value is 0 (to rounding) are undetermined, and take no part.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ...pools import Pool
from ...pools.magnitudes import Cut, cut
from ...pools.sources import Shape
from ..errors import check_choice, check_number
from .merge import Merge, Part, Rule, check_weights, expert_weights, not_finite

if TYPE_CHECKING:
    from ...pools.statistics import Statistics


NOTHING = 1e-12  # squared singular values below this, relative to the largest, count as 0
ROWS = 1024  # of a matrix that are in float64 at a time


def eigen(matrix: torch.Tensor, scale: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return S [r] and V [p, r] of A [m, p], float64, smallest first, from AᵀA: those that are not 0 to rounding.

    In float64 that finds singular values down to 1e-6 of the largest more exactly than LAPACK's SVD does in float32,
    in less time, and does not fail on repeated ones. `scale` is the norm of what the matrix was computed from, if that
    may be larger.
    """
    square = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for start in range(0, len(matrix), ROWS):
        rows = matrix[start : start + ROWS].double()
        square.addmm_(rows.T, rows)
    values, vectors = torch.linalg.eigh(square)
    first = int((values <= NOTHING * values[-1].clamp_min(scale**2)).sum()) if len(values) else 0
    return values[first:].sqrt(), vectors[:, first:]


def times(matrix: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the product of a float32 matrix and a float64 one, in float64, as float32."""
    found = torch.empty(len(matrix), other.shape[1], device=matrix.device)
    for start in range(0, len(matrix), ROWS):
        found[start : start + ROWS] = matrix[start : start + ROWS].double() @ other
    return found


def factors(matrix: torch.Tensor, count: int, scale: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U [m, r], S [r], Vᵀ [r, p] of the r ≤ count largest singular values; those that are 0 are left out."""
    m, p = matrix.shape
    if m < p:
        v, s, uh = factors(matrix.T, count, scale)
        return uh.T, s, v.T
    values, vectors = eigen(matrix, scale)
    values, vectors = values[max(0, len(values) - count) :], vectors[:, max(0, len(values) - count) :]
    return times(matrix, vectors / values), values.float(), vectors.T.float()


def orthogonal(matrix: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return U Vᵀ of A = U S Vᵀ, and the sum of S.

    U Vᵀ is the nearest matrix with orthonormal columns, or rows where A has more columns than rows; if its columns are
    not independent, it is so on the space that they span.
    """
    m, p = matrix.shape
    if m < p:
        found, total = orthogonal(matrix.T)
        return found.T, total
    values, vectors = eigen(matrix)
    return times(matrix, (vectors / values) @ vectors.T), float(values.sum())


def whitened(parts: list[torch.Tensor], axis: int) -> torch.Tensor:
    """Return the nearest orthonormal columns (axis 1) or rows (axis 0) to the parts' together; empties the list."""
    stacked = torch.cat(parts, axis)
    parts.clear()
    return orthogonal(stacked)[0]


def mean(part: Part) -> torch.Tensor:
    """Return the mean of the task vectors [size], reading one at a time."""
    return total(part).div_(part.n)


def total(part: Part, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return the (weighted) sum of the task vectors [size], reading one at a time."""
    found = torch.zeros(part.size, device=part.device)
    for i in range(part.n):
        found.add_(part.task_vector(i), alpha=1.0 if weights is None else float(weights[i]))
    return found


def decomposed(matrix: Callable[[Part], torch.Tensor], part: Part) -> torch.Tensor:
    """Return matrix(part); raise PoolError that names the tensor where a decomposition fails, as it does for NaN."""
    try:
        return matrix(part)
    except LinAlgError as error:
        raise not_finite(part.name) from error


@dataclass(frozen=True)
class Spectral(Merge):
    """θ = θ0 + scale · a function of the matrices τ_i; of tensors that are no matrices, scale · mean of the τ_i."""

    whole: ClassVar[bool] = True
    held: ClassVar[float] = 20.0  # most of it LAPACK's: copies, factors and workspace, where it fails again in float64

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "scale", -math.inf, math.inf, closed="neither")

    @abstractmethod
    def matrix(self, part: Part) -> torch.Tensor:
        """Return the merged task vector [m, p] of a matrix."""

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the rule; nothing is needed of the whole pool."""

        def rule(part: Part) -> torch.Tensor:
            found = decomposed(self.matrix, part).reshape(-1) if len(part.shape) == 2 else mean(part)
            return torch.add(part.base, found, alpha=self.scale)

        return rule


@dataclass(frozen=True)
class TSVM(Spectral):
    """Of each of n matrices its min(m, p) / n largest singular triples, whitened against those of the others.

        τ = U⊥ diag(S) V⊥ᵀ,   U⊥, V⊥: the orthogonal matrices nearest to the stacked singular vectors [U_1 .. U_n] and
        [V_1 .. V_n]

    A matrix with fewer rows or columns than there are experts gets the mean of the τ_i.
    """

    source: ClassVar[str] = "Gargiulo et al. (2025), Task Singular Vectors: Reducing Task Interference, algorithm 1"

    def matrix(self, part: Part) -> torch.Tensor:
        """Decompose one expert after the other, then whiten."""
        count = min(part.shape) // part.n
        if count == 0:
            return mean(part)
        left, values, right = [], [], []
        for i in range(part.n):
            u, s, vh = factors(part.task_vector(i).view(part.shape), count)
            left.append(u)
            values.append(s)
            right.append(vh)
        turned = whitened(left, 1)
        turned *= torch.cat(values)
        return turned @ whitened(right, 0)


@dataclass(frozen=True)
class IsoC(Spectral):
    """The sum of the task vectors with all its singular values replaced by their mean: Σ τ_i = U S Vᵀ → mean(S) U Vᵀ.

    The mean is over min(m, p) singular values; directions of singular value 0 stay 0.
    """

    source: ClassVar[str] = "Marczak et al. (2025), No Task Left Behind: Isotropic Model Merging, section 4.1"

    def matrix(self, part: Part) -> torch.Tensor:
        """Flatten the spectrum of the sum."""
        found, trace = orthogonal(total(part).view(part.shape))
        return found * (trace / min(part.shape))


@dataclass(frozen=True)
class IsoCTS(Spectral):
    """Iso-C with room for each task: the top directions of Σ τ_i, and those of each τ_i that these leave out.

    Of min(m, p) directions the fraction `common` is taken from the sum, the rest in equal parts from the experts; left
    and right vectors are made orthogonal, and all singular values are replaced by their mean.
    """

    source: ClassVar[str] = "Marczak et al. (2025), No Task Left Behind: Isotropic Model Merging, section 4.2"
    passes: ClassVar[int] = 2
    held: ClassVar[float] = 26.0

    common: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "common", 0, 1)

    def matrix(self, part: Part) -> torch.Tensor:
        """Gather the common and the specific directions, then flatten."""
        size, n = min(part.shape), part.n
        own = round((size - int(size * self.common)) / n)
        own = min(own, size // n)
        shared = size - own * n
        common, s, vh = factors(total(part).view(part.shape), shared)
        left, values, right = [common], [s], [vh]
        for i in range(n if own else 0):
            matrix = part.task_vector(i).view(part.shape)
            norm = float(torch.linalg.vector_norm(matrix))
            matrix -= common @ (common.T @ matrix)
            u, s, vh = factors(matrix, own, norm)
            left.append(u)
            values.append(s)
            right.append(vh)
        del common
        return whitened(left, 1).mul_(torch.cat(values).sum() / size) @ whitened(right, 0)


@dataclass(frozen=True)
class Knots(Spectral):
    """Merge in the common left basis of all updates: [τ_1 .. τ_n] = U S [V_1 .. V_n]ᵀ, τ = U · merge of the S V_iᵀ.

    `inner="ties"` trims each S V_iᵀ to its `density` largest entries, elects signs and takes the disjoint mean of what
    agrees; `inner="linear"` adds them, which is task arithmetic. Trimming is by matrix (the authors' code has one
    threshold for all matrices of an expert). Made for low-rank updates; `weights` are by expert name.
    """

    source: ClassVar[str] = "Stoica et al. (2025), Model Merging with SVD to Tie the Knots, section 4"
    passes: ClassVar[int] = 3

    inner: Literal["ties", "linear"] = "ties"
    density: float = 0.2
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "inner", ("ties", "linear"))
        check_number(self, "density", 0, 1, closed="right")
        check_weights(self, self.weights)

    def memory(self, shapes: Iterable[Shape], n: int) -> int:
        """Bytes of the basis of the largest matrix, in float64 with the workspace of its decomposition."""
        largest = 0
        for m, p in (shape for shape in shapes if len(shape) == 2):
            side = min(m, n * p)
            largest = max(largest, 8 * (5 * side**2 + 3 * (m * side if side < m else 0) + 6 * m * p))
        return largest

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Look up the weights."""
        weights = torch.from_numpy(expert_weights(self.weights, pool, self, default=1.0)).float()

        def rule(part: Part) -> torch.Tensor:
            if len(part.shape) == 2:
                found = decomposed(lambda part: self._merged(part, weights), part).reshape(-1)
            else:
                found = total(part, weights).div_(part.n)
            return torch.add(part.base, found, alpha=self.scale)

        return rule

    def matrix(self, part: Part) -> torch.Tensor:
        """Merge with weights of 1."""
        return self._merged(part, torch.ones(part.n))

    def _merged(self, part: Part, weights: torch.Tensor) -> torch.Tensor:
        """Rotate one expert after the other into the basis: once for the signs, once for what agrees with them."""
        basis = left_basis(part)
        turned = torch.zeros(basis.shape[1], part.shape[1], device=part.device)
        cuts: list[Cut] = []
        for i in range(part.n):
            turned += weights[i] * self._trimmed(part, i, basis, cuts)
        if self.inner == "linear":
            return basis @ turned
        signs = turned.sign()
        turned.zero_()
        divisor = torch.zeros_like(turned)
        for i in range(part.n):
            value = self._trimmed(part, i, basis, cuts)
            agrees = value * (weights[i] * signs) > 0
            turned += weights[i] * (value * agrees)
            divisor += weights[i] * agrees
        return basis @ turned.div_(divisor.masked_fill_(divisor == 0, 1.0))

    def _trimmed(self, part: Part, expert: int, basis: torch.Tensor, cuts: list[Cut]) -> torch.Tensor:
        """Return S V_iᵀ = Uᵀ τ_i [r, p], trimmed; finds the cut when an expert is seen for the first time."""
        value = basis.T @ part.task_vector(expert).view(part.shape)
        if self.inner == "linear" or self.density == 1:
            return value
        magnitudes = value.abs().view(-1)
        if len(cuts) == expert:
            cuts.append(cut(magnitudes.cpu().numpy(), max(1, int(self.density * value.numel()))))
        return value.mul_(cuts[expert].above(magnitudes, 0).view_as(value))


def left_basis(part: Part) -> torch.Tensor:
    """Return the left singular vectors U [m, r] of T = [τ_1 .. τ_n], from T Tᵀ, or from Tᵀ T where that is smaller."""
    m, p = part.shape
    if part.n * p < m:
        stacked = torch.cat([part.task_vector(i).view(m, p) for i in range(part.n)], 1)
        values, vectors = eigen(stacked)
        return times(stacked, vectors.div_(values))
    square = torch.zeros(m, m, dtype=torch.float64, device=part.device)
    for i in range(part.n):
        matrix = part.task_vector(i).view(m, p).double()
        square.addmm_(matrix, matrix.T)
    values, vectors = torch.linalg.eigh(square)
    del square
    return vectors[:, int((values <= values[-1] * NOTHING).sum()) :].float()
