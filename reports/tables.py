"""Tables of results as rich text, markdown and JSON: one list of rows, three ways to print it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

CALIBRATION = (("confidence", "confidence"), ("ECE", "ece"))
"""Columns of calibration: header, and name of the number."""


@dataclass(frozen=True)
class AccuracyRow:
    """Top-1 of one method on each task (0 to 1; a missing task is a dash), what it cost and what it saw.

    peak_memory is in bytes, seconds in seconds; `group` separates blocks of rows by a rule. calibration: by task,
    numbers with a name (confidence, ece and logit_norm), whose means over the tasks are columns.
    """

    method: str
    accuracies: Mapping[str, float]
    seconds: float | None = None
    peak_memory: int | None = None
    data: str = ""
    group: str = ""
    calibration: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def calibrated(self, name: str) -> float:
        """The mean over the tasks of one of the numbers of calibration."""
        found = [numbers[name] for numbers in self.calibration.values()]
        return sum(found) / len(found) if found else math.nan

    @property
    def mean(self) -> float:
        """Mean over the tasks that were evaluated."""
        return sum(self.accuracies.values()) / len(self.accuracies) if self.accuracies else math.nan

    @property
    def worst(self) -> float:
        """Smallest accuracy."""
        return min(self.accuracies.values(), default=math.nan)


@dataclass(frozen=True)
class AccuracyTable:
    """Methods × tasks with mean, worst task, seconds and peak memory."""

    tasks: Sequence[str]
    rows: Sequence[AccuracyRow] = field(default_factory=list)
    title: str = ""

    def _columns(self) -> tuple[bool, bool, bool]:
        return (
            any(row.seconds is not None for row in self.rows),
            any(row.peak_memory is not None for row in self.rows),
            any(row.data for row in self.rows),
        )

    def _calibrated(self) -> bool:
        return any(row.calibration for row in self.rows)

    def _header(self) -> list[str]:
        seconds, memory, data = self._columns()
        calibrated = [header for header, _ in CALIBRATION] if self._calibrated() else []
        extra = calibrated + ["seconds"] * seconds + ["peak MB"] * memory + ["data"] * data
        return ["method", *self.tasks, "mean", "worst", *extra]

    def _cells(self, row: AccuracyRow) -> list[str]:
        seconds, memory, data = self._columns()
        cells = [row.method, *(percent(row.accuracies.get(task)) for task in self.tasks)]
        cells += [percent(row.mean), percent(row.worst)]
        if self._calibrated():
            cells += [percent(row.calibrated(name)) for _, name in CALIBRATION]
        if seconds:
            cells.append("–" if row.seconds is None else f"{row.seconds:.1f}")
        if memory:
            cells.append("–" if row.peak_memory is None else f"{row.peak_memory / 1e6:.0f}")
        return cells + ([row.data] if data else [])

    def _best(self, cells: Sequence[Sequence[str]], groups: Sequence[str]) -> set[tuple[int, int]]:
        """Cells that hold the best accuracy of their column within a group of two rows or more."""
        best: set[tuple[int, int]] = set()
        for group in dict.fromkeys(groups):
            members = [i for i, name in enumerate(groups) if name == group]
            if len(members) < 2:
                continue
            for column in range(1, len(self.tasks) + 3):
                numbers = {i: float(cells[i][column]) for i in members if cells[i][column] != "–"}
                best |= {(i, column) for i, value in numbers.items() if value == max(numbers.values())}
        return best

    def rich(self) -> Table:
        """Table for the terminal; the best value of each column within a group is bold."""
        table = Table(title=self.title or None, title_justify="left", header_style="bold", box=SIMPLE, pad_edge=False)
        for name in self._header():
            text = name in ("method", "data")
            escaped = name.replace("[", r"\[")
            table.add_column(escaped, justify="left" if text else "right", overflow="fold", no_wrap=not text)
        cells = [self._cells(row) for row in self.rows]
        groups = [row.group for row in self.rows]
        best = self._best(cells, groups)
        for i, line in enumerate(cells):
            styled = [f"[bold]{cell}[/bold]" if (i, j) in best else cell for j, cell in enumerate(line)]
            styled[0] = line[0].replace("[", r"\[")
            table.add_row(*styled, end_section=i + 1 < len(cells) and groups[i + 1] != groups[i])
        return table

    def markdown(self) -> str:
        """GitHub table; the best value of each column within a group is bold."""
        header = self._header()
        cells = [self._cells(row) for row in self.rows]
        best = self._best(cells, [row.group for row in self.rows])
        lines = ["| " + " | ".join(header) + " |"]
        lines.append("|" + "|".join(" --- " if name in ("method", "data") else " ---: " for name in header) + "|")
        for i, line in enumerate(cells):
            marked = [f"**{cell}**" if (i, j) in best else cell for j, cell in enumerate(line)]
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in marked) + " |")
        return "\n".join(lines) + "\n"

    def json(self) -> dict[str, Any]:
        """Plain values for machines: accuracies from 0 to 1, seconds, bytes."""
        return {
            "tasks": list(self.tasks),
            "rows": [
                {
                    "method": row.method,
                    "accuracies": dict(row.accuracies),
                    "mean": finite(row.mean),
                    "worst": finite(row.worst),
                    **({"calibration": plain_numbers(row.calibration)} if row.calibration else {}),
                    "seconds": row.seconds,
                    "peak_memory": row.peak_memory,
                    "data": row.data,
                    "group": row.group,
                }
                for row in self.rows
            ],
        }


def plain_numbers(table: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """The numbers of each task as JSON has them."""
    return {task: {name: finite(value) for name, value in numbers.items()} for task, numbers in table.items()}


def percent(value: float | None) -> str:
    """Accuracy in percent with one decimal, a dash if there is none."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def finite(value: float | None) -> float | None:
    """Return the value, None where JSON has no number for it."""
    return None if value is None or not math.isfinite(value) else value


def pairs(rows: Mapping[str, object], *, title: str = "") -> Table:
    """Two columns, names and values, without rules: for summaries."""
    table = Table(title=title or None, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value).replace("[", r"\["))
    return table


def listing(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", numeric: Sequence[int] = ()
) -> Table:
    """A plain table; columns in `numeric` are right aligned."""
    table = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for k, name in enumerate(header):
        escaped = name.replace("[", r"\[")
        table.add_column(escaped, justify="right" if k in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def size(count: float) -> str:
    """Bytes for people: 1.9 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
