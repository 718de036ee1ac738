"""Merges that are points of the pool: coefficients that need no data at all.

    θ = θ0 + Σ_i λ_i τ_i

The average has λ_i = 1/n, task arithmetic λ_i = scale, PAINT any α with the rest on the base; a running mean over
checkpoints weighs them equally, an exponential one by decay. They agree wherever their coefficients do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...pools import Blocks, Pool
from ..errors import OptionError, check_choice, check_number
from .merge import Linear, Matrix, check_weights, expert_weights, only


def one_row(pool: Pool, coefficients: Matrix) -> tuple[Matrix, Blocks]:
    """Return coefficients [n] as the one row of the whole model."""
    return np.asarray(coefficients, dtype=np.float64)[None, :], pool.blocks("model")


@dataclass(frozen=True)
class Average(Linear):
    """θ = Σ w_i θ_i / Σ w_i, with weights by expert name (1 each unless given).

    `normalize=False` leaves out the division, and the base gets 1 − Σ w_i.
    """

    source: ClassVar[str] = "Wortsman et al. (2022), Model soups, section 2"

    weights: Mapping[str, float] | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        check_weights(self, self.weights)
        check_choice(self, "normalize", (True, False))

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return the weights over their sum."""
        found = expert_weights(self.weights, pool, self, default=1.0)
        if not self.normalize:
            return one_row(pool, found)
        total = math.fsum(found)
        if total == 0 or not math.isfinite(1 / total):
            raise OptionError(
                "The 'weights' parameter of Average must not sum to 0, by which it divides; give other weights, or "
                "normalize=False."
            )
        return one_row(pool, found / total)


@dataclass(frozen=True)
class TaskArithmetic(Linear):
    """θ = θ0 + scale · Σ w_i τ_i."""

    source: ClassVar[str] = "Ilharco et al. (2023), Editing Models with Task Arithmetic, section 4"

    scale: float = 0.3
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_number(self, "scale", -math.inf, math.inf, closed="neither")
        check_weights(self, self.weights)

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return the scaled weights."""
        return one_row(pool, self.scale * expert_weights(self.weights, pool, self, default=1.0))


@dataclass(frozen=True)
class Negation(Linear):
    """θ = θ0 − scale · Σ τ_i: the experts' tasks are unlearned."""

    source: ClassVar[str] = "Ilharco et al. (2023), Editing Models with Task Arithmetic, section 3"

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "scale", 0, math.inf, closed="neither")

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return −scale for every expert."""
        return one_row(pool, np.full(pool.n, -self.scale))


@dataclass(frozen=True)
class Analogy(Linear):
    """θ = θ0 + scale · (τ_c + τ_b − τ_a) for three experts a, b, c: "a is to b as c is to the result".

    `a`, `b`, `c` name them; unless named, they are the pool's three in its order.
    """

    source: ClassVar[str] = "Ilharco et al. (2023), Editing Models with Task Arithmetic, section 5"

    a: str | None = None
    b: str | None = None
    c: str | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "scale", 0, math.inf, closed="neither")
        given = [name for name in (self.a, self.b, self.c) if name is not None]
        if len(given) not in (0, 3) or len(set(given)) != len(given):
            raise OptionError(f"Analogy needs three different experts a, b and c, or none named. Got {given} instead.")

    def check(self, pool: Pool) -> None:
        """Three experts, unless they are named."""
        if self.a is None:
            only(pool, 3, self, "a, b and c of τ_c + (τ_b − τ_a)")

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return −1, 1, 1 times the scale."""
        names = pool.names if self.a is None else (self.a, self.b, self.c)
        signs = {str(name): sign * self.scale for name, sign in zip(names, (-1, 1, 1), strict=True)}
        return one_row(pool, expert_weights(signs, pool, self, default=0.0))


@dataclass(frozen=True)
class Paint(Linear):
    """θ = (1 − Σ α_i) θ0 + Σ α_i θ_i, with `alpha` for every expert or `weights` by name.

    Unless given, α = 1/(n + 1): base and experts alike.
    """

    source: ClassVar[str] = "Ilharco et al. (2022), Patching Open-Vocabulary Models by Interpolating Weights, section 2"

    alpha: float | None = None
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_weights(self, self.weights)
        if self.alpha is not None:
            check_number(self, "alpha", 0, 1)

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return α."""
        alpha = 1 / (pool.n + 1) if self.alpha is None else self.alpha
        return one_row(pool, expert_weights(self.weights, pool, self, default=alpha))


@dataclass(frozen=True)
class WiseFT(Linear):
    """θ = (1 − α) θ0 + α θ_1, for one expert."""

    source: ClassVar[str] = "Wortsman et al. (2022), Robust Fine-Tuning of Zero-Shot Models, equation 1"

    alpha: float = 0.5

    def __post_init__(self) -> None:
        check_number(self, "alpha", 0, 1)

    def check(self, pool: Pool) -> None:
        """One expert."""
        only(pool, 1, self, "it interpolates between the base and one fine-tuned model")

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return α."""
        return one_row(pool, np.array([self.alpha]))


@dataclass(frozen=True)
class Expo(Linear):
    """θ = θ_1 + α (θ_1 − θ0), for one expert: beyond the aligned model, away from the one it was aligned from."""

    source: ClassVar[str] = "Zheng et al. (2024), Weak-to-Strong Extrapolation Expedites Alignment, equation 2"

    alpha: float = 0.3

    def __post_init__(self) -> None:
        check_number(self, "alpha", 0, math.inf, closed="neither")

    def check(self, pool: Pool) -> None:
        """One expert."""
        only(pool, 1, self, "it extrapolates beyond one aligned model; the base is the model it was aligned from")

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return 1 + α."""
        return one_row(pool, np.array([1 + self.alpha]))


@dataclass(frozen=True)
class SWA(Linear):
    """The mean of the checkpoints from index `first` (from 0) on, every `every`-th, in the order of the pool.

    Equal to the running form W ← (k W + θ_k) / (k + 1).
    """

    source: ClassVar[str] = "Izmailov et al. (2018), Averaging Weights Leads to Wider Optima, algorithm 1"

    first: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        check_number(self, "first", 0, math.inf, integer=True)
        check_number(self, "every", 1, math.inf, integer=True)

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return 1/k for the k checkpoints that are averaged."""
        found = np.zeros(pool.n)
        found[self.first :: self.every] = 1.0
        if not found.any():
            raise OptionError(
                f"The 'first' parameter of SWA must be an index of one of the {pool.n} checkpoints, from 0. "
                f"Got {self.first!r} instead."
            )
        return one_row(pool, found / found.sum())


@dataclass(frozen=True)
class EMA(Linear):
    """W ← decay · W + (1 − decay) · θ_k over the checkpoints in the order of the pool, starting from the first one.

    With `start="base"`, the average starts from the base.
    """

    source: ClassVar[str] = "Tarvainen and Valpola (2017), Mean Teachers Are Better Role Models, equation 1"

    decay: float = 0.9
    start: str = "first"

    def __post_init__(self) -> None:
        check_number(self, "decay", 0, 1, closed="left")
        check_choice(self, "start", ("first", "base"))

    def coefficients(self, pool: Pool) -> tuple[Matrix, Blocks]:
        """Return (1 − decay) · decay^(n − k) for k = 1..n; the first one takes what is left, or the base does."""
        found = (1 - self.decay) * self.decay ** np.arange(pool.n - 1, -1, -1, dtype=np.float64)
        if self.start == "first":
            found[0] = self.decay ** (pool.n - 1)
        return one_row(pool, found)
