"""Which experts to merge at all: selectors over evidence, which is measured when a selector asks for it.

    selection = DPP(k=6).select(Evidence(pool, accuracy=accuracy, features=features))
    pool.subset(selection.names)

A selector returns a ranked subset with a reason for each expert. What it needs of a model (accuracy, losses, gradients,
features) comes as functions of weights; experts are formed one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from . import dpp
from .construct import construct, describe
from .diversity import BoundTerms, bound_terms
from .errors import OptionError, check_choice, check_number
from .problem import cosines

if TYPE_CHECKING:
    from ..pools import Pool

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Any]


class Evidence:
    """What is known of the experts of a pool, measured once, on first use.

    accuracy, losses: weights -> a number for each task; gradients: weights -> the gradient of each task's loss;
    features: weights -> [samples, d], one row a validation sample; predictions: weights -> [samples] classes;
    confidence: weights -> [samples] probabilities of the true class.
    Raises OptionError when a selector asks for what was not given.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        accuracy: Callable[[Weights], Mapping[str, float]] | None = None,
        losses: Callable[[Weights], Mapping[str, float]] | None = None,
        gradients: Callable[[Weights], Mapping[str, Weights]] | None = None,
        features: Callable[[Weights], Array] | None = None,
        predictions: Callable[[Weights], Array] | None = None,
        confidence: Callable[[Weights], Array] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.pool = pool
        self.names = tuple(pool.names)
        self._accuracy, self._losses, self._gradients = accuracy, losses, gradients
        self._features, self._predictions, self._confidence = features, predictions, confidence
        self._progress = progress
        self._blocks = pool.blocks("model")

    @property
    def n(self) -> int:
        """Number of experts."""
        return len(self.names)

    def average(self, experts: Sequence[int]) -> Weights:
        """Return the average of some experts; of none, the base."""
        coefficients = np.zeros((1, self.n))
        if experts:
            coefficients[0, list(experts)] = 1 / len(experts)
        return self.pool.combine(coefficients, self._blocks)

    @cached_property
    def gram(self) -> Array:
        """Inner products of task vectors over the whole model [n, n]; one pass."""
        return self.pool.gram(self._blocks)[0]

    @cached_property
    def norms(self) -> Array:
        """Norms of the task vectors [n]."""
        return np.sqrt(np.diagonal(self.gram))

    @cached_property
    def cosines(self) -> Array:
        """Cosines of the task vectors over the whole model [n, n]."""
        return cosines(self.gram)

    @cached_property
    def layer_cosines(self) -> Array:
        """Mean over layers of the cosines of the task vectors within the layer [n, n]; one pass.

        Experts that leave a layer as it is are alike there, and unlike all others: so the mean stays positive
        semidefinite, and 1 for copies.
        """
        grams = self.pool.gram(self.pool.blocks("layer"))
        total = np.zeros((self.n, self.n))
        for gram in grams:
            unmoved = np.diagonal(gram) == 0
            total += cosines(gram)
            total[np.outer(unmoved, unmoved) & ~np.eye(self.n, dtype=bool)] += 1
        return total / len(grams)

    @cached_property
    def accuracies(self) -> tuple[Array, Array]:
        """Validation accuracy of the base [T] and of the experts [T, n]."""
        return self._table(self._needed(self._accuracy, "accuracy", "labelled validation data"), "accuracy")

    @cached_property
    def loss_table(self) -> tuple[Array, Array]:
        """Validation loss of the base [T] and of the experts [T, n]."""
        return self._table(self._needed(self._losses, "losses", "labelled validation data"), "loss")

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Names of the validation tasks."""
        measure = self._accuracy or self._losses
        return tuple(self._needed(measure, "accuracy", "labelled validation data")(self.average([])))

    @cached_property
    def relevance(self) -> tuple[tuple[str, ...], Array]:
        """Tasks, and the linear oracle's scores ⟨∇loss_t(θ0), τ_i⟩ [T, n]; the most negative is the most relevant."""
        gradients = self._needed(self._gradients, "gradients", "labelled data")(self.average([]))
        scores = self.pool.correlate(list(gradients.values()), self._blocks)[:, 0, :]
        return tuple(gradients), scores

    @cached_property
    def feature_similarity(self) -> Array:
        """Mean over samples of the cosine between two experts' features [n, n].

        Source: Quality and Diversity Both Matter When Merging Models, section Methodology.
        """
        measure = self._needed(self._features, "features", "validation inputs")
        rows = []
        for i in range(self.n):
            found = np.asarray(measure(self.average([i])), dtype=np.float64)
            if not np.isfinite(found).all():
                raise OptionError(
                    f"The features of {self.names[i]!r} hold NaN or infinity; leave the expert out (exclude), or look "
                    "at it with `mergesolve pool inspect`."
                )
            found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-300)
            rows.append(found.ravel() / math.sqrt(len(found)))
            self._tell("features", i + 1)
        stacked = np.stack(rows)
        similarity = stacked @ stacked.T
        return 0.5 * (similarity + similarity.T)

    @cached_property
    def agreement(self) -> Array:
        """Share of validation samples on which two experts predict the same class [n, n]."""
        measure = self._needed(self._predictions, "predictions", "validation inputs")
        rows = []
        for i in range(self.n):
            rows.append(np.asarray(measure(self.average([i]))))
            self._tell("predictions", i + 1)
        classes = np.stack(rows)
        return np.array([[float((a == b).mean()) for b in classes] for a in classes])

    @cached_property
    def _true_class(self) -> Array:
        """Probabilities of the true class [n, samples]."""
        measure = self._needed(self._confidence, "confidence", "labelled validation data")
        rows = []
        for i in range(self.n):
            rows.append(np.asarray(measure(self.average([i])), dtype=np.float64))
            self._tell("confidence", i + 1)
        return np.stack(rows)

    def bound(self, experts: Sequence[int]) -> BoundTerms:
        """Return the terms of the bound on the target risk of these experts' average, measured on validation data.

        Source: Quality and Diversity Both Matter When Merging Models, proposition 1 and lemma 3.
        """
        chosen = list(experts)
        true = self._true_class[chosen]
        pairs = np.stack([true, 1 - true], axis=-1)  # the terms depend on the true class alone
        return bound_terms(pairs, np.zeros(true.shape[1], dtype=np.int64), self.gram[np.ix_(chosen, chosen)])

    def merged_accuracy(self, experts: Sequence[int]) -> float:
        """Return the mean validation accuracy of the average of some experts."""
        scores = self._needed(self._accuracy, "accuracy", "labelled validation data")(self.average(experts))
        return float(np.mean(list(scores.values())))

    def _table(self, measure: Callable[[Weights], Mapping[str, float]], what: str) -> tuple[Array, Array]:
        base = measure(self.average([]))
        columns = []
        for i in range(self.n):
            found = measure(self.average([i]))
            if set(found) != set(base):
                raise OptionError(f"The {what} of {self.names[i]!r} is missing for a task that the base has.")
            columns.append([found[task] for task in base])
            self._tell(what, i + 1)
        return np.array(list(base.values())), np.array(columns).T

    def _needed(self, given: Any, name: str, data: str) -> Any:
        if given is None:
            raise OptionError(f"This selector needs the experts' {name}: give {data}, or choose a data-free one.")
        return given

    def _tell(self, what: str, done: int) -> None:
        if self._progress is not None:
            self._progress(what, done, self.n)


@dataclass(frozen=True)
class Selection:
    """A ranked subset: names, best or first chosen first, with a reason each, and what the choice was made by."""

    names: tuple[str, ...]
    reasons: tuple[str, ...]
    selector: dict[str, Any]
    candidates: tuple[str, ...]
    quality: Array | None = None
    similarity: Array | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Selector:
    """Options of a selector; subclasses are listed in `SELECTORS`."""

    source: ClassVar[str] = ""

    def select(self, evidence: Evidence) -> Selection:
        """Return the chosen experts. Raises OptionError for options that the pool does not allow."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return the mapping from which `make_selector` makes it again."""
        return describe(self, SELECTORS)

    def _selection(self, evidence: Evidence, ranked: Sequence[int], reasons: Sequence[str], **rest: Any) -> Selection:
        names = tuple(evidence.names[i] for i in ranked)
        return Selection(names, tuple(reasons), self.describe(), evidence.names, **rest)


def check_size(owner: Selector, k: int, n: int) -> None:
    """Raise OptionError unless 1 <= k <= n."""
    if k > n:
        raise OptionError(f"The 'k' parameter of {type(owner).__name__} must be at most {n}, the experts. Got {k}.")


QUALITIES = ("accuracy", "loss", "norm", "uniform")
SIMILARITIES = ("features", "task-vectors", "layers", "agreement")


def quality(evidence: Evidence, kind: str, over: str) -> Array:
    """Return the quality of each expert [n], at least 0.

    "accuracy": relative gain over the base, (a_i − a_0) / a_0, on each task, then the mean over tasks or the best;
    "loss": relative reduction (l_0 − l_i) / l_0, alike; "norm", without data: min(r, 1/r) with r = ‖τ_i‖ over the
    median norm, small for experts that moved much less or much more than the others; "uniform": 1. An expert that is
    worse than the base gets 0: det(L) has q², by which it would look good.
    """
    if kind == "uniform":
        return np.ones(evidence.n)
    if kind == "norm":
        norms = evidence.norms
        ratio = norms / np.median(norms) if np.median(norms) > 0 else norms
        return np.array([min(r, 1 / r) if r > 0 else 0.0 for r in ratio])
    base, experts = evidence.accuracies if kind == "accuracy" else evidence.loss_table
    gains = (experts - base[:, None]) / np.maximum(base[:, None], 1e-12)
    if kind == "loss":
        gains = -gains
    return np.maximum(gains.mean(axis=0) if over == "mean" else gains.max(axis=0), 0.0)


def similarity(evidence: Evidence, kind: str) -> Array:
    """Return the similarity of experts [n, n]: of features, of task vectors, of predictions.

    "features": mean cosine on the same samples; "task-vectors": cosine over the whole model; "layers": mean over layers
    of the cosine within each (neither takes data); "agreement": share of samples with the same predicted class.
    """
    found = {
        "features": lambda: evidence.feature_similarity,
        "task-vectors": lambda: evidence.cosines,
        "layers": lambda: evidence.layer_cosines,
        "agreement": lambda: evidence.agreement,
    }
    return found[kind]()


@dataclass(frozen=True)
class DPP(Selector):
    """Good and diverse experts: the subset Y of largest det(L_Y), L = diag(q) S diag(q).

    k: how many, by default 8 or all of a smaller pool; or an expected `size` instead (then the quality is scaled so
    that a draw has that many on average and the mode is taken); quality, over, similarity: see `quality` and
    `similarity`; inference: "greedy", "polished" (greedy, then swaps), "exhaustive" (n <= 20), or "sample" from the
    k-DPP with `seed`; shortlist: only the experts of the best linear oracle scores; include, exclude: names that must
    or must not be chosen.
    """

    k: int | None = None
    quality: str = "accuracy"
    over: str = "mean"
    similarity: str = "features"
    inference: str = "polished"
    size: float | None = None
    shortlist: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    source: ClassVar[str] = "Kulesza and Taskar (2012), Determinantal Point Processes for Machine Learning"

    def __post_init__(self) -> None:
        if self.k is not None and self.size is not None:
            raise OptionError(f"DPP takes either 'k' or an expected 'size'. Got k={self.k!r}, size={self.size!r}.")
        for name in ("include", "exclude"):
            given = getattr(self, name)
            names = (given,) if isinstance(given, str) else given
            if not isinstance(names, (list, tuple)) or not all(isinstance(expert, str) for expert in names):
                raise OptionError(f"The '{name}' parameter of DPP must be a list of names of experts. Got {given!r}.")
            object.__setattr__(self, name, tuple(names))
        if self.k is not None:
            check_number(self, "k", 1, math.inf, integer=True)
        if self.size is not None:
            check_number(self, "size", 0, math.inf, closed="neither")
        if self.shortlist is not None:
            check_number(self, "shortlist", 1, math.inf, integer=True)
        check_number(self, "seed", 0, math.inf, integer=True)
        check_choice(self, "quality", QUALITIES)
        check_choice(self, "similarity", SIMILARITIES)
        check_choice(self, "over", ("mean", "best"))
        check_choice(self, "inference", ("greedy", "polished", "exhaustive", "sample"))

    def select(self, evidence: Evidence) -> Selection:
        """Choose by the determinant."""
        k = min(8, evidence.n) if self.k is None and self.size is None else self.k
        if k is not None:
            check_size(self, k, evidence.n)
        worth = quality(evidence, self.quality, self.over)
        alike = similarity(evidence, self.similarity)
        index = {name: i for i, name in enumerate(evidence.names)}
        for name in (*self.include, *self.exclude):
            if name not in index:
                raise OptionError(f"DPP: there is no expert {name!r} to include or exclude.")
        excluded = {index[name] for name in self.exclude}
        if self.shortlist is not None:
            _, scores = evidence.relevance
            order = np.argsort(scores.min(axis=0), kind="stable")
            excluded |= set(order[self.shortlist :].tolist()) - {index[name] for name in self.include}
        kernel = dpp.Kernel(worth, alike, evidence.names)
        if self.size is not None:
            kernel = kernel.scaled_to(self.size)
        ranked = self._infer(kernel, k, [index[name] for name in self.include], sorted(excluded))
        forced = {"include": [index[name] for name in self.include], "exclude": sorted(excluded)}
        if k is None:
            inclusion = dpp.marginals(kernel.matrix, **forced)
        else:
            inclusion = dpp.kdpp_marginals(kernel.matrix, k, **forced)
        reasons = [
            f"{_why(evidence, worth, alike, i, ranked[:place])}; a draw has it with probability {inclusion[i]:.2f}"
            for place, i in enumerate(ranked)
        ]
        details = {
            "log_det": float(dpp.log_det(kernel.matrix, ranked)),
            "log_likelihood": float(dpp.log_likelihood(kernel.matrix, ranked, k, **forced)),
            "expected_size": kernel.expected_size,
            "inclusion": inclusion.tolist(),
        }
        return self._selection(evidence, ranked, reasons, quality=worth, similarity=alike, details=details)

    def _infer(self, kernel: dpp.Kernel, k: int | None, include: list[int], exclude: list[int]) -> list[int]:
        matrix = kernel.matrix
        if self.inference == "sample":
            rng = np.random.default_rng(self.seed)
            if k is None:
                return dpp.sample_dpp(matrix, rng, include=include, exclude=exclude).tolist()
            return dpp.sample_kdpp(matrix, k, rng, include=include, exclude=exclude).tolist()
        if self.inference == "exhaustive":
            return dpp.exhaustive_map(matrix, k, include=include, exclude=exclude).indices.tolist()
        ranking = dpp.greedy_map(matrix, k, include=include, exclude=exclude)
        if self.inference == "polished":
            ranking = dpp.swap_polish(matrix, ranking.indices, include=include, exclude=exclude)
        return ranking.indices.tolist()


def _why(evidence: Evidence, worth: Array, alike: Array, i: int, before: Sequence[int]) -> str:
    """Return the expert's quality, and the most similar of the experts that were chosen before."""
    text = f"quality {worth[i]:.3g}"
    if not len(before):
        return text
    nearest = max(before, key=lambda j: alike[i, j])
    return f"{text}, most like {evidence.names[nearest]} ({alike[i, nearest]:.2f})"


@dataclass(frozen=True)
class TopK(Selector):
    """The experts of lowest linear oracle scores ⟨∇loss_t(θ0), τ_i⟩: those along which the loss falls fastest.

    over: "mean" of the tasks' scores, or the "best" of them. Ranks as ⟨∇loss, θ_i⟩ does.
    """

    k: int = 8
    over: str = "mean"
    source: ClassVar[str] = "FW-Merging (Chen et al. 2025), section 3.2"

    def __post_init__(self) -> None:
        check_number(self, "k", 1, math.inf, integer=True)
        check_choice(self, "over", ("mean", "best"))

    def select(self, evidence: Evidence) -> Selection:
        """Rank by score."""
        check_size(self, self.k, evidence.n)
        tasks, table = evidence.relevance
        scores = table.mean(axis=0) if self.over == "mean" else table.min(axis=0)
        ranked = np.argsort(scores, kind="stable")[: self.k].tolist()
        reasons = [f"score {scores[i]:.3g}, strongest for {tasks[int(table[:, i].argmin())]}" for i in ranked]
        return self._selection(evidence, ranked, reasons, quality=-scores, details={"relevance": table.tolist()})


@dataclass(frozen=True)
class GreedySoup(Selector):
    """In the order of their validation accuracy, keep each expert with which the average is not worse than without."""

    k: int | None = None
    source: ClassVar[str] = "Wortsman et al. (2022), Model soups, recipe 1"

    def __post_init__(self) -> None:
        if self.k is not None:
            check_number(self, "k", 1, math.inf, integer=True)

    def select(self, evidence: Evidence) -> Selection:
        """Build the soup."""
        _, experts = evidence.accuracies
        means = experts.mean(axis=0)
        order = np.argsort(-means, kind="stable").tolist()
        chosen, best, reasons = [order[0]], float(means[order[0]]), [f"accuracy {100 * means[order[0]]:.1f} alone"]
        for i in order[1:]:
            if self.k is not None and len(chosen) == self.k:
                break
            found = evidence.merged_accuracy([*chosen, i])
            if found >= best:
                rise = f"rises from {100 * best:.1f} to" if found > best else "stays at"
                reasons.append(f"the average {rise} {100 * found:.1f}")
                chosen, best = [*chosen, i], found
        return self._selection(evidence, chosen, reasons, quality=means, details={"accuracy": best})


@dataclass(frozen=True)
class BestSingle(Selector):
    """The one expert of highest mean validation accuracy."""

    source: ClassVar[str] = "baseline"

    def select(self, evidence: Evidence) -> Selection:
        """Take the best."""
        means = evidence.accuracies[1].mean(axis=0)
        best = int(means.argmax())
        return self._selection(evidence, [best], [f"accuracy {100 * means[best]:.1f}"], quality=means)


@dataclass(frozen=True)
class Random(Selector):
    """k experts at random, by `seed`."""

    k: int = 8
    seed: int = 0
    source: ClassVar[str] = "baseline"

    def __post_init__(self) -> None:
        check_number(self, "k", 1, math.inf, integer=True)
        check_number(self, "seed", 0, math.inf, integer=True)

    def select(self, evidence: Evidence) -> Selection:
        """Draw."""
        check_size(self, self.k, evidence.n)
        by_name = sorted(range(evidence.n), key=lambda i: evidence.names[i])  # whatever the order of the pool
        drawn = np.random.default_rng(self.seed).choice(evidence.n, size=self.k, replace=False)
        return self._selection(evidence, [by_name[i] for i in drawn], ["drawn"] * self.k)


@dataclass(frozen=True)
class All(Selector):
    """Every expert, in the order of the pool."""

    source: ClassVar[str] = "baseline"

    def select(self, evidence: Evidence) -> Selection:
        """Take all."""
        return self._selection(evidence, range(evidence.n), ["all are"] * evidence.n)


SELECTORS: dict[str, type[Selector]] = {
    "dpp": DPP,
    "top-k": TopK,
    "greedy-soup": GreedySoup,
    "best-single": BestSingle,
    "random": Random,
    "all": All,
}


def make_selector(spec: object) -> Selector:
    """Return a selector from an instance, a name, or a mapping with a name and options."""
    return construct("selector", SELECTORS, spec)
