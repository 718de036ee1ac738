"""`mergesolve demo`: every method on the embedded zoo, one table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .flags import json_flag
from .names import choose

if TYPE_CHECKING:
    from ..objectives import Task
    from ..reports.tables import AccuracyRow
    from .setup import Setup

LABELS = 100  # labelled training images a task, for every method that uses labels


@dataclass(frozen=True)
class Method:
    """One row of the table: a preset, and what the demo changes in it."""

    title: str
    preset: str
    data: str
    changes: Mapping[str, Any] = field(default_factory=dict)


LABELLED = {"limit": LABELS}
METHODS: dict[str, Method] = {
    "pretrained": Method("pretrained", "average", "none", {**LABELLED, "start": "base", "domain": "capped"}),
    "average": Method("weight average", "average", "none", LABELLED),
    "task-arithmetic": Method("task arithmetic 0.3", "task-arithmetic", "none", LABELLED),
    "task-arithmetic-scan": Method("task arithmetic, λ scanned", "task-arithmetic-scan", "{labels} labels", LABELLED),
    # From 1/n: from 0.3 for each of so many experts, as published, it ends far below the pretrained model.
    "adamerging": Method(
        "AdaMerging from 1/n",
        "adamerging",
        "test images, no labels (transductive)",
        {"split": "test", "start": "average"},
    ),
    "projected-gradient": Method("projected gradient (control)", "projected-gradient", "{labels} labels", LABELLED),
    "fw-hard": Method("Frank-Wolfe, hard", "fw-hard", "{labels} labels", LABELLED),
    "fw-soft": Method("Frank-Wolfe, soft", "fw-soft", "{labels} labels", LABELLED),
    "row-distillation": Method(
        "rows × distillation", "row-distillation", "training images, no labels", {"max_iter": 500}
    ),
}


@click.command()
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Evaluation tasks (default: 4 over the table).")
@click.option("--method", "methods", multiple=True, metavar="NAME", help="Only these methods. Repeatable.")
@click.option("--out", default="runs/demo", show_default=True, metavar="FOLDER", help="Where the runs go.")
@click.option(
    "--zoo-data", metavar="FOLDER", help="A zoo that `mergesolve zoo build` left, instead of the embedded one."
)
@click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu or cuda.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Decides every random choice.")
@json_flag
def command(
    tasks: tuple[str, ...],
    methods: tuple[str, ...],
    out: str,
    zoo_data: str | None,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Merge the embedded zoo with every method, and compare them on a few evaluation tasks.

    The pool holds the experts of all tasks, so most of them are irrelevant to the evaluation. Methods that use labels
    see the same 100 labelled training images a task. AdaMerging adapts to the test images, as published, and says so.
    Each method is one `solve` and leaves a run folder with recipe, coefficients, trace, merged checkpoint and figures;
    the table is printed and written as text, markdown and JSON. About 5 minutes on 2 cores.

    \b
    Examples:
      mergesolve demo
      mergesolve demo --task digits --task shapes --method fw-soft --method average
    """
    from ..reports.tables import AccuracyRow, AccuracyTable
    from .console import note, print_json, show
    from .setup import Setup, load_weights

    began = time.monotonic()
    for name in methods:
        choose("method", name, METHODS)
    chosen = {name: method for name, method in METHODS.items() if not methods or name in methods}
    from .recipe import Recipe

    setup = Setup(Recipe(zoo=zoo_data or True))
    names = tuple(tasks) or spread(setup.zoo.tasks, 4)
    for name in names:
        choose("task of the zoo", name, setup.zoo.tasks)
    tests = [setup.zoo.task(name, split="test") for name in names]
    setup.recipe = plan(METHODS["average"], names, zoo_data or True, device, seed)
    note(f"pool: {setup.pool.n} experts on {setup.zoo.base.name}; evaluation on {', '.join(names)}")
    rows: list[AccuracyRow] = []
    for name, method in chosen.items():
        setup = setup.another(plan(method, names, zoo_data or True, device, seed))
        rows.append(solve_one(setup, name, method, Path(out) / name, tests, quiet=as_json))
    own: dict[str, float] = {}
    for expert in names:
        start = time.monotonic()
        scores = accuracies(setup, load_weights(setup.zoo.experts[expert]), tests)
        own[expert] = scores[expert]
        rows.append(AccuracyRow(f"expert: {expert}", scores, time.monotonic() - start, group="experts"))
    rows.append(AccuracyRow("each task's own expert", own, group="ceiling"))
    table = AccuracyTable(
        names, rows, title=f"top-1 (%) on the test images of {len(names)} tasks, pool of {setup.pool.n}"
    )
    figures = compare(Path(out), tuple(chosen))
    written = write(table, Path(out))
    if as_json:
        print_json({**table.json(), "runs": out, "figures": [str(path) for path in figures], "tables": written})
        return
    show("")
    show(table.rich())
    show("")
    note(f"runs, merged checkpoints and figures: {out}/<method>; side by side: {out}/figures")
    note(f"this table: {', '.join(written)}")
    note(f"{time.monotonic() - began:.0f} s in all")


def spread(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Tasks at equal distances over the table, so that the choice is nobody's favourite."""
    stride = max(1, len(names) // count)
    return tuple(names[::stride][:count])


def plan(method: Method, tasks: tuple[str, ...], zoo: bool | str, device: str, seed: int) -> Any:
    """The recipe of one method."""
    from ..solvers import PRESETS
    from .recipe import from_mapping

    fields = {
        "zoo": zoo,
        "pool": {"device": device},
        "tasks": [{"name": name} for name in tasks],
        "preset": method.preset,
        "seed": seed,
        **method.changes,
    }
    return from_mapping(fields, PRESETS, where=f"demo, {method.title}")


def solve_one(setup: Setup, name: str, method: Method, folder: Path, tests: list[Task], *, quiet: bool) -> AccuracyRow:
    """Run one method, evaluate what it returns, print its line."""
    from ..reports.tables import AccuracyRow, percent
    from .console import note, number
    from .running import execute, new_run_folder
    from .setup import merged_weights

    began = time.monotonic()
    outcome = execute(
        setup.recipe,
        new_run_folder(setup.recipe, str(folder), overwrite=True),
        setup=setup,
        quiet=quiet,
        label=method.title,
    )
    seconds = time.monotonic() - began
    scores = accuracies(setup, merged_weights(setup, outcome.result), tests)
    data = method.data.format(labels=outcome.result.data.get("labelled", 0))
    if outcome.result.nit > 0:
        data += f"; {outcome.result.counts['gradients']} gradients"
    row = AccuracyRow(method.title, scores, seconds, outcome.result.peak_memory, data, "methods")
    certificate = outcome.result.gap if outcome.result.gap is not None else outcome.result.stationarity
    if not quiet:
        note(
            f"{method.title:28s} mean {percent(row.mean)}  worst {percent(row.worst)}  {seconds:6.1f} s  "
            f"{outcome.result.nit} iterations, {'gap' if outcome.result.gap is not None else 'stationarity'} "
            f"{number(certificate)} ({outcome.result.status})"
        )
    return row


def accuracies(setup: Setup, weights: dict[str, Any], tests: list[Task]) -> dict[str, float]:
    """Top-1 on every test task."""
    from ..objectives import evaluate

    return dict(evaluate(setup.model, weights, tests))


def compare(out: Path, names: tuple[str, ...]) -> list[Path]:
    """Figures of all methods that iterate, side by side."""
    from ..reports import read_run, save_figures

    runs = [read_run(out / name) for name in names]
    moving = [run for run in runs if len(run.records) > 1 and run.name != "task-arithmetic-scan"]
    return save_figures(moving or runs, out / "figures")


def write(table: Any, out: Path) -> list[str]:
    """The table as text, markdown and JSON."""
    import json

    from rich.console import Console

    console = Console(width=220, force_terminal=False)
    with console.capture() as captured:
        console.print(table.rich())
    text = "\n".join(line.rstrip() for line in captured.get().split("\n"))
    contents = {
        "table.txt": text,
        "table.md": table.markdown(),
        "table.json": json.dumps(table.json(), indent=2, ensure_ascii=False) + "\n",
    }
    for name, content in contents.items():
        part = out / f".{name}.part"
        part.write_text(content, encoding="utf-8")
        part.replace(out / name)
    return [str(out / name) for name in contents]
