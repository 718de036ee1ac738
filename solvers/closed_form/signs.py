"""Merges that look at signs and magnitudes across experts, entry by entry: TIES, MagMax, EMR."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ...pools import Pool, operator
from ...pools.sources import Scratch
from ...pools.transforms.transform import Transform
from ...pools.transforms.trim import Trim
from ..errors import check_choice, check_number
from .merge import Merge, Part, Rule, check_transforms, check_weights, expert_weights

if TYPE_CHECKING:
    from ...pools.statistics import Statistics


def disjoint(stack: torch.Tensor, weights: torch.Tensor, *, mean: bool, zero: float) -> torch.Tensor:
    """Return the weighted sum [m] of the entries [n, m] whose sign is that of the total, or their weighted mean.

    `stack` is overwritten. `zero` is the sign of a total of 0: +1 or −1, or 0 to drop such entries.
    """
    if not bool((weights == 1).all()):
        stack *= weights.unsqueeze(1)
    total = stack.sum(0)
    signs = total.sign()
    if zero:
        signs = torch.where(signs == 0, zero, signs)
    agrees = (stack * signs) > 0
    stack *= agrees
    merged = stack.sum(0)
    if not mean:
        return merged
    if bool((weights == 1).all()):
        divisor = agrees.sum(0, dtype=torch.float32)
    else:
        divisor = (agrees * weights.unsqueeze(1)).sum(0)
    return torch.where(divisor == 0, merged, merged / divisor)


@dataclass(frozen=True)
class SignMerge(Merge):
    """θ = θ0 + scale · disjoint merge of the (transformed) task vectors."""

    scale: float = 0.3
    merge: Literal["mean", "sum"] = "mean"
    weights: Mapping[str, float] | None = None
    zero: Literal["drop", "plus", "majority"] = "drop"

    def __post_init__(self) -> None:
        check_number(self, "scale", -math.inf, math.inf, closed="neither")
        check_choice(self, "merge", ("mean", "sum"))
        check_choice(self, "zero", ("drop", "plus", "majority"))
        check_weights(self, self.weights)

    @property
    def passes(self) -> int:  # type: ignore[override]
        """The majority of signs takes a pass of its own."""
        return 2 if self.zero == "majority" else 1

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the disjoint merge."""
        weights = torch.from_numpy(expert_weights(self.weights, pool, self, default=1.0)).float()
        zero = {"drop": 0.0, "plus": 1.0}.get(self.zero)
        sign = majority(pool, weights) if zero is None else zero

        def rule(part: Part) -> torch.Tensor:
            merged = disjoint(part.stack(), weights.to(part.device), mean=self.merge == "mean", zero=sign)
            return torch.add(part.base, merged, alpha=self.scale)

        return rule


def majority(pool: Pool, weights: torch.Tensor) -> float:
    """Return the sign of the sum over all entries of the signs of the totals, −1 if that is 0 as in the authors' code.

    One pass.
    """
    source, workers = pool.stream()
    sizes = {name: prod(shape) for name, shape in pool.tensors.items()}
    limit = min(workers.limit, operator.gram_limit(operator.PIECE, pool.n))
    items = [(name, a, min(a + limit, size)) for name, size in sizes.items() for a in range(0, size, limit)]
    found = 0.0

    def balance(item: tuple[str, int, int], scratch: Scratch) -> float:
        part = Part(source, scratch, *item, torch.device("cpu"))
        return float((part.stack() * weights.unsqueeze(1)).sum(0).sign().sum(dtype=torch.float64))

    def add(item: tuple[str, int, int], value: float) -> None:
        nonlocal found
        found += value

    workers.run(items, balance, then=add, serial=source.serial)
    return 1.0 if found > 0 else -1.0


@dataclass(frozen=True)
class Ties(SignMerge):
    """Trim each task vector to its largest entries, elect a sign for each entry, merge those that agree.

        γ = sgn Σ τ̂_i,   τ = mean of the τ̂_i with sgn τ̂_i = γ,   θ = θ0 + scale · τ

    The paper trims over the whole model ("model") and takes the disjoint mean. Its authors' code and FusionBench:
    trim="model", zero="majority", with merge="mean" or "sum"; mergekit: trim="tensor", zero="plus", merge="mean" or,
    with `normalize: false`, "sum". `zero` is what happens where the total is exactly 0.
    """

    source: ClassVar[str] = "Yadav et al. (2023), TIES-Merging, section 4 and algorithm 1"

    density: float = 0.2
    trim: Literal["model", "tensor"] = "model"
    densities: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "density", 0, 1, closed="right")
        check_choice(self, "trim", ("model", "tensor"))
        check_transforms(self)

    def transforms(self) -> Sequence[Transform]:
        """Return the trimming."""
        return (Trim(self.density, self.trim, self.densities),)


@dataclass(frozen=True)
class MagMax(Merge):
    """θ = θ0 + scale · τ with, in each entry, the τ_i of largest magnitude (of x and −x, the positive one)."""

    source: ClassVar[str] = "Marczak et al. (2024), MagMax, section 4"

    scale: float = 0.5

    def __post_init__(self) -> None:
        check_number(self, "scale", -math.inf, math.inf, closed="neither")

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the entry-wise choice."""
        return _unified(largest, self.scale)


@dataclass(frozen=True)
class Emr(Merge):
    """θ = θ0 + scale · γ ∘ max over the τ_i with sgn τ_i = γ of |τ_i|,   γ = sgn Σ τ_i: EMR's unified vector.

    EMR applies a mask and a rescaler for each task at inference; this is its part that all tasks share.
    """

    source: ClassVar[str] = "Huang et al. (2024), EMR-Merging, equation 3"

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "scale", -math.inf, math.inf, closed="neither")

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the unified vector's rule."""
        return _unified(unified, self.scale)


def largest(stack: torch.Tensor) -> torch.Tensor:
    """Return the entry of largest magnitude [m] of task vectors [n, m], whatever their order."""
    high, low = stack.amax(0), stack.amin(0)
    return torch.where(high >= -low, high, low)


def unified(stack: torch.Tensor) -> torch.Tensor:
    """Return EMR's unified vector [m] of task vectors [n, m]."""
    signs = stack.sum(0).sign()
    return signs * (stack * signs).clamp_min(0).amax(0)


def _unified(choose: Callable[[torch.Tensor], torch.Tensor], scale: float) -> Rule:
    def rule(part: Part) -> torch.Tensor:
        return torch.add(part.base, choose(part.stack()), alpha=scale)

    return rule
