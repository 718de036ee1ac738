"""Run one recipe from start to end: the path that `solve` and `demo` share."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import counting, follow, note, number, print_json, show, warn
from .errors import OK, Interrupted, SolveFailed
from .many import constraint_summary, many_rows, solve_problem
from .names import UsageProblem
from .recipe import Recipe, from_mapping, plain, read_yaml, to_yaml
from .selecting import RECORD, write_record
from .setup import Setup

if TYPE_CHECKING:
    from ..solvers import Result

RECIPE = "recipe.yaml"
COMMENT = f"# What ran, every default filled in. Again: mergesolve solve {RECIPE}\n"
LEFT_BY_A_RUN = ("trace.jsonl", "result.json", "coefficients.safetensors", "checkpoint.safetensors", "rounds")
ALL_OF_A_RUN = (*LEFT_BY_A_RUN, RECIPE, RECORD, "merged.safetensors", "figures", "report.html")
ASIDE = ".replaced"  # where the run that --overwrite replaces waits until the new one has made its first step


@dataclass
class Outcome:
    """What a run left: the result, the recipe as it ran, the files."""

    folder: Path
    recipe: Recipe
    setup: Setup
    result: Result
    seconds: float
    merged: list[Path] = field(default_factory=list)
    figures: list[Path] = field(default_factory=list)


def new_run_folder(recipe: Recipe, wanted: str | None, *, overwrite: bool = False) -> Path:
    """The folder to write into. Raises UsageProblem if it holds a run that must not be lost."""
    if wanted is not None:
        folder = Path(wanted)
        if folder.exists() and not folder.is_dir():
            raise UsageProblem(f"--run '{wanted}' is a file. Name a folder.")
        if any((folder / name).exists() for name in LEFT_BY_A_RUN):
            if not overwrite:
                raise UsageProblem(
                    f"--run '{wanted}' holds a run already. Go on with it (--resume {wanted}), replace it "
                    "(--overwrite), or name another folder."
                )
        elif (folder / RECIPE).exists():
            raise UsageProblem(
                f"--run '{wanted}' holds a {RECIPE} and no run; the recipe of the new run would replace it. "
                "Name another folder."
            )
        return folder
    name = recipe.preset or recipe.solver.name
    for number_ in range(1, 10_000):
        folder = Path("runs") / (name if number_ == 1 else f"{name}-{number_}")
        if not folder.exists():
            return folder
    raise UsageProblem(f"runs/ holds 10000 runs named '{name}'. Give --run FOLDER.")


def open_run(folder: Path) -> tuple[Recipe, str | None]:
    """The recipe of an existing run and the status that it ended with (None: it was killed)."""
    from ..reports.run import read_run
    from ..solvers import PRESETS

    if not folder.is_dir():
        raise UsageProblem(f"run '{folder}': there is no such folder.")
    if not (folder / RECIPE).exists():
        raise UsageProblem(f"run '{folder}': it holds no {RECIPE}, so `mergesolve solve` did not write it.")
    fields = read_yaml(folder / RECIPE, "recipe")
    recipe = from_mapping({**fields, "preset": None}, PRESETS, where=str(folder / RECIPE))
    try:
        status = read_run(folder).status
    except ValueError:  # killed before its first iteration
        status = "running"
    return recipe, None if status in ("running", "interrupted") else status


@contextlib.contextmanager
def _writing(folder: Path, *, resume: bool) -> Iterator[Callable[[], None]]:
    """Put the folder back as it was if the block raises before it calls what it is given.

    Until then an old run of the folder is set aside, and only files that the block made are removed. Of a run that is
    resumed, only the recipe is written before the solve has accepted it.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    aside = folder / ASIDE
    kept = False
    recipe = (folder / RECIPE).read_text(encoding="utf-8") if resume else ""
    if not resume and any((folder / name).exists() for name in LEFT_BY_A_RUN):
        _remove(aside)
        aside.mkdir()
        for name in ALL_OF_A_RUN:
            if (folder / name).exists():
                (folder / name).rename(aside / name)

    def keep() -> None:
        nonlocal kept
        if not kept:
            _remove(aside)
        kept = True

    before = {name for name in ALL_OF_A_RUN if (folder / name).exists()}
    try:
        yield keep
    except BaseException:
        if not kept and resume:
            _write(folder / RECIPE, recipe)
        elif not kept:
            for name in ALL_OF_A_RUN:
                if name not in before:
                    _remove(folder / name)
            if aside.exists():
                for place in aside.iterdir():
                    place.rename(folder / place.name)
                aside.rmdir()
            for place in missing:
                with contextlib.suppress(OSError):
                    place.rmdir()
        raise
    keep()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _blame_checkpoints(setup: Setup) -> None:
    """Raise UsageProblem if a checkpoint itself holds NaN or infinity."""
    from ..pools import inspect

    flags = [flag.message for flag in inspect(setup.pool).flags if flag.kind == "nonfinite"]
    if flags:
        raise UsageProblem(" ".join(flags))


def check_pool(outcome: Outcome) -> None:
    """Raise UsageProblem unless the pool of a run is the one that it was solved with."""
    if outcome.setup.pool.fingerprint != outcome.result.fingerprint:
        raise UsageProblem(
            f"run '{outcome.folder}': the checkpoints of its pool have changed since it was solved, so its "
            "coefficients do not belong to them. Restore the files, or solve again."
        )


def load_outcome(folder: Path) -> Outcome:
    """A finished run as `execute` would return it, its pool not yet opened."""
    from ..solvers import Result

    recipe, _ = open_run(folder)
    return Outcome(folder, recipe, Setup(recipe), Result.load(folder), 0.0)


def execute(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    merge: bool = True,
    figures: bool = True,
    setup: Setup | None = None,
    label: str | None = None,
) -> Outcome:
    """Solve, then write the merged checkpoint and the figures.

    setup: live objects to share between runs of one pool; its recipe must be this one.
    """
    began = time.monotonic()
    label = label or recipe.preset or recipe.solver.name
    with counting("teachers", quiet=quiet) as teachers:
        setup = setup or Setup(recipe)
        setup.progress = teachers
        setup.check_names()
        problem, solver, start = setup.minimized, setup.solver, setup.start
        complete = setup.resolved()
        if setup.remark is not None and not quiet and not resume:
            note(setup.remark)
        with follow(label, recipe.iterations, quiet=quiet) as follower, _writing(folder, resume=resume) as keep:

            def watch(record: dict[str, Any]) -> None:
                if record["step"] is not None:
                    keep()
                if follower is not None:
                    follower(record)

            _write(folder / RECIPE, COMMENT + to_yaml(complete))
            if setup.selection is not None:
                write_record(setup.selection, setup, folder)
            result = solve_problem(
                setup,
                problem,
                solver,
                start=start,
                max_iter=recipe.max_iter,
                tol=recipe.tol,
                rtol=recipe.rtol,
                time_limit=math.inf if recipe.time_limit is None else recipe.time_limit,
                callback=watch,
                run=folder,
                resume=resume,
            )
            if result.status == "nonfinite":
                _blame_checkpoints(setup)
    if result.status == "interrupted":
        raise Interrupted(f"interrupted after {result.nit} iterations; go on with: mergesolve solve --resume {folder}")
    if result.status == "nonfinite":
        raise SolveFailed(
            f"the objective or its scores became NaN or infinite at iteration {result.nit} ({result.message}); "
            f"{folder} holds the trace. Look for a bad expert with `mergesolve pool inspect`, start from 'average', or "
            "take a smaller step."
        )
    outcome = Outcome(folder, complete, setup, result, time.monotonic() - began)
    if merge:
        outcome.merged = materialize(outcome)
    if figures:
        outcome.figures = draw(folder)
    return outcome


def materialize(outcome: Outcome, path: Path | None = None, dtype: str | None = None) -> list[Path]:
    """Write the merged checkpoint of a run."""
    from importlib.metadata import version

    pool, result = outcome.setup.pool, outcome.result
    return list(
        pool.materialize(
            result.coefficients,
            outcome.setup.blocks,
            path or outcome.folder / "merged.safetensors",
            dtype=dtype,
            metadata={
                "mergesolve": version("mergesolve"),
                "run": outcome.folder.resolve().name,
                "solver": str(result.solver.get("name", "")),
                "status": result.status,
            },
        )
    )


def draw(folder: Path) -> list[Path]:
    """Draw one run into its own folder."""
    from ..reports import read_run, save_figures

    return save_figures([read_run(folder)], folder / "figures")


def report(outcome: Outcome, *, as_json: bool, quiet: bool) -> int:
    """Print the summary; returns the exit code."""
    result = outcome.result
    more = "--run NEW --start run:{folder}" if outcome.setup.solver.scheduled else "--resume {folder} --max-iter N"
    if outcome.recipe.subject_to is not None:
        more = "--resume {folder} --rounds N"
    remedy = {
        "max_iter": f"more iterations: {more}",
        "time_limit": "more time: --resume {folder} --time-limit SECONDS",
        "stalled": "another start, step rule or solver",
    }.get(result.status)
    least = getattr(result, "least", None)
    if least is not None and least > result.bound:  # type: ignore[attr-defined]
        remedy = f"a larger bound: none below {number(least)} is held anywhere, if the constraint is convex"
    if remedy is not None and outcome.setup.solver.needs_scores:  # the others do not converge to a gap, they try
        reached = (
            f"gap {number(result.gap)}" if result.gap is not None else f"stationarity {number(result.stationarity)}"
        )
        warn(
            f"ended as {result.status.replace('_', ' ')} with {reached}, tolerance {number(outcome.recipe.tol)}; "
            f"to come closer, try {remedy.format(folder=outcome.folder)}."
        )
    if as_json:
        print_json(summary(outcome))
    elif not quiet:
        show(table(outcome))
    return OK


def summary(outcome: Outcome) -> dict[str, Any]:
    """The result for machines, without the coefficients (they are in their file)."""
    result = outcome.result
    return {
        "run": str(outcome.folder),
        "status": result.status,
        "success": bool(result.success),
        "message": result.message,
        "objective": result.objective,
        "tasks": dict(result.tasks),
        **constraint_summary(result),
        "gap": result.gap,
        "stationarity": result.stationarity,
        "nit": result.nit,
        "counts": dict(result.counts),
        "data": dict(result.data),
        "experts": list(result.experts),
        "blocks": result.blocks,
        "solver": result.solver,
        "domain": result.domain,
        "seconds": result.seconds,
        "seconds_in_all": outcome.seconds,
        "peak_memory": result.peak_memory,
        "merged": [str(path) for path in outcome.merged],
        "figures": [str(path) for path in outcome.figures],
        "recipe": plain(outcome.recipe),
    }


def table(outcome: Outcome) -> Any:
    """The result for people."""
    from ..reports.tables import pairs, size

    result = outcome.result
    data = result.data
    ledger = f"{data.get('labelled', 0)} labelled, {data.get('unlabelled', 0)} unlabeled examples"
    if data.get("test_inputs"):
        ledger += "; test inputs among them (transductive)"
    if "samples_seen" in data:
        ledger += f"; {data['samples_seen']} samples forwarded"
    rows: dict[str, object] = {
        "status": result.status if result.success else f"{result.status} ({result.message})",
        "objective": number(result.objective),
        "gap": number(result.gap) if result.gap is not None else why_no_gap(result),
        "stationarity": number(result.stationarity),
        **many_rows(result),
        "iterations": result.nit,
        "evaluations": f"{result.counts['gradients']} gradients, {result.counts['evaluations']} values, "
        f"{size(result.counts['bytes_read'])} read from the pool",
        "data": ledger,
        "coefficients": f"{result.coefficients.shape[0]} × {result.coefficients.shape[1]} ({result.blocks}), largest: "
        + largest(result),
        "time, memory": f"{result.seconds:.1f} s, peak {size(result.peak_memory)}",
        "run": outcome.folder,
    }
    if outcome.merged:
        rows["merged"] = ", ".join(str(path) for path in outcome.merged[:2]) + (" …" if outcome.merged[2:] else "")
    return pairs(rows)


def why_no_gap(result: Result) -> str:
    """What stands in the place of a gap that is not there."""
    return "none: the objective has no gradient" if math.isnan(result.stationarity) else "none on this domain"


def largest(result: Result, count: int = 4) -> str:
    """The experts with the largest mean coefficients."""
    mean = result.coefficients.mean(axis=0)
    order = sorted(range(len(mean)), key=lambda i: -abs(mean[i]))[:count]
    return ", ".join(f"{result.experts[i]} {mean[i]:.3f}" for i in order)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
