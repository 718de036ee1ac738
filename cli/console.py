"""What a command prints: results on stdout, everything else (progress, warnings) on stderr."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

INTERVAL = 5.0  # seconds between progress lines where there is no terminal


def stdout() -> Console:
    """The console of results; not narrower than a table needs when the output is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200, force_terminal=False)


def show(what: RenderableType) -> None:
    """Print a result; lines are not padded where the output is not a terminal."""
    console = stdout()
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as captured:
        console.print(what)
    click.echo("\n".join(line.rstrip() for line in captured.get().split("\n")), nl=False)


def stderr() -> Console:
    """The console of progress and remarks."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=200, force_terminal=False)


def print_json(value: Any) -> None:
    """Strict JSON on stdout: NaN and infinity become null."""
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "item") and callable(value.item):  # numpy scalars
        return _finite(value.item())
    return value


def warn(message: str) -> None:
    """One line on stderr."""
    click.echo(f"Warning: {message}", err=True)


def note(message: str) -> None:
    """One line on stderr."""
    click.echo(message, err=True)


def number(value: float | None) -> str:
    """Four significant digits, a dash for none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


class Follower:
    """Live progress of a solve: call it with each trace record."""

    def __init__(self, progress: Progress | None, task: Any, label: str, max_iter: int) -> None:
        self.label = label
        self.max_iter = max_iter
        self._progress = progress
        self._task = task
        self._last = time.monotonic()

    def __call__(self, record: dict[str, Any]) -> None:
        """Show one record."""
        gap = record.get("gap")
        certificate = f"stationarity {number(record.get('stationarity'))}" if gap is None else f"gap {number(gap)}"
        if record.get("estimate"):
            certificate += " (est.)"
        text = f"objective {number(record['value'])}  {certificate}  step {number(record.get('step'))}"
        iteration = int(record["iteration"])
        if self._progress is not None:
            self._progress.update(self._task, completed=iteration, detail=text, seconds=f"{record['seconds']:.0f} s")
        elif time.monotonic() - self._last >= INTERVAL:
            self._last = time.monotonic()
            note(f"{self.label}: iteration {iteration}/{self.max_iter}  {text}  {record['seconds']:.0f} s")

    def say(self, text: str) -> None:
        """Show what is going on before the first iteration."""
        if self._progress is not None:
            self._progress.update(self._task, detail=text)


@contextmanager
def follow(label: str, max_iter: int, *, quiet: bool = False) -> Iterator[Follower | None]:
    """A progress line for one solve; None if the command is to be quiet."""
    if quiet:
        yield None
        return
    console = stderr()
    if not console.is_terminal:
        yield Follower(None, None, label, max_iter)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[detail]}"),
        TextColumn("{task.fields[seconds]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=max_iter, detail="", seconds="")
        yield Follower(progress, task, label, max_iter)


@contextmanager
def counting(label: str, *, quiet: bool = False) -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress line for counted work: call what it yields with (what, done, in all)."""
    console = stderr()
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (
        SpinnerColumn(),
        TextColumn(label),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=1)

        def step(what: str, done: int, total: int) -> None:
            progress.update(bar, description=what, completed=done, total=total)

        yield step
