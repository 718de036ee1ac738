"""Determinantal point processes: subsets of a pool that are good and unlike each other.

    P(Y) ∝ det L_Y,   L = diag(q) S diag(q),   log det L_Y = Σ_{i ∈ Y} log q_i² + log det S_Y

Qualities q pull towards good experts, log det S_Y ≤ 0 charges for their similarity; two copies of one expert span no
volume, so no subset holds both. Everything is a function of the kernel L [n, n] in float64 and knows nothing of models.

A conditional DPP is a DPP: with the experts A forced in, the others follow the kernel L_R − L_RA L_A⁻¹ L_AR, and
experts that are forced out are struck from L. This is how ``include`` and ``exclude`` work everywhere below.

The size has to come from somewhere. Normalized as in the paper (‖q‖ = 1, S_ii = 1) L has trace 1, so the empty set is
its mode and its expected size is below 1: fix the size k, or scale the quality with :meth:`Kernel.scaled_to`.

Sources: the paper on DPP quality-diversity selection of task vectors, "Kernel Construction"; Kulesza and Taskar (2012),
Determinantal Point Processes for Machine Learning; Kulesza and Taskar (2011), k-DPPs; Chen, Zhang and Zhou (2018), Fast
Greedy MAP Inference for Determinantal Point Process.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import OptionError

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Items = Sequence[int] | NDArray[np.integer]

ROUNDING = 1e-6  # similarities may come from float32: asymmetry, negative eigenvalues and 1 − cosine up to here
DEPENDENT = 1e-7  # an item whose residual is below this part of its L_ii lies in the span of the others: the rounding
# of float64 comes back divided by the residuals of the items before, so that smaller ones cannot be told from 0
IMPROVEMENT = 1e-10  # by how much log det has to grow for a swap: rounding must not swap for ever
EXHAUSTIVE = 20  # experts; 2²⁰ determinants take some seconds
BATCH = 1 << 14  # subsets whose determinants are computed at once


class Ranking(NamedTuple):
    """A subset in the order of its choice. ``gains``: by how much each choice raised log det L_Y."""

    indices: Indices
    gains: Array

    @property
    def log_det(self) -> float:
        """Return log det L_Y; 0 for the empty set."""
        return float(np.sum(self.gains))


@dataclass(frozen=True, eq=False)
class Kernel:
    """L = diag(q) S diag(q) for qualities q [n] ≥ 0 and similarities S [n, n].

    S is symmetrized, and made positive semidefinite by clipping its eigenvalues at 0 and scaling back to its diagonal,
    with a UserWarning where that is more than rounding. Experts with a cosine above 1 − 1e-6 are duplicates: they get
    the same row, so that the rank of L does not count them twice. The sign of a similarity does not matter to the
    determinant of a pair: opposite experts exclude each other as equal ones do.

    Raises OptionError for wrong shapes, numbers that are not finite, negative qualities, qualities that are all 0, and
    similarities that are not symmetric. ``names`` are for these messages.
    """

    quality: Array
    similarity: Array
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        quality = _finite("quality", self.quality, 1, self.names)
        n = len(quality)
        names = tuple(self.names) or tuple(str(i) for i in range(n))
        if len(names) != n:
            raise OptionError(f"There are {len(names)} names for {n} qualities.")
        if (quality < 0).any():
            worst = int(np.argmin(quality))
            raise OptionError(
                f"The quality of expert '{names[worst]}' is {quality[worst]:.6g}, but must be at least 0: the "
                "determinant depends on its square only. Clip qualities at 0, then what is worse than the base is "
                "never selected."
            )
        if not quality.any():
            raise OptionError(
                f"The qualities of all {n} experts are 0, so there is nothing to select: none is better than the base "
                "by this measure. Choose another measure, or check the validation data."
            )
        similarity = _finite("similarity", self.similarity, 2, names)
        if similarity.shape != (n, n):
            raise OptionError(f"The similarity has shape {similarity.shape}; {n} qualities need {(n, n)}.")
        similarity = _symmetric("similarity", similarity, ROUNDING)
        if (np.diag(similarity) < 0).any():
            worst = int(np.argmin(np.diag(similarity)))
            raise OptionError(
                f"The similarity of expert '{names[worst]}' to itself is {similarity[worst, worst]:.6g}, but must be "
                "at least 0."
            )
        similarity = _repaired(similarity)
        groups = _duplicates(similarity)
        norms = np.sqrt(np.diag(similarity))
        for first, *others in groups:
            for other in others:
                ratio = norms[other] / norms[first]
                similarity[other] = similarity[first] * ratio
                similarity[:, other] = similarity[:, first] * ratio
        with np.errstate(over="ignore", invalid="ignore"):
            matrix = quality[:, None] * similarity * quality
        _finite("kernel (quality squared times similarity)", matrix, 2, names)
        for array in (quality, similarity):
            array.flags.writeable = False
        object.__setattr__(self, "quality", quality)
        object.__setattr__(self, "similarity", similarity)
        object.__setattr__(self, "names", names)

    def __len__(self) -> int:
        return len(self.quality)

    @cached_property
    def matrix(self) -> Array:
        """L [n, n], symmetric positive semidefinite, read-only."""
        matrix: Array = self.quality[:, None] * self.similarity * self.quality
        matrix = (matrix + matrix.T) / 2
        matrix.flags.writeable = False
        return matrix

    @cached_property
    def rank(self) -> int:
        """Size of the largest subset with a determinant above 0."""
        return numerical_rank(self.matrix)

    @cached_property
    def expected_size(self) -> float:
        """E|Y| = Σ λ/(1+λ) over the eigenvalues of L, without a fixed size."""
        return float(np.sum(marginals(self.matrix)))

    @cached_property
    def duplicates(self) -> tuple[tuple[int, ...], ...]:
        """Groups of experts that are the same but for rounding, at most one of which is ever selected."""
        return _duplicates(self.similarity)

    def scaled_to(self, expected_size: float) -> Kernel:
        """Return the kernel aL, its quality times √a, with Σ aλ/(1+aλ) = ``expected_size`` in (0, rank)."""
        from scipy.optimize import brentq
        from scipy.special import expit, logit

        eigenvalues = _spectrum(_condition(self.matrix)).eigenvalues
        logs = np.log(eigenvalues[eigenvalues > 0])
        rank = len(logs)
        number = isinstance(expected_size, (int, float)) and not isinstance(expected_size, bool)
        if not (number and 0 < expected_size < rank):
            raise OptionError(
                f"The expected size must be a number in (0, {rank}), the rank of the kernel of {len(self)} experts. "
                f"Got {expected_size!r} instead."
            )
        # At these two ends every term is below, or above, its share size/rank of the sum.
        low = float(np.log(expected_size / rank) - logs.max()) - 1.0
        high = float(logit(expected_size / rank) - logs.min()) + 1.0
        root = brentq(lambda x: float(np.sum(expit(x + logs))) - expected_size, low, high, xtol=1e-13)
        return Kernel(self.quality * np.exp(root / 2), self.similarity, self.names)


def numerical_rank(kernel: ArrayLike) -> int:
    """Return the number of linearly independent items of the kernel [n, n], whatever their scale."""
    return _condition(kernel).rank


def log_det(kernel: ArrayLike, subset: Items) -> float:
    """Return log det L_Y: 0 for the empty set, −inf where the subset is linearly dependent."""
    matrix = _checked(kernel)
    items = _items("subset", subset, len(matrix))
    ranking = _order(matrix[np.ix_(items, items)])
    return -np.inf if ranking is None else ranking.log_det


def greedy_map(kernel: ArrayLike, k: int | None = None, *, include: Items = (), exclude: Items = ()) -> Ranking:
    """Add the expert with the largest gain of log det L_Y, k times; O(k² n) by an incremental Cholesky factor.

    The forced experts come first and count towards k. With k None it stops when no gain is above 0, which may be
    before the first expert. Of equal gains the first in the pool is taken.

    Raises OptionError if k is above the rank: an expert that adds no volume is never taken.
    Source: Chen, Zhang and Zhou (2018), algorithm 1.
    """
    matrix = _checked(kernel)
    n = len(matrix)
    forced, struck = _forced(include, exclude, n)
    if k is not None:
        k = _size(k, n, len(forced), len(struck))
    factor = _Factor(matrix, k or n)
    factor.force(forced)
    factor.strike(struck)
    while k is None or len(factor.chosen) < k:
        best = factor.best()
        if best is None:
            if k is not None:
                raise _above_rank(k, len(factor.chosen), forced, struck)
            break
        if k is None and factor.residuals[best] <= 1:
            break
        factor.choose(best)
    return factor.ranking()


def exhaustive_map(kernel: ArrayLike, k: int | None = None, *, include: Items = (), exclude: Items = ()) -> Ranking:
    """Return the subset with the largest determinant of all those of size k (of any size: k None), in greedy order.

    Raises OptionError for more than 20 experts, and if k is above the rank.
    """
    matrix = _checked(kernel)
    n = len(matrix)
    if n > EXHAUSTIVE:
        raise OptionError(
            f"Trying all subsets is for at most {EXHAUSTIVE} experts; there are {n}. Use the greedy search, polished "
            "by swaps."
        )
    forced, struck = _forced(include, exclude, n)
    best = greedy_map(matrix, k, include=forced, exclude=struck)  # the bound that saves looking closer at most subsets
    free = [i for i in range(n) if matrix[i, i] > 0 and i not in forced and i not in struck]
    sizes = range(len(forced), len(forced) + len(free) + 1) if k is None else [len(best.indices)]
    for size in sizes:
        best = _best_of_size(matrix, forced, free, size, best)
    return best


def swap_polish(kernel: ArrayLike, subset: Items, *, include: Items = (), exclude: Items = ()) -> Ranking:
    """Exchange one expert for another while that raises log det L_Y, always the best exchange; in greedy order.

    With M = L_Y⁻¹, C = M L_Y,: and s the residuals of the other experts, exchanging i for j multiplies det L_Y by
    M_ii s_j + C_ij². No exchange is worse than none, so the result is never below ``subset``.

    Raises OptionError if the subset lacks a forced expert, holds one that is forced out, or has determinant 0.
    """
    matrix = _checked(kernel)
    n = len(matrix)
    forced, struck = _forced(include, exclude, n)
    items = _items("subset", subset, n)
    if not set(forced) <= set(items) or set(struck) & set(items):
        raise OptionError(
            f"The subset {items.tolist()} has to hold the experts {forced.tolist()} that are forced in, and none of "
            f"{struck.tolist()} that are forced out."
        )
    held = np.isin(items, forced)
    ranking = _order(matrix[np.ix_(items, items)], np.flatnonzero(held))
    if ranking is None:
        raise OptionError(
            f"The subset {items.tolist()} has determinant 0 (duplicates, or an expert of quality 0), so no exchange "
            "can be compared with it. Start from the greedy subset."
        )
    others = np.setdiff1d(np.arange(n), np.concatenate([items, struck]))
    better: Ranking | None = ranking
    while better is not None and len(items) and len(others):
        ranking, better = better, None
        ratios = _exchange_ratios(matrix, items, others)
        ratios[held] = 0.0
        for place in np.argsort(-ratios, axis=None, kind="stable"):
            leaves, enters = np.unravel_index(place, ratios.shape)
            if ratios[leaves, enters] <= 1 + IMPROVEMENT:
                break
            trial = items.copy()
            trial[leaves] = others[enters]
            found = _order(matrix[np.ix_(trial, trial)], np.flatnonzero(held))
            if found is not None and found.log_det > ranking.log_det + IMPROVEMENT:  # else the ratio was rounding
                others[enters], items, better = items[leaves], trial, found
                break
    return Ranking(items[ranking.indices], ranking.gains)


def sample_dpp(kernel: ArrayLike, rng: np.random.Generator, *, include: Items = (), exclude: Items = ()) -> Indices:
    """Draw Y with P(Y) = det L_Y / det(L + I), given the forced experts; exact. Sorted, possibly empty.

    Source: Hough, Krishnapur, Peres and Virág (2006); Kulesza and Taskar (2012), algorithm 1.
    """
    conditioned = _condition(kernel, include, exclude)
    spectrum = _spectrum(conditioned)
    chosen = rng.random(len(spectrum.eigenvalues)) * (1 + spectrum.eigenvalues) < spectrum.eigenvalues
    return conditioned.subset(_sample_projection(spectrum.vectors[:, chosen], rng))


def sample_kdpp(
    kernel: ArrayLike, k: int, rng: np.random.Generator, *, include: Items = (), exclude: Items = ()
) -> Indices:
    """Draw Y of size k with P(Y) = det L_Y / e_k(eigenvalues of L), given the forced experts; exact. Sorted.

    Raises OptionError if k is above the rank. Source: Kulesza and Taskar (2011), algorithm 2, here in logarithms.
    """
    conditioned = _condition(kernel, include, exclude)
    spectrum = _spectrum(conditioned)
    remaining = conditioned.remaining(k, spectrum.rank)
    logs = _log(spectrum.eigenvalues)
    table = _esp_table(logs, remaining)
    chosen = np.zeros(len(logs), dtype=bool)
    for m in reversed(range(len(logs))):
        if remaining == 0:
            break
        taken = logs[m] + table[m, remaining - 1] - table[m + 1, remaining]
        if rng.random() < np.exp(taken):  # exactly 1 where too few are left to go without this one
            chosen[m] = True
            remaining -= 1
    return conditioned.subset(_sample_projection(spectrum.vectors[:, chosen], rng))


def marginals(kernel: ArrayLike, *, include: Items = (), exclude: Items = ()) -> Array:
    """Return P(i ∈ Y) of the DPP [n], the diagonal of L(L + I)⁻¹; 1 for experts forced in and 0 for those out."""
    conditioned = _condition(kernel, include, exclude)
    spectrum = _spectrum(conditioned)
    return conditioned.spread(spectrum.vectors**2 @ (spectrum.eigenvalues / (1 + spectrum.eigenvalues)))


def kdpp_marginals(kernel: ArrayLike, k: int, *, include: Items = (), exclude: Items = ()) -> Array:
    """Return P(i ∈ Y) of the k-DPP [n], which sum to k.

    Σ_m v_im² P(eigenvector m is chosen), where the latter follow the chain that the sampler walks.
    Raises OptionError if k is above the rank. Source: Kulesza and Taskar (2011), section 3.
    """
    conditioned = _condition(kernel, include, exclude)
    spectrum = _spectrum(conditioned)
    remaining = conditioned.remaining(k, spectrum.rank)
    logs = _log(spectrum.eigenvalues)
    table = _esp_table(logs, remaining)
    state = np.zeros(remaining + 1)  # P(so many eigenvectors are still to be chosen)
    state[remaining] = 1.0
    chosen = np.zeros(len(logs))
    for m in reversed(range(len(logs))):
        total = np.where(np.isneginf(table[m + 1]), 0.0, table[m + 1])  # states of probability 0
        taken = state[1:] * np.exp(logs[m] + table[m, :-1] - total[1:])
        chosen[m] = np.sum(taken)
        state = state * np.exp(table[m] - total)
        state[:-1] += taken
    return conditioned.spread(spectrum.vectors**2 @ chosen)


def log_likelihood(
    kernel: ArrayLike,
    subset: Items,
    k: int | None = None,
    *,
    include: Items = (),
    exclude: Items = (),
) -> float:
    """Return log P(Y = subset) under the DPP, or the k-DPP, given the forced experts; −inf for what cannot be drawn."""
    conditioned = _condition(kernel, include, exclude)
    items = _items("subset", subset, conditioned.n)
    spectrum = _spectrum(conditioned)
    remaining = None if k is None else conditioned.remaining(k, spectrum.rank)
    free = np.setdiff1d(items, conditioned.forced)
    complete = len(items) - len(free) == len(conditioned.forced)
    if not complete or not np.isin(free, conditioned.items).all() or (remaining is not None and len(free) != remaining):
        return -np.inf
    places = np.searchsorted(conditioned.items, free)
    ranking = _order(conditioned.kernel[np.ix_(places, places)], scale=conditioned.scale[places])
    if ranking is None:
        return -np.inf
    if remaining is None:
        normalizer = float(np.sum(np.log1p(spectrum.eigenvalues)))
    else:
        normalizer = float(log_esp(_log(spectrum.eigenvalues), remaining)[-1])
    return min(ranking.log_det - normalizer, 0.0)


def log_esp(log_eigenvalues: ArrayLike, k: int) -> Array:
    """Return log e_0 … log e_k [k + 1], the elementary symmetric polynomials of λ ≥ 0 given as logarithms.

    e_j(λ_1 … λ_m) = e_j(λ_1 … λ_{m−1}) + λ_m e_{j−1}(λ_1 … λ_{m−1}); all terms are positive, so logarithms lose
    nothing, where the polynomials themselves overflow (200 eigenvalues, k = 120). Source: Kulesza and Taskar (2011).
    """
    logs = np.asarray(log_eigenvalues, dtype=np.float64)
    if logs.ndim != 1 or np.isnan(logs).any() or (logs == np.inf).any():
        raise OptionError("The logarithms of eigenvalues must be a vector of numbers below infinity (−inf for 0).")
    k = _integer("k", k)
    if k < 0:
        raise OptionError(f"The 'k' of an elementary symmetric polynomial must be at least 0. Got {k} instead.")
    polynomials: Array = _esp_table(logs, k)[-1]
    return polynomials


class _Factor:
    """Incremental Cholesky factor of L in the order of the choices, and what is left of the diagonal.

    ``residuals`` [n]: det L_{Y+i} / det L_Y. Those of rounding alone (below DEPENDENT · ``scale``) are never chosen.
    """

    def __init__(self, matrix: Array, capacity: int, scale: Array | None = None) -> None:
        self.matrix = matrix
        self.scale = np.diag(matrix).copy() if scale is None else scale
        self.residuals = np.diag(matrix).copy()
        self.rows: Array = np.empty((capacity, len(matrix)))
        self.chosen: list[int] = []
        self.gains: list[float] = []
        self.open = np.ones(len(matrix), dtype=bool)

    def best(self) -> int | None:
        """Return the first of the items with the largest residual, or None where no volume is left."""
        usable = np.where(self.open & (self.residuals > DEPENDENT * self.scale), self.residuals, 0.0)
        best = int(np.argmax(usable)) if len(usable) else 0
        return best if len(usable) and usable[best] > 0 else None

    def choose(self, item: int) -> None:
        """Add an item: one row of the factor, O(n |Y|)."""
        pivot = self.residuals[item]
        size = len(self.chosen)
        row = (self.matrix[item] - self.rows[:size, item] @ self.rows[:size]) / np.sqrt(pivot)
        self.rows[size] = row
        self.residuals = self.residuals - row**2
        self.residuals[item] = 0.0
        self.open[item] = False
        self.chosen.append(item)
        self.gains.append(float(np.log(pivot)))
        if (self.residuals < -ROUNDING * self.scale).any():
            raise _indefinite()

    def force(self, items: Indices) -> None:
        """Choose the items in their order; OptionError if one adds no volume."""
        for item in items.tolist():
            if self.residuals[item] <= DEPENDENT * self.scale[item]:
                raise OptionError(
                    f"Expert {item} is forced in but adds no volume to {self.chosen}: it has quality 0, is a duplicate "
                    "of one of them, or is a combination of them. Leave it, or them, out of the forced experts."
                )
            self.choose(item)

    def strike(self, items: Indices) -> None:
        """Never choose these."""
        self.open[items] = False

    def ranking(self) -> Ranking:
        return Ranking(np.array(self.chosen, dtype=np.int64), np.array(self.gains, dtype=np.float64))


@dataclass(frozen=True)
class _Conditioned:
    """The kernel of the experts that are free, given those forced in and out.

    kernel [m, m]; items [m]: their indices in the pool of n, ascending; scale [m]: the diagonal before conditioning,
    which says what rounding is.
    """

    kernel: Array
    items: Indices
    scale: Array
    forced: Indices
    struck: Indices
    n: int

    @property
    def rank(self) -> int:
        """Number of free experts that can be added, by a Cholesky factorization with pivoting of the scaled kernel."""
        from scipy.linalg.lapack import dpstrf

        present = np.flatnonzero(self.scale > 0)
        if not len(present):
            return 0
        norms = np.sqrt(self.scale[present])
        _, _, rank, _ = dpstrf(self.kernel[np.ix_(present, present)] / norms / norms[:, None], tol=DEPENDENT)
        return int(rank)

    def remaining(self, k: int, rank: int) -> int:
        """Return how many experts are to be added to the forced ones for a size of k; OptionError if that cannot be."""
        k = _size(k, self.n, len(self.forced), len(self.struck))
        if k - len(self.forced) > rank:
            raise _above_rank(k, len(self.forced) + rank, self.forced, self.struck)
        return k - len(self.forced)

    def subset(self, places: Indices) -> Indices:
        """Return the experts at these places of ``items``, and the forced ones, sorted."""
        return np.sort(np.concatenate([self.forced, self.items[places]]))

    def spread(self, values: Array) -> Array:
        """Return probabilities of the free experts as probabilities of all [n]."""
        everyone = np.zeros(self.n)
        everyone[self.items] = np.clip(values, 0.0, 1.0)
        everyone[self.forced] = 1.0
        return everyone


class _Spectrum(NamedTuple):
    """Eigenvalues [m] ascending, those beyond the rank exactly 0, and eigenvectors [m, m] as columns."""

    eigenvalues: Array
    vectors: Array
    rank: int


def _condition(kernel: ArrayLike, include: Items = (), exclude: Items = ()) -> _Conditioned:
    matrix = _checked(kernel)
    n = len(matrix)
    forced, struck = _forced(include, exclude, n)
    factor = _Factor(matrix, len(forced))
    factor.force(forced)
    items = np.setdiff1d(np.arange(n), np.concatenate([forced, struck]))
    scale = np.diag(matrix)[items]
    rows = factor.rows[:, items]
    conditional = matrix[np.ix_(items, items)] - rows.T @ rows
    spanned = factor.residuals[items] <= DEPENDENT * scale
    conditional[spanned] = 0.0
    conditional[:, spanned] = 0.0
    return _Conditioned(conditional, items, scale, forced, struck, n)


def _spectrum(conditioned: _Conditioned) -> _Spectrum:
    eigenvalues, vectors = np.linalg.eigh(conditioned.kernel)
    if len(eigenvalues) and eigenvalues[0] < -ROUNDING * max(eigenvalues[-1], conditioned.scale.max()):
        raise _indefinite()
    eigenvalues[: len(eigenvalues) - conditioned.rank] = 0.0
    eigenvalues = np.maximum(eigenvalues, 0.0)
    return _Spectrum(eigenvalues, vectors, int(np.count_nonzero(eigenvalues)))


def _sample_projection(vectors: Array, rng: np.random.Generator) -> Indices:
    """Draw from the DPP with the marginal kernel VVᵀ for V [n, k] with orthonormal columns: always k items."""
    n, k = vectors.shape
    start = np.sum(vectors**2, axis=1)
    weights = start.copy()
    rows = np.empty((k, n))
    chosen = np.empty(k, dtype=np.int64)
    for t in range(k):
        usable = np.where(weights > DEPENDENT * start, weights, 0.0)
        cumulative = np.cumsum(usable)
        item = int(np.searchsorted(cumulative / cumulative[-1], rng.random(), side="right"))
        rows[t] = (vectors @ vectors[item] - rows[:t, item] @ rows[:t]) / np.sqrt(weights[item])
        weights -= rows[t] ** 2
        weights[item] = 0.0
        chosen[t] = item
    return chosen


def _best_of_size(matrix: Array, forced: Indices, free: list[int], size: int, best: Ranking) -> Ranking:
    """Return the best of the subsets of this size, or ``best`` if none has a larger determinant."""
    combinations = itertools.combinations(free, size - len(forced))
    while batch := list(itertools.islice(combinations, BATCH)):
        subsets = np.array([(*forced.tolist(), *others) for others in batch], dtype=np.int64).reshape(len(batch), size)
        signs, values = np.linalg.slogdet(matrix[subsets[:, :, None], subsets[:, None, :]])
        values = np.where(signs > 0, values, -np.inf)
        for place in np.argsort(-values, kind="stable"):
            if values[place] <= best.log_det + IMPROVEMENT:
                break
            items = subsets[place]
            ranking = _order(matrix[np.ix_(items, items)], np.arange(len(forced)))
            if ranking is not None:  # else the subset is dependent, and its determinant was rounding
                best = Ranking(items[ranking.indices], ranking.gains)
                break
    return best


def _order(matrix: Array, forced: Indices | None = None, scale: Array | None = None) -> Ranking | None:
    """Return all items in greedy order, ``forced`` first; None where they are linearly dependent."""
    factor = _Factor(matrix, len(matrix), scale)
    if forced is not None:
        factor.force(forced)
    while len(factor.chosen) < len(matrix):
        best = factor.best()
        if best is None:
            return None
        factor.choose(best)
    return factor.ranking()


def _exchange_ratios(matrix: Array, items: Indices, others: Indices) -> Array:
    """Return det L_{Y−i+j} / det L_Y for each i in ``items`` and j in ``others``."""
    from scipy.linalg import solve_triangular

    diagonal = np.diag(matrix)
    scale = 1 / np.sqrt(diagonal[items])
    lower = np.linalg.cholesky(matrix[np.ix_(items, items)] * scale[:, None] * scale)
    half = solve_triangular(lower, matrix[np.ix_(items, others)] * scale[:, None], lower=True)
    inverse = solve_triangular(lower, np.eye(len(items)), lower=True)
    residuals = np.maximum(diagonal[others] - np.sum(half**2, axis=0), 0.0)
    coordinates = scale[:, None] * (inverse.T @ half)
    ratios: Array = (scale**2 * np.sum(inverse**2, axis=0))[:, None] * residuals + coordinates**2
    return ratios


def _esp_table(logs: Array, k: int) -> Array:
    """Return log e_j of the first m eigenvalues [m = 0 … n, j = 0 … k]."""
    table = np.full((len(logs) + 1, k + 1), -np.inf)
    table[:, 0] = 0.0
    for m, value in enumerate(logs):
        np.logaddexp(table[m, 1:], value + table[m, :-1], out=table[m + 1, 1:])
    return table


def _log(eigenvalues: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(eigenvalues)


def _repaired(similarity: Array) -> Array:
    """Return the similarity with negative eigenvalues clipped at 0 and its diagonal restored."""
    eigenvalues, vectors = np.linalg.eigh(similarity)
    lowest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    if lowest >= -1e-12 * max(largest, -lowest):
        return similarity
    positive = np.maximum(eigenvalues, 0.0)
    positive_part = (vectors * positive) @ vectors.T
    diagonal, raised = np.diag(similarity), np.diag(positive_part)
    scale = np.sqrt(np.divide(diagonal, raised, out=np.zeros_like(raised), where=raised > 0))
    clipped: Array = (positive_part + positive_part.T) / 2 * scale[:, None] * scale
    if lowest < -ROUNDING * max(largest, -lowest):
        warnings.warn(
            f"The similarity is not positive semidefinite: its eigenvalues lie in [{lowest:.3g}, {largest:.3g}] and "
            f"{np.count_nonzero(eigenvalues < 0)} of {len(eigenvalues)} are negative. They were clipped at 0, which "
            f"changed similarities by up to {np.max(np.abs(clipped - similarity)):.3g}.",
            UserWarning,
            stacklevel=4,  # the caller of Kernel
        )
    return clipped


def _duplicates(similarity: Array) -> tuple[tuple[int, ...], ...]:
    norms = np.sqrt(np.diag(similarity))
    same = similarity >= (1 - ROUNDING) * norms[:, None] * norms
    same &= (norms > 0)[:, None] & (norms > 0)
    first = np.where(same.any(axis=1), np.argmax(same, axis=1), np.arange(len(same)))
    groups: dict[int, list[int]] = {}
    for item, leader in enumerate(first.tolist()):
        # The nearest leader may itself follow an earlier one: 1 − 1e-6 is not transitive, so follow it to its own.
        while first[leader] != leader:
            leader = int(first[leader])
        groups.setdefault(leader, []).append(item)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _checked(kernel: ArrayLike) -> Array:
    matrix = _symmetric("kernel", _finite("kernel", kernel, 2), ROUNDING)
    if (np.diag(matrix) < 0).any():
        raise _indefinite()
    return matrix


def _finite(what: str, values: ArrayLike, dimensions: int, names: Sequence[str] = ()) -> Array:
    """Return a float64 copy; OptionError unless it has these dimensions, is not empty, and holds only numbers."""
    array = np.array(values, dtype=np.float64)
    if array.ndim != dimensions or not array.size:
        shape = "a vector with a number an expert" if dimensions == 1 else "a square matrix over the experts"
        raise OptionError(f"The {what} has shape {array.shape}; expected {shape}.")
    if not np.isfinite(array).all():
        place = np.argwhere(~np.isfinite(array))[0].tolist()
        named = [f"'{names[i]}'" if i < len(names) else str(i) for i in place]
        raise OptionError(
            f"The {what} is {array[tuple(place)]} at expert {' and '.join(named)}, but must be finite. Check the "
            "features, accuracies or weights that it was computed from."
        )
    return array


def _symmetric(what: str, matrix: Array, tolerance: float) -> Array:
    if matrix.shape[0] != matrix.shape[1]:
        raise OptionError(f"The {what} has shape {matrix.shape}; expected a square matrix over the experts.")
    asymmetry = np.abs(matrix - matrix.T)
    if asymmetry.max() > tolerance * np.abs(matrix).max():
        row, column = np.unravel_index(int(np.argmax(asymmetry)), matrix.shape)
        raise OptionError(
            f"The {what} is not symmetric: {matrix[row, column]:.6g} at ({row}, {column}) and "
            f"{matrix[column, row]:.6g} at ({column}, {row})."
        )
    return (matrix + matrix.T) / 2


def _integer(name: str, value: object) -> int:
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise OptionError(f"The '{name}' of a subset must be an integer. Got {value!r} instead.")
    return operator.index(value)


def _size(k: object, n: int, forced: int, struck: int) -> int:
    """Return k as an integer, in [max(1, experts forced in), experts not forced out]."""
    size = _integer("k", k)
    low, high = max(1, forced), n - struck
    if not low <= size <= high:
        notes = [f"{forced} forced in"] * (forced > 0) + [f"{struck} forced out"] * (struck > 0)
        pool = f"{n} experts" + (f", {' and '.join(notes)}" if notes else "")
        raise OptionError(
            f"The number k of experts to select must be an integer in [{low}, {high}] ({pool}). Got {size} instead."
        )
    return size


def _items(what: str, items: Items, n: int) -> Indices:
    indices = [_integer(what, item) for item in items]
    if any(not 0 <= item < n for item in indices) or len(set(indices)) < len(indices):
        raise OptionError(f"The {what} must be distinct indices in [0, {n - 1}]. Got {indices} instead.")
    return np.array(indices, dtype=np.int64)


def _forced(include: Items, exclude: Items, n: int) -> tuple[Indices, Indices]:
    forced, struck = _items("experts forced in", include, n), _items("experts forced out", exclude, n)
    both = sorted(set(forced.tolist()) & set(struck.tolist()))
    if both:
        raise OptionError(f"The experts {both} are forced both in and out.")
    return forced, struck


def _above_rank(k: int, rank: int, forced: Indices, struck: Indices) -> OptionError:
    given = " with these experts forced in or out" if len(forced) or len(struck) else ""
    return OptionError(
        f"k = {k} is above the rank of the kernel{given}, which is {rank}: every subset of {k} experts has determinant "
        "0, because of duplicates, of experts of quality 0, or of too few features. "
        f"Select at most {rank}, or use another similarity or quality."
    )


def _indefinite() -> OptionError:
    return OptionError(
        "The kernel is not positive semidefinite, so some subsets have a negative determinant. Build it with Kernel, "
        "which repairs the similarity."
    )
