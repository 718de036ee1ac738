"""The curve of a scan: score over the option that was scanned, the mean bold, single tasks thin."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .figures import STYLE, shorten
from .palette import COLOURS, INK

TASK_LIMIT = 12  # single tasks that are drawn; more would hide the mean


def scan_curve(trials: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Draw trials {"options": {name: value, ...}, "scores": {task: 0 to 1}} as `merge --scan` records them.

    The first option is the axis; each combination of the others is a line of its own.
    """
    names = list(trials[0]["options"])
    axis, others = names[0], names[1:]
    lines: dict[tuple[float, ...], list[Mapping[str, Any]]] = {}
    for trial in trials:
        lines.setdefault(tuple(trial["options"][name] for name in others), []).append(trial)
    tasks = list(trials[0]["scores"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        colours = dict(zip(lines, itertools.cycle(COLOURS), strict=False))
        best = max(trials, key=_mean)
        for key, line in lines.items():
            line = sorted(line, key=lambda trial: trial["options"][axis])
            xs = [trial["options"][axis] for trial in line]
            if not others and len(tasks) <= TASK_LIMIT:
                for task in tasks:
                    ys = [100 * trial["scores"][task] for trial in line]
                    axes.plot(xs, ys, color="#B8B8B8", linewidth=0.8, zorder=1)
                    axes.annotate(shorten(task), (xs[-1], ys[-1]), (4, 0), textcoords="offset points", fontsize=7,
                                  color="#777777", va="center")  # fmt: skip
            colour = INK if not others else colours[key]
            label = ", ".join(f"{name} {value:g}" for name, value in zip(others, key, strict=True)) or "mean"
            axes.plot(
                xs,
                [100 * _mean(trial) for trial in line],
                color=colour,
                linewidth=2,
                marker="o",
                markersize=3,
                label=label,
            )
        x, y = best["options"][axis], 100 * _mean(best)
        axes.plot([x], [y], marker="o", markersize=9, markerfacecolor="none", markeredgecolor="#C0392B", zorder=5)
        chosen = ", ".join(f"{name} = {value:g}" for name, value in best["options"].items())
        axes.set_title(f"{title + ': ' if title else ''}best mean {y:.1f} % at {chosen}")
        axes.set_xlabel(axis)
        axes.set_ylabel("top-1 on validation data (%)")
        axes.grid(axis="y")
        if others:
            axes.legend(fontsize=8)
    return figure


def _mean(trial: Mapping[str, Any]) -> float:
    scores = trial["scores"]
    return float(sum(scores.values()) / len(scores))
