"""`mergesolve landscape`: the loss between merges, and whether a pool is fit to be merged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from .flags import data_flags, json_flag, pool_flags
from .names import UsageProblem

F = TypeVar("F", bound=Callable[..., Any])
POINTS = "base, average, expert:NAME, task-arithmetic:0.3, run:FOLDER or run:FOLDER@ITERATION"


def _no_file(context: click.Context, option: click.Parameter, out: str | None) -> str | None:
    """Refuse a folder that is a file, or lies in one, before anything is computed."""
    if out is not None:
        there = next(place for place in (Path(out), *Path(out).parents) if place.exists())
        if not there.is_dir():
            raise UsageProblem(f"--out '{out}': '{there}' is a file. Name a folder.")
    return out


def survey_flags(function: F) -> F:
    """The flags that every command here has."""
    options = [
        click.option("--recipe", "recipe_file", metavar="FILE", help="Take pool, model, tasks, objective from here."),
        data_flags,
        pool_flags,
        click.option("--objective", metavar="NAME", help="See `mergesolve list objectives` (cross-entropy)."),
        click.option(
            "--split", metavar="SPLIT", help="Split of tasks that have splits (validation; a run's: its own)."
        ),
        click.option("--limit", type=int, metavar="N", help="Use at most N samples a task, class-balanced."),
        click.option("--seed", type=int, metavar="N", help="Decides which samples --limit takes (0)."),
        click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any field of the recipe."),
        click.option(
            "--out", metavar="FOLDER", callback=_no_file, help="Write the numbers as JSON, and figures as PNG and SVG."
        ),
        json_flag,
    ]
    for option in reversed(options):
        function = option(function)
    return function


def grid_flag(default: int, what: str) -> Callable[[F], F]:
    """--grid with a default."""
    return click.option(
        "--grid", type=click.IntRange(3), default=default, show_default=True, metavar="N", help=f"Steps of {what}."
    )


blocks_flag = click.option(
    "--blocks", multiple=True, metavar="KIND", help="layer, tensor, row or patterns (as fine as the runs named)."
)


@click.group()
def group() -> None:
    """The loss between merges: segments, planes, barriers, layers, features; and whether a pool is fit to be merged.

    A point is base, average, expert:NAME, task-arithmetic:0.3, run:FOLDER (the result of a run) or run:FOLDER@7 (its
    iterate 7). Where a run is named and no pool is given, pool, tasks and objective are that run's.

    \b
    Examples:
      mergesolve landscape check --zoo --task digits --task shapes --limit 50 --out landscape
      mergesolve landscape segment expert:digits expert:shapes --zoo --task digits --task shapes --accuracy
      mergesolve landscape plane base expert:digits expert:shapes --zoo --task digits --task shapes --out landscape
      mergesolve landscape barriers --iterates runs/fw-soft
    """


@group.command(short_help="The loss along the segment between two points.")
@click.argument("a")
@click.argument("b")
@survey_flags
@blocks_flag
@grid_flag(21, "the segment")
@click.option("--refine", type=click.IntRange(0), default=12, show_default=True, metavar="N",
              help="Further evaluations, around the worst step.")  # fmt: skip
@click.option("--accuracy", is_flag=True, help="Also top-1 of each task along the segment.")
def segment(
    a: str, b: str, recipe_file: str | None, grid: int, refine: int, accuracy: bool, out: str | None, as_json: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """The loss along the segment from point A to point B, by task, and its barrier.

    The barrier is sup over t of L((1−t)A + tB) − ((1−t)L(A) + tL(B)): 0 for a convex loss, and about 0 between experts
    that lie in one basin.

    \b
    Examples:
      mergesolve landscape segment expert:digits expert:shapes --zoo --task digits --task shapes --limit 50
      mergesolve landscape segment average run:runs/fw-soft --accuracy --out landscape
      mergesolve landscape segment run:runs/fw-soft@0 run:runs/fw-soft@20
    """
    from ..solvers.landscape import segment as walk
    from .surveying import Survey, telling

    survey = Survey(flags, recipe_file, (a, b))
    survey.setup.check_names()
    points = survey.points((a, b))
    first, second = points

    def measure(weights: Mapping[str, Any]) -> Mapping[str, float]:
        from ..objectives import evaluate

        return evaluate(survey.setup.model, dict(weights), survey.setup.tasks)

    with telling("segment", quiet=as_json) as progress:
        found = walk(
            survey.problem,
            points[first],
            points[second],
            grid=grid,
            refine=refine,
            measure=measure if accuracy else None,
            progress=_counted(progress),
        )
    report = {"command": "segment", "a": a, "b": b, **found.as_dict(), **_data(survey)}

    def draw() -> Any:
        from ..reports.landscape import segment_figure

        return segment_figure(found, first, second)

    def table() -> Any:
        from ..reports.landscape import segment_tables

        return segment_tables(found, first, second)

    _tell(report, {"segment": draw}, table, out, as_json)


@group.command(short_help="The loss on the plane through three points.")
@click.argument("a")
@click.argument("b")
@click.argument("c")
@survey_flags
@blocks_flag
@grid_flag(15, "the longer side")
@click.option("--margin", type=click.FloatRange(0.0, 5.0), default=0.25, show_default=True, metavar="X",
              help="How far to go beyond the points, in their extent.")  # fmt: skip
@click.option("--trajectory", "runs", multiple=True, metavar="RUN",
              help="Project the iterates of this run on the plane. Repeatable.")  # fmt: skip
@click.option("--by-task", is_flag=True, help="Also a panel for each task.")
def plane(
    a: str, b: str, c: str, recipe_file: str | None, grid: int, margin: float, runs: tuple[str, ...], by_task: bool,
    out: str | None, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """The loss on the plane through points A, B and C, in distances of the weights, with the runs that pass near it.

    \b
    Examples:
      mergesolve landscape plane base expert:digits expert:shapes --zoo --task digits --task shapes --out landscape
      mergesolve landscape plane base average run:runs/fw-soft --trajectory runs/fw-soft --by-task --out landscape
    """
    from ..solvers.landscape import plane as survey_plane
    from .surveying import Survey, telling

    survey = Survey(flags, recipe_file, (a, b, c), runs=runs)
    survey.setup.check_names()
    points = survey.points((a, b, c))
    paths = {
        label: list(survey.iterates(Path(run)).values())
        for label, run in zip(Survey.labels([f"run:{run}" for run in runs]), runs, strict=True)
    }
    with telling("plane", quiet=as_json) as progress:
        found = survey_plane(
            survey.problem, *points.values(), grid=grid, margin=margin, paths=paths, progress=_counted(progress)
        )
    report = {"command": "plane", "a": a, "b": b, "c": c, **found.as_dict(), **_data(survey)}

    def draw() -> Any:
        from ..reports.landscape import plane_figure

        return plane_figure(found, list(points), by_task=by_task)

    def table() -> Any:
        from ..reports.landscape import plane_table

        return plane_table(found, list(points))

    _tell(report, {"plane": draw}, table, out, as_json)


@group.command(short_help="Replace one layer at a time: which carry a task?")
@click.argument("a")
@click.argument("b")
@survey_flags
@blocks_flag
def swap(a: str, b: str, recipe_file: str | None, out: str | None, as_json: bool, **flags: Any) -> None:
    """Replace one layer of point A by that of point B, and the other way round: which layers carry a task.

    Also the excess half way, where only that layer is averaged (layer-wise mode connectivity), and the loss with all
    layers up to it replaced.

    \b
    Examples:
      mergesolve landscape swap base expert:digits --zoo --task digits --task shapes --limit 50 --out landscape
      mergesolve landscape swap run:runs/fw-soft average
    """
    from ..solvers.landscape import layer_swap
    from .surveying import Survey, telling

    survey = Survey(flags, recipe_file, (a, b))
    survey.setup.check_names()
    points = survey.points((a, b))
    first, second = points
    with telling("layers", quiet=as_json) as progress:
        found = layer_swap(survey.problem, points[first], points[second], progress=_counted(progress))
    report = {"command": "swap", "a": a, "b": b, **found.as_dict(), **_data(survey)}

    def draw() -> Any:
        from ..reports.landscape import swap_figure

        return swap_figure(found, first, second)

    def table() -> Any:
        from ..reports.landscape import swap_table

        return swap_table(found, first, second)

    _tell(report, {"swap": draw}, table, out, as_json)


@group.command(short_help="Barriers between points, or iterates of a run.")
@click.argument("points", nargs=-1, metavar="[POINT...]")
@survey_flags
@blocks_flag
@grid_flag(11, "each segment")
@click.option("--refine", type=click.IntRange(0), default=8, show_default=True, metavar="N",
              help="Further evaluations, around the worst step.")  # fmt: skip
@click.option("--iterates", metavar="RUN", help="Between successive iterates of this run, instead.")
@click.option("--count", type=click.IntRange(2), default=8, show_default=True, metavar="N",
              help="How many iterates, evenly apart.")  # fmt: skip
def barriers(
    points: tuple[str, ...], recipe_file: str | None, grid: int, refine: int, iterates: str | None, count: int,
    out: str | None, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Barriers between points, each pair: unless some are named, between all experts, the base and the average.

    \b
    Examples:
      mergesolve landscape barriers --zoo --expert digits --expert shapes --task digits --task shapes --limit 50
      mergesolve landscape barriers run:runs/fw-hard run:runs/fw-soft average --out landscape
      mergesolve landscape barriers --iterates runs/fw-soft --count 10
    """
    from ..solvers.landscape import barriers as between
    from .surveying import Survey, evenly, telling

    if iterates is not None and points:
        raise UsageProblem(f"--iterates has its own points; leave out {', '.join(points)}.")
    if len(points) == 1:
        raise UsageProblem(f"one point, '{points[0]}', has no segment. Name two or more: {POINTS}.")
    survey = Survey(flags, recipe_file, points, runs=(iterates,) if iterates else ())
    survey.setup.check_names()
    pairs = None
    if iterates is not None:
        path = survey.iterates(Path(iterates))
        numbers = evenly(list(path), count)
        places = {str(number): path[number] for number in numbers}
        names = list(places)
        pairs = list(itertools.pairwise(names))
        if not pairs:
            raise UsageProblem(f"run '{iterates}' recorded one iterate, so there is no segment.")
    else:
        texts = points or ("base", "average", *(f"expert:{name}" for name in survey.setup.pool.names))
        places = survey.points(texts)
        names = list(places)
    with telling("segments", quiet=as_json) as progress:
        found = between(survey.problem, places, pairs, grid=grid, refine=refine, progress=progress)
    report = {
        "command": "barriers",
        "points": names,
        "iterates": iterates,
        "segments": [{"a": first, "b": second, **path.as_dict()} for (first, second), path in found.items()],
        **_data(survey),
    }

    def draw() -> Any:
        from ..reports.landscape import barriers_figure, chain_figure

        if iterates is not None:
            return chain_figure(found, Path(iterates).resolve().name)
        return barriers_figure(found, names)

    def table() -> Any:
        from ..reports.landscape import barriers_table

        return barriers_table(found)

    _tell(report, {"iterates" if iterates else "barriers": draw}, table, out, as_json)


@group.command(short_help="Are merged features the interpolated features?")
@click.argument("a")
@click.argument("b")
@survey_flags
@blocks_flag
@grid_flag(5, "the segment, its ends included")
def features(a: str, b: str, recipe_file: str | None, grid: int, out: str | None, as_json: bool, **flags: Any) -> None:
    """How near the features of (1−t)A + tB are to (1−t) times the features of A plus t times those of B, by task.

    Linear feature connectivity (Zhou et al. 2023) holds where the cosine is close to 1, and above that to either end.
    Needs inputs only, no labels.

    \b
    Examples:
      mergesolve landscape features expert:digits expert:shapes --zoo --task digits --task shapes --limit 50
      mergesolve landscape features base run:runs/fw-soft --out landscape
    """
    from ..solvers.landscape import feature_connectivity
    from .surveying import Survey, telling

    survey = Survey(flags, recipe_file, (a, b))
    survey.setup.check_names()
    points = survey.points((a, b))
    first, second = points
    steps = [k / (grid - 1) for k in range(1, grid - 1)]
    with telling("features", quiet=as_json) as progress:
        rows = _features(survey, points[first], points[second], [0.0, 1.0, *steps], progress)
    found = {
        task: [
            feature_connectivity(merged, [parts[0], parts[1]], [1 - t, t])
            for t, merged in zip(steps, parts[2:], strict=True)
        ]
        for task, parts in rows.items()
    }
    report = {
        "command": "features",
        "a": a,
        "b": b,
        "steps": steps,
        "tasks": {task: [vars(value) for value in values] for task, values in found.items()},
        **_data(survey),
    }

    def draw() -> Any:
        from ..reports.landscape import features_figure

        return features_figure(steps, found, first, second)

    def table() -> Any:
        from ..reports.landscape import features_table

        return features_table(steps, found)

    _tell(report, {"features": draw}, table, out, as_json)


def _features(survey: Any, a: Any, b: Any, steps: list[float], progress: Any) -> dict[str, list[Any]]:
    """By task, the features [N, d] at each step."""
    from ..objectives import features as measure
    from ..solvers.landscape import Slice

    line = Slice(survey.problem, a, b - a)
    tasks = survey.setup.tasks
    rows: dict[str, list[Any]] = {task.name: [] for task in tasks}
    for k, step in enumerate(steps):
        weights = line.weights(step)
        for task in tasks:
            rows[task.name].append(measure(survey.setup.model, weights, task).numpy())
        if progress is not None:
            progress(f"t = {step:.2f}", k + 1, len(steps))
    return rows


@group.command(short_help="Go, caution or no-go, for experts and pool.")
@survey_flags
@grid_flag(9, "the segment of each expert")
@click.option("--threshold", "thresholds", multiple=True, metavar="NAME=VALUE",
              help="norm_ratio (2), similar (0.9), barrier_caution (0.05), barrier_no_go (0.25).")  # fmt: skip
def check(
    recipe_file: str | None, grid: int, thresholds: tuple[str, ...], out: str | None, as_json: bool, **flags: Any
) -> None:
    """Go, caution or no-go for each expert and for the pool, with the reason, before anything is merged.

    Without --task: lengths, angles, distances and copies, in one pass over the checkpoints. With tasks also the barrier
    from each expert to the average of the others, what averaging gains, and the measurable terms of the bound on the
    risk of an average (Proposition 1 of the paper on DPP selection). With --zoo, all experts of the zoo are checked,
    the broken ones too.

    \b
    Examples:
      mergesolve landscape check --base base.safetensors --expert 'experts/*.safetensors'
      mergesolve landscape check --zoo --task digits --task shapes --task clocks --task lowercase --limit 50
      mergesolve landscape check --recipe recipe.yaml --threshold barrier_no_go=0.1 --json
    """
    from ..solvers.readiness import check_pool
    from .recipe import parse_assignments
    from .surveying import Survey, telling

    limits = {}
    for name, text in parse_assignments(thresholds, "--threshold").items():
        try:
            limits[name] = float(text)
        except ValueError:
            raise UsageProblem(f"--threshold '{name}={text}': expected a number.") from None
    survey = Survey({**flags, "blocks": ("model",)}, recipe_file)
    setup = survey.setup
    setup.check_names()
    if setup.recipe.zoo and not setup.recipe.pool.experts:  # all of it, those that should not be merged too
        setup.recipe = replace(setup.recipe, pool=replace(setup.recipe.pool, experts=tuple(setup.zoo.experts)))
    problem = survey.problem if setup.recipe.tasks else None
    with telling("check", quiet=as_json) as progress:
        found = check_pool(
            setup.pool, problem, bound=_bound(setup), grid=grid, thresholds=limits, progress=progress
        )  # fmt: skip
    report = {"command": "check", **found.as_dict(), **(_data(survey) if problem is not None else {})}

    def draw() -> Any:
        from ..reports.landscape import check_figure

        return check_figure(found)

    def table() -> Any:
        from ..reports.landscape import check_tables

        return check_tables(found)

    _tell(report, {"check": draw}, table, out, as_json)


def _bound(setup: Any) -> Any:
    """The terms of Proposition 1 for subsets of the checkpoints; None without labels, or for other task vectors."""
    from .selecting import evidence

    part = setup.recipe.pool
    if not setup.recipe.tasks or part.transforms or part.select is not None:
        return None
    if any(task.labels is None for task in setup.tasks):
        return None
    return evidence(setup).bound


def _counted(progress: Callable[[str, int, int], None] | None) -> Callable[[int, int], None] | None:
    """Progress without words."""
    return None if progress is None else lambda done, total: progress("", done, total)


def _data(survey: Any) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "objective": dict(survey.problem.objective.describe()),
        "data": [
            {"task": task.name, "split": task.split, "samples": len(task), "fingerprint": task.fingerprint}
            for task in survey.setup.tasks
        ],
        "data_used": survey.problem.data_used,
        "pool": list(survey.problem.experts),
        "fingerprint": survey.setup.pool.fingerprint,
    }


def _tell(
    report: dict[str, Any],
    figures: Mapping[str, Callable[[], Any]],
    table: Callable[[], Any],
    out: str | None,
    as_json: bool,
) -> None:
    """Write numbers and figures, and print: everything is computed before the first file is begun."""
    from .console import note, print_json, show

    written: list[Path] = []
    if out is not None:
        from ..reports.landscape import save_landscape
        from ..solvers.files import write_json

        folder = Path(out)
        for name, draw in figures.items():
            written += save_landscape(draw, folder, name)
            write_json(folder / f"{name}.json", report)
            written.append(folder / f"{name}.json")
        report = {**report, "written": [str(path) for path in written]}
    if as_json:
        print_json(report)
        return
    made = table()
    for part in made if isinstance(made, list) else [made]:
        show(part)
        if isinstance(made, list):
            show("")
    if written:
        note(f"wrote {', '.join(map(str, written))}")
