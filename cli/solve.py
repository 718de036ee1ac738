"""`mergesolve solve`: recipe in, run folder out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .flags import constraint_flags, data_flags, json_flag, many_flags, pool_flags, recipe_from
from .names import UsageProblem


@click.command(short_help="Merge: find the coefficients that minimize an objective.")
@click.argument("recipe", required=False, metavar="[RECIPE.yaml]")
@click.option("--preset", metavar="NAME", help="Start from a named recipe (see `mergesolve list presets`).")
@data_flags
@pool_flags
@click.option("--objective", metavar="NAME", help="See `mergesolve list objectives`.")
@click.option("--split", metavar="SPLIT", help="Split of tasks that have splits: train (default), validation, test.")
@click.option("--limit", type=int, metavar="N", help="Use at most N samples a task, class-balanced.")
@click.option("--mixed", type=int, metavar="N", help="Distil on N inputs a task: its own, and mixtures of two of them.")
@click.option("--blocks", multiple=True, metavar="KIND", help="model, layer, tensor, row; or patterns, repeatable.")
@click.option("--domain", metavar="NAME", help="See `mergesolve list domains`.")
@constraint_flags
@many_flags
@click.option("--solver", metavar="NAME", help="See `mergesolve list solvers`.")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any field of the recipe. Repeatable.")
@click.option(
    "--start",
    metavar="POINT",
    help="average, base, task-arithmetic:0.3, expert:NAME, run:FOLDER (a warm start), or nearest:POINT.",
)
@click.option("--max-iter", type=int, metavar="N", help="Iterations at most.")
@click.option("--tol", type=float, metavar="GAP", help="Optimal when the gap is at most this.")
@click.option("--rtol", type=float, metavar="GAP", help="The same, relative to the objective.")
@click.option("--time-limit", type=float, metavar="SECONDS", help="Stop after the iteration that passes this.")
@click.option("--seed", type=int, metavar="N", help="Decides every random choice (default 0).")
@click.option("--run", "run_folder", metavar="FOLDER", help="Where to write (default: a new folder under runs/).")
@click.option("--resume", metavar="RUN", help="Go on with a run that was killed, interrupted or cut off by a limit.")
@click.option("--overwrite", is_flag=True, help="Replace the run that --run holds.")
@click.option("--no-merge", is_flag=True, help="Do not write merged.safetensors (`materialize` can, any time later).")
@click.option("--no-figures", is_flag=True, help="Do not draw (`plot` can, any time later).")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
@json_flag
def command(recipe: str | None, resume: str | None, **flags: Any) -> int:
    """Find the coefficients of a merge, with a certificate, and write the merged checkpoint.

    Everything can be given by flags, by a YAML recipe, or by a preset; flags win over the recipe, the recipe over the
    preset, --set over all. The recipe that ran, with every default filled in, is written into the run folder beside
    result.json, coefficients.safetensors, trace.jsonl, merged.safetensors and figures/.

    \b
    Exit code: 0 when the solve ended (a warning says so if the iterations or the time ran out before the tolerance was
    reached, or no further progress was possible); 1 when the objective became NaN or infinite, or the machine failed;
    2 for a mistake in what was asked; 130 when interrupted (nothing is lost: go on with --resume).

    \b
    Examples:
      mergesolve solve --zoo --task digits --task shapes --limit 100 --preset fw-soft
      mergesolve solve --zoo --task digits --preset row-distillation --max-iter 200
      mergesolve solve --zoo --task digits --task chess --constraint 'digits <= 0.2' --constraint 'mean(chess) >= 0.1'
      mergesolve solve recipe.yaml --seed 1 --set solver.step_rule=open-loop
      mergesolve solve --base clip.safetensors --expert 'experts/*.safetensors' --model ViT-B-32 \\
          --task cars=cars.npz --task pets=pets_images/ --domain capped --run runs/pets
      mergesolve solve --resume runs/pets --max-iter 800
    """
    from ..solvers import make_solver
    from .running import execute, new_run_folder, open_run, report

    as_json, quiet = flags.pop("as_json"), flags.pop("quiet")
    overwrite, run_folder = flags.pop("overwrite"), flags.pop("run_folder")
    merge, figures = not flags.pop("no_merge"), not flags.pop("no_figures")
    if resume is not None:
        _refuse_beside_resume(recipe, run_folder, flags)
        folder = Path(resume)
        plan, ended = open_run(folder)
        limits = {name: flags[name] for name in ("max_iter", "tol", "rtol", "time_limit") if flags[name] is not None}
        if ended == "optimal" and not limits:
            raise UsageProblem(
                f"run '{resume}' has ended as optimal, so there is nothing to resume. Give a smaller --tol."
            )
        if flags["rounds"] is not None and plan.subject_to is None:
            raise UsageProblem(f"run '{resume}' has no bound (subject_to), so it has no rounds. Leave out --rounds.")
        if ended in ("max_iter", "time_limit") and not limits and flags["rounds"] is None:
            more = "--max-iter" if plan.subject_to is None else "--rounds"
            flag = more if ended == "max_iter" else "--time-limit"
            if ended == "time_limit" or not make_solver(plan.solver.plain()).scheduled:
                raise UsageProblem(
                    f"run '{resume}' used up its {ended.replace('_', ' ')}. Give a larger {flag} to go on."
                )
            limits["max_iter"] = None  # refused below
        if limits.get("max_iter", plan.max_iter) != plan.max_iter and make_solver(plan.solver.plain()).scheduled:
            raise UsageProblem(
                f"run '{resume}': the steps of '{plan.solver.name}' follow a schedule over max_iter={plan.max_iter}, "
                f"so a resumed run keeps it. For more iterations start a new run from this one: --start run:{resume}"
            )
        if flags["rounds"] is not None and plan.subject_to is not None:
            limits["subject_to"] = replace(plan.subject_to, rounds=flags["rounds"])
        plan = replace(plan, **limits)
    else:
        plan = recipe_from(flags, recipe)
        folder = new_run_folder(plan, run_folder, overwrite=overwrite)
    outcome = execute(plan, folder, resume=resume is not None, quiet=quiet or as_json, merge=merge, figures=figures)
    return report(outcome, as_json=as_json, quiet=quiet)


def _refuse_beside_resume(recipe: str | None, run_folder: str | None, flags: dict[str, Any]) -> None:
    """A resumed run is the run that it was: only its limits may change."""
    allowed = ("max_iter", "tol", "rtol", "time_limit", "rounds")
    given = [name for name, value in flags.items() if value not in (None, (), False) and name not in allowed]
    if recipe is not None:
        given.append("RECIPE")
    if run_folder is not None:
        given.append("--run")
    if given:
        named = ", ".join(name if name[0] in "-R" else f"--{name.replace('_', '-')}" for name in given)
        raise UsageProblem(
            f"--resume goes on with the recipe in the run folder, so {named} cannot be given with it. "
            "Only --max-iter, --tol, --rtol, --time-limit and --rounds may change; for anything else start a new run, "
            "for example with --start run:FOLDER."
        )
