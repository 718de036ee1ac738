"""The study of server steps: every step × every seed, one run folder each; a study that was killed goes on.

The fixed steps are those of Table 1 of Kubota et al. (2025), at one setting each; the sweep is their Figure 2. Solver
steps see the server's unlabeled inputs, never a test set; their settings were chosen on nine other tasks of the zoo
(the protocol continual-clip-others) with another seed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import Interrupted
from .names import UsageProblem, choose
from .protocol import FederationRecipe, federation_recipe
from .recipe import Choice, merge, plain

DISTILL = {"name": "distillation", "batch_size": 16}
SCALES = (0.05, 0.2, 0.3, 0.4, 0.5)
BOUNDS = (0.005, 0.05, 0.1, 0.3)

FIXED: dict[str, dict[str, Any]] = {
    "average": {"name": "fedavg"},
    "paint": {"name": "paint", "alpha": 0.05},
    "task-arithmetic": {"name": "task-arithmetic", "scale": 0.1},
    "ties": {"name": "ties", "density": 0.2, "scale": 0.3},
    "dare": {"name": "dare", "density": 0.1, "scale": 0.1},
    "breadcrumbs": {"name": "breadcrumbs", "scale": 0.3},
    "magmax": {"name": "magmax", "scale": 0.3},
}
"""The seven steps of the paper, each with the factor of the best client mean on the other tasks."""
WITHOUT_DATA: dict[str, dict[str, Any]] = {
    "fedexp": {"name": "fedexp"},
    "by-phase": {"name": "by-phase", "method": "ties", "density": 0.2},
    "anchored": {"name": "anchored", "retention": {"by": "euclidean", "bound": 0.5}},
}
SOLVING: dict[str, dict[str, Any]] = {
    "fw-hard": {"name": "fw-hard", "objective": DISTILL, "max_iter": 5},
    "fw-soft": {"name": "fw-soft", "objective": DISTILL, "max_iter": 1},
    "projected-gradient": {"name": "projected-gradient", "objective": DISTILL, "max_iter": 10},
    "adamerging": {"name": "adamerging", "start": "average", "max_iter": 30},
    "fw-bound": {"name": "fw-bound"},
    "rows": {"name": "rows"},
    "rows-penalty": {"name": "rows-penalty"},
    "rows-bound": {"name": "rows-bound"},
}
SWEEP: dict[str, dict[str, Any]] = {
    f"task-arithmetic-{scale:g}": {"name": "task-arithmetic", "scale": scale} for scale in SCALES
}
FRONTIER: dict[str, dict[str, Any]] = {
    f"rows-bound-{bound:g}": {"name": "rows-bound", "retention": {"bound": bound}} for bound in BOUNDS
}
DATA: dict[str, tuple[int, str]] = {
    "rows-bound-20-images": (20, "rows-bound"),
    "rows-penalty-20-images": (20, "rows-penalty"),
}
"""Steps with less of the server's data: images a task, and the step."""


def steps_of_study() -> dict[str, tuple[dict[str, Any], dict[str, Any], bool]]:
    """Return by label: the step, what it changes in the recipe, and whether it runs on the first seed only."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {}
    for table, once in ((FIXED, False), (WITHOUT_DATA, False), (SOLVING, False), (SWEEP, True), (FRONTIER, True)):
        for label, step in table.items():
            found[label] = (step, {}, once)
    for label, (images, base) in DATA.items():
        found[label] = (SOLVING[base], {"server": {"images": images}}, True)
    return found


def run_study(
    recipe: FederationRecipe,
    folder: Path,
    seeds: int,
    only: tuple[str, ...],
    workers: int,
    *,
    quiet: bool = False,
    figures: bool = True,
) -> dict[str, Any]:
    """Run what is missing of the study, then print and write its tables and draw its figures.

    Returns folder, tables and figures. A step that fails does not keep the others from running; its error is raised
    after them.
    """
    if seeds < 1 or workers < 1:
        raise UsageProblem("--seeds and --workers must be at least 1.")
    table = steps_of_study()
    labels = [choose("step of the study", label, table) for label in only] or list(table)
    jobs = []
    for seed in range(seeds):
        for label in labels:
            step, changes, once = table[label]
            if once and seed:
                continue
            fields = merge(plain(replace(recipe, step=Choice("fedavg"), seed=recipe.seed + seed)), changes)
            jobs.append((label, {**fields, "step": step}, folder / label / f"seed-{recipe.seed + seed}"))
    _write_plan(folder, recipe, labels, seeds)
    waiting = [job for job in jobs if not _done(job[2], recipe.rounds)]
    _say(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done", quiet)
    began = time.monotonic()
    failure = _in_processes(waiting, workers, began, quiet)
    if failure is not None and not any(folder.glob("*/seed-*/rounds.jsonl")):
        raise failure  # there is nothing to report
    found = report(folder, figures=figures, quiet=quiet)
    if failure is not None:
        raise failure
    return found


def _in_processes(
    jobs: Sequence[tuple[str, Mapping[str, Any], Path]], workers: int, began: float, quiet: bool
) -> Exception | None:
    """Run all jobs; returns the first error."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, (int(wanted) if wanted.isdecimal() else os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    failure: Exception | None = None
    with ProcessPoolExecutor(  # a process for each run, so that its peak of memory is its own
        workers, mp_context=context, initializer=_threads, initargs=(threads,), max_tasks_per_child=1
    ) as pool:
        left: set[Future[str]] = {pool.submit(_work, *job) for job in jobs}
        total = len(left)
        try:
            while left:
                finished, left = wait(left, return_when=FIRST_COMPLETED)
                for future in finished:
                    error = future.exception()
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    failure = failure or error
                    text = future.result() if error is None else f"failed: {error}"
                    _say(_progress(total - len(left), total, began, text), quiet)
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()  # a run that is killed goes on
            raise Interrupted("interrupted; the same command goes on with the study") from None
    return failure


def _threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study ends its runs
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Where the study is killed, its runs must end, too: the study that goes on writes into the same folders."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(label: str, fields: Mapping[str, Any], folder: Path) -> str:
    from .federate import run_one

    outcome = run_one(federation_recipe(fields), folder, resume=(folder / "rounds.jsonl").exists(), quiet=True)
    last = outcome["records"][-1] if outcome["records"] else {}
    where = f"{folder.parent.name}, {folder.name}"
    if outcome["status"] != "finished" or last.get("mean") is None:
        return f"{where}: {outcome['status']} {outcome['message']}"
    return f"{where}: clients {last['mean']:.1f}%  reference {last['reference'] or 0:.1f}%"


def _progress(done: int, total: int, began: float, text: str) -> str:
    spent = time.monotonic() - began
    return f"[{done}/{total}] {text}  ({spent / 60:.0f} min, about {spent / done * (total - done) / 60:.0f} to go)"


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def _done(folder: Path, rounds: int) -> bool:
    from ..federated.federation import read_rounds

    _, records = read_rounds(folder / "rounds.jsonl")
    merged = [record["round"] for record in records if not record["repeat"]]
    return bool(merged) and merged[-1] >= rounds and (folder / "model.safetensors").exists()


def _write_plan(folder: Path, recipe: FederationRecipe, labels: list[str], seeds: int) -> None:
    from ..solvers.files import write_json

    path = folder / "study.json"
    protocol = {key: value for key, value in plain(recipe).items() if key not in ("step", "seed")}
    numbers = [recipe.seed + seed for seed in range(seeds)]
    if (folder / "rounds.jsonl").exists():
        raise UsageProblem(f"'{folder}' holds a federation, no study. Name another folder (--run).")
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            begun, steps, done = old["protocol"], [str(name) for name in old["steps"]], [int(n) for n in old["seeds"]]
        except (ValueError, KeyError, TypeError):
            raise UsageProblem(f"'{path}' is damaged. Remove it to go on, with the settings of before.") from None
        if begun != protocol:
            other = next(key for key in {**begun, **protocol} if begun.get(key) != protocol.get(key))
            raise UsageProblem(
                f"'{folder}' holds a study with another '{other}'. Give what it was begun with, or name another folder "
                "(--run)."
            )
        order = list(steps_of_study())
        labels = sorted({*steps, *labels}, key=lambda label: order.index(label) if label in order else len(order))
        numbers = sorted({*done, *numbers})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"steps": labels, "seeds": numbers, "protocol": protocol})


def report(folder: Path, *, figures: bool, quiet: bool) -> dict[str, Any]:
    """Print the tables, write them as Markdown, draw the figures; returns all of it as JSON has it."""
    from ..reports import accuracy_table, cost_table, dominance_table, read_study, save_federation
    from ..solvers.files import write_bytes
    from .console import note, show

    study = read_study(folder)
    tables = {"accuracy": accuracy_table(study), "dominance": dominance_table(study), "cost": cost_table(study)}
    for name, grid in tables.items():
        write_bytes(folder / f"{name}.md", grid.markdown().encode())
        if not quiet:
            show(grid.rich())
    drawn = save_federation(study, folder / "figures") if figures else []
    if drawn and not quiet:
        note(f"figures in {folder / 'figures'}")
    return {
        "folder": str(folder),
        "tables": {name: {"header": grid.header, "rows": grid.rows} for name, grid in tables.items()},
        "figures": [str(path) for path in drawn],
    }
