"""Merges on the sphere: SLERP of two models, the mean of more by direction, each tensor on its own.

    θ = Σ a_i θ_i    or    θ = θ0 + Σ a_i τ_i

The coefficients a follow from the inner products of the vectors that are interpolated, which one streaming pass takes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from ...pools import Pool
from ..errors import check_choice, check_number
from .merge import Matrix, Merge, Part, Rule, only
from .norms import grams

if TYPE_CHECKING:
    from ...pools.statistics import Statistics

TINY = 1e-8  # a shorter vector has no direction
STEPS = 100  # of the iteration for the mean, which converges linearly


@dataclass(frozen=True)
class Spherical(Merge):
    """Combinations of the models' weights, or of their task vectors, by coefficients from angles and norms."""

    passes: ClassVar[int] = 2

    of: Literal["weights", "task-vectors"] = "weights"

    def __post_init__(self) -> None:
        check_choice(self, "of", ("weights", "task-vectors"))

    @abstractmethod
    def coefficients(self, gram: Matrix) -> Matrix:
        """Return the coefficients [n] of vectors with these inner products [n, n]."""

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Take the inner products of each tensor's vectors and return the combination."""
        raw = self.of == "weights"
        found = {name: self.coefficients(gram) for name, gram in grams(pool, raw=raw).items()}

        def rule(part: Part) -> torch.Tensor:
            weights = found[part.name]
            stack = part.stack()
            stack *= torch.from_numpy(weights).to(stack).unsqueeze(1)
            return torch.add(stack.sum(0), part.base, alpha=math.fsum(weights) if raw else 1.0)

        return rule


def cosines(gram: Matrix) -> tuple[Matrix, Matrix]:
    """Return cosines [n, n] and norms [n]; vectors without a direction have cosine 0 with all."""
    norms = np.sqrt(np.diagonal(gram))
    scale = np.outer(norms, norms)
    usable = np.outer(norms > TINY, norms > TINY)
    return np.divide(gram, scale, out=np.zeros_like(gram), where=usable).clip(-1, 1), norms


@dataclass(frozen=True)
class Slerp(Spherical):
    """θ = sin((1 − t) Ω)/sin Ω · θ_1 + sin(t Ω)/sin Ω · θ_2, with the angle Ω between them: from t = 0 to t = 1.

    Two experts, in the order of the pool; each tensor on its own, its weights as they are (`of="weights"`, as in
    mergekit, where the base is the first of the two models) or as task vectors from the base (`of="task-vectors"`).
    Where |cos Ω| > `parallel` it is (1 − t) θ_1 + t θ_2, which is the limit; weights of models that were fine-tuned
    from one base mostly are that parallel, task vectors are not.
    """

    source: ClassVar[str] = "Shoemake (1985), Animating Rotation with Quaternion Curves"

    t: float = 0.5
    parallel: float = 0.9995

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "t", 0, 1)
        check_number(self, "parallel", 0, 1, closed="left")

    def check(self, pool: Pool) -> None:
        """Two experts."""
        only(pool, 2, self, "the ends of the arc; spherical-mean takes more")

    def coefficients(self, gram: Matrix) -> Matrix:
        """Return the two coefficients."""
        cosine = float(cosines(gram)[0][0, 1])
        if abs(cosine) > self.parallel:
            return np.array([1 - self.t, self.t])
        angle = math.acos(cosine)
        return np.array([math.sin((1 - self.t) * angle), math.sin(self.t * angle)]) / math.sin(angle)


@dataclass(frozen=True)
class SphericalMean(Spherical):
    """θ = mean norm · the point of the unit sphere nearest to all directions: min_m Σ_i angle(m, θ_i/‖θ_i‖)².

    Each tensor on its own. Tensors of 0 count in the norm and not in the direction. Where the directions do not lie
    within 90° of their chordal mean, the nearest point need not be unique, and the arithmetic mean is taken instead; so
    it is for tensors of one element with different signs. For two vectors of equal norm this is SLERP at t = 1/2.
    """

    source: ClassVar[str] = "Buss and Fillmore (2001), Spherical Averages, algorithm A1; Karcher (1977)"

    def coefficients(self, gram: Matrix) -> Matrix:
        """Return mean norm · c_i / ‖θ_i‖ with the mean Σ c_i u_i of the directions u_i."""
        angles, norms = cosines(gram)
        usable = norms > TINY
        result = np.zeros(len(norms))
        if not usable.any():
            return result
        mean = karcher(angles[np.ix_(usable, usable)])
        if mean is None:
            return np.full(len(norms), 1 / len(norms))
        result[usable] = norms.mean() * mean / norms[usable]
        return result


def karcher(gram: Matrix) -> Matrix | None:
    """Return c with the mean Σ c_i u_i on the sphere of unit vectors u_i with these inner products [n, n].

    Gradient descent with step 1 in the tangent space, in the coefficients. None where the start is not within 90° of
    every vector.
    """
    n = len(gram)
    point: Matrix = np.full(n, 1 / n)
    length = math.sqrt(max(0.0, float(point @ gram @ point)))
    if length < TINY or (gram @ point).min() <= 0:
        return None
    point /= length
    for _ in range(STEPS):
        toward = (gram @ point).clip(-1, 1)
        angle = np.arccos(toward)
        pull = np.divide(angle, np.sin(angle), out=np.ones(n), where=angle > TINY) / n
        tangent = pull - (pull @ toward) * point
        length = math.sqrt(max(0.0, float(tangent @ gram @ tangent)))
        if length < 1e-12:
            break
        point = math.cos(length) * point + math.sin(length) / length * tangent
        point /= math.sqrt(float(point @ gram @ point))
    return point
