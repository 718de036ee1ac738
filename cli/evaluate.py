"""`mergesolve evaluate`: top-1 accuracy and calibration of checkpoints and runs."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .flags import data_flags, json_flag, recipe_from
from .names import UsageProblem

if TYPE_CHECKING:
    from ..objectives import Task


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="CHECKPOINT|RUN...")
@click.option("--recipe", "recipe_file", metavar="FILE", help="Take tasks and model from this recipe.")
@data_flags
@click.option("--device", metavar="DEVICE", help="cpu (default) or cuda.")
@click.option("--markdown", is_flag=True, help="Print the table as markdown.")
@json_flag
def command(models: tuple[str, ...], recipe_file: str | None, markdown: bool, as_json: bool, **flags: Any) -> None:
    """Top-1 accuracy on the test data of tasks: one row a checkpoint or run, one column a task, mean and worst.

    Beside them, over all tasks: the mean confidence, and the expected calibration error (ECE, 15 bins), which is large
    where predictions are surer than they are right. --json has both, and the norm of the logits, task by task.

    A run brings tasks, model and pool from its own recipe; with --zoo, a checkpoint may also be named 'base' or after
    an expert of the zoo. Without --task, all tasks of the recipe are evaluated (with --zoo alone: all of the zoo).

    \b
    Examples:
      mergesolve evaluate runs/fw-soft
      mergesolve evaluate --zoo --task digits --task shapes base digits merged.safetensors
      mergesolve evaluate merged.safetensors --model ViT-B-32 --weights clip.safetensors --task cars=cars_test.npz
    """
    from ..objectives import calibrate
    from ..reports.tables import AccuracyRow, AccuracyTable
    from .console import counting, print_json, show
    from .recipe import Recipe, TaskPart
    from .running import RECIPE, check_pool, load_outcome
    from .setup import Setup, merged_weights, model_weights

    recipe: Recipe = recipe_from(flags, recipe_file, test=True)
    runs = [name for name in models if (Path(name) / RECIPE).is_file()]
    outcomes = {name: load_outcome(Path(name)) for name in runs}
    described = recipe_file is not None or recipe.zoo or recipe.model.architecture or recipe.model.module
    if not described:
        if not runs:
            raise UsageProblem(
                "nothing says how to evaluate: give --zoo, --recipe FILE, or --model with --task NAME=PATH."
            )
        first = outcomes[runs[0]].recipe
        recipe = first if not recipe.tasks else _with_tasks(first, recipe.tasks)
    setup = Setup(recipe)
    if recipe.zoo and not recipe.tasks:
        recipe = _with_tasks(recipe, tuple(TaskPart(name) for name in setup.zoo.tasks))
        setup.recipe = recipe
    if not recipe.tasks:
        raise UsageProblem("there are no tasks to evaluate on. Give --task NAME=PATH for each.")
    tests: list[Task] = [setup.load_test(part) for part in recipe.tasks]
    rows = []
    for name in models:
        began = time.monotonic()
        if name in outcomes:
            check_pool(outcomes[name])
            weights = merged_weights(outcomes[name].setup, outcomes[name].result)
        elif recipe.zoo and name in ("base", *setup.zoo.experts):
            weights = model_weights(setup.zoo.base if name == "base" else setup.zoo.experts[name], setup.model)
        else:
            weights = model_weights(name, setup.model)
        with counting(name, quiet=as_json) as progress:
            found = calibrate(setup.model, weights, tests, progress=progress)
        accuracies = {task: one.accuracy for task, one in found.items()}
        numbers = {task: {n: v for n, v in asdict(one).items() if n != "accuracy"} for task, one in found.items()}
        rows.append(AccuracyRow(name, accuracies, seconds=time.monotonic() - began, calibration=numbers))
    table = AccuracyTable([task.name for task in tests], rows)
    if as_json:
        print_json(table.json())
    elif markdown:
        click.echo(table.markdown(), nl=False)
    else:
        show(table.rich())


def _with_tasks(recipe: Any, tasks: Any) -> Any:
    from dataclasses import replace

    return replace(recipe, tasks=tasks)
