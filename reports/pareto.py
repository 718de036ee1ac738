"""The figure of a Pareto set: two tasks as one plane, three as three planes, more as parallel axes."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .figures import Array, save_figure, shorten
from .palette import COLOURS, GREY, INK

if TYPE_CHECKING:
    from ..solvers import Front

POINT, MODEL = COLOURS[0], COLOURS[3]
NAMED = 12  # points whose preference is written beside them; more would hide one another


def front_figure(front: Front) -> Figure:
    """Draw a front: points that no other dominates filled, dominated ones hollow, predictions of a surrogate hollow."""
    count = len(front.tasks)
    if count == 1:
        raise ValueError("A front of one task is a point; there is nothing to draw.")
    if count == 2:
        figure = _figure(5.6, 4.4)
        ax = figure.subplots()
        _plane(ax, front, 0, 1, area=True)
        figure.legend(handles=_legend(front), loc="outside lower center", ncols=4, fontsize=7.5)
    elif count == 3:
        figure = _figure(11.4, 4.1)
        axes = figure.subplots(1, 3)
        for ax, (first, second) in zip(axes, combinations(range(3), 2), strict=True):
            _plane(ax, front, first, second, area=False)
        figure.legend(handles=_legend(front), loc="outside lower center", ncols=4, fontsize=7.5)
    else:
        figure = _figure(max(6.4, 1.3 * count), 4.3)
        _parallel(figure.subplots(), front)
    figure.suptitle(_title(front), x=0.01, ha="left", fontsize=9.5)
    return figure


def save_front(front: Front, folder: Path) -> list[Path]:
    """Write front.png and front.svg into `folder` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    return save_figure(lambda: front_figure(front), folder / "front")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _title(front: Front) -> str:
    kept = int(front.nondominated.sum())
    volume = f"{front.hypervolume:.4g}" + (f" ± {front.hypervolume_error:.1g}" if front.hypervolume_error else "")
    return f"{kept} of {len(front.losses)} points are not dominated; hypervolume {volume}"


def _plane(ax: Axes, front: Front, first: int, second: int, *, area: bool) -> None:
    kept = front.nondominated
    x, y = front.losses[:, first], front.losses[:, second]
    if area:
        order = np.argsort(x[kept], kind="stable")
        xs, ys = x[kept][order], y[kept][order]
        steps = np.append(xs, max(front.reference[first], xs[-1]))
        top = float(max(front.reference[second], ys.max()))
        ax.fill_between(steps, np.append(ys, ys[-1]), top, step="post", color=POINT, alpha=0.08, linewidth=0)
        ax.step(steps, np.append(ys, ys[-1]), where="post", color=POINT, linewidth=0.8, alpha=0.5)
        ax.plot(front.reference[first], front.reference[second], marker="+", color="#777777", markersize=7)
    if front.predicted is not None:
        guess = front.predicted[:, [first, second]]
        lines = np.stack([guess, np.column_stack([x, y])], axis=1)
        ax.add_collection(LineCollection(list(lines), colors=MODEL, linewidths=0.7, alpha=0.8))
        ax.plot(*guess.T, "D", color=MODEL, markerfacecolor="white", markersize=4, linestyle="none")
    ax.plot(x[~kept], y[~kept], "o", color=GREY, markerfacecolor="white", markersize=5, linestyle="none")
    ax.plot(x[kept], y[kept], "o", color=POINT, markersize=5, linestyle="none")
    ax.plot(front.ideal[first], front.ideal[second], marker="*", color=COLOURS[1], markersize=9, linestyle="none")
    if area and len(x) <= NAMED:
        for k in range(len(x)):
            weight = f"{front.preferences[k, first]:.2f}".rstrip("0").rstrip(".")
            ax.annotate(weight, (x[k], y[k]), (5, 4), textcoords="offset points", fontsize=7, color="#555555")
    ax.set_xlabel(f"loss of {shorten(front.tasks[first])}")
    ax.set_ylabel(f"loss of {shorten(front.tasks[second])}")
    ax.grid(visible=True)
    ax.set_axisbelow(True)
    ax.margins(0.08)


def _legend(front: Front) -> list[Any]:
    def dot(marker: str, colour: str, label: str, *, filled: bool = True) -> Line2D:
        face = colour if filled else "white"
        return Line2D([], [], marker=marker, color=colour, markerfacecolor=face, linestyle="none", label=label)

    named = len(front.tasks) == 2 and len(front.losses) <= NAMED
    beside = f" (beside it: its weight of {shorten(front.tasks[0], 14)})" if named else ""
    handles = [dot("o", POINT, f"not dominated{beside}")]
    if not front.nondominated.all():
        handles.append(dot("o", GREY, "dominated", filled=False))
    if front.predicted is not None:
        handles.append(dot("D", MODEL, "on the surrogate", filled=False))
    handles.append(dot("*", COLOURS[1], "ideal point"))
    return handles


def _parallel(ax: Axes, front: Front) -> None:
    span = np.maximum(front.reference - front.ideal, 1e-300)
    scaled: Array = (front.losses - front.ideal) / span
    positions = np.arange(len(front.tasks))
    favourite = front.preferences.argmax(axis=1)
    for k in np.argsort(front.nondominated, kind="stable"):
        kept = bool(front.nondominated[k])
        colour = COLOURS[int(favourite[k]) % len(COLOURS)] if kept else GREY
        ax.plot(positions, scaled[k], color=colour, linewidth=1.2 if kept else 0.6, alpha=0.85 if kept else 0.6)
    ax.set_xticks(positions, [shorten(task, 14) for task in front.tasks])
    for position in positions:
        ax.axvline(float(position), color="#DDDDDD", linewidth=0.7, zorder=0)
        ends = ((0.0, front.ideal[position], "top", -4), (1.0, front.reference[position], "bottom", 3))
        for height, level, side, offset in ends:
            ax.annotate(
                f"{level:.3g}",
                (float(position), height),
                (0, offset),
                textcoords="offset points",
                ha="center",
                va=side,
                fontsize=7,
                color="#777777",
            )
    ax.set_ylim(-0.12, 1.12)
    ax.set_yticks([0, 1], ["ideal", "reference"])
    ax.set_ylabel("loss")
    ax.text(
        0.0,
        -0.13,
        "A line is a point of the front, in the colour of the task that its preference weighs most; dominated: grey.",
        transform=ax.transAxes,
        fontsize=7.5,
        color=INK,
    )
