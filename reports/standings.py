"""Tables of a federated study: accuracies by step, what the steps cost, and which dominate those with a fixed scale.

Means and sample standard deviations are over seeds, of the last recorded round; a table says where a run has not
reached its last round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.table import Table

from .rounds import Study, known_mean
from .tables import size

Array = NDArray[np.float64]
DASH = "–"
PARTS = ("screen", "read", "combine", "objective", "correlate", "write")
"""Parts of the server's seconds in the order in which they happen."""


@dataclass(frozen=True)
class Grid:
    """Cells of text: best and second name cells (row, column) to mark."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    text: frozenset[int] = frozenset({0})  # columns of words
    best: frozenset[tuple[int, int]] = frozenset()
    second: frozenset[tuple[int, int]] = frozenset()
    rules: frozenset[int] = frozenset()  # rows that a rule follows

    def rich(self) -> Table:
        """Table for the terminal: best bold, second underlined."""
        table = Table(title=self.title or None, title_justify="left", header_style="bold", box=SIMPLE, pad_edge=False)
        for k, name in enumerate(self.header):
            table.add_column(
                name.replace("[", r"\["),
                justify="left" if k in self.text else "right",
                overflow="fold",
                no_wrap=k not in self.text,
            )
        for i, row in enumerate(self.rows):
            cells = [cell.replace("[", r"\[") for cell in row]
            cells = [f"[bold]{cell}[/bold]" if (i, j) in self.best else cell for j, cell in enumerate(cells)]
            cells = [
                f"[underline]{cell}[/underline]" if (i, j) in self.second else cell for j, cell in enumerate(cells)
            ]
            table.add_row(*cells, end_section=i in self.rules)
        return table

    def markdown(self) -> str:
        """GitHub table: best between two stars, second between one, for Markdown cannot underline."""
        lines = ["| " + " | ".join(self.header) + " |"]
        lines.append("|" + "|".join(" --- " if k in self.text else " ---: " for k in range(len(self.header))) + "|")
        for i, row in enumerate(self.rows):
            cells = [cell.replace("|", r"\|") for cell in row]
            cells = [f"**{cell}**" if (i, j) in self.best else cell for j, cell in enumerate(cells)]
            cells = [f"*{cell}*" if (i, j) in self.second else cell for j, cell in enumerate(cells)]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def accuracy_table(study: Study) -> Grid:
    """Steps × tasks in percent, with client mean and reference ± std over seeds (Kubota et al. 2025, Table 3).

    The first row is the model before the first round; it is not ranked.
    """
    tasks = study.tasks
    rows = [("zero-shot", *(_shown(study.start("accuracy", task), spread=False) for task in tasks),
             _shown(study.start("mean"), spread=False), _shown(study.start("reference"), spread=False))]  # fmt: skip
    for step in study.steps:
        cells = [_shown(study.last(step, "accuracy", task), spread=False) for task in tasks]
        rows.append((step + unfinished(study, step), *cells, _shown(study.last(step, "mean")),
                     _shown(study.last(step, "reference"))))  # fmt: skip
    best, second = _ranked(rows, range(1, len(rows)), range(1, len(tasks) + 3))
    kinds = [study.fixed(step) for step in study.steps]
    rules = frozenset({0, *(i for i in range(1, len(kinds)) if kinds[i - 1] != kinds[i])})
    return Grid(
        ("step", *tasks, "client mean", "reference"), tuple(rows), _title(study), best=best, second=second, rules=rules
    )


def cost_table(study: Study) -> Grid:
    """Seconds a round by part of the server, clients' and evaluation's seconds, peak memory, bytes a round."""
    parts = [part for part in PARTS if any(np.nansum(study.series(s, "seconds", part)[1]) > 0 for s in study.steps)]
    rows = []
    for step in study.steps:
        cells = [
            _seconds(known_mean(study.series(step, "seconds", part)[1]))
            for part in (*parts, "server", "evaluate", "clients")
        ]
        peak = study.series(step, "peak_memory")[1]
        cells.append(DASH if np.isnan(peak).all() else size(float(np.nanmax(peak))))
        for way in ("down", "up"):
            mean = known_mean(study.series(step, "bytes", way)[1])
            cells.append(DASH if np.isnan(mean) else size(mean))
        rows.append((step + unfinished(study, step), *cells))
    header = ("step", *parts, "server", "evaluate", "clients", "peak memory", "down", "up")
    return Grid(header, tuple(rows), "seconds and bytes a round" + _seeds(study))


@dataclass(frozen=True)
class Standing:
    """How a step stands against the steps with a fixed scale, over the seeds that both have finished.

    mean_margin and reference_margin: smallest lead in points over any of them in any seed (negative: behind).
    beaten: those that it dominates in every seed (no worse on both axes, better on one). seeds, most_seeds: fewest and
    most of them that it shares with one of the others.
    """

    step: str
    seeds: int
    opponents: tuple[str, ...]
    beaten: tuple[str, ...]
    mean_margin: float
    reference_margin: float
    most_seeds: int = 0

    @property
    def dominates(self) -> bool:
        """Whether it dominates every one of them in every seed."""
        return bool(self.opponents) and self.beaten == self.opponents


def dominance(study: Study) -> list[Standing]:
    """Standing of every step without a fixed scale; what is unfinished or has no reference is not compared."""
    points: dict[str, dict[int, tuple[float, float]]] = {}
    for step in study.steps:
        for run in study.runs[step]:
            mean, reference = run.series("mean"), run.series("reference")
            if run.finished and np.isfinite([mean[-1], reference[-1]]).all():
                points.setdefault(step, {})[run.seed] = (float(mean[-1]), float(reference[-1]))
    found = []
    for step in [step for step in study.steps if not study.fixed(step)]:
        mine = points.get(step, {})
        leads = {
            other: np.asarray(
                [np.subtract(mine[seed], points[other][seed]) for seed in sorted(mine) if seed in points[other]]
            )
            for other in points
            if study.fixed(other) and set(mine) & set(points[other])
        }
        beaten = tuple(o for o, lead in leads.items() if bool(((lead >= 0).all(axis=1) & (lead > 0).any(axis=1)).all()))
        worst = np.concatenate(list(leads.values())).min(axis=0) if leads else np.full(2, np.nan)
        shared = [len(lead) for lead in leads.values()] or [0]
        margins = float(worst[0]), float(worst[1])
        found.append(Standing(step, min(shared), tuple(leads), beaten, *margins, max(shared)))
    return found


def dominance_table(study: Study) -> Grid:
    """Which steps dominate every step with a fixed scale on both axes in every seed, by how much, or where not."""
    rows = []
    for standing in dominance(study):
        others = [name for name in standing.opponents if name not in standing.beaten]
        verdict = DASH if not standing.opponents else "yes" if standing.dominates else "no"
        rows.append((
            standing.step, verdict, f"{len(standing.beaten)} of {len(standing.opponents)}", _range(standing),
            _signed(standing.mean_margin), _signed(standing.reference_margin), ", ".join(others) or DASH,
        ))  # fmt: skip
    header = (
        "step",
        "dominates all",
        "dominated",
        "seeds",
        "least lead: clients",
        "least lead: reference",
        "not dominated",
    )
    best = frozenset((i, 1) for i, row in enumerate(rows) if row[1] == "yes")
    return Grid(header, tuple(rows), "against every step with a fixed scale, in every seed", frozenset({0, 6}), best)


def _range(standing: Standing) -> str:
    few, most = standing.seeds, standing.most_seeds
    return str(few) if few == most else f"{few} to {most}"


def _ranked(
    rows: Sequence[Sequence[str]], members: range, columns: range
) -> tuple[frozenset[tuple[int, int]], frozenset[tuple[int, int]]]:
    """Cells with the largest and the second largest mean of their column as printed; ties share a rank."""
    best: set[tuple[int, int]] = set()
    second: set[tuple[int, int]] = set()
    for j in columns:
        values = {i: float(rows[i][j].split(" ")[0]) for i in members if rows[i][j] != DASH}
        ranks = sorted(set(values.values()), reverse=True)
        if len(values) > 1:
            best |= {(i, j) for i, value in values.items() if value == ranks[0]}
            second |= {(i, j) for i, value in values.items() if len(ranks) > 1 and value == ranks[1]}
    return frozenset(best), frozenset(second)


def _shown(values: Array, *, spread: bool = True) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return DASH
    return f"{known.mean():.1f}" + (f" ± {known.std(ddof=1):.1f}" if spread and len(known) > 1 else "")


def _signed(value: float) -> str:
    return DASH if np.isnan(value) else f"{value:+.1f}".replace("-", "−")


def _seconds(value: float) -> str:
    if np.isnan(value) or 0 < value < 1e-3:
        return DASH if np.isnan(value) else "<0.001"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def unfinished(study: Study, step: str) -> str:
    """Where the slowest run of a step is, if it is not at its end."""
    late = [run for run in study.runs[step] if not run.finished]
    if not late:
        return ""
    slowest = min(late, key=lambda run: len(run.records))
    return f" (round {int(slowest.records[-1]['round']) if slowest.records else 0} of {slowest.planned})"


def _seeds(study: Study) -> str:
    return f", {len(study.seeds)} seeds" if len(study.seeds) > 1 else f", seed {study.seeds[0]}"


def _title(study: Study) -> str:
    rounds = max((run.planned for runs in study.runs.values() for run in runs), default=0)
    return f"accuracy (%) after {rounds} round{'s' * (rounds != 1)}" + _seeds(study)
