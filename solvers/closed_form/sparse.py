"""Merges of sparsified task vectors: DARE, DELLA, Breadcrumbs, consensus. What they drop is a transform of the pool.

Each comes with two ways to merge what is left: the scaled sum of task arithmetic, or the sign election of TIES.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...pools.transforms.agreement import Consensus
from ...pools.transforms.breadcrumbs import Breadcrumbs
from ...pools.transforms.dare import Dare
from ...pools.transforms.della import Della
from ...pools.transforms.transform import Transform
from ..errors import check_number
from .linear import TaskArithmetic
from .merge import Merge, check_transforms
from .signs import SignMerge


@dataclass(frozen=True)
class Sparse(Merge):
    """What the options of a transform have in common, to be put before the merge of what is left."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_transforms(self)


@dataclass(frozen=True)
class DareOptions(Sparse):
    """The options of `Dare`."""

    density: float = 0.1
    rescale: Literal["density", "l1", "none"] = "density"
    seed: int = 0
    densities: Mapping[str, float] | None = None

    def transforms(self) -> Sequence[Transform]:
        """Return the dropping."""
        return (Dare(self.density, self.rescale, self.seed, self.densities),)


@dataclass(frozen=True)
class DareLinear(DareOptions, TaskArithmetic):
    """θ = θ0 + scale · Σ w_i dare(τ_i)."""

    source: ClassVar[str] = "Yu et al. (2024), Language Models are Super Mario, equations 2 and 3"


@dataclass(frozen=True)
class DareTies(DareOptions, SignMerge):
    """θ = θ0 + scale · disjoint merge of dare(τ_i); mergekit's: rescale="l1", zero="plus"."""

    source: ClassVar[str] = "Yu et al. (2024), Language Models are Super Mario, section 3.3"


@dataclass(frozen=True)
class DellaOptions(Sparse):
    """The options of `Della`."""

    density: float = 0.5
    epsilon: float = 0.2
    rescale: Literal["probability", "l1", "none"] = "probability"
    window: Literal["paper", "symmetric"] = "paper"
    seed: int = 0
    densities: Mapping[str, float] | None = None

    def transforms(self) -> Sequence[Transform]:
        """Return the dropping."""
        return (Della(self.density, self.epsilon, self.rescale, self.window, self.seed, self.densities),)


@dataclass(frozen=True)
class DellaLinear(DellaOptions, TaskArithmetic):
    """θ = θ0 + scale · Σ w_i della(τ_i)."""

    source: ClassVar[str] = "Deep et al. (2024), DELLA-Merging, section 3 without election"


@dataclass(frozen=True)
class DellaTies(DellaOptions, SignMerge):
    """θ = θ0 + scale · disjoint merge of della(τ_i)."""

    source: ClassVar[str] = "Deep et al. (2024), DELLA-Merging, section 3"


@dataclass(frozen=True)
class BreadcrumbsOptions(Sparse):
    """The options of `Breadcrumbs`."""

    density: float = 0.14
    top: float = 0.01
    densities: Mapping[str, float] | None = None

    def transforms(self) -> Sequence[Transform]:
        """Return the masking."""
        return (Breadcrumbs(self.density, self.top, self.densities),)


@dataclass(frozen=True)
class BreadcrumbsLinear(BreadcrumbsOptions, TaskArithmetic):
    """θ = θ0 + scale · Σ w_i breadcrumbs(τ_i)."""

    source: ClassVar[str] = "Davari and Belilovsky (2024), Model Breadcrumbs, equations 2 and 3"


@dataclass(frozen=True)
class BreadcrumbsTies(BreadcrumbsOptions, SignMerge):
    """θ = θ0 + scale · disjoint merge of breadcrumbs(τ_i)."""

    source: ClassVar[str] = "Davari and Belilovsky (2024), Model Breadcrumbs; Yadav et al. (2023), TIES-Merging"


@dataclass(frozen=True)
class ConsensusOptions(Sparse):
    """The options of `Consensus`; `multitask` scales the sum of task vectors that experts are compared with."""

    tall: float = 0.4
    agree: int = 2
    multitask: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "multitask", 0, math.inf, closed="neither")
        super().__post_init__()

    def transforms(self) -> Sequence[Transform]:
        """Return the consensus mask."""
        return (Consensus(self.tall, self.agree, self.multitask),)


@dataclass(frozen=True)
class ConsensusLinear(ConsensusOptions, TaskArithmetic):
    """θ = θ0 + scale · Σ w_i m ∘ τ_i,   m = 1[at least `agree` experts have the entry in their TALL mask]."""

    source: ClassVar[str] = "Wang et al. (2024), Localizing Task Information, equations 4 and 6"
