"""Figures of runs and pools, drawn with matplotlib's object interface (no pyplot, no global state).

Every function takes a list of runs and lays one panel a run side by side, axes shared where the quantity is the same.
Experts keep their colour from figure to figure (`Palette`); names stand beside their curve instead of in a legend.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .palette import GREY, INK, Palette
from .run import Run

Array = NDArray[np.float64]
Label = tuple[float, str, str]  # height, name, colour

STYLE: Any = {
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "figure.dpi": 130,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "savefig.dpi": 130,
    "svg.fonttype": "none",
    "svg.hashsalt": "mergesolve",  # identifiers in the SVG depend on its content alone
    "text.color": INK,
    "xtick.color": "#555555",
    "xtick.labelsize": 8,
    "ytick.color": "#555555",
    "ytick.labelsize": 8,
}
COLUMNS = 4
LABELS = 6
BANDS = 3  # spreads over the layers that are shown: more would hide one another
PANEL_HEIGHT = 3.4  # inches, of the figures with direct labels
NAME_LENGTH = 24
EXPERT_LIMIT = 60
LAYER_LIMIT = 60


def shorten(name: str, length: int = NAME_LENGTH) -> str:
    """Cut the middle out of a long name, so that prefixes and suffixes still tell names apart."""
    if len(name) <= length:
        return name
    head = length // 2
    return f"{name[:head]}…{name[-(length - 1 - head) :]}"


def columns_of(count: int) -> int:
    """Columns of a grid of panels: at most COLUMNS, and rows of about equal length (five panels are 3 + 2)."""
    return -(-count // -(-count // COLUMNS))


def _panels(
    count: int, *, width: float, height: float, sharex: bool = False, sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    columns = columns_of(count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    axes = list(grid.ravel())
    for ax in axes[count:]:
        ax.set_visible(False)
    for ax in axes:  # a shared axis hides inner tick labels, also above a panel that is not there
        ax.tick_params(labelbottom=True)
    return figure, axes[:count]


def _comparable(runs: Sequence[Run]) -> bool:
    """Whether the iteration axes can be shared: a run of 15 steps is a sliver beside one of 400."""
    lengths = [max(1.0, float(run.iterations[-1])) if len(run.records) else 1.0 for run in runs]
    return max(lengths) <= 4 * min(lengths)


def _alike(ranges: Sequence[float]) -> bool:
    """Whether one scale serves all runs: a free run with coefficients of 3 would flatten one on the simplex."""
    known = [value for value in ranges if value > 0]
    return not known or max(known) <= 3 * min(known)


def _title(ax: Axes, run: Run) -> None:
    status = "" if run.status in ("optimal", "max_iter") else f" ({run.status.replace('_', ' ')})"
    ax.set_title(shorten(run.name, 32) + status)


def _spread(values: Array, gap: float, low: float, high: float) -> Array:
    """Move label positions as little as needed so that they are `gap` apart and inside [low, high]."""
    order = np.argsort(values, kind="stable")
    placed = np.asarray(values, dtype=np.float64)[order]
    for _ in range(100):
        close = np.diff(placed) < gap - 1e-12
        if not close.any() and placed[0] >= low and placed[-1] <= high:
            break
        for k in np.flatnonzero(close):
            push = (gap - (placed[k + 1] - placed[k])) / 2
            placed[k] -= push
            placed[k + 1] += push
        placed += max(0.0, low - placed[0])
        placed -= max(0.0, placed[-1] - high)
    result = np.empty_like(placed)
    result[order] = placed
    return result


def _label_ends(ax: Axes, positions: Sequence[float], names: Sequence[str], colours: Sequence[str]) -> None:
    """Write names to the right of the axes at the heights where their curves end."""
    if not names:
        return
    low, high = ax.get_ylim()
    inches = 0.72 * PANEL_HEIGHT
    gap = (high - low) * 0.135 / max(inches, 0.5)
    placed = _spread(np.clip(np.asarray(positions, np.float64), low, high), gap, low, max(high, low + gap * len(names)))
    for y, name, colour in zip(placed, names, colours, strict=True):
        ax.annotate(
            shorten(name),
            xy=(1.0, float(y)),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=colour,
            annotation_clip=False,
        )


def _iteration_axis(ax: Axes, run: Run) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    ax.set_xlabel("iteration")
    if len(run.records) == 1:
        ax.set_xlim(run.iterations[0] - 0.5, run.iterations[0] + 0.5)


def _nothing(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="#777777", fontsize=8.5)


def _padded(iterations: Array, values: Array) -> tuple[Array, Array]:
    """A single iterate is drawn as a band, not as an invisible line."""
    if len(iterations) == 1:
        return iterations[0] + np.array([-0.5, 0.5]), np.repeat(values, 2, axis=0)
    return iterations, values


def _standing(run: Run, palette: Palette, values: Array) -> list[int]:
    """Experts to name in a panel: coloured ones, by final weight, at most `LABELS`, none that stays at zero."""
    last = np.abs(values[-1])
    floor = max(1e-3, 0.02 * float(last.max(initial=0.0)))
    order = [int(i) for i in np.argsort(-last, kind="stable") if last[i] >= floor and run.experts[i] in palette]
    return order[:LABELS]


def trajectories(runs: Sequence[Run], palette: Palette | None = None) -> Figure:
    """Stacked coefficients (mean over layers) along each run; what is missing to 1 is the base's share.

    Negative coefficients (free domain) stack below zero.
    """
    palette = palette or Palette.of(runs)
    means = [run.trajectory()[1].mean(axis=1) for run in runs]
    ranges = [
        (float(np.minimum(m, 0).sum(1).min()), float(np.maximum(m, 0).sum(1).max())) if len(m) else (0.0, 1.0)
        for m in means
    ]
    ranges = [(0.0, 1.0) if low == 0 and high <= 1 + 1e-6 else (1.04 * low, 1.04 * high) for low, high in ranges]
    shared = _alike([high - low for low, high in ranges])
    figure, axes = _panels(
        len(runs), width=4.3 if len(runs) > 1 else 6.4, height=PANEL_HEIGHT, sharex=_comparable(runs), sharey=shared
    )
    ends: list[list[Label]] = []
    for ax, run, mean, limits in zip(axes, runs, means, ranges, strict=True):
        ends.append([])
        _title(ax, run)
        if len(mean) == 0:
            _nothing(ax, "no iteration yet")
            continue
        iterations, mean = _padded(run.trajectory()[0], mean)
        coloured = [i for i, expert in enumerate(run.experts) if expert in palette]
        coloured.sort(key=lambda i: list(palette.colours).index(run.experts[i]))
        rest = [i for i in range(len(run.experts)) if i not in coloured]
        upper, lower = np.zeros(len(mean)), np.zeros(len(mean))
        middles: dict[int, float] = {}
        for i in [*coloured, *rest]:
            above, below = np.maximum(mean[:, i], 0), np.minimum(mean[:, i], 0)
            style: dict[str, Any] = {"color": palette[run.experts[i]], "edgecolor": "white", "linewidth": 0.35}
            if above.any():
                ax.fill_between(iterations, upper, upper + above, **style)
            if below.any():
                ax.fill_between(iterations, lower + below, lower, **style)
            end = upper[-1] + above[-1] / 2 if above[-1] >= -below[-1] else lower[-1] + below[-1] / 2
            middles[i] = float(end)
            upper, lower = upper + above, lower + below
        labels = [(middles[i], run.experts[i], palette[run.experts[i]]) for i in _standing(run, palette, mean)]
        inside = not lower.any() and float(upper.max()) <= 1 + 1e-6
        if inside:
            if float((1 - upper).max()) > 1e-3:
                ax.fill_between(iterations, upper, 1, facecolor="white", edgecolor="#CFCFCF", hatch="////", linewidth=0)
                if 1 - upper[-1] > 0.02:
                    labels.append((float((1 + upper[-1]) / 2), "base", "#666666"))
        else:
            ax.axhline(0, color=INK, linewidth=0.8)
        ax.set_ylim(*((min(low for low, _ in ranges), max(high for _, high in ranges)) if shared else limits))
        share = float(np.abs(mean[-1, rest]).sum()) if rest else 0.0
        if share > 0.02 * float(np.abs(mean[-1]).sum()):
            middle = float(np.average([middles[i] for i in rest], weights=np.abs(mean[-1, rest]) + 1e-12))
            labels.append((middle, f"{len(rest)} others", "#777777"))
        ax.set_xlim(float(iterations[0]), float(iterations[-1]))
        ends[-1] = labels
        _iteration_axis(ax, run)
    _finish_labels(axes, ends)
    _left(axes, "coefficient, mean over layers")
    return figure


def _finish_labels(axes: Sequence[Axes], named: Sequence[list[Label]]) -> None:
    """Direct labels last: with a shared axis the limits are known only when every panel is drawn."""
    for ax, labels in zip(axes, named, strict=True):
        _label_ends(ax, [y for y, _, _ in labels], [name for _, name, _ in labels], [c for _, _, c in labels])


def _left(axes: Sequence[Axes], label: str) -> None:
    for k, ax in enumerate(axes):
        if k % columns_of(len(axes)) == 0:
            ax.set_ylabel(label)


def lines(runs: Sequence[Run], palette: Palette | None = None) -> Figure:
    """Coefficients (mean over layers) of each expert along each run, with the spread over layers as a band."""
    palette = palette or Palette.of(runs)
    paths = [run.trajectory()[1] for run in runs]
    shared = _alike([float(np.ptp(path.mean(axis=1))) for path in paths if len(path)])
    figure, axes = _panels(
        len(runs), width=4.3 if len(runs) > 1 else 6.4, height=PANEL_HEIGHT, sharex=_comparable(runs), sharey=shared
    )
    ends: list[list[Label]] = []
    for ax, run, path in zip(axes, runs, paths, strict=True):
        ends.append([])
        _title(ax, run)
        iterations = run.trajectory()[0]
        if len(path) == 0:
            _nothing(ax, "no iteration yet")
            continue
        low, high = np.quantile(path, [0.1, 0.9], axis=1)
        mean = path.mean(axis=1)
        marker = "o" if len(path) == 1 else None
        order = sorted(range(len(run.experts)), key=lambda i: run.experts[i] in palette)
        named = _standing(run, palette, mean)
        for i in order:
            expert = run.experts[i]
            bright = expert in palette
            ax.plot(
                iterations,
                mean[:, i],
                color=palette[expert],
                linewidth=1.7 if bright else 0.8,
                marker=marker,
                markersize=4,
                zorder=3 if bright else 2,
            )
            if i in named[:BANDS] and path.shape[1] > 1:
                ax.fill_between(iterations, low[:, i], high[:, i], color=palette[expert], alpha=0.12, linewidth=0)
        ax.axhline(0, color="#888888", linewidth=0.6, zorder=1)
        ax.grid(axis="y")
        labels = [(float(mean[-1, i]), run.experts[i], palette[run.experts[i]]) for i in named]
        if len(run.experts) > 1 and float(np.ptp(mean[-1])) < 1e-9:
            labels = [(float(mean[-1, 0]), f"all {len(run.experts)} experts", INK)]
        ends[-1] = labels
        ax.margins(x=0.01)
        _iteration_axis(ax, run)
    _finish_labels(axes, ends)
    _left(axes, "coefficient (band: 10 to 90% of layers)" if any(len(r.layers) > 1 for r in runs) else "coefficient")
    return figure


def _thinned(names: Sequence[str], limit: int, length: int = NAME_LENGTH) -> tuple[list[int], list[str]]:
    stride = -(-len(names) // limit)
    ticks = list(range(0, len(names), stride))
    return ticks, [shorten(names[k], length) for k in ticks]


def heatmap(runs: Sequence[Run], palette: Palette | None = None) -> Figure:
    """Final coefficients, layers × experts; one colour scale for all runs, centred at 0 if any are negative."""
    del palette  # magnitude is the colour here
    values = [run.final for run in runs]
    low = min((float(np.nanmin(value, initial=0.0)) for value in values), default=0.0)
    high = max((float(np.nanmax(value, initial=0.0)) for value in values), default=1.0)
    experts = max(len(run.experts) for run in runs)
    layers = max(len(run.layers) for run in runs)
    width = min(16.0, 2.7 + 0.24 * min(experts, EXPERT_LIMIT))
    height = min(13.0, 2.2 + 0.2 * min(layers, LAYER_LIMIT))
    columns = columns_of(len(runs))
    figure, axes = _panels(
        len(runs), width=min(width, 22.0 / columns) if columns > 1 else width, height=height, sharey=False
    )
    spans = [float(np.nanmax(np.abs(value), initial=0.0)) for value in values]
    shared = _alike(spans)
    signed = low < -1e-9
    for k, (ax, run, value, span) in enumerate(zip(axes, runs, values, spans, strict=True)):
        bound = max(max(-low, high) if shared else span, 1e-12)
        negative = signed if shared else bool((value < -1e-9).any())
        style: dict[str, Any] = {"cmap": "RdBu_r" if negative else "cividis", "vmin": -bound if negative else 0.0}
        image = ax.imshow(
            np.ma.masked_invalid(value), aspect="auto", interpolation="nearest", vmax=bound, **style
        )  # fmt: skip
        _title(ax, run)
        ticks, names = _thinned(run.experts, EXPERT_LIMIT)
        ax.set_xticks(ticks, names, rotation=90, fontsize=7.5)
        same = k % columns and run.layers == runs[k - 1].layers
        ticks, names = _thinned(run.layers, LAYER_LIMIT, 30)
        ax.set_yticks(ticks, [""] * len(ticks) if same else names, fontsize=7.5)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        if len(run.experts) * len(run.layers) <= 2000:
            ax.set_xticks(np.arange(len(run.experts) + 1) - 0.5, minor=True)
            ax.set_yticks(np.arange(len(run.layers) + 1) - 0.5, minor=True)
            ax.grid(which="minor", color="white", linewidth=0.6)
            ax.tick_params(which="minor", length=0)
        if not shared or k == len(runs) - 1:
            bar = figure.colorbar(image, ax=axes if shared else ax, shrink=0.8, aspect=30, pad=0.015)
            if k == len(runs) - 1:
                bar.set_label("coefficient", fontsize=8.5)
            bar.outline.set_visible(False)
    return figure


def _objective(run: Run) -> str:
    """Name of the objective's class in words: "cross entropy"."""
    name = str((run.header.get("objective") or {}).get("objective", ""))
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def convergence(runs: Sequence[Run], palette: Palette | None = None) -> Figure:
    """Objective (above, with its tasks in grey) and gap on a log axis (below), one column a run.

    On the free domain there is no gap: the norm of the scores ("stationarity") stands in its place. A gap from
    minibatches is labelled as the estimate that it is.
    """
    del palette
    count = columns_of(len(runs))
    blocks = -(-len(runs) // count)
    figure = Figure(
        figsize=((3.6 if count > 1 else 6.4) * count, 5.0 * blocks), layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    sharex: Literal["all", "col", "none"] = "all" if _comparable(runs) else "col" if blocks == 1 else "none"
    grid = figure.subplots(2 * blocks, count, squeeze=False, sharex=sharex)
    objectives = {_objective(run) for run in runs}
    positive: list[float] = []
    lower: list[Axes] = []
    for k in range(blocks * count):
        top, bottom = grid[2 * (k // count)][k % count], grid[2 * (k // count) + 1][k % count]
        if k >= len(runs):
            top.set_visible(False)
            bottom.set_visible(False)
            continue
        run = runs[k]
        _title(top, run)
        top.tick_params(labelbottom=False)
        bottom.tick_params(labelbottom=True)
        if len(run.records) == 0:
            _nothing(top, "no iteration yet")
            continue
        marker = "o" if len(run.records) <= 25 else None
        style: dict[str, Any] = {"marker": marker, "markersize": 3.2}
        losses = run.task_losses()
        if len(losses) > 1:
            for loss in losses.values():
                top.plot(run.iterations, loss, color=GREY, linewidth=0.8, zorder=2)
        value = run.series("value")
        noisy = run.gap_is_estimate and len(value) > 40
        top.plot(run.iterations, value, color=COLOUR_VALUE, linewidth=0.6 if noisy else 1.7, zorder=3, **style)
        if noisy:
            top.plot(run.iterations, _smooth(value), color=COLOUR_VALUE, linewidth=2.0, zorder=4)
        top.grid(axis="y")
        if len(objectives) > 1:
            top.set_title(_objective(run), loc="right", fontsize=8, color="#777777")
        if k % count == 0:
            top.set_ylabel("objective" + (" (tasks in grey)" if len(losses) > 1 else ""))
        gap = run.series("gap")
        has_gap = bool(np.isfinite(gap).any())
        shown = gap if has_gap else run.series("stationarity")
        label = "gap" if has_gap else "stationarity (the free domain has no gap)"
        if run.records and not np.isfinite(shown).any():
            label = "no certificate on the way: the solver read values only"
        if run.gap_is_estimate:
            label += "\nestimated on minibatches"
        bottom.set_title(label, fontsize=8, color="#555555")
        seen = np.where(shown > 0, shown, np.nan)
        if np.isfinite(seen).any():
            noisy = noisy or (len(seen) > 40 and run.gap_is_estimate)
            bottom.plot(run.iterations, seen, color=COLOUR_GAP, linewidth=0.6 if noisy else 1.7, zorder=3, **style)
            if noisy:
                smooth = np.exp(_smooth(np.log(seen)))
                bottom.plot(run.iterations, smooth, color=COLOUR_GAP, linewidth=2.0, zorder=4)
            bottom.set_yscale("log")
            bottom.grid(axis="y")
            if has_gap:
                positive.extend(seen[np.isfinite(seen)])
                lower.append(bottom)
        else:
            _nothing(bottom, "gap 0 throughout" if has_gap else "not recorded")
        if k % count == 0:
            bottom.set_ylabel("gap" if has_gap else "stationarity")
        _iteration_axis(bottom, run)
    if len(lower) > 1 and len(objectives) == 1:
        for ax in lower:
            ax.set_ylim(min(positive) / 1.5, max(positive) * 1.5)
    if len(runs) > 1 and len(objectives) == 1:
        tops = [grid[2 * (k // count)][k % count] for k in range(len(runs))]
        low, high = min(ax.get_ylim()[0] for ax in tops), max(ax.get_ylim()[1] for ax in tops)
        for ax in tops:
            ax.set_ylim(low, high)
    return figure


COLOUR_VALUE = "#332288"
COLOUR_GAP = "#B5533C"


def _smooth(values: Array) -> Array:
    """Centred running mean over about a fifteenth of the run, ignoring nan."""
    width = max(3, len(values) // 15) | 1
    padded = np.pad(values, width // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    filled = np.isfinite(windows)
    total = np.where(filled, windows, 0.0).sum(axis=1)
    return np.where(filled.any(axis=1), total / np.maximum(filled.sum(axis=1), 1), np.nan)


def steps(runs: Sequence[Run], palette: Palette | None = None) -> Figure:
    """Step size of each iteration, one scale for runs of one solver (steps of different solvers do not compare).

    The axis is logarithmic if the steps span more than two decades; steps of 0 are then crosses below.
    """
    del palette
    runs = [run for run in runs if np.isfinite(run.series("step")).any()] or runs
    alike = len({str((run.header.get("solver") or {}).get("name")) for run in runs}) == 1
    figure, axes = _panels(
        len(runs), width=3.6 if len(runs) > 1 else 6.4, height=2.8, sharex=_comparable(runs), sharey=alike
    )
    spans = [_positive(run.series("step")) for run in runs]
    if alike:
        spans = [np.concatenate(spans)] * len(runs)
    for ax, run, positive in zip(axes, runs, spans, strict=True):
        _title(ax, run)
        step = run.series("step")
        taken = np.isfinite(step)
        if not taken.any():
            _nothing(ax, "no step was taken")
            continue
        log = len(positive) > 0 and float(positive.max()) > 100 * float(positive.min())
        shown = np.where(step > 0, step, np.nan) if log else step
        marker = "o" if len(step) <= 60 else None
        ax.plot(run.iterations, shown, color="#117733", linewidth=1.0, marker=marker, markersize=3.5)
        zero = taken & (step == 0)
        if log and zero.any():
            ax.plot(
                run.iterations[zero], np.full(int(zero.sum()), 0.02), "x", color="#B5533C", markersize=4,
                transform=ax.get_xaxis_transform(), clip_on=False,
            )  # fmt: skip
        if log:
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, 1.06 * float(positive.max()) if len(positive) else 1.0)
        ax.grid(axis="y")
        _iteration_axis(ax, run)
    _left(axes, "step size")
    return figure


def _positive(values: Array) -> Array:
    return values[np.isfinite(values) & (values > 0)]


def vertices(runs: Sequence[Run], palette: Palette | None = None) -> Figure:
    """Vertices that the oracle chose, iteration by iteration; area of a dot = share of the choices of that iteration.

    Runs of solvers that choose no vertices get no panel.
    """
    palette = palette or Palette.of(runs)
    runs = [run for run in runs if any(record.get("vertices") for record in run.records)] or runs
    rows: dict[str, None] = {}
    for run in runs:
        chosen = {name for record in run.records for name in record.get("vertices") or ()}
        rows.update((name, None) for name in ("base", *run.experts) if name in chosen)
    names = list(rows)
    height = 1.6 + 0.2 * max(3, len(names))
    figure, axes = _panels(len(runs), width=4.2 if len(runs) > 1 else 7.0, height=height, sharex=_comparable(runs))
    position = {name: k for k, name in enumerate(names)}
    for ax, run in zip(axes, runs, strict=True):
        _title(ax, run)
        points: list[tuple[float, int, float, str]] = []
        for iteration, record in zip(run.iterations, run.records, strict=True):
            for vertex, share in run.choices(record).items():
                points.append((float(iteration), position[vertex], share, vertex))
        if not points:
            _nothing(ax, "this solver chooses no vertices")
            ax.set_xticks([])
            continue
        largest = float(np.clip(3200 / max(1, len(run.records)), 10, 150))
        ax.scatter(
            [x for x, _, _, _ in points],
            [y for _, y, _, _ in points],
            s=[max(4.0, largest * share) for _, _, share, _ in points],
            c=[palette[name] if name == "base" or name in palette else "#8C8C8C" for *_, name in points],
            linewidths=0,
            zorder=3,
        )
        ax.set_yticks(range(len(names)), [shorten(name, 24) for name in names])
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.grid(axis="y")
        _iteration_axis(ax, run)
    if any(len(run.choices(record)) > 1 for run in runs for record in run.records):
        figure.supxlabel("area of a dot: share of the blocks or tasks that chose it", fontsize=8, color="#666666")
    return figure


def cosines(matrix: Array, names: Sequence[str], *, flagged: Mapping[str, str] | None = None) -> Figure:
    """Cosine matrix of task vectors; `flagged` names (strangers, duplicates, ...) are written in red."""
    count = len(names)
    side = min(15.0, 2.6 + 0.3 * max(count, 4))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    off = matrix[~np.eye(count, dtype=bool)]
    off = off[np.isfinite(off)]
    bound = max(0.1, float(np.abs(off).max())) if len(off) else 1.0
    shown = np.ma.masked_invalid(np.where(np.eye(count, dtype=bool), np.nan, matrix))
    image = ax.imshow(shown, cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest")
    ax.set_facecolor("#DDDDDD")  # the diagonal is 1 by definition and would eat the scale
    ticks, labels = _thinned(names, EXPERT_LIMIT, 24)
    ax.set_xticks(ticks, labels, rotation=90)
    ax.set_yticks(ticks, labels)
    for k, x, y in zip(ticks, ax.get_xticklabels(), ax.get_yticklabels(), strict=True):
        if flagged and names[k] in flagged:
            x.set_color("#C0392B")
            y.set_color("#C0392B")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if count <= 16:
        for i in range(count):
            for j in range(count):
                if i != j and np.isfinite(matrix[i, j]):
                    dark = abs(matrix[i, j]) > 0.6 * bound
                    text = f"{matrix[i, j]:.2f}".replace("-", "−")
                    ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color="white" if dark else INK)
    bar = figure.colorbar(image, ax=ax, shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("cosine of task vectors", fontsize=8.5)
    bar.outline.set_visible(False)
    return figure


FIGURES: dict[str, Callable[[Sequence[Run], Palette | None], Figure]] = {
    "trajectories": trajectories,
    "lines": lines,
    "heatmap": heatmap,
    "convergence": convergence,
    "steps": steps,
    "vertices": vertices,
}


def applies(name: str, runs: Sequence[Run]) -> bool:
    """Whether a figure of that name has anything to show for these runs."""
    if name == "vertices":
        return any(record.get("vertices") for run in runs for record in run.records)
    if name == "steps":
        return any(record.get("step") is not None for run in runs for record in run.records)
    return any(run.records for run in runs) or (name == "heatmap" and any(run.coefficients is not None for run in runs))


def save_figure(draw: Callable[[], Figure], stem: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw under this package's style and write `stem.png`, `stem.svg`: same input, same bytes; never half a file."""
    written = []
    with mpl.rc_context(), warnings.catch_warnings():
        # Names may be in any script; matplotlib warns of each character that its font lacks, and draws a box for it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = draw()
        for form in formats:
            buffer = io.BytesIO()
            metadata = {"svg": {"Date": None, "Creator": "mergesolve"}, "png": {"Software": "mergesolve"}}.get(form)
            figure.savefig(buffer, format=form, metadata=metadata, facecolor="white")
            path = stem.with_name(f"{stem.name}.{form}")
            part = path.with_name(f".{path.name}.part")
            try:
                part.write_bytes(buffer.getvalue())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            written.append(path)
    return written


def save_figures(
    runs: Sequence[Run],
    folder: str | Path,
    formats: Sequence[str] = ("png", "svg"),
    *,
    palette: Palette | None = None,
) -> list[Path]:
    """Every figure that applies to the runs, into `folder` (made if missing); returns what was written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    palette = palette or Palette.of(runs)
    written: list[Path] = []
    for name, draw in FIGURES.items():
        if applies(name, runs):
            written += save_figure(lambda draw=draw: draw(runs, palette), folder / name, formats)  # type: ignore[misc]
    return written
