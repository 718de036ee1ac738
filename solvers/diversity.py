"""The terms of the bound behind DPP selection that can be measured, as functions of predictions.

    L_T(h_WA) ≤ mean_m L_S(θ_m) − D(ρ) + d₁(D_S, D_T) + ν + O(Δ²)                                       (Proposition 1)
    −log mean_m p_m ≤ mean_m −log p_m − V_m(p_m / (√2 max_m p_m)),   p_m = p(y | x; θ_m)                      (Lemma 3)

Lemma 3 is exact and holds for each sample: it is Jensen's inequality with the second-order term kept, since
(−log)'' ≥ 1/max² on (0, max]. Proposition 1 as a whole is no number: it assumes a loss in [0, 1] where Lemma 3 has
cross-entropy, d₁ and ν cannot be measured, and the constant before Δ² is unknown. So the terms are reported, to compare
subsets with one another, and not their sum as a bound.

Predictions are probabilities (softmax outputs) [models, samples, classes], labels integers [samples].

Sources: the paper on DPP quality-diversity selection of task vectors, "Generalization Error Bound"; Ortega, Cabañas and
Masegosa (2022), Diversity and Generalization in Neural Network Ensembles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import OptionError

Array = NDArray[np.float64]

NORMALIZED = 1e-3  # by how much probabilities may miss a sum of 1: they may come from float16


@dataclass(frozen=True)
class BoundTerms:
    """What can be measured of Proposition 1 for one subset.

    mean_source_risk: mean_m E[−log p_m]; diversity: D(ρ); ensemble_risk: E[−log mean_m p_m]; delta_squared: Δ², None
    without a Gram matrix.
    """

    mean_source_risk: float
    diversity: float
    ensemble_risk: float
    delta_squared: float | None = None

    @property
    def slack(self) -> float:
        """How much Lemma 3 gives away, mean source risk − diversity − ensemble risk ≥ 0; inf if the first is."""
        if np.isinf(self.mean_source_risk):
            return np.inf
        return self.mean_source_risk - self.diversity - self.ensemble_risk


def source_risks(predictions: ArrayLike, labels: ArrayLike) -> Array:
    """Return the cross-entropy of each model [models] in nats; inf where a true class got probability 0.

    Where each model has data of its own, call it once for each, with predictions [1, samples, classes].
    """
    risks: Array = _cross_entropy(_true_class(predictions, labels)).mean(axis=1)
    return risks


def mean_source_risk(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return mean_m L_S(θ_m), the first term of Proposition 1."""
    return float(source_risks(predictions, labels).mean())


def pointwise_diversity(predictions: ArrayLike, labels: ArrayLike) -> Array:
    """Return V_m(p_m / (√2 max_m p_m)) of each sample [samples]; 0 where all models give the true class 0."""
    return _diversity(_true_class(predictions, labels))


def diversity(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return D(ρ) = E[V_m(p_m / (√2 max_m p_m))], between 0 (equal predictions of the true class) and 1/8."""
    return float(pointwise_diversity(predictions, labels).mean())


def pointwise_ensemble_risk(predictions: ArrayLike, labels: ArrayLike) -> Array:
    """Return −log mean_m p_m of each sample [samples], of the average of the probabilities."""
    return _cross_entropy(_true_class(predictions, labels).mean(axis=0))


def ensemble_risk(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return L_S(h_ENS) = E[−log mean_m p_m]."""
    return float(pointwise_ensemble_risk(predictions, labels).mean())


def delta_squared(gram: ArrayLike) -> float:
    """Return Δ² = max_m ‖θ_m − θ_WA‖² from the Gram matrix of the task vectors [models, models].

    ‖τ_m − τ̄‖² = G_mm − 2 mean_j G_mj + mean_jl G_jl, with the uniform average; the base cancels.
    """
    matrix = np.asarray(gram, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size or not np.isfinite(matrix).all():
        raise OptionError(f"Δ² needs a square Gram matrix of finite numbers. Got one of shape {matrix.shape}.")
    distances = np.diag(matrix) - matrix.mean(axis=0) - matrix.mean(axis=1) + matrix.mean()
    return float(max(distances.max(), 0.0))


def averaging_error(merged: ArrayLike, predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return L_S(h_WA) − L_S(h_ENS), the O(Δ²) of Lemma 1 itself, given the averaged model's predictions.

    merged: [samples, classes].
    """
    return mean_source_risk(np.asarray(merged)[None], labels) - ensemble_risk(predictions, labels)


def bound_terms(predictions: ArrayLike, labels: ArrayLike, gram: ArrayLike | None = None) -> BoundTerms:
    """Return all terms for the models given; select a subset by indexing predictions and the Gram matrix with it."""
    true_class = _true_class(predictions, labels)
    if gram is not None and np.shape(gram) != (len(true_class),) * 2:
        raise OptionError(f"The Gram matrix has shape {np.shape(gram)}; {len(true_class)} models were given.")
    return BoundTerms(
        mean_source_risk=float(_cross_entropy(true_class).mean()),
        diversity=float(_diversity(true_class).mean()),
        ensemble_risk=float(_cross_entropy(true_class.mean(axis=0)).mean()),
        delta_squared=None if gram is None else delta_squared(gram),
    )


def _true_class(predictions: ArrayLike, labels: ArrayLike) -> Array:
    """Return p(y | x; θ_m) [models, samples] in float64, after checking everything."""
    probabilities, classes = np.asarray(predictions), np.asarray(labels)
    if probabilities.ndim != 3 or not probabilities.size:
        raise OptionError(
            f"The predictions have shape {probabilities.shape}; expected probabilities [models, samples, classes]."
        )
    models, samples, count = probabilities.shape
    if classes.shape != (samples,) or not np.issubdtype(classes.dtype, np.integer):
        raise OptionError(
            f"The labels have shape {classes.shape} and type {classes.dtype}; expected {samples} integers, one for "
            "each sample of the predictions."
        )
    if classes.min() < 0 or classes.max() >= count:
        raise OptionError(f"The labels lie in [{classes.min()}, {classes.max()}]; there are {count} classes.")
    for model in range(models):  # one at a time: nothing of the size of all predictions is made
        one = probabilities[model].astype(np.float64)
        sums = one.sum(axis=1)
        if not (one >= 0).all() or not (np.abs(sums - 1) <= NORMALIZED).all():  # nan fails both
            worst = int(np.argmax(np.where(np.isnan(sums), np.inf, np.maximum(np.abs(sums - 1), -one.min(axis=1)))))
            raise OptionError(
                f"The predictions of model {model} at sample {worst} are no probabilities: they sum to "
                f"{sums[worst]:.6g} and their smallest is {one[worst].min():.6g}. Apply the softmax to logits first."
            )
    return probabilities[:, np.arange(samples), classes].astype(np.float64)


def _cross_entropy(true_class: Array) -> Array:
    with np.errstate(divide="ignore"):
        return -np.log(true_class)


def _diversity(true_class: Array) -> Array:
    largest = true_class.max(axis=0)
    shares = np.divide(true_class, largest, out=np.zeros_like(true_class), where=largest > 0)
    variance: Array = np.var(shares, axis=0) / 2
    return variance
