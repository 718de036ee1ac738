"""Figures and tables of the loss between merges: segments, planes, swaps of layers, features, readiness of a pool.

Colour maps are perceptually uniform; where a value has a sign, the map diverges at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from .figures import save_figure, shorten
from .palette import COLOURS, GREY, INK
from .tables import listing

if TYPE_CHECKING:
    from rich.table import Table

    from ..solvers.landscape import FeatureConnectivity, Plane, Segment, Swap
    from ..solvers.readiness import PoolCheck

Array = np.ndarray[Any, Any]
Pairs = Mapping[tuple[str, str], "Segment"]
WRITTEN = 14  # rows and columns of a matrix up to which its values are written into the cells
LEVELS = 14  # of a contour plot
RED = "#B5533C"
VERDICT_COLOURS = {"go": "#117733", "caution": "#DDAA33", "no-go": "#CC3311"}
SERIES: Sequence[Any] = (*COLOURS, GREY)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _number(value: float) -> str:
    """Three or four significant digits, without an exponent where that is readable; a true minus sign."""
    size = abs(value)
    form = ".3f" if 1e-3 <= size < 10 else ".1f" if 10 <= size < 1e4 else ".3g"
    return format(value, form).replace("-", "−")


def segment_figure(found: Segment, first: str, second: str) -> Figure:
    """Draw the loss along the segment with its chord and barrier, its tasks thin; accuracies, if measured, below."""
    rows = 2 if found.measured else 1
    figure = _figure(6.6, 3.7 * rows - 0.3 * (rows - 1))
    axes = np.atleast_1d(figure.subplots(rows, 1, sharex=True))
    top = axes[0]
    for k, (name, values) in enumerate(found.tasks.items()):
        if len(found.tasks) > 1:
            top.plot(found.steps, values, color=SERIES[min(k, len(SERIES) - 1)], linewidth=1.1, label=shorten(name))
    label = "all tasks" if len(found.tasks) > 1 else "loss"
    top.plot(found.steps, found.values, color=INK, linewidth=2.2, marker="o", markersize=3.5, label=label, zorder=4)
    ends = found.values[[0, -1]]
    top.plot([0, 1], ends, color="#777777", linewidth=1.0, linestyle="--", label="chord", zorder=3)
    barrier = found.barrier
    worth = np.isfinite(barrier.height) and barrier.height > 1e-3 * float(np.ptp(found.values))
    if worth:
        chord = (1 - barrier.at) * ends[0] + barrier.at * ends[1]
        top.annotate(
            "", (barrier.at, chord + barrier.height), (barrier.at, chord),
            arrowprops={"arrowstyle": "<->", "color": RED, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}, zorder=5,
        )  # fmt: skip
    top.set_title(f"barrier {_number(barrier.height)} at t = {barrier.at:.2f}" if worth else "no barrier")
    top.set_ylabel("loss")
    top.grid(axis="y")
    _legend_beside(top)
    if found.measured:
        for k, values in enumerate(found.measured.values()):
            axes[1].plot(found.steps, 100 * values, color=SERIES[min(k, len(SERIES) - 1)], linewidth=1.1)
        mean = 100 * np.mean(list(found.measured.values()), axis=0)
        axes[1].plot(found.steps, mean, color=INK, linewidth=2.2, marker="o", markersize=3.5, zorder=4)
        axes[1].set_ylabel("top-1 (%)")
        axes[1].grid(axis="y")
    _ends(axes[-1], first, second)
    return figure


def _legend_beside(ax: Axes) -> None:
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=7.5, handlelength=1.4, borderaxespad=0.2)


def _ends(ax: Axes, first: str, second: str) -> None:
    """A t axis whose ends are named, on the line of its label."""
    ax.set_xlim(-0.02, 1.02)
    ax.set_xlabel("t")
    for t, name, side in ((0.0, first, "left"), (1.0, second, "right")):
        ax.annotate(
            shorten(name), (t, 0.0), (0, -19), xycoords=ax.get_xaxis_transform(), textcoords="offset points",
            ha=side, va="top", fontsize=8.5,
        )  # fmt: skip


def plane_figure(found: Plane, names: Sequence[str], *, by_task: bool = False) -> Figure:
    """Draw contours of the loss on the plane, its three points, and the runs that pass near it.

    Axes are distances in the space of the weights. Losses above the 90th percentile share one colour, so that a rim
    of large losses does not flatten what is between the points. by_task: one panel a task, each with its own scale.
    """
    panels = {"all tasks" if len(found.tasks) > 1 else "loss": found.values}
    if by_task and len(found.tasks) > 1:
        panels.update(found.tasks)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    spans = float(np.ptp(found.y)), float(np.ptp(found.x))
    side = 5.6 if len(panels) == 1 else 3.9
    height = side * float(np.clip(spans[0] / spans[1], 0.45, 1.25))
    figure = _figure(columns * (side + 1.1), rows * (height + 0.7))
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax in grid.ravel()[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, values) in zip(grid.ravel(), panels.items(), strict=False):
        _contours(figure, ax, found, values)
        _marks(ax, found, names)
        ax.set_title(title if len(panels) > 1 else "")
        ax.set_xlabel("distance in weights")
        ax.set_aspect("equal")
    for row in grid:
        row[0].set_ylabel("distance in weights")
    return figure


def _contours(figure: Figure, ax: Axes, found: Plane, values: Array) -> None:
    finite = values[np.isfinite(values)]
    if not len(finite):
        ax.text(0.5, 0.5, "not finite anywhere", transform=ax.transAxes, ha="center", color="#777777")
        return
    low, high = float(finite.min()), float(np.quantile(finite, 0.9))
    if high - low <= 1e-12 * max(1.0, abs(high)):
        high = low + max(1e-9, 1e-6 * abs(low))
    levels = MaxNLocator(nbins=LEVELS, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    shown = np.ma.masked_invalid(values)
    over = "max" if float(finite.max()) > levels[-1] else "neither"
    image = ax.contourf(found.x, found.y, shown, levels=levels, cmap="viridis", extend=over)
    lines = ax.contour(found.x, found.y, shown, levels=levels, colors="white", linewidths=0.5, alpha=0.7)
    written = ax.clabel(lines, levels=levels[1::2], fontsize=6.5, colors="white", fmt=lambda value: f"{value:g}")
    for text in written:
        text.set_path_effects([withStroke(linewidth=1.6, foreground="#333333")])
    bar = figure.colorbar(image, ax=ax, shrink=0.85, aspect=28, pad=0.02)
    bar.set_label("loss", fontsize=8.5)
    bar.outline.set_visible(False)


def _marks(ax: Axes, found: Plane, names: Sequence[str]) -> None:
    halo = [withStroke(linewidth=2.6, foreground="white")]
    for k, (name, path) in enumerate(found.paths.items()):
        colour = ("#CC3311", "#EE7733", "#AA4499", "#EE3377")[k % 4]
        ax.plot(path[:, 0], path[:, 1], color="white", linewidth=2.8, zorder=4)
        ax.plot(path[:, 0], path[:, 1], color=colour, linewidth=1.5, marker="o", markersize=2.6, zorder=5)
        far = float(path[-1, 2])
        reach = max(float(np.ptp(found.x)), float(np.ptp(found.y)))
        note = f"{far:.2g} off the plane" if far > 0.01 * reach else ""
        label = shorten(name) if name not in names else ""  # the run's end is one of the three points
        text = f"{label} ({note})" if label and note else label or note
        ax.annotate(
            text, (path[-1, 0], path[-1, 1]), (6, -9), textcoords="offset points", fontsize=7.5, color=colour,
            path_effects=halo, zorder=7,
        )  # fmt: skip
    middle = found.points.mean(axis=0)
    for name, (x, y) in zip(names, found.points, strict=True):
        ax.plot([x], [y], marker="o", markersize=7, color=INK, markeredgecolor="white", markeredgewidth=1.2, zorder=6)
        above = y >= middle[1]
        right = x > found.x[0] + 0.75 * float(np.ptp(found.x))
        ax.annotate(
            shorten(name, 18), (x, y), (-6 if right else 6, 6 if above else -6), textcoords="offset points",
            ha="right" if right else "left", va="bottom" if above else "top", fontsize=8.5, color=INK,
            path_effects=halo, zorder=8,
        )  # fmt: skip


def swap_figure(found: Swap, first: str, second: str) -> Figure:
    """Draw what replacing one layer adds to the loss, by layer and task, in both directions."""
    columns = [*found.tasks] if len(found.tasks) > 1 else []
    names = [*columns, "all tasks" if columns else "loss"]
    panels = [
        np.column_stack([*(found.task_change(task)[side] for task in columns), found.change[side]]) for side in (0, 1)
    ]
    bound = max(float(np.nanmax(np.abs(np.concatenate(panels)))), 1e-12)
    width = 2.4 + 0.62 * len(names)
    figure = _figure(2 * width + 1.6, 1.5 + 0.27 * len(found.layers))
    axes = figure.subplots(1, 2)
    titles = (
        f"{shorten(first, 16)} with a layer of {shorten(second, 16)}",
        f"{shorten(second, 16)} with a layer of {shorten(first, 16)}",
    )
    for k, (ax, values, title) in enumerate(zip(axes, panels, titles, strict=True)):
        image = _matrix(ax, values, [shorten(layer, 30) for layer in found.layers], names, "RdBu_r", -bound, bound)
        if k:
            ax.set_yticks(ax.get_yticks(), [""] * len(found.layers))
        if columns:
            ax.axvline(len(columns) - 0.5, color=INK, linewidth=0.9)
        ax.set_title(title, fontsize=9)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.85, aspect=28, pad=0.015)
    bar.set_label("what the swap adds to the loss", fontsize=8.5)
    bar.outline.set_visible(False)
    return figure


def _matrix(
    ax: Axes, values: Array, rows: Sequence[str], columns: Sequence[str], colours: str, low: float, high: float
) -> Any:
    """An image with named rows and columns, its values written into the cells if there are few."""
    image = ax.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, aspect="auto")
    ax.set_facecolor("#DDDDDD")
    ax.set_xticks(range(len(columns)), [shorten(name, 18) for name in columns], rotation=90, fontsize=7.5)
    ax.set_yticks(range(len(rows)), list(rows), fontsize=7.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if len(columns) <= WRITTEN and len(rows) <= 2 * WRITTEN:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if not np.isfinite(value):
                    continue
                red, green, blue, _ = image.cmap(image.norm(np.array(value)))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                text = f"{value:.2f}".replace("-", "−")
                ax.text(j, i, "0" if float(f"{value:.2f}") == 0 else text, ha="center", va="center", fontsize=6.5,
                        color="white" if dark else INK)  # fmt: skip
    return image


def barriers_figure(found: Pairs, names: Sequence[str]) -> Figure:
    """Draw the matrix of barriers, and that of the excess in the middle, which is negative where averaging gains."""
    index = {name: k for k, name in enumerate(names)}
    n = len(names)
    height, middle = np.full((n, n), np.nan), np.full((n, n), np.nan)
    for (first, second), path in found.items():
        i, j = sorted((index[first], index[second]))
        height[i, j], middle[j, i] = path.barrier.height, path.barrier.middle
    side = 2.3 + 0.36 * max(n, 4)
    figure = _figure(2 * side + 1.2, side)
    parts = (
        (height, "barrier", "cividis", 0.0, _top(height)),
        (middle, "excess over the chord at t = ½", "RdBu_r", -_top(np.abs(middle)), _top(np.abs(middle))),
    )
    for ax, (values, title, colours, low, high) in zip(figure.subplots(1, 2), parts, strict=True):
        full = np.where(np.isnan(values), values.T, values)
        image = _matrix(ax, full, [shorten(name, 18) for name in names], names, colours, low, high)
        ax.set_title(title)
        bar = figure.colorbar(image, ax=ax, shrink=0.8, aspect=28, pad=0.02)
        bar.outline.set_visible(False)
    return figure


def _top(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return max(float(finite.max()), 1e-3) if len(finite) else 1.0


def chain_figure(found: Pairs, title: str = "") -> Figure:
    """Draw the loss along the segments between iterates, one after the other; the axis is the way in the weights."""
    figure = _figure(6.8, 3.6)
    ax = figure.subplots()
    start = 0.0
    joints: list[tuple[float, float, str]] = []
    highest = max(found.values(), key=lambda path: path.barrier.height, default=None)
    for (first, second), path in found.items():
        along = start + path.length * path.steps
        ax.plot(along, path.values, color="#332288", linewidth=1.6, zorder=3)
        ax.plot(along[[0, -1]], path.values[[0, -1]], color="#999999", linewidth=0.9, linestyle="--", zorder=2)
        joints.append((start, float(path.values[0]), first))
        start += path.length
        last = (start, float(path.values[-1]), second)
        if path is highest:
            height = path.barrier.height
            said = f"largest barrier {_number(height)}, {first} to {second}" if height > 0 else "no barrier"
            ax.set_title(f"{title}: {said}" if title else said)
    joints.append(last)
    ax.plot([x for x, _, _ in joints], [y for _, y, _ in joints], "o", color=INK, markersize=4.5, zorder=4)
    taken = -np.inf
    for x, y, name in joints:
        if x - taken > 0.05 * start:
            ax.annotate(
                shorten(name, 14), (x, y), (0, 6), textcoords="offset points", fontsize=7.5, ha="center", zorder=5
            )
            taken = x
    ax.set_xlabel("way in the weights")
    ax.set_ylabel("loss")
    ax.margins(x=0.05, y=0.12)
    ax.grid(axis="y")
    return figure


def features_figure(
    steps: Sequence[float], found: Mapping[str, Sequence[FeatureConnectivity]], first: str, second: str
) -> Figure:
    """Draw cosine and distance of merged to interpolated features, by task; dotted, the cosine to the nearer end."""
    figure = _figure(9.4, 3.7)
    left, right = figure.subplots(1, 2)
    for k, (task, values) in enumerate(found.items()):
        colour = SERIES[min(k, len(SERIES) - 1)]
        left.plot(steps, [v.cosine for v in values], color=colour, linewidth=1.6, marker="o", markersize=3.2)
        left.plot(steps, [max(v.endpoints) for v in values], color=colour, linewidth=1.0, linestyle=":")
        right.plot(
            steps, [v.distance for v in values], color=colour, linewidth=1.6, marker="o", markersize=3.2,
            label=shorten(task),
        )  # fmt: skip
    left.set_ylabel("cosine of merged features")
    left.set_title("to the interpolated ones (dotted: to the nearer end)")
    right.set_ylabel("relative distance")
    right.set_title("from the interpolated ones")
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.grid(axis="y")
        _ends(ax, first, second)
    _legend_beside(right)
    return figure


def check_figure(checked: PoolCheck) -> Figure:
    """Draw each expert by the length of its task vector and its barrier (or, without data, its angle to the base)."""
    figure = _figure(6.6, 4.2)
    ax = figure.subplots()
    measured = any(one.relative_barrier is not None for one in checked.experts)
    points: list[tuple[float, float, str, str]] = []
    for one in checked.experts:
        y = one.relative_barrier if measured else 1 - one.base_cosine
        if y is not None and np.isfinite(y) and np.isfinite(one.norm_ratio) and one.norm_ratio > 0:
            points.append((one.norm_ratio, y, one.name, one.verdict))
    for verdict, colour in VERDICT_COLOURS.items():
        chosen = [(x, y) for x, y, _, found in points if found == verdict]
        if chosen:
            ax.scatter(
                [x for x, _ in chosen],
                [y for _, y in chosen],
                s=34,
                color=colour,
                label=verdict,
                zorder=3,
                linewidths=0,
            )
    odd = [point for point in points if point[3] != "go"]
    limits = checked.thresholds
    ax.set_xscale("log")
    for x, y, name, _ in odd if odd and len(points) > 12 else points:
        beside = (-6, 5) if x > 3 else (5, 4)  # names of what is far out are written inwards
        ax.annotate(
            shorten(name, 18), (x, y), beside, textcoords="offset points", fontsize=7.5,
            ha="right" if x > 3 else "left",
        )  # fmt: skip
    for x in (1 / limits["norm_ratio"], limits["norm_ratio"]):
        ax.axvline(x, color="#BBBBBB", linewidth=0.8, linestyle="--", zorder=1)
    if measured:
        for y in (limits["barrier_caution"], limits["barrier_no_go"]):
            ax.axhline(y, color="#BBBBBB", linewidth=0.8, linestyle="--", zorder=1)
    ax.set_xlabel("length of the task vector / median of the others")
    ax.set_ylabel("barrier / mean loss of the ends" if measured else "1 − cos(θ, θ0)")
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
    low, high = ax.get_xlim()
    shown = [t for t in ticks if min(low, 0.45) <= t <= max(high, 2.2)]
    ax.set_xticks(shown, [f"{t:g}" for t in shown])
    ax.set_xticks([], minor=True)
    ax.set_title("the pool: " + checked.verdict + (f"; what is kept: {checked.kept_verdict}" if odd else ""))
    ax.legend(loc="best", fontsize=8)
    return figure


def segment_tables(found: Segment, first: str, second: str) -> list[Any]:
    """What the segment says in one line; then steps, loss, excess over the chord, tasks, accuracies."""
    excess = found.values - ((1 - found.steps) * found.values[0] + found.steps * found.values[-1])
    header = ["t", "loss", "excess", *(found.tasks if len(found.tasks) > 1 else ())]
    header += [f"top-1 {name}" for name in found.measured]
    rows = []
    for k, step in enumerate(found.steps):
        row = [f"{step:.3f}", f"{found.values[k]:.4f}", f"{excess[k]:+.4f}"]
        if len(found.tasks) > 1:
            row += [f"{values[k]:.4f}" for values in found.tasks.values()]
        rows.append([*row, *(f"{100 * values[k]:.1f}" for values in found.measured.values())])
    barrier, (at, low) = found.barrier, found.lowest
    said = (
        f"{first} (t = 0) to {second} (t = 1): barrier {barrier.height:.4g} at t = {barrier.at:.2f}, lowest loss "
        f"{low:.4g} at t = {at:.2f}, distance {found.length:.4g}"
    )
    return [said.replace("[", r"\["), listing(header, rows, numeric=range(len(header)))]


def plane_table(found: Plane, names: Sequence[str]) -> Table:
    """The three points and the ends of the runs, with their coordinates; the lowest point of the grid."""
    rows = [[name, f"{x:.4g}", f"{y:.4g}", "–"] for name, (x, y) in zip(names, found.points, strict=True)]
    for name, path in found.paths.items():
        for label, (x, y, off) in ((f"{name}, first", path[0]), (f"{name}, last", path[-1])):
            rows.append([label, f"{x:.4g}", f"{y:.4g}", f"{off:.3g}"])
    if np.isfinite(found.values).any():
        i, j = np.unravel_index(int(np.nanargmin(found.values)), found.values.shape)
        rows.append(
            [f"lowest of the grid, loss {found.values[i, j]:.4f}", f"{found.x[j]:.4g}", f"{found.y[i]:.4g}", "0"]
        )
    return listing(("point", "x", "y", "off the plane"), rows, numeric=(1, 2, 3))


def barriers_table(found: Pairs) -> Table:
    """One row a segment: losses of the ends, barrier, excess in the middle, lowest loss, distance, worst task."""
    rows = []
    for (first, second), path in found.items():
        tasks = path.task_barriers
        task = max(tasks, key=lambda name: tasks[name].height, default="")
        worst = f"{tasks[task].height:.3g} {task}" if task and tasks[task].height > 0 else "–"
        rows.append(
            [
                first, second, f"{path.length:.4g}", f"{path.values[0]:.4f}", f"{path.values[-1]:.4f}",
                f"{path.barrier.height:.4f}", f"{path.barrier.at:.2f}" if path.barrier.height > 0 else "–",
                f"{path.barrier.middle:+.4f}", f"{path.lowest[1]:.4f} at {path.lowest[0]:.2f}", worst,
            ]
        )  # fmt: skip
    header = ("from", "to", "distance", "loss", "loss", "barrier", "at t", "excess at ½", "lowest", "worst task")
    return listing(header, rows, numeric=range(2, 9))


def swap_table(found: Swap, first: str, second: str) -> Table:
    """One row a layer: what its swap adds, in both directions, the excess half way, and the losses up to it."""
    change, barrier = found.change, found.barrier
    rows = [
        [
            layer, *(f"{change[side, k]:+.4f}" for side in (0, 1)), *(f"{barrier[side, k]:+.4f}" for side in (0, 1)),
            *(f"{found.together[side, k]:.4f}" for side in (0, 1)),
        ]
        for k, layer in enumerate(found.layers)
    ]  # fmt: skip
    header = ("layer", "a ← b", "b ← a", "half way a", "half way b", "up to it, a ← b", "up to it, b ← a")
    title = f"a = {first}, loss {found.ends[0]:.4f}; b = {second}, loss {found.ends[1]:.4f}"
    return listing(header, rows, title=title, numeric=range(1, 7))


def features_table(steps: Sequence[float], found: Mapping[str, Sequence[FeatureConnectivity]]) -> Table:
    """One row a task and step."""
    rows = [
        [task, f"{t:.2f}", f"{v.cosine:.4f}", f"{v.scale:.3f}", f"{v.distance:.4f}", *(f"{e:.4f}" for e in v.endpoints)]
        for task, values in found.items()
        for t, v in zip(steps, values, strict=True)
    ]
    header = ("task", "t", "cosine", "scale", "distance", "cosine to a", "cosine to b")
    return listing(header, rows, numeric=range(1, 7))


def check_tables(checked: PoolCheck) -> list[Any]:
    """The experts with their verdicts, what averaging gains, the terms of the bound, and the reasons."""
    measured = any(one.barrier is not None for one in checked.experts)
    header = ["expert", "verdict", "‖τ‖", "‖τ‖/‖θ0‖", "of median", "cos(θ,θ0)", "largest cos(τ)", "to average"]
    if measured:
        header += ["loss", "barrier", "relative", "influence", "best task over the base"]
    rows = []
    for one in checked.experts:
        row = [
            one.name, one.verdict, f"{one.norm:.4g}", f"{100 * one.relative:.1f}%", f"{one.norm_ratio:.2f}",
            f"{one.base_cosine:.3f}", f"{one.cosine:.3f} {one.nearest}", f"{one.to_average:.4g}",
        ]  # fmt: skip
        if measured:
            row += [
                _cell(one.loss, ".4f"), _cell(one.barrier, ".4f"), _cell(one.relative_barrier, ".1%"),
                _cell(one.influence, "+.4f"), f"{one.best_gain[1]:+.3f} {one.best_gain[0]}" if one.best_gain else "–",
            ]  # fmt: skip
        rows.append(row)
    parts: list[Any] = [listing(header, rows, numeric=[2, 3, 4, 5, 7, *(range(8, 12) if measured else ())])]
    if checked.gain is not None:
        gain = checked.gain
        parts.append(
            f"merging gain of {len(checked.averaged)} experts: their mean loss {gain.mean:.4f} − the loss of their "
            f"average {gain.merged:.4f} = {gain.gain:+.4f} (base {_cell(checked.base_loss, '.4f')}, ½ mean ‖θ − θ̄‖² "
            f"{gain.spread:.4g})"
        )
    if checked.bound:
        names = ("mean_source_risk", "diversity", "ensemble_risk", "average_risk", "averaging_error", "delta_squared")
        shown = ("experts", "mean risk", "diversity", "risk of the ensemble", "risk of the average", "difference", "Δ²")
        cells = [[label, *(_cell(terms[name], ".4g") for name in names)] for label, terms in checked.bound.items()]
        parts.append(listing(shown, cells, title="measurable terms of Proposition 1", numeric=range(1, 7)))
    else:
        found = ", ".join(f"{label} {value:.4g}" for label, value in checked.delta_squared.items())
        far = f"; farthest {' and '.join(checked.farthest)}, {checked.max_distance:.4g}" if checked.farthest else ""
        parts.append(f"Δ²: {found}{far}")
    for one in checked.experts:
        parts += [f"{one.name}: {reason}" for reason in one.reasons]
    parts.append(f"the pool as it is: {checked.verdict}" + "".join(f"\n  {reason}" for reason in checked.reasons))
    if checked.kept and len(checked.kept) < len(checked.experts):
        kept = f"without {', '.join(one.name for one in checked.experts if one.name not in checked.kept)}"
        parts.append(f"{kept}: {checked.kept_verdict}" + "".join(f"\n  {reason}" for reason in checked.kept_reasons))
    return [part.replace("[", r"\[") if isinstance(part, str) else part for part in parts]


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None or not np.isfinite(value) else format(value, form)


def save_landscape(figure: Any, folder: Path, name: str, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw and write one figure into a folder that is made if missing; figure: a function without arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    return save_figure(figure, folder / name, formats)
