"""Go or no-go: what is known of a pool before it is merged, and what it means for each expert and for the pool.

Without data: ‖τ_i‖, ‖τ_i‖/‖θ0‖, cos(θ_i, θ0), cos(τ_i, τ_j), distances ‖θ_i − θ_j‖, Δ² = max_i ‖θ_i − θ̄‖², and what
`pools.inspect` flags. With data: the barrier from each expert to the average of the others, what averaging gains, and
the measurable terms of the bound on the risk of an average (Proposition 1 of the paper on DPP selection).

The thresholds separate, on the embedded zoo, 24 experts that were fine-tuned from one base from three that are broken
on purpose (`mergesolve landscape check --zoo --task digits --task shapes --task clocks --task lowercase --limit 50`):

    quantity                                        sound experts    duplicate   misinitialized   noisy
    cos(θ, θ0)                                      0.994 to 0.997   0.995       0.338            0.840
    ‖τ‖ / median of the others                      0.79 to 1.10     1.07        11.1             6.7
    largest cos(τ, τ')                              0.05 to 0.21     1           0.01             0.16
    barrier to the average / mean loss of the ends  0 to 0.02        0           0.97             0

No measure sees all three: the norm finds both that went astray, the cosine the copy, and the barrier only what lies in
another basin; noise around a sound expert has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .diversity import BoundTerms, delta_squared
from .errors import OptionError
from .landscape import Gain, Metric, barrier_of, losses_at, merging_gain, segment
from .problem import Problem

if TYPE_CHECKING:
    from ..pools import Pool, Report

Array = np.ndarray[Any, Any]
GO, CAUTION, NO_GO = "go", "caution", "no-go"
VERDICTS = (GO, CAUTION, NO_GO)

THRESHOLDS: dict[str, float] = {
    "norm_ratio": 2.0,
    "similar": 0.9,
    "barrier_caution": 0.05,
    "barrier_no_go": 0.25,
}
"""norm_ratio: ‖τ‖ over the median of the others, either way, beyond which a plain average is out of proportion;
similar: cosine above which two experts are nearly one; barrier_caution, barrier_no_go: barrier to the average of the
others, relative to the mean loss of the two ends."""

FLAGGED = {"nonfinite": NO_GO, "stranger": NO_GO, "duplicate": CAUTION, "unchanged": CAUTION, "rounding": CAUTION}
"""What the flags of `pools.inspect` mean for an expert; the flag `base` is about the pool."""


@dataclass
class ExpertCheck:
    """What is known of one expert.

    norm: ‖τ‖; relative: ‖τ‖/‖θ0‖; norm_ratio: ‖τ‖ over the median of the others; base_cosine: cos(θ, θ0); nearest: the
    expert of the largest cosine, which is `cosine`; to_average: ‖θ − θ̄‖ from the average of the sound others. With
    data: loss; barrier and relative_barrier on the way to that average, at barrier_at; influence: what joining adds to
    the average's loss; best_gain: the task on which the expert is furthest below the base, and by how much.
    """

    name: str
    norm: float
    relative: float
    norm_ratio: float
    base_cosine: float
    nearest: str
    cosine: float
    to_average: float = float("nan")
    loss: float | None = None
    barrier: float | None = None
    relative_barrier: float | None = None
    barrier_at: float | None = None
    influence: float | None = None
    best_gain: tuple[str, float] | None = None
    verdict: str = GO
    reasons: list[str] = field(default_factory=list)

    def judge(self, verdict: str, reason: str) -> None:
        """Add a reason; the verdict is the worst of them."""
        self.verdict = worst([self.verdict, verdict])
        self.reasons.append(f"{verdict}: {reason}")


@dataclass
class PoolCheck:
    """The check of a pool: its experts, and the verdict on merging it as it is, and on what is left of it.

    kept: the experts without those that are no-go and without copies; max_distance: the largest ‖θ_i − θ_j‖ and its
    pair; delta_squared: Δ² by name of the subset ("all", "kept"). With data: averaged, the experts whose average is
    measured (the kept ones; if fewer than two are, all that can be read); losses of the base and of that average; gain:
    what averaging them gains; bound: the terms of Proposition 1 by subset.
    """

    experts: list[ExpertCheck]
    kept: tuple[str, ...]
    base_norm: float
    max_distance: float
    farthest: tuple[str, str] | None
    delta_squared: dict[str, float]
    verdict: str = GO
    reasons: list[str] = field(default_factory=list)
    kept_verdict: str = GO
    kept_reasons: list[str] = field(default_factory=list)
    base_loss: float | None = None
    average_loss: float | None = None
    averaged: tuple[str, ...] = ()
    gain: Gain | None = None
    bound: dict[str, dict[str, float | None]] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=lambda: dict(THRESHOLDS))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        plain = asdict(self)
        if self.gain is not None:
            plain["gain"] = {**asdict(self.gain), "gain": self.gain.gain}
        return plain


def worst(verdicts: Sequence[str]) -> str:
    """Return the worst of some verdicts; of none, go."""
    return max(verdicts, key=VERDICTS.index, default=GO)


def check_pool(
    pool: Pool,
    problem: Problem | None = None,
    *,
    bound: Callable[[Sequence[int]], BoundTerms] | None = None,
    grid: int = 9,
    refine: int = 6,
    thresholds: Mapping[str, float] | None = None,
    report: Report | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> PoolCheck:
    """Check a pool: one pass without data, and with a problem over it, about ``grid`` forward passes an expert.

    bound: indices of experts -> the terms of Proposition 1 (`Evidence.bound`). thresholds: other values for some of
    THRESHOLDS. Raises OptionError for thresholds that do not exist or are negative.
    """
    from ..pools import inspect

    limits = {**THRESHOLDS, **(thresholds or {})}
    if unknown := sorted(limits.keys() - THRESHOLDS.keys()):
        raise OptionError(f"There is no threshold {unknown[0]!r}. Known: {', '.join(THRESHOLDS)}.")
    for name, limit in limits.items():
        if not 0 <= limit < math.inf:
            raise OptionError(f"The threshold {name!r} must be a number of at least 0. Got {limit:g} instead.")
    found = report or inspect(pool)
    checked = _without_data(found, limits)
    checked.thresholds = limits
    if problem is not None:
        _with_data(checked, found, problem, bound, grid, refine, limits, progress)
    _conclude(checked, found)
    return checked


def _gram(report: Report) -> Array:
    gram: Array = report.cosines * np.outer(report.norms, report.norms)
    gram[np.diag_indices(len(gram))] = report.norms**2
    return gram


def _without_data(report: Report, limits: Mapping[str, float]) -> PoolCheck:
    names, norms, n = report.names, report.norms, len(report.names)
    gram = _gram(report)
    squared = np.maximum(np.diag(gram)[:, None] + np.diag(gram)[None, :] - 2 * gram, 0)
    experts = []
    for i, name in enumerate(names):
        others = [j for j in range(n) if j != i]
        usual = float(np.median(norms[others])) if others else float("nan")
        nearest = max(others, key=lambda j: report.cosines[i, j]) if others else i
        one = ExpertCheck(
            name,
            float(norms[i]),
            float(norms[i] / report.base_norm) if report.base_norm else float("nan"),
            float(norms[i] / usual) if others and usual > 0 else float("nan"),
            float(report.base_cosines[i]),
            names[nearest] if others else "",
            float(report.cosines[i, nearest]) if others else float("nan"),
        )
        for flag in report.flags:
            if flag.model == name:
                one.judge(FLAGGED[flag.kind], flag.message)
        flagged = bool(one.reasons)
        ratio = limits["norm_ratio"]
        if not flagged and len(others) > 1 and not 1 / ratio <= one.norm_ratio <= ratio:
            one.judge(
                CAUTION,
                f"its task vector is {one.norm_ratio:.2g} times as long as the median of the others (threshold: "
                f"{1 / ratio:g} to {ratio:g}), so a plain average is out of proportion; solve for the coefficients.",
            )
        copies = [j for j in range(i) if report.cosines[i, j] > limits["similar"]]
        if not flagged and copies:
            near = max(copies, key=lambda j: report.cosines[i, j])
            one.judge(
                CAUTION,
                f"nearly the same as {names[near]!r}: cosine {report.cosines[i, near]:.3f} (threshold: "
                f"{limits['similar']:g}). An average counts it twice.",
            )
        experts.append(one)
    alike = {flag.model for flag in report.flags if flag.kind == "duplicate"}
    kept = tuple(one.name for one in experts if one.verdict != NO_GO and one.name not in alike)
    far = np.unravel_index(int(np.argmax(squared)), squared.shape)
    finite = [k for k, one in enumerate(experts) if np.isfinite(gram[k, k])]
    delta = {"all": delta_squared(gram[np.ix_(finite, finite)])} if finite else {}
    rows = [names.index(name) for name in kept]
    if rows:
        delta["kept"] = delta_squared(gram[np.ix_(rows, rows)])
    for k, one in enumerate(experts):
        others = [row for row in rows if row != k]
        if others:
            share = np.full(len(others), 1 / len(others))
            square = gram[k, k] - 2 * gram[k, others] @ share + share @ gram[np.ix_(others, others)] @ share
            one.to_average = float(np.sqrt(max(square, 0.0)))
    return PoolCheck(
        experts,
        kept,
        report.base_norm,
        float(np.sqrt(squared.max())),
        (names[int(far[0])], names[int(far[1])]) if n > 1 else None,
        delta,
    )


def _with_data(
    checked: PoolCheck,
    report: Report,
    problem: Problem,
    bound: Callable[[Sequence[int]], BoundTerms] | None,
    grid: int,
    refine: int,
    limits: Mapping[str, float],
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Barriers, influences, the gain and the bound, on the problem's data as it is drawn."""
    names = report.names
    rows = _averaged(checked, report)
    metric = Metric(_gram(report)[None])

    def average(experts: Sequence[int]) -> Array:
        point = np.zeros((problem.rows, problem.n))
        if experts:
            point[:, list(experts)] = 1 / len(experts)
        return point

    base = losses_at(problem, average([]))
    checked.base_loss = base.total
    for i, one in enumerate(checked.experts):
        if progress is not None:
            progress(f"barrier of {one.name}", i, len(names))
        others = [row for row in rows if row != i]
        if not others or any(flag.model == one.name and flag.kind == "nonfinite" for flag in report.flags):
            continue
        alone = losses_at(problem, average([i]))
        path = segment(problem, average([i]), average(others), grid=grid, refine=refine, metric=metric)
        barrier = barrier_of(path.steps, path.values)
        scale = 0.5 * (abs(path.values[0]) + abs(path.values[-1]))
        one.loss, one.barrier, one.barrier_at = alone.total, barrier.height, barrier.at
        one.relative_barrier = barrier.height / scale if scale > 0 else float("inf") if barrier.height > 0 else 0.0
        one.influence = losses_at(problem, average([*others, i])).total - float(path.values[-1])
        if base.tasks:
            best = max(base.tasks, key=lambda task: base.tasks[task] - alone.tasks[task])
            one.best_gain = best, base.tasks[best] - alone.tasks[best]
        for verdict, limit in ((NO_GO, limits["barrier_no_go"]), (CAUTION, limits["barrier_caution"])):
            if one.relative_barrier > limit:
                one.judge(
                    verdict,
                    f"on the way to the average of the others the loss rises {barrier.height:.3g} above the chord at t "
                    f"= {barrier.at:.2f}, {one.relative_barrier:.0%} of the mean loss of the ends (threshold: "
                    f"{limit:.0%}): they lie in different basins.",
                )
                break
    checked.kept = tuple(one.name for one in checked.experts if one.name in checked.kept and one.verdict != NO_GO)
    rows = _averaged(checked, report)
    if progress is not None:
        progress("gain and bound", len(names), len(names))
    if rows:
        points = [average([row]) for row in rows]
        known = [checked.experts[row].loss for row in rows]
        values = (
            None if any(value is None for value in known) else [float(value) for value in known if value is not None]
        )
        checked.gain = merging_gain(problem, points, values=values, metric=metric)
        checked.average_loss = checked.gain.merged
        checked.averaged = tuple(names[row] for row in rows)
    kept = [names.index(name) for name in checked.kept]
    if kept:
        checked.delta_squared["kept"] = delta_squared(_gram(report)[np.ix_(kept, kept)])
    if bound is not None:
        subsets = {"all": list(range(len(names))), "kept": kept}
        for label, chosen in subsets.items():
            if chosen and not (label == "all" and any(flag.kind == "nonfinite" for flag in report.flags)):
                terms = bound(chosen)
                merged = losses_at(problem, average(chosen)).total
                checked.bound[label] = {
                    **asdict(terms),
                    "average_risk": merged,
                    "averaging_error": merged - terms.ensemble_risk,
                }


def _averaged(checked: PoolCheck, report: Report) -> list[int]:
    """The experts whose average is measured: the kept ones; where fewer than two are, all that are finite, once."""
    if len(checked.kept) > 1:
        return [report.names.index(name) for name in checked.kept]
    left_out = {flag.model for flag in report.flags if flag.kind in ("nonfinite", "duplicate")}
    return [i for i, name in enumerate(report.names) if name not in left_out]


def _conclude(checked: PoolCheck, report: Report) -> None:
    """The verdicts on the pool as it is and on the kept experts."""
    by_name = {one.name: one for one in checked.experts}
    kept: list[tuple[str, str]] = []
    for flag in report.flags:
        if flag.model == "base":
            kept.append((NO_GO, flag.message))
    if len(checked.kept) < 2:
        count = "one sound expert is" if checked.kept else "no sound expert is"
        kept.append((NO_GO, f"{count} left, so there is nothing to merge."))
    if checked.gain is not None and len(checked.kept) > 1:
        gain = checked.gain
        if gain.gain < 0:
            kept.append(
                (
                    NO_GO,
                    f"the average loses: its loss {gain.merged:.4g} is above the mean loss {gain.mean:.4g} of the "
                    "experts, so the loss is not convex between them.",
                )
            )
        elif checked.base_loss is not None and gain.merged > checked.base_loss:
            kept.append(
                (
                    CAUTION,
                    f"the plain average ({gain.merged:.4g}) is worse than the base ({checked.base_loss:.4g}) on these "
                    "tasks; solve for the coefficients over a domain that contains the base (--domain capped).",
                )
            )
    careful = [name for name in checked.kept if by_name[name].verdict == CAUTION]
    if careful:
        kept.append((CAUTION, f"look at {', '.join(careful)}."))
    checked.kept_verdict = worst([verdict for verdict, _ in kept])
    checked.kept_reasons = [f"{verdict}: {reason}" for verdict, reason in kept]
    as_it_is = list(kept)
    astray = [one.name for one in checked.experts if one.verdict == NO_GO]
    copies = [one.name for one in checked.experts if one.name not in (*checked.kept, *astray)]
    if astray:
        as_it_is.insert(0, (NO_GO, f"leave out {', '.join(astray)}."))
    if copies:
        as_it_is.append((CAUTION, f"{', '.join(copies)} would count twice what is there already; leave out."))
    checked.verdict = worst([verdict for verdict, _ in as_it_is])
    checked.reasons = [f"{verdict}: {reason}" for verdict, reason in as_it_is]
