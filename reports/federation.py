"""Figures of federated runs: accuracy over rounds, the frontier, sweeps, cosines, coefficients, cost, the constraint.

    frontier(read_study(folder), Path("frontier.png"))

Each writes the file that it is given (the suffix is the format) and returns its path. Steps with a scaling factor set
by hand are muted, the others have one hue a method; a band or a bar spans least to largest over the seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from .figures import columns_of, save_figure, shorten
from .palette import COLOURS, GREY, INK
from .rounds import FederatedRun, Study, Sweep, known_mean
from .run import RunError
from .standings import PARTS, unfinished
from .tables import size

Array = NDArray[np.float64]
Data = TypeVar("Data")
Options = ParamSpec("Options")

MUTED = ("#5F6B73", "#9A8F80", "#8796A5", "#7A7468", "#A3A9AD", "#6C7F78", "#B09E9E", "#86808F")
SYMBOLS = {"scale": "λ", "alpha": "λ", "bound": "ε", "weight": "μ"}
RETAINED = ("bound", "weight")  # options that trade the clients for the reference: a bound, or the weight of a penalty
NUMBERED = 16  # clients up to which a cosine matrix carries its numbers
ROW = 0.165  # inches between two names of 7.5 points
PART_COLOURS = dict(zip(PARTS, ("#A3A9AD", "#4BA6D4", "#332288", "#CC6677", "#DDAA33", "#117733"), strict=True))


def _saved(
    draw: Callable[Concatenate[Data, Options], Figure],
) -> Callable[Concatenate[Data, Path, Options], Path]:
    """Turn a function that draws into one that writes what it drew to a path."""

    def save(data: Data, path: Path, /, *args: Options.args, **kwargs: Options.kwargs) -> Path:
        form = path.suffix[1:] or "png"
        path.parent.mkdir(parents=True, exist_ok=True)
        return save_figure(lambda: draw(data, *args, **kwargs), path.with_suffix(""), (form,))[0]

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(save, name, getattr(draw, name))
    return save


@dataclass(frozen=True)
class Look:
    """How a step is drawn, the same in every figure of a study."""

    colour: str
    line: Any = "-"
    width: float = 1.8
    marker: str = "o"


def looks(study: Study) -> dict[str, Look]:
    """Muted tones and broken lines for a fixed scale; one hue a method for the others, lighter along its options."""
    methods: dict[str, list[str]] = {}
    for step in study.steps:
        methods.setdefault(study.runs[step][0].method, []).append(step)
    found: dict[str, Look] = {}
    muted = hues = 0
    markers = "sD^vPXph"
    lines = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
    for steps in methods.values():
        fixed = study.fixed(steps[0])
        base = MUTED[muted % len(MUTED)] if fixed else COLOURS[hues % len(COLOURS)]
        for k, step in enumerate(steps):
            colour = _towards_white(base, (0.35 if fixed else 0.55) * k / max(len(steps) - 1, 1))
            if fixed:
                found[step] = Look(colour, lines[(muted + k) % len(lines)], 1.1, markers[muted % len(markers)])
            else:
                found[step] = Look(colour, "-" if hues < len(COLOURS) else lines[1])
        muted, hues = muted + fixed, hues + (not fixed)
    return {step: found[step] for step in study.steps}


def _towards_white(colour: str, share: float) -> str:
    red, green, blue = to_rgb(colour)
    return to_hex(((1 - share) * red + share, (1 - share) * green + share, (1 - share) * blue + share))


def _canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _round_axis(axes: Axes, first: float, last: float) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_xlabel("round")
    axes.set_xlim(first, last) if last > first else axes.set_xlim(first - 0.5, first + 0.5)


@dataclass(frozen=True)
class _End:
    """Where a curve ends, and the name to write there."""

    x: float
    y: float
    name: str
    colour: str


def _label_ends(axes: Axes, ends: Sequence[_End], height: float) -> None:
    """Write names to the right of axes of this height (inches), in the order of the ends, tied to them by a line."""
    if not ends:
        return
    data = axes.transData.transform([(end.x, end.y) for end in ends])
    heights = axes.transAxes.inverted().transform(data)[:, 1]
    gap = ROW / height
    spare = max(0.0, gap * len(ends) - 1) / 2
    placed = apart(heights, gap, -spare, 1 + spare)
    edge = axes.get_xlim()[1]
    for y, end in zip(placed, ends, strict=True):
        axes.annotate(
            shorten(end.name, 28),
            xy=(end.x, end.y),
            xytext=(1.045, float(y)),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            color=_legible(end.colour),
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": end.colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 1,
                "relpos": (0, 0.5), "linestyle": "-" if end.x > 0.9 * edge else ":",
            },
        )  # fmt: skip


def apart(values: Array, gap: float, low: float, high: float) -> Array:
    """Return the positions nearest to `values` in least squares that are `gap` apart and inside [low, high].

    Positions less their rank times the gap are an isotonic regression, found by pooling neighbours that violate it.
    """
    order = np.argsort(values, kind="stable")
    blocks: list[tuple[float, int]] = []  # mean and size
    for k, value in enumerate(np.asarray(values, dtype=np.float64)[order]):
        mean, count = float(value) - k * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, more = blocks.pop()
            mean, count = (mean * count + before * more) / (count + more), count + more
        blocks.append((mean, count))
    level = np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])
    result = np.empty(len(values))
    result[order] = np.clip(level, low, max(low, high - (len(values) - 1) * gap)) + gap * np.arange(len(values))
    return result


def _legible(colour: str) -> str:
    """Darken a light colour until text in it can be read on white (contrast of 3.5)."""
    parts = np.asarray(to_rgb(colour))
    while 1.05 / (_luminance(parts) + 0.05) < 3.5:
        parts = parts * 0.95
    return to_hex((float(parts[0]), float(parts[1]), float(parts[2])))


def _luminance(parts: Array) -> float:
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _curve(study: Study, step: str, key: str) -> tuple[Array, Array]:
    """Rounds from 0 on, where the start stands, and the values [seeds, T]."""
    rounds, values = study.series(step, key)
    starts = [run.start.get(key) for run in study.runs[step] if run.records]
    first = np.asarray([np.nan if value is None else value for value in starts], dtype=np.float64)
    return np.concatenate([[0.0], rounds]), np.concatenate([first[:, None], values], axis=1)


def _over_seeds(values: Array) -> tuple[Array, Array, Array]:
    """Mean, least and largest over the seeds, nan where no seed has a value."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=0)
    mean = np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)
    low, high = np.where(known, values, np.inf).min(axis=0), np.where(known, values, -np.inf).max(axis=0)
    return mean, np.where(np.isfinite(low), low, np.nan), np.where(np.isfinite(high), high, np.nan)


def _draw_curve(axes: Axes, rounds: Array, values: Array, look: Look, name: str) -> _End | None:
    """Draw mean and band; return the end of the curve, if there is one."""
    mean, low, high = _over_seeds(values)
    shown = np.isfinite(mean)
    if not shown.any():
        return None
    style: dict[str, Any] = {"color": look.colour, "linewidth": look.width, "linestyle": look.line}
    alone = int(shown.sum()) == 1
    axes.plot(
        rounds[shown], mean[shown], **style, marker=look.marker if alone else None, markersize=4, zorder=look.width
    )
    if len(values) > 1:
        axes.fill_between(rounds[shown], low[shown], high[shown], color=look.colour, alpha=0.13, linewidth=0, zorder=1)
    last = int(np.flatnonzero(shown)[-1])
    return _End(float(rounds[last]), float(mean[last]), name, look.colour)


@_saved
def accuracy(study: Study) -> Figure:
    """Client mean and reference over the rounds, one line a step, band over seeds; dotted: before the first round.

    Of a sweep only what ran with most seeds is drawn; it has a figure of its own.
    """
    found = {step: look for step, look in looks(study).items() if step not in _swept(study)}
    panels = [("mean", "client mean (%)"), ("reference", "reference (%)")]
    panels = [panel for panel in panels if any(np.isfinite(study.series(s, panel[0])[1]).any() for s in study.steps)]
    if not panels:
        raise RunError(f"study '{study.name}': no round has an accuracy yet. Wait for the first evaluation.")
    height = max(3.4, 0.9 + ROW * (len(found) + 1))
    last = max(run.planned for runs in study.runs.values() for run in runs)
    figure = _canvas(5.4 * len(panels), height)
    for axes, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        ends = [_draw_curve(axes, *_curve(study, step, key), look, step) for step, look in found.items()]
        start = study.start(key)
        if np.isfinite(start).any():
            axes.axhline(known_mean(start), color=INK, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
            ends.append(_End(float(last), known_mean(start), "zero-shot", INK))
        axes.grid(axis="y")
        axes.set_title(label)
        _round_axis(axes, 0, last)
        _label_ends(axes, [end for end in ends if end], height - 0.8)
    return figure


@_saved
def frontier(study: Study) -> Figure:
    """Client mean against reference accuracy after the last round, mean over seeds with bars from least to largest.

    Shaded: what a step with a fixed scale dominates. Inside the dashed corner, all of those are dominated. A curve
    joins the steps of one method with different bounds ε (or weights μ of a penalty). Fixed scales that end far below
    everything else are named under the picture instead, or nothing else could be told apart.
    """
    found = looks(study)
    points: dict[str, tuple[float, float]] = {}
    start = (known_mean(study.start("reference")), known_mean(study.start("mean")))
    outside = _far_below(study, start)
    strokes: list[Array] = []  # lines that names should not cross
    figure = _canvas(7.4, 5.4)
    axes = figure.subplots()
    for step, look in found.items():
        x, y = study.last(step, "reference"), study.last(step, "mean")
        known = np.isfinite(x) & np.isfinite(y)
        if not known.any() or step in outside:
            continue
        x, y = x[known], y[known]
        points[step] = (float(x.mean()), float(y.mean()))
        strokes.append(np.asarray([(x.min(), y.mean()), (x.max(), y.mean())]))
        strokes.append(np.asarray([(x.mean(), y.min()), (x.mean(), y.max())]))
        bars: dict[str, Any] = {"xerr": _reach(x), "yerr": _reach(y)} if len(x) > 1 else {}
        fixed = study.fixed(step)
        axes.errorbar(
            *points[step], **bars, fmt=look.marker, color=look.colour, markersize=5 if fixed else 7, elinewidth=0.7,
            markeredgecolor="white", markeredgewidth=0.6, zorder=3 if fixed else 5,
        )  # fmt: skip
    if not points:
        raise RunError(
            f"study '{study.name}': no run has an accuracy on a reference set, so there is no frontier. "
            "Run it with a reference set."
        )
    names: list[_Name] = []
    label_of: dict[str, str] = {}
    curves = _retained(study)
    for sweep in curves:
        inside = [step for step in sweep.steps if step in points]
        colour = found[sweep.steps[0]].colour
        alone = [other.method for other in curves].count(sweep.method) == 1
        if inside:
            strokes.append(np.asarray([points[step] for step in inside]))
            axes.plot(*strokes[-1].T, color=colour, linewidth=1.2, zorder=4)
        for step, value in zip(sweep.steps, sweep.values, strict=True):
            label_of.setdefault(step, f"{_symbol(sweep.option)} = {value:g}")
        if inside:
            name = sweep.method if alone else sweep.steps[0]
            names.append(_Name(*points[inside[len(inside) // 2]], name, colour, 8.5, bold=True))
    for step, point in points.items():
        text = label_of.get(step, step) + unfinished(study, step)
        names.append(_Name(*point, text, found[step].colour, 7.5 if study.fixed(step) or step in label_of else 8.5,
                           bold=not study.fixed(step) and step not in label_of))  # fmt: skip
    if np.isfinite(start).all():
        axes.plot(*start, marker="*", markersize=12, color=INK, zorder=6, linestyle="none", markeredgecolor="white")
        names.insert(0, _Name(*start, "zero-shot", INK, 8.5))
    axes.margins(0.1)
    strokes += _shade(axes, [point for step, point in points.items() if study.fixed(step)])
    axes.grid()
    axes.set_axisbelow(True)
    axes.set_xlabel("reference accuracy (%)")
    axes.set_ylabel("client mean (%)")
    if outside:
        told = "   ".join(f"{step} ({x:.0f}, {y:.0f})" for step, (x, y) in outside.items())
        figure.supxlabel(f"far below: {told}", fontsize=7.5, color=INK, x=0.01, ha="left")
    _place(figure, axes, names, strokes)
    return figure


def _swept(study: Study) -> set[str]:
    """Steps of a sweep that ran with fewer seeds than another one of it."""
    seeds = {step: len(study.runs[step]) for step in study.steps}
    most = {step: max(seeds[s] for s in found.steps) for found in study.sweeps() for step in found.steps}
    return {step for step, count in most.items() if seeds[step] < count}


def _far_below(study: Study, start: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """Steps with a fixed scale that end further below the others' range than that range is wide (at least 5 points)."""
    ends = {s: (known_mean(study.last(s, "reference")), known_mean(study.last(s, "mean"))) for s in study.steps}
    others = np.asarray([start, *(end for step, end in ends.items() if not study.fixed(step))])
    others = others[np.isfinite(others).all(axis=1)]
    if len(others) < 2:
        return {}
    low = others.min(axis=0)
    lowest = low - np.maximum(others.max(axis=0) - low, 5.0)
    return {s: end for s, end in ends.items() if study.fixed(s) and bool((np.asarray(end) < lowest).any())}


def _leaf(option: str) -> str:
    """Name of an option without those that it is inside of."""
    return option.split(".")[-1]


def _symbol(option: str) -> str:
    return SYMBOLS.get(_leaf(option), _leaf(option))


def _retained(study: Study) -> list[Sweep]:
    return [found for found in study.sweeps() if _leaf(found.option) in RETAINED and not study.fixed(found.steps[0])]


def _reach(values: Array) -> Array:
    """Distances from the mean to the least and the largest value, shape [2, 1]."""
    return np.asarray([[values.mean() - values.min()], [values.max() - values.mean()]])


def _shade(axes: Axes, points: Sequence[tuple[float, float]]) -> list[Array]:
    """Shade what any of the points dominates, and mark the corner that dominates all of them; return its lines."""
    if not points:
        return []
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    ordered = sorted(points)
    xs = [left, *(x for x, _ in ordered)]
    best = [max(y for _, y in ordered[k:]) for k in range(len(ordered))]
    axes.fill_between(xs, bottom, [best[0], *best], step="pre", color="#000000", alpha=0.045, linewidth=0, zorder=0)
    corner = (max(x for x, _ in points), max(y for _, y in points))
    line: dict[str, Any] = {"color": "#888888", "linewidth": 0.8, "linestyle": (0, (4, 3)), "zorder": 1}
    edge = np.asarray([(corner[0], top), corner, (right, corner[1])])
    axes.set_title(
        "shaded: dominated by a step with a fixed scale; dashed corner: dominates all of these",
        fontsize=8,
        color="#555555",
    )
    axes.plot(*edge.T, **line)
    return [edge]


@dataclass(frozen=True)
class _Name:
    """A name to write near a point."""

    x: float
    y: float
    text: str
    colour: str
    size: float
    bold: bool = False


def _place(figure: Figure, axes: Axes, names: Sequence[_Name], strokes: Sequence[Array]) -> None:
    """Write each name beside its point where it covers no point and no other name, and no line if that can be.

    A name that had to go far from its point is tied to it; one that fits nowhere is left out.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the axes stay where the names are placed
    frame = axes.get_window_extent()
    dots = figure.dpi / 72
    taken = [_around(point, 4 * dots) for point in axes.transData.transform([(name.x, name.y) for name in names])]
    crossed = [_around(point, dots) for line in strokes for point in _along(axes.transData.transform(line), 3 * dots)]
    for name in names:
        style: dict[str, Any] = {"fontsize": name.size, "color": _legible(name.colour), "zorder": 7}
        style["fontweight"] = "bold" if name.bold else "normal"
        probe = axes.annotate(shorten(name.text), (name.x, name.y), (0, 0), textcoords="offset points", **style)
        box = probe.get_window_extent()
        probe.remove()
        spots = [spot for spot in _spots(axes.transData.transform((name.x, name.y)), box, dots)
                 if frame.x0 <= spot[0].x0 and spot[0].x1 <= frame.x1 and frame.y0 <= spot[0].y0
                 and spot[0].y1 <= frame.y1 and not any(spot[0].overlaps(other) for other in taken)]  # fmt: skip
        clear = [spot for spot in spots if not any(spot[0].overlaps(other) for other in crossed)]
        if not spots:
            continue
        spot, far = (clear or spots)[0]
        taken.append(spot)
        arrow = {"arrowstyle": "-", "color": name.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            shorten(name.text), (name.x, name.y), (spot.x0 / dots, spot.y0 / dots), textcoords="figure points",
            arrowprops=arrow if far else None, va="bottom", **style,
        )  # fmt: skip


def _around(point: Array, reach: float) -> Bbox:
    return Bbox.from_extents(point[0] - reach, point[1] - reach, point[0] + reach, point[1] + reach)


def _along(line: Array, distance: float) -> Array:
    """Points on a line through the given points, at most this distance apart."""
    pieces = [np.linspace(a, b, 2 + int(np.linalg.norm(b - a) / distance)) for a, b in itertools.pairwise(line)]
    return np.concatenate([line, *pieces])


def _spots(point: Array, box: Bbox, dots: float) -> Iterator[tuple[Bbox, bool]]:
    """Boxes for a text of this size around a point, nearest first, and whether they need a line to it."""
    for reach in (5, 11, 18, 26, 36, 48, 62, 80):
        for angle in (0, 180, 90, 270, 35, 145, 325, 215, 60, 120, 300, 240):
            direction = np.round([np.cos(np.radians(angle)), np.sin(np.radians(angle))], 6)
            x, y = point + direction * reach * dots + (np.sign(direction) - 1) / 2 * [box.width, box.height]
            yield Bbox.from_bounds(x, y, box.width, box.height), reach > 5


@_saved
def sweep(study: Study, chosen: Sweep | None = None) -> Figure:
    """Client mean over the rounds, one curve a value of the option that was varied (Kubota et al. 2025, Figure 2)."""
    chosen = chosen or next((found for found in study.sweeps() if _leaf(found.option) not in RETAINED), None)
    if chosen is None:
        raise RunError(
            f"study '{study.name}': no two steps of one method differ in one number, so there is no sweep to draw; "
            f"found {', '.join(study.steps)}. Run one method with several values of an option."
        )
    figure = _canvas(6.2, 3.8)
    axes = figure.subplots()
    ends = []
    colours = _sequence(len(chosen.values))
    for value, step, colour in zip(chosen.values, chosen.steps, colours, strict=True):
        look = Look(colour, marker="o")
        ends.append(_draw_curve(axes, *_curve(study, step, "mean"), look, f"{_symbol(chosen.option)} = {value:g}"))
    start = study.start("mean")
    if np.isfinite(start).any():
        axes.axhline(known_mean(start), color=INK, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
    axes.grid(axis="y")
    axes.set_title(f"{chosen.method}: client mean (%), dotted: zero-shot")
    _round_axis(axes, 0, max(float(run.planned) for step in chosen.steps for run in study.runs[step]))
    _label_ends(axes, [end for end in ends if end], 3.0)
    return figure


def _sequence(count: int) -> list[str]:
    """Colours from light to dark, all of them legible on white."""
    return [to_hex(colour) for colour in mpl.colormaps["viridis_r"](np.linspace(0.12, 1.0, count))]


@_saved
def cosines(run: FederatedRun) -> Figure:
    """Cosines of the clients' task vectors in the first and the last round (Kubota et al. 2025, Figure 3)."""
    usable = [k for k, record in enumerate(run.records) if len(record.get("accepted") or ()) > 1]
    if not usable:
        raise RunError(
            f"run '{run.step}', seed {run.seed}: no round accepted two clients, so there are no cosines. "
            "See 'rejected' in its rounds.jsonl."
        )
    pictures = [(int(run.records[k]["round"]), *run.cosines(k)) for k in dict.fromkeys((usable[0], usable[-1]))]
    off = np.concatenate([matrix[~np.eye(len(names), dtype=bool)] for _, names, matrix in pictures])
    off = off[np.isfinite(off)]
    bound = max(0.1, float(np.abs(off).max(initial=0.0)))
    largest = max(len(names) for _, names, _ in pictures)
    side = min(9.0, 1.5 + 0.36 * max(largest, 6))
    figure = _canvas(len(pictures) * side + 0.7, side + 0.3)
    grid = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axes, (number, names, matrix) in zip(grid, pictures, strict=True):
        count = len(names)
        shown = np.ma.masked_invalid(np.where(np.eye(count, dtype=bool), np.nan, matrix))
        image = axes.imshow(shown, cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest")
        axes.set_facecolor("#DDDDDD")  # the diagonal is 1 by definition and would eat the scale
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        stride = -(-count // 60)
        ticks = range(0, count, stride)
        axes.set_xticks(ticks, [shorten(names[k], 16) for k in ticks], rotation=90, fontsize=7.5)
        axes.set_yticks(ticks, [shorten(names[k], 16) for k in ticks], fontsize=7.5)
        mean = matrix[~np.eye(count, dtype=bool)]
        mean = mean[np.isfinite(mean)]
        axes.set_title(f"round {number}" + (f", mean {mean.mean():.3f}".replace("-", "−") if len(mean) else ""))
        for i, j in np.argwhere(np.isfinite(matrix) & ~np.eye(count, dtype=bool)) if count <= NUMBERED else ():
            dark = abs(matrix[i, j]) > 0.6 * bound
            axes.text(j, i, f"{matrix[i, j]:.2f}".replace("-", "−"), ha="center", va="center", fontsize=6.5,
                      color="white" if dark else INK)  # fmt: skip
    bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("cosine of task vectors", fontsize=8.5)
    bar.outline.set_visible(False)
    return figure


@_saved
def coefficients(runs: Sequence[FederatedRun]) -> Figure:
    """Mean coefficient of every client, and of the origin θ0, in each round: one stack a round, one panel a run."""
    runs = [run for run in runs if any(record.get("coefficients") for record in run.records)]
    if not runs:
        raise RunError("no run has coefficients: these server steps are no points of the pool. Draw another step.")
    clients = list(dict.fromkeys(client for run in runs for client in run.clients))
    weight = {c: sum(float(np.nansum(np.abs(run.series("coefficients", c)))) for run in runs) for c in clients}
    bright = sorted(sorted(clients, key=lambda c: -weight[c])[: len(COLOURS)], key=clients.index)
    colour = dict(zip(bright, COLOURS, strict=False)) | {"origin": INK}
    columns = columns_of(len(runs))
    rows = -(-len(runs) // columns)
    height = 2.8
    figure = _canvas((4.2 if columns > 1 else 5.6) * columns, height * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    several = len({run.seed for run in runs}) > 1 or len({run.step for run in runs}) < len(runs)
    for k, (axes, run) in enumerate(zip(grid, runs, strict=False)):
        names = [name for name in ("origin", *bright, *(c for c in clients if c not in bright))
                 if np.isfinite(run.series("coefficients", name)).any()]  # fmt: skip
        above, below = np.zeros(len(run.records)), np.zeros(len(run.records))
        ends, rest = [], []
        right = run.rounds[-1] + 0.4
        for name in names:
            values = np.nan_to_num(run.series("coefficients", name))
            bottom = np.where(values >= 0, above, below)
            axes.bar(
                run.rounds, values, 0.8, bottom=bottom, color=colour.get(name, GREY), linewidth=0.4,
                edgecolor="white" if name in colour else GREY,
            )  # fmt: skip
            middle = float(bottom[-1] + values[-1] / 2)
            above, below = above + np.maximum(values, 0), below + np.minimum(values, 0)
            if name in colour and values[-1]:
                ends.append(_End(float(right), middle, name, colour[name]))
            elif values[-1]:
                rest.append(middle)
        if rest:
            ends.append(_End(float(right), float(np.mean(rest)), f"{len(rest)} others", "#777777"))
        axes.axhline(0, color=INK, linewidth=0.7)
        axes.set_title(shorten(run.step, 32) + (f", seed {run.seed}" if several else ""))
        _round_axis(axes, float(run.rounds[0]) - 0.5, float(run.rounds[-1]) + 0.5)
        if k % columns == 0:
            axes.set_ylabel("coefficient, mean over blocks")
        _label_ends(axes, ends, height - 0.8)
    return figure


@_saved
def cost(study: Study) -> Figure:
    """Seconds of the server a round by part, and bytes down and up a round, one bar a step (means of all rounds)."""
    steps = study.steps
    figure = _canvas(10.0, max(0.6, 0.24 * len(steps)) + 1.1)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.7, 1])
    at = np.arange(len(steps))
    used, total = np.zeros(len(steps)), _means(study, "seconds", "server")
    for part in PARTS:
        values = _means(study, "seconds", part)
        if values.any():
            left.barh(at, values, left=used, height=0.68, color=PART_COLOURS[part], label=part)
            used = used + values
    other = np.maximum(total - used, 0)
    if (other > 0.02 * np.maximum(total, 1e-12)).any():
        left.barh(at, other, left=used, height=0.68, color="#E2E2E2", label="other")
    ends = np.maximum(total, used)
    for y, value in zip(at, ends, strict=True):
        left.annotate(f"{value:.2g} s" if value < 10 else f"{value:.0f} s", (value, y), (3, 0),
                      textcoords="offset points", va="center", fontsize=7.5)  # fmt: skip
    left.set_xlim(0, 1.12 * float(ends.max(initial=0.0)) or 1.0)
    left.set_ylim(len(steps) - 0.4, -0.6)
    left.set_yticks(at, [shorten(step) for step in steps])
    left.set_title("seconds of the server a round")
    for offset, way, colour in ((-0.17, "down", "#B4BCC4"), (0.17, "up", "#5F6B73")):
        values = _means(study, "bytes", way)
        right.barh(at + offset, values, height=0.32, color=colour, label=way)
        for y, value in zip(at + offset, values, strict=True):
            right.annotate(size(value), (value, y), (3, 0), textcoords="offset points", va="center", fontsize=6.5)
    right.set_title("bytes a round")
    right.xaxis.set_major_formatter(lambda value, _: size(value))
    right.xaxis.set_major_locator(MaxNLocator(nbins=4))
    right.margins(x=0.2)
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    sides: tuple[tuple[Axes, Any], ...] = ((left, "outside lower left"), (right, "outside lower right"))
    for axes, side in sides:
        figure.legend(
            *axes.get_legend_handles_labels(), loc=side, ncols=len(PARTS) + 1, fontsize=7.5,
            handlelength=1, columnspacing=1,
        )  # fmt: skip
    return figure


def _means(study: Study, *keys: str) -> Array:
    """Mean over rounds and seeds of a number, one a step; 0 where it was not recorded."""
    return np.nan_to_num(np.asarray([known_mean(study.series(step, *keys)[1]) for step in study.steps]))


@_saved
def constraint(study: Study) -> Figure:
    """Reference loss against its bound ε (dashed) in each round, and the multiplier of the constraint below."""
    found = looks(study)
    steps = _constrained(study)
    if not steps:
        raise RunError(
            f"study '{study.name}': no step holds a bound on the reference loss, so there is no constraint to draw; "
            f"found {', '.join(study.steps)}."
        )
    height = max(2.3, 0.5 + ROW * len(steps))
    figure = _canvas(6.4, 2 * height + 0.4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    ends: list[_End] = []
    lower: list[_End] = []
    bounds: list[Array] = []
    losses: list[Array] = []
    first, last = np.inf, -np.inf
    for step in steps:
        rounds, loss = study.series(step, "method", "reference_loss")
        first, last = min(first, float(rounds[0])), max(last, float(rounds[-1]))
        bound = _over_seeds(study.series(step, "method", "bound")[1])[0]
        limit = f", ε = {bound[np.isfinite(bound)][-1]:g}"
        end = _draw_curve(top, rounds, loss, found[step], shorten(step, 18) + limit)
        alone = {"marker": "_", "markersize": 14} if len(rounds) == 1 else {}
        top.plot(rounds, bound, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=4, **alone)
        bounds.append(bound)
        losses.append(loss)
        ends += [end] if end else []
        end = _draw_curve(bottom, rounds, study.series(step, "method", "multiplier")[1], found[step], step)
        lower += [end] if end else []
    for axes in (top, bottom):
        axes.grid(axis="y")
    top.set_title("reference loss, dashed: its bound ε")
    bottom.set_title("multiplier of the constraint")
    known = np.concatenate([values.ravel() for values in (*bounds, *losses)])
    known = known[np.isfinite(known)]
    widest = max(float(np.nanmax(bound)) for bound in bounds)
    if known.min() > 0 and widest > 5 * min(float(np.nanmin(bound)) for bound in bounds):
        top.set_yscale("log")  # a breach of a small bound shows as large as that of a large one
        ticks = sorted({float(f"{bound[np.isfinite(bound)][-1]:.3g}") for bound in bounds})
        top.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        top.minorticks_off()
    else:
        top.set_ylim(min(0.0, 1.1 * float(known.min())), 1.1 * float(known.max()))
    bottom.set_ylim(bottom=0, top=None if bottom.get_ylim()[1] > 0 and bottom.dataLim.y1 > 0 else 1)
    _round_axis(bottom, first, last)
    _label_ends(top, ends, height - 0.6)
    _label_ends(bottom, lower, height - 0.6)
    return figure


def _constrained(study: Study) -> list[str]:
    return [step for step in study.steps if np.isfinite(study.series(step, "method", "bound")[1]).any()]


def save_federation(study: Study, folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write every figure that the study has the numbers for into `folder` (made if missing).

    Cosines and coefficients are of the first seed: cosines-STEP for every step, coefficients for those whose scale was
    not set by hand (all, if there are no others).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not study.steps:
        return []
    first = {step: next(run for run in study.runs[step] if run.records) for step in study.steps}
    written: list[Path] = []
    for form in formats:
        written.append(cost(study, folder / f"cost.{form}"))
        if any(np.isfinite(study.series(step, key)[1]).any() for step in study.steps for key in ("mean", "reference")):
            written.append(accuracy(study, folder / f"accuracy.{form}"))
        if any(np.isfinite(study.last(step, "reference")).any() for step in study.steps):
            written.append(frontier(study, folder / f"frontier.{form}"))
        for found in study.sweeps():
            written.append(sweep(study, folder / f"sweep-{found.steps[0]}-{found.option}.{form}", found))
        for step, run in first.items():
            if any(len(record.get("accepted") or ()) > 1 for record in run.records):
                written.append(cosines(run, folder / f"cosines-{step}.{form}"))
        weighed = [run for run in first.values() if any(record.get("coefficients") for record in run.records)]
        weighed = [run for run in weighed if not run.fixed] or weighed
        if weighed:
            written.append(coefficients(weighed, folder / f"coefficients.{form}"))
        if _constrained(study):
            written.append(constraint(study, folder / f"constraint.{form}"))
    return written
