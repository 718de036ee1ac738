"""Merges whose coefficients follow from norms and angles of task vectors: MetaGPT and Model Stock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import numpy as np
import torch

from ...pools import Blocks, Pool, operator
from ...pools.sources import Scratch
from ..errors import check_choice
from .linear import one_row
from .merge import Linear, Matrix, Part, not_finite

SINGULAR = 1e-6  # a ratio whose denominator is smaller is taken as 0


@dataclass(frozen=True)
class MetaGPT(Linear):
    """θ = θ0 + Σ λ_i τ_i,   λ_i = ‖τ_i‖² / Σ_k ‖τ_k‖²: the average weighted by squared norms, over the whole model.

    It minimizes Σ_i ‖τ_i‖² ‖θ − θ_i‖².
    """

    source: ClassVar[str] = "Zhou et al. (2024), MetaGPT: Merging LLMs Using Model Exclusive Task Arithmetic, section 3"
    passes: ClassVar[int] = 2

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return the shares of the squared norms; 0 if all of them are."""
        norms = np.sum(list(squared_norms(pool).values()), axis=0)
        total = norms.sum()
        return one_row(pool, norms / total if total > 0 else np.zeros(pool.n))


@dataclass(frozen=True)
class ModelStock(Linear):
    """θ = θ0 + t · mean of the τ_i in each tensor,   t = n cos φ / (1 + (n − 1) cos φ).

    φ is the angle between task vectors. Beyond two, cos φ is the mean over pairs of their cosines (`average="cosine"`,
    as in mergekit) or the cosine of the mean over pairs of their angles (`average="angle"`, as in FusionBench); pairs
    with a task vector of 0 count as orthogonal. t is negative for cos φ < 0, and 0 where its denominator vanishes; one
    expert is returned as it is.
    """

    source: ClassVar[str] = "Jang et al. (2024), Model Stock: All We Need Is Just a Few Fine-Tuned Models, equation 3"
    passes: ClassVar[int] = 2

    average: Literal["cosine", "angle"] = "cosine"

    def __post_init__(self) -> None:
        check_choice(self, "average", ("cosine", "angle"))

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return t / n, by tensor."""
        blocks = pool.blocks("tensor")
        found = grams(pool)
        matrix = np.empty((blocks.count, pool.n))
        for name, rows in blocks.rows.items():
            matrix[rows] = self._ratio(found[name]) / pool.n
        return matrix, blocks

    def _ratio(self, gram: Matrix) -> float:
        """Return t from the inner products [n, n] of one tensor's task vectors."""
        n = len(gram)
        if n == 1:
            return 1.0
        norms = np.sqrt(np.diagonal(gram))
        scale = np.outer(norms, norms)
        cosines = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)[np.triu_indices(n, 1)].clip(-1, 1)
        cosine = float(cosines.mean() if self.average == "cosine" else np.cos(np.arccos(cosines).mean()))
        below = 1 + (n - 1) * cosine
        return n * cosine / below if abs(below) >= SINGULAR else 0.0


def squared_norms(pool: Pool) -> dict[str, Matrix]:
    """Return ‖τ_i‖² of each tensor, [n], summed in float64, in one pass."""
    return _sums(
        pool, lambda part: torch.linalg.vector_norm(part.stack(), dim=1, dtype=torch.float64).square_(), (pool.n,)
    )


def grams(pool: Pool, *, raw: bool = False) -> dict[str, Matrix]:
    """Return the inner products [n, n] of each tensor's task vectors, or of its weights (`raw`), in one pass.

    All in float64, unlike `Pool.gram`: float32 products do not tell the small angles between weights of models with a
    common base, and are off by 3e-4 in the angle of parallel task vectors.
    """

    def products(part: Part) -> torch.Tensor:
        stack = part.stack().double()
        if raw:
            stack += part.base
        return stack @ stack.T

    return _sums(pool, products, (pool.n, pool.n))


def _sums(pool: Pool, of: Callable[[Part], torch.Tensor], shape: tuple[int, ...]) -> dict[str, Matrix]:
    """Return the sum of `of` over the pieces of each tensor, taken in order, so that threads make no difference."""
    source, workers = pool.stream()
    limit = min(workers.limit, operator.gram_limit(operator.PIECE, pool.n))
    found = {name: np.zeros(shape) for name in pool.tensors}
    items = [
        (name, start, min(start + limit, prod(size)))
        for name, size in pool.tensors.items()
        for start in range(0, prod(size), limit)
    ]

    def measure(item: tuple[str, int, int], scratch: Scratch) -> torch.Tensor:
        return of(Part(source, scratch, *item, torch.device("cpu")))

    def add(item: tuple[str, int, int], part: torch.Tensor) -> None:
        found[item[0]] += part.numpy()

    workers.run(items, measure, then=add, serial=source.serial)
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise not_finite(name)
    return found
