"""Runs side by side: what each had reached after the same number of iterations, seconds, gradients, values or samples.

Counters and times of a record include the step taken from its iterate, so Λ_k was reached at those of the record
before, and the starting point at 0. A run's state at a mark is the last iterate that it had reached by then. After its
last one it keeps that and counts as ended, unless it was cut off (killed or still going): then nothing is known.
The distance of two merges at a mark is

    ‖Λ − Λ'‖_F / √L   over the L layers, experts matched by name

where the layers are the same, and ‖mean_l Λ_l − mean_l Λ'_l‖ where only the experts are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .palette import COLOURS
from .run import Run, RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

AXES = {
    "iteration": "iteration",
    "seconds": "seconds",
    "gradients": "gradients (forward and backward passes of the objective)",
    "evaluations": "values (forward passes without a gradient)",
    "samples": "samples through the model",
}
MARKS = 10
LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class State:
    """A run at a mark: its record there; distance: from the first run; ended: the mark lies behind its last record."""

    record: Mapping[str, Any]
    ended: bool
    distance: float | None = None


@dataclass(frozen=True)
class Alignment:
    """`states[k][r]`: run r at `marks[k]`, None where nothing is known; distances are by `distance` (see above)."""

    by: str
    runs: Sequence[Run]
    marks: Array
    states: Sequence[Sequence[State | None]]
    distance: str | None  # "layers", "mean" or None


def axis(run: Run, by: str) -> Array:
    """What each iterate of a run took to reach, shape [T]. Raises RunError if its trace does not say."""
    places = run.iterations if by == "iteration" else run.series(by)
    if len(run.records) == 0:
        raise RunError(f"run '{run.name}': its trace holds no iteration yet. Compare it once it has made one.")
    if np.isnan(places).any():
        known = [name for name in AXES if name == "iteration" or not np.isnan(run.series(name)).any()]
        raise RunError(
            f"run '{run.name}': its trace does not record {by}. Align by {', '.join(known)}, or solve it again."
        )
    return places if by == "iteration" else np.concatenate([[0.0], places[:-1]])


def default_marks(runs: Sequence[Run], by: str, count: int = MARKS) -> Array:
    """At most `count` marks, evenly spaced from 0 to where the longest run ends."""
    marks = np.linspace(0, max(axis(run, by)[-1] for run in runs), count)
    return np.unique(marks if by == "seconds" else np.round(marks))


def align(runs: Sequence[Run], by: str = "iteration", marks: Sequence[float] | Array | None = None) -> Alignment:
    """Look each run up at each mark. Raises RunError for an axis that a trace does not record."""
    places = [axis(run, by) for run in runs]
    at = default_marks(runs, by) if marks is None else np.asarray(sorted(marks), dtype=np.float64)
    kind = _distance_kind(runs)
    states: list[list[State | None]] = []
    for mark in at:
        line: list[State | None] = []
        first: Array | None = None
        for run, place in zip(runs, places, strict=True):
            k = int(np.searchsorted(place, mark, side="right")) - 1
            ended = bool(mark > place[-1])
            if k < 0 or (ended and not run.finished):
                line.append(None)
                continue
            record = run.records[k]
            matrix = _matched(run, runs[0], record)
            if run is runs[0]:
                first = matrix
            line.append(State(record, ended, _distance(first, matrix, kind)))
        states.append(line)
    return Alignment(by, runs, at, states, kind)


def _distance_kind(runs: Sequence[Run]) -> str | None:
    if len(runs) < 2 or any(set(run.experts) != set(runs[0].experts) for run in runs):
        return None
    return "layers" if all(run.layers == runs[0].layers for run in runs) else "mean"


def _matched(run: Run, first: Run, record: Mapping[str, Any]) -> Array | None:
    """The record's coefficients with the experts in the order of the first run."""
    if "coefficients" not in record or set(run.experts) != set(first.experts):
        return None
    return np.asarray(record["coefficients"], np.float64)[:, [run.experts.index(name) for name in first.experts]]


def _distance(first: Array | None, other: Array | None, kind: str | None) -> float | None:
    if first is None or other is None or kind is None:
        return None
    if kind == "mean":
        return float(np.linalg.norm(first.mean(axis=0) - other.mean(axis=0)))
    return float(np.linalg.norm(first - other) / np.sqrt(len(first)))


def differences(runs: Sequence[Run]) -> list[str]:
    """What keeps numbers of these runs from being compared, one sentence each."""
    found = []
    for what, key, consequence in (
        ("objectives", "objective", "their values do not compare"),
        ("tasks", "tasks", "their values do not compare"),
        ("pools", "fingerprint", "the same coefficients are different models"),
        ("domains", "domain", "gaps are bounds for different problems"),
        ("blocks", "blocks", "gaps are sums over different blocks"),
    ):
        if len({repr(_comparable(run.header.get(key))) for run in runs if run.header}) > 1:
            found.append(f"the runs have different {what}: {consequence}.")
    if len({run.gap_is_estimate for run in runs}) > 1:
        found.append("some traces hold estimates on minibatches, others exact values.")
    return found


def _comparable(value: Any) -> Any:
    """A described objective without its weights file, which is only where the model came from."""
    if isinstance(value, Mapping):
        return sorted((key, _comparable(item)) for key, item in value.items() if key not in ("weights", "microbatch"))
    return value


def final(run: Run) -> dict[str, Any]:
    """How a run ended and what it took; None for what is not known. Counts, bytes, seconds, samples."""
    result = run.result or {}
    last = run.records[-1] if run.records else {}
    counts, data = result.get("counts") or {}, result.get("data") or {}
    solver, domain = (result.get(key) or run.header.get(key) or {} for key in ("solver", "domain"))
    return {
        "run": run.name,
        "status": run.status,
        "solver": solver.get("name") if isinstance(solver, Mapping) else solver,
        "domain": domain.get("name") if isinstance(domain, Mapping) else domain,
        "experts": len(run.experts),
        "rows": run.header.get("rows"),
        "objective": result.get("objective", last.get("value")),
        "gap": result.get("gap", last.get("gap")),
        "stationarity": result.get("stationarity", last.get("stationarity")),
        "tasks": dict(result.get("tasks") or last.get("tasks") or {}),
        "iterations": result.get("nit", last.get("iteration")),
        "gradients": counts.get("gradients", last.get("gradients")),
        "evaluations": counts.get("evaluations", last.get("evaluations")),
        "samples": data.get("samples_seen", last.get("samples")),
        "bytes_read": counts.get("bytes_read", last.get("bytes_read")),
        "seconds": result.get("seconds", last.get("seconds")),
        "peak_memory": result.get("peak_memory"),
        "labelled": data.get("labelled"),
        "unlabelled": data.get("unlabelled"),
        "test_inputs": data.get("test_inputs"),
    }


def figure(runs: Sequence[Run], by: str = "iteration") -> Figure:
    """Objective above, gap below (logarithmic), over the axis; one line a run. The objective is logarithmic if it
    falls by more than a decade; a run without a gap shows its stationarity, dotted.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 5.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(drawn)
    top, bottom = drawn.subplots(2, 1, sharex=True)
    values = [run.series("value") for run in runs]
    for k, (run, value) in enumerate(zip(runs, values, strict=True)):
        places = axis(run, by)
        style: dict[str, Any] = {
            "color": COLOURS[k % len(COLOURS)],
            "linestyle": LINES[k // len(COLOURS) % len(LINES)],
            "marker": "o" if len(places) <= 25 else None,
            "markersize": 3,
            "linewidth": 1.5,
        }
        top.plot(places, value, label=run.name, **style)
        gap = run.series("gap")
        if not np.isfinite(gap).any():
            gap, style["linestyle"] = run.series("stationarity"), ":"
        bottom.plot(places, np.where(gap > 0, gap, np.nan), **style)
    known = np.concatenate([value[np.isfinite(value)] for value in values])
    if len(known) and known.min() > 0 and known.max() > 10 * known.min():
        top.set_yscale("log")
    bottom.set_yscale("log")
    _name(top, "objective")
    _name(bottom, "gap" if not all(run.free for run in runs) else "stationarity")
    bottom.set_xlabel(AXES[by])
    top.legend(fontsize=8)
    return drawn


def _name(ax: Axes, label: str) -> None:
    ax.set_ylabel(label)
    ax.grid(axis="y")
