"""Coordinates in which the simplex, the capped simplex and the box have no boundary: mirror maps of their entropies.

    simplex   λ = softmax(u)                               φ(λ) = Σ λ ln λ
    capped    (base, λ) = softmax(u), base = 1 − Σλ        φ(λ) = Σ λ ln λ + base ln base
    box       λ = l + (h − l) σ(u), number by number       φ(λ) = Σ (λ − l) ln(λ − l) + (h − λ) ln(h − λ)

In all three u = ∇φ(λ) up to a constant a row. A coefficient that underflows to 0 keeps its finite u, so it can come
back; one that is 0 to begin with has none, and is moved inside first (:meth:`Coordinates.interior`).
Source: Beck and Teboulle (2003), section 5 (simplex); the capped simplex is a simplex with the base as a coordinate.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .domains import Box, Capped, Domain, Simplex
from .errors import OptionError

Array = np.ndarray[Any, Any]
TOUCHES = 1e-15  # shares below this are rounding, and have no logarithm worth keeping


class Coordinates:
    """u [rows, m] for Λ [rows, n]; m = n, or n + 1 with the base in column 0."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain

    def interior(self, point: Array, mixing: float) -> Array:
        """Return Λ [rows, n] with the rows that touch the boundary moved by ``mixing`` toward the domain's centre."""
        shares = self._shares(point)
        touching = (shares.reshape(len(point), -1) <= TOUCHES).any(axis=1)
        if not touching.any():
            return point
        moved = point.copy()
        moved[touching] = (1 - mixing) * point[touching] + mixing * self._centre(point.shape[1])
        return moved

    def enter(self, point: Array) -> Array:
        """Return u of Λ in the interior."""
        return np.log(self._shares(point))

    def leave(self, u: Array) -> Array:
        """Return Λ of u."""
        return np.exp(u)

    def normalized(self, u: Array) -> Array:
        """Return the u of the same Λ whose exponentials sum to 1 in each row."""
        u = u - u.max(axis=1, keepdims=True)
        return u - np.log(np.exp(u).sum(axis=1, keepdims=True))

    def lifted(self, scores: Array) -> Array:
        """Return S as a linear function of the shares [rows, m]."""
        return scores

    def gradient(self, u: Array, scores: Array) -> Array:
        """Return ∂f/∂u [rows, m] by the chain rule: p_j (s_j − ⟨p, s⟩)."""
        shares, lifted = np.exp(u), self.lifted(scores)
        return shares * (lifted - np.sum(shares * lifted, axis=1, keepdims=True))

    def divergence(self, u: Array, other: Array) -> float:
        """Return Σ_rows KL(p(u) ‖ p(other)), the Bregman divergence of φ; both are normalized."""
        return float(np.sum(np.exp(u) * (u - other)))

    def _shares(self, point: Array) -> Array:
        return point

    def _centre(self, n: int) -> float:
        return 1.0 / n


class CappedCoordinates(Coordinates):
    """The base is one more coordinate, of score 0."""

    def leave(self, u: Array) -> Array:
        """Drop the base."""
        return np.exp(u[:, 1:])

    def lifted(self, scores: Array) -> Array:
        """The base scores 0, since its task vector is 0."""
        return np.hstack([np.zeros((len(scores), 1)), scores])

    def _shares(self, point: Array) -> Array:
        return np.hstack([1.0 - point.sum(axis=1, keepdims=True), point])

    def _centre(self, n: int) -> float:
        return 1.0 / (n + 1)


class BoxCoordinates(Coordinates):
    """One logit a number."""

    domain: Box

    @property
    def width(self) -> float:
        """Length of the interval."""
        return self.domain.upper - self.domain.lower

    def enter(self, point: Array) -> Array:
        """Logits."""
        return np.log(point - self.domain.lower) - np.log(self.domain.upper - point)

    def leave(self, u: Array) -> Array:
        """l + (h − l) σ(u), inside the bounds also where it rounds."""
        return self.domain.project(self.domain.lower + self.width * sigmoid(u))

    def normalized(self, u: Array) -> Array:
        """Each Λ has one u."""
        return u

    def gradient(self, u: Array, scores: Array) -> Array:
        """(h − l) σ(u) σ(−u) s."""
        return self.width * sigmoid(u) * sigmoid(-u) * scores

    def divergence(self, u: Array, other: Array) -> float:
        """(h − l) Σ KL of the two shares of each number."""
        up = sigmoid(u) * (np.logaddexp(0, -other) - np.logaddexp(0, -u))
        down = sigmoid(-u) * (np.logaddexp(0, other) - np.logaddexp(0, u))
        return float(self.width * np.sum(up + down))

    def _shares(self, point: Array) -> Array:
        return np.hstack([point - self.domain.lower, self.domain.upper - point]) / self.width

    def _centre(self, n: int) -> float:
        return (self.domain.lower + self.domain.upper) / 2


COORDINATES: dict[type[Domain], type[Coordinates]] = {
    Simplex: Coordinates,
    Capped: CappedCoordinates,
    Box: BoxCoordinates,
}


def sigmoid(u: Array) -> Array:
    """Return 1 / (1 + exp(−u)) without overflow."""
    return np.exp(-np.logaddexp(0, -u))


def coordinates(solver: str, domain: Domain) -> Coordinates:
    """Return the coordinates of a domain. Raises OptionError for one that has none here."""
    if type(domain) not in COORDINATES:
        raise OptionError(
            f"{solver} moves in the entropy's coordinates, which 'simplex', 'capped' and 'box' have; the domain "
            f"{domain.name!r} has none. Use projected-gradient there."
        )
    return COORDINATES[type(domain)](domain)
