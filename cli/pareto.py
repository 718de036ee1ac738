"""`mergesolve pareto`: one merge a preference, and their front."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .flags import constraint_flags, data_flags, json_flag, named_options, pool_flags, recipe_from
from .names import UsageProblem

if TYPE_CHECKING:
    from ..solvers import Front, Surrogate
    from .recipe import Recipe
    from .setup import Setup

PLAN = "pareto.yaml"
DEFAULTS = {"solver": "projected-gradient", "max_iter": 50, "tol": 1e-4}  # where no recipe and no preset says it
OPTIONS = ("divisions", "preferences", "method", "smoothing", "no_warm", "surrogate", "samples", "reference")


@click.command(short_help="Merges along preferences between tasks: their Pareto front.")
@click.argument("recipe", required=False, metavar="[RECIPE.yaml]")
@click.option("--preset", metavar="NAME", help="Start from a named recipe (see `mergesolve list presets`).")
@data_flags
@pool_flags
@click.option("--objective", metavar="NAME", help="See `mergesolve list objectives`.")
@click.option("--split", metavar="SPLIT", help="Split of tasks that have splits: train (default), validation, test.")
@click.option("--limit", type=int, metavar="N", help="Use at most N samples a task, class-balanced.")
@click.option("--blocks", multiple=True, metavar="KIND", help="model, layer, tensor, row; or patterns, repeatable.")
@click.option("--domain", metavar="NAME", help="See `mergesolve list domains`.")
@constraint_flags
@click.option("--solver", metavar="NAME", help="Of one objective (default: projected-gradient).")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any field of the recipe. Repeatable.")
@click.option("--start", metavar="POINT", help="Where the first solve begins (default: average).")
@click.option("--max-iter", type=int, metavar="N", help="Iterations of each solve at most (default 50).")
@click.option("--tol", type=float, metavar="GAP", help="A point is done when its gap is at most this (default 1e-4).")
@click.option("--seed", type=int, metavar="N", help="Decides every random choice (default 0).")
@click.option("--divisions", type=int, metavar="N", help="Preferences are multiples of 1/N (default: up to 15 points).")
@click.option(
    "--preference",
    "preferences",
    multiple=True,
    metavar="TASK=WEIGHT,...",
    help="A preference instead of a grid; a task that is not named has weight 0. Repeatable.",
)
@click.option("--method", metavar="NAME", help="chebyshev (default), which reaches every point, or weighted-sum.")
@click.option("--smoothing", type=float, metavar="MU", help="Of chebyshev, in the units of the losses (default 0.01).")
@click.option("--no-warm", is_flag=True, help="Begin each solve at --start instead of at its nearest neighbour.")
@click.option("--surrogate", is_flag=True, help="Fit a quadratic to each task, solve its front, verify the points.")
@click.option("--samples", type=int, metavar="N", help="Gradients that --surrogate is fitted to.")
@click.option("--reference", metavar="TASK=LOSS,...", help="What the hypervolume is measured to.")
@click.option("--out", metavar="FOLDER", help="Where to write (default: a new folder under runs/).")
@click.option("--resume", metavar="FOLDER", help="Go on with a front that was killed; points that are done are kept.")
@click.option("--no-figures", is_flag=True, help="Do not draw front.png and front.svg.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
@json_flag
def command(recipe: str | None, resume: str | None, **flags: Any) -> int:
    """Merges along preferences between tasks, from one warm start to the next, and the front that they make.

    Writes front.json, front.csv, front.png and a run for each preference, which `materialize`, `evaluate` and `report`
    take as any other. With --surrogate a quadratic is fitted to each task's loss from a few gradients (take --blocks
    model), its held-out error is told, and the points of its front are evaluated as they are.

    \b
    Examples:
      mergesolve pareto --zoo --task digits --task chess --limit 50 --blocks model --divisions 6
      mergesolve pareto --zoo --task digits --task chess --task shapes --limit 50 --blocks model --surrogate
      mergesolve pareto recipe.yaml --preference digits=3,chess=1 --preference digits=1,chess=3
      mergesolve pareto --resume runs/pareto
    """
    from .console import print_json, show
    from .surveying import telling

    as_json, quiet, out = flags.pop("as_json"), flags.pop("quiet"), flags.pop("out")
    figures = not flags.pop("no_figures")
    if resume is not None:
        _refuse_beside_resume(recipe, out, flags)
        folder = Path(resume)
        asked, options = _read(folder)
    else:
        options = {
            name: value for name in OPTIONS if (value := flags.pop(name)) not in (None, ()) and value is not False
        }
        if recipe is None and flags.get("preset") is None:
            flags.update({name: value for name, value in DEFAULTS.items() if flags.get(name) is None})
        asked = recipe_from(flags, recipe)
        folder = _new_folder(out)
    with telling("pareto", quiet=quiet or as_json) as progress:
        front, model = _solve(asked, options, folder, resume=resume is not None, progress=progress)
    written: list[Path] = []
    if figures and len(front.tasks) > 1:
        from ..reports.pareto import save_front

        written = save_front(front, folder)
    if as_json:
        content = {name: value for name, value in vars(front).items() if name != "coefficients"}
        lists = {name: value.tolist() for name, value in content.items() if hasattr(value, "tolist")}
        kept = front.nondominated.tolist()
        print_json(
            {"folder": str(folder), **content, **lists, "nondominated": kept, "figures": [str(p) for p in written]}
        )
    elif not quiet:
        show(_table(front, model, folder))
    return 0


def _solve(
    recipe: Recipe, options: dict[str, Any], folder: Path, *, resume: bool, progress: Any
) -> tuple[Front, Surrogate | None]:
    """Solve or fit, and write the folder."""
    from ..solvers import OptionError, Plan, pareto_front, surrogate_front
    from .recipe import to_yaml
    from .running import RECIPE, _write
    from .setup import Setup

    _check(recipe)
    setup = Setup(recipe)
    setup.check_names()
    about = recipe.objectives[0].options.get("tasks") if len(recipe.objectives) == 1 else ()
    # Of several objectives, or of one about some tasks, the losses have names of their own.
    names = [part.name for part in recipe.tasks] if about is None else list(setup.problem.tasks)
    preferences = _preferences(options, names)
    reference = _weights(options["reference"], "--reference", names) if "reference" in options else None
    method = {name: options[name] for name in ("method", "smoothing") if name in options}
    plan = Plan(
        solver=setup.solver,
        start=setup.start,
        max_iter=recipe.max_iter,
        tol=recipe.tol,
        warm=not options.get("no_warm", False),
        **method,
    )
    if "samples" in options and not options.get("surrogate"):
        raise UsageProblem(
            "--samples says how many gradients a surrogate is fitted to. Add --surrogate, or leave it out."
        )
    problem = setup.problem
    if len(problem.tasks) < 2:
        raise UsageProblem(
            f"a front is between losses, and the objective has one alone: {problem.tasks[0]}. Take an objective about "
            "more tasks, or a list of objectives."
        )
    complete = setup.resolved()

    def tell(done: int, total: int, name: str) -> None:
        if progress is not None:
            progress(name, done, total)

    folder.mkdir(parents=True, exist_ok=True)
    _write(
        folder / RECIPE,
        "# The tasks, pool and solver of every point; pareto.yaml says which points.\n" + to_yaml(complete),
    )
    _write(folder / PLAN, _yaml(options))
    try:
        if options.get("surrogate"):
            front, model = surrogate_front(
                problem,
                preferences,
                plan,
                samples=options.get("samples"),
                seed=recipe.seed,
                run=folder,
                reference=reference,
                progress=tell,
            )
            return front, model
        front = pareto_front(
            problem, preferences, plan, run=folder, resume=resume, reference=reference, seed=recipe.seed, progress=tell
        )
    except OptionError:  # a mistake in what was asked: nothing is left behind, unless there was something
        if not resume:
            (folder / RECIPE).unlink()
            (folder / PLAN).unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    except KeyboardInterrupt:
        from .errors import Interrupted

        raise Interrupted(f"interrupted; go on with: mergesolve pareto --resume {folder}") from None
    _leave_recipes(front, setup, complete, folder)
    return front, None


def _check(recipe: Recipe) -> None:
    """Refuse what has no meaning between preferences."""
    if len(recipe.tasks) < 2 and not isinstance(recipe.objective, tuple):
        raise UsageProblem("a front is between tasks, and there are fewer than two. Give --task for each.")
    for name in ("scalarization", "subject_to"):
        if getattr(recipe, name) is not None:
            raise UsageProblem(f"`pareto` weighs the tasks itself, so the recipe cannot have '{name}'. Leave it out.")
    if recipe.solver.name in ("mgda", "pcgrad", "minimax"):
        raise UsageProblem(
            f"`pareto` solves one objective a preference; the solver '{recipe.solver.name}' weighs tasks itself. Take "
            "another, such as projected-gradient."
        )


def _leave_recipes(front: Front, setup: Setup, complete: Recipe, folder: Path) -> None:
    """Write a recipe into each point's run, so that every command that takes a run takes it."""
    from ..solvers import Result
    from .recipe import Choice, to_yaml
    from .running import COMMENT, RECIPE, _write

    for record in front.records:
        place = folder / record["name"]
        spec = Result.load(place).described_objective["scalarization"]
        _write(place / RECIPE, COMMENT + to_yaml(replace(complete, scalarization=Choice.read(spec, "scalarization"))))


def _preferences(options: dict[str, Any], names: list[str]) -> Any:
    """The matrix of preferences, the divisions of the grid, or None."""
    import numpy as np

    given = options.get("preferences")
    if given and "divisions" in options:
        raise UsageProblem("--preference and --divisions are two ways to say the same. Give one of them.")
    if not given:
        return options.get("divisions")
    rows = [_weights(text, "--preference", names) for text in given]
    return np.array([[row.get(name, 0.0) for name in names] for row in rows])


def _weights(text: str, option: str, names: list[str]) -> dict[str, float]:
    """TASK=NUMBER,... as numbers by task."""
    from .names import choose

    try:
        fields = named_options(f"x:{text}", option)
    except UsageProblem:
        raise UsageProblem(f"{option} '{text}': expected TASK=NUMBER,TASK=NUMBER,...") from None
    fields.pop("name")
    if not fields:
        raise UsageProblem(f"{option} '{text}': expected TASK=NUMBER,TASK=NUMBER,...")
    for name, value in fields.items():
        choose("task", name, names, where=f"{option} '{text}'")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageProblem(f"{option} '{text}': '{name}' needs a number.")
    return {name: float(value) for name, value in fields.items()}


def _new_folder(out: str | None) -> Path:
    """The folder to write into, which holds no front yet."""
    if out is None:
        numbered = (Path("runs") / ("pareto" if k == 1 else f"pareto-{k}") for k in range(1, 10_000))
        return next(folder for folder in numbered if not folder.exists())
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageProblem(f"--out '{out}' is a file. Name a folder.")
    if folder.exists() and any(folder.iterdir()):
        raise UsageProblem(f"--out '{out}' is not empty. Go on with it (--resume {out}), or name another folder.")
    return folder


def _read(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """Recipe and options of a front that was begun."""
    from ..solvers import PRESETS
    from .recipe import from_mapping, read_yaml
    from .running import RECIPE

    if not (folder / PLAN).exists() or not (folder / RECIPE).exists():
        raise UsageProblem(f"--resume '{folder}': it holds no {PLAN}, so `mergesolve pareto` did not begin it.")
    fields = read_yaml(folder / RECIPE, "recipe")
    options = read_yaml(folder / PLAN, "plan")
    return from_mapping({**fields, "preset": None}, PRESETS, where=str(folder / RECIPE)), options


def _refuse_beside_resume(recipe: str | None, out: str | None, flags: dict[str, Any]) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value not in (None, (), False)]
    given += ["RECIPE"] if recipe is not None else []
    given += ["--out"] if out is not None else []
    if given:
        raise UsageProblem(
            f"--resume goes on with what the folder says, so {', '.join(given)} cannot be given with it."
        )


def _yaml(options: dict[str, Any]) -> str:
    import yaml

    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return str(yaml.safe_dump(plain, sort_keys=False)) if plain else "{}\n"


def _table(front: Front, model: Surrogate | None, folder: Path) -> Any:
    """The front for people."""
    from rich.console import Group

    from ..reports.tables import listing, pairs
    from .console import number

    header = ["point", *front.tasks, "", "gap", "status"]
    if front.predicted is not None:
        header[1 + len(front.tasks) : 1 + len(front.tasks)] = [f"{task} (model)" for task in front.tasks]
    cells = []
    for k, (record, kept) in enumerate(zip(front.records, front.nondominated, strict=True)):
        losses = [number(float(value)) for value in front.losses[k]]
        guess = [] if front.predicted is None else [number(float(value)) for value in front.predicted[k]]
        cells.append(
            [record["name"], *losses, *guess, "" if kept else "dominated", number(record["gap"]), record["status"]]
        )
    volume = f"{front.hypervolume:.6g}" + (
        f" ± {front.hypervolume_error:.1g}" if front.hypervolume_error else " (exact)"
    )
    levels = ", ".join(f"{t} {number(float(v))}" for t, v in zip(front.tasks, front.reference, strict=True))
    rows: dict[str, object] = {"hypervolume": f"{volume}, up to {levels}"}
    if model is not None:
        told = ", ".join(f"{task} {value:.4f}" for task, value in model.r2.items())
        rows["surrogate"] = f"R² {told} on {model.held_out} held-out points, fitted to {model.samples}"
    counts = front.about["counts"]
    rows["evaluations"] = f"{counts['gradients']} gradients, {counts['evaluations']} values"
    rows["folder"] = folder
    return Group(listing(tuple(header), cells, title="front"), "", pairs(rows))
