"""Figures of a selection: kernel ordered by choice, quality against similarity, a map of the experts, relevance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from .figures import save_figure, shorten
from .palette import GREY, INK

CHOSEN = "#CC6677"
NAMED = 40  # experts beyond which axes carry no names

Report = Mapping[str, Any]


def save_selection(report: Report, folder: Path, formats: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """Draw every figure that the record of a selection (`selection.json`) has the numbers for."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    if report.get("similarity") is not None:
        written += save_figure(lambda: kernel(report), folder / "kernel", formats)
        written += save_figure(lambda: spread(report), folder / "quality", formats)
        if len(report["candidates"]) > 2:
            written += save_figure(lambda: chart(report), folder / "map", formats)
    if report.get("relevance") is not None:
        written += save_figure(lambda: relevance(report), folder / "relevance", formats)
    return written


def _chosen(report: Report) -> list[int]:
    index = {name: i for i, name in enumerate(report["candidates"])}
    return [index[entry["expert"]] for entry in report["selected"]]


def _order(report: Report) -> list[int]:
    """Chosen experts in their order, then the others by quality."""
    chosen = _chosen(report)
    others = [i for i in range(len(report["candidates"])) if i not in chosen]
    return chosen + sorted(others, key=lambda i: -report["quality"][i])


def kernel(report: Report) -> Figure:
    """Draw diag(q) S diag(q) and S, experts in the order of their choice; a line ends the chosen ones."""
    order, count = _order(report), len(_chosen(report))
    similarity = np.array(report["similarity"])[np.ix_(order, order)]
    quality = np.array(report["quality"])[order]
    names = [shorten(report["candidates"][i], 16) for i in order]
    size = max(3.6, 0.19 * min(len(order), NAMED) + 1.6)
    figure = Figure(figsize=(2 * size + 0.8, size), layout="constrained")
    pictures = (("similarity S", similarity, "RdBu_r"), ("kernel L", quality[:, None] * similarity * quality, "RdBu_r"))
    for axes, (title, matrix, colours) in zip(np.atleast_1d(figure.subplots(1, 2)), pictures, strict=True):
        limit = float(np.abs(matrix).max()) or 1.0
        image = axes.imshow(matrix, cmap=colours, vmin=-limit, vmax=limit)
        axes.set_title(title)
        _names(axes, names, both=True)
        for draw in (axes.axhline, axes.axvline):
            draw(count - 0.5, color=INK, linewidth=0.9)
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _names(axes: Axes, names: list[str], *, both: bool) -> None:
    if len(names) > NAMED:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.set_yticks(range(len(names)), names, fontsize=7)
    if both:
        axes.set_xticks(range(len(names)), names, fontsize=7, rotation=90)


def spread(report: Report) -> Figure:
    """Draw quality against the largest similarity to another chosen expert; good and unlike them is above left."""
    chosen = _chosen(report)
    similarity, quality = np.array(report["similarity"]), np.array(report["quality"])
    near = np.array([max((similarity[i, j] for j in chosen if j != i), default=0.0) for i in range(len(quality))])
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    _points(axes, near, quality, report, chosen)
    axes.set_xlabel("largest similarity to a chosen expert")
    axes.set_ylabel("quality")
    axes.set_title(f"{len(chosen)} of {len(quality)} experts")
    return figure


def chart(report: Report) -> Figure:
    """Draw the experts in the plane that keeps their distances √(2 − 2 S) best (classical scaling)."""
    points, share = embedding(np.array(report["similarity"]))
    figure = Figure(figsize=(6.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    _points(axes, points[:, 0], points[:, 1], report, _chosen(report))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"map of the experts ({100 * share:.0f}% of the squared distances)")
    return figure


def embedding(similarity: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return points [n, 2] by classical scaling, and their share of all squared distances from the centre."""
    n = len(similarity)
    centre = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(centre @ similarity @ centre)
    top = np.maximum(values[[-1, -2]], 0)
    total = float(np.maximum(values, 0).sum())
    return vectors[:, [-1, -2]] * np.sqrt(top), float(top.sum() / total) if total > 0 else 1.0


def _points(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], report: Report, chosen: list[int]) -> None:
    others = [i for i in range(len(x)) if i not in chosen]
    axes.scatter(x[others], y[others], s=22, color=GREY, zorder=2)
    axes.scatter(x[chosen], y[chosen], s=34, color=CHOSEN, zorder=3)
    labels = [
        axes.annotate(
            shorten(report["candidates"][i], 16), (x[i], y[i]), (4, 3), textcoords="offset points", fontsize=7,
            color=INK if i in chosen else "#888888",
        )
        for i in (*chosen, *others)
    ]  # fmt: skip
    _hide_overlapping(axes, labels)


def _hide_overlapping(axes: Axes, labels: list[Annotation]) -> None:
    """Hide each label that would cover an earlier one."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    shown: list[Bbox] = []
    for label in labels:
        box = label.get_window_extent()
        if any(box.overlaps(other) for other in shown):
            label.set_visible(False)
        else:
            shown.append(box)


def relevance(report: Report) -> Figure:
    """Draw −⟨∇loss_t(θ0), τ_i⟩ of every task and expert, each task scaled by its largest (FW-Merging, figure 3)."""
    scores = -np.array(report["relevance"]["scores"])
    tasks, names = report["relevance"]["tasks"], report["candidates"]
    scaled = scores / np.maximum(np.abs(scores).max(axis=1, keepdims=True), 1e-30)
    figure = Figure(figsize=(max(4.5, 0.26 * len(names) + 1.8), 0.3 * len(tasks) + 1.7), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(scaled, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    if len(names) <= NAMED:
        axes.set_xticks(range(len(names)), [shorten(name, 16) for name in names], fontsize=7, rotation=90)
    axes.set_yticks(range(len(tasks)), [shorten(task, 16) for task in tasks], fontsize=7)
    for t, row in enumerate(scaled):
        axes.plot(int(row.argmax()), t, marker="o", markersize=4, markerfacecolor="none", markeredgecolor="white")
    axes.set_title("how far the loss of a task (row) falls along an expert (column), at the base")
    figure.colorbar(image, ax=axes, shrink=0.9)
    return figure
