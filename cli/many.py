"""Many tasks in a recipe: one number out of their losses (`scalarization`), or a bound on some (`subject_to`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .names import UsageProblem, choose, unknown
from .objective import check_objectives, make_objective
from .recipe import BoundPart, Choice, Recipe

if TYPE_CHECKING:
    from ..solvers import MatrixProblem, Result
    from .setup import Setup

_BOUND = re.compile(r"^\s*(?P<name>[^()<>=]+?)\s*(?:\(\s*(?P<tasks>[^()]*)\))?\s*<=\s*(?P<bound>\S+)\s*$")


def bound_fields(text: str) -> dict[str, Any]:
    """The recipe's `subject_to` from a text: "TASK <= 0.3", "OBJECTIVE <= 0.02" or "OBJECTIVE(TASK, ...) <= 0.02"."""
    from ..objectives.registry import OBJECTIVES

    match = _BOUND.match(text)
    try:
        bound = float(match["bound"]) if match else math.nan
    except ValueError:
        bound = math.nan
    if match is None or math.isnan(bound):
        raise UsageProblem(
            f"--subject-to '{text}': expected TASK <= NUMBER, or OBJECTIVE <= NUMBER such as 'retention <= 0.02', or "
            "OBJECTIVE(TASK, ...) <= NUMBER."
        )
    if match["tasks"] is None and match["name"] not in OBJECTIVES:
        return {"bound": bound, "tasks": _names(match["name"])}
    choose("objective", match["name"], OBJECTIVES, where=f"--subject-to '{text}'")
    tasks = {"tasks": _names(match["tasks"])} if match["tasks"] else {}
    return {"bound": bound, "objective": match["name"], **tasks}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def check_many(recipe: Recipe) -> None:
    """Refuse scalarizations and bounds that do not exist or have no meaning in this recipe."""
    if recipe.scalarization is not None:
        from ..solvers import make_scalarization

        made = make_scalarization(recipe.scalarization.plain())
        if recipe.tasks and len(recipe.objectives) == 1:  # of several, the same task is in each under another name
            names = [part.name for part in recipe.tasks if part.name not in _held(recipe)]
            made.weights(names)
            made.levels(names)
    if recipe.subject_to is not None:
        part = recipe.subject_to
        tasks = [task.name for task in recipe.tasks]
        for name in part.tasks:
            if name not in tasks and part.objective is None:  # it may have been meant for either
                from ..objectives.registry import OBJECTIVES

                raise unknown("task or objective", name, [*tasks, *OBJECTIVES], where="subject_to")
            choose("task", name, tasks, where="subject_to")
        for each in parts_of(recipe):
            check_objectives(each)


def _held(recipe: Recipe) -> tuple[str, ...]:
    """Tasks that are not minimized, because their own loss is what is bounded."""
    return recipe.subject_to.tasks if recipe.subject_to is not None and recipe.subject_to.objective is None else ()


def parts_of(recipe: Recipe) -> tuple[Recipe, Recipe]:
    """The recipe of what is minimized, and that of what is bounded."""
    part = recipe.subject_to
    assert isinstance(part, BoundPart)
    names = [task.name for task in recipe.tasks]
    held = list(part.tasks) or names
    plain = replace(recipe, subject_to=None, scalarization=None)
    if part.objective is not None:
        return plain, replace(plain, objective=_about((part.objective,), held, recipe))
    rest = [name for name in names if name not in held]
    if not rest:
        raise UsageProblem(
            "subject_to: every task is bounded by its own loss, so nothing is left to minimize. Name more tasks "
            "(--task), or bound another objective, as in --subject-to 'retention <= 0.02'."
        )
    return (
        replace(plain, objective=_about(recipe.objectives, rest, recipe)),
        replace(plain, objective=_about(recipe.objectives, held, recipe)),
    )


def _about(choices: Sequence[Choice], names: Sequence[str], recipe: Recipe) -> Choice | tuple[Choice, ...]:
    """The objectives, about these tasks only; those that are about none of them fall away."""
    every = [task.name for task in recipe.tasks]
    kept = []
    for choice in choices:
        own = choice.options.get("tasks", every)
        tasks = [name for name in ([own] if isinstance(own, str) else own) if name in names]
        if tasks:
            kept.append(Choice(choice.name, {**choice.options, "tasks": tasks}))
    if not kept:
        raise UsageProblem(f"subject_to: no objective of the recipe is about {', '.join(names)}.")
    if len(kept) == 1:
        return Choice(kept[0].name, {k: v for k, v in kept[0].options.items() if k != "weight"})
    return tuple(kept)


def constrained_objective(setup: Setup) -> Any:
    """f and g ≤ ε of a recipe with a bound, as one objective."""
    from ..objectives import AugmentedLagrangian

    part = setup.recipe.subject_to
    assert part is not None
    minimize, held = (_with(setup, recipe) for recipe in parts_of(setup.recipe))
    return AugmentedLagrangian(make_objective(minimize), make_objective(held), part.bound)


def _with(setup: Setup, recipe: Recipe) -> Setup:
    """A setup for another objective of the same pool and tasks."""
    tasks = setup.tasks
    new = setup.another(recipe)
    new.progress = setup.progress
    new.__dict__["tasks"] = tasks
    return new


def framed(setup: Setup, problem: MatrixProblem) -> MatrixProblem:
    """The problem with the recipe's scalarization over its tasks."""
    from ..solvers import Scalarized

    choice = setup.recipe.scalarization
    return problem if choice is None else Scalarized(problem, choice.plain())


def solve_problem(setup: Setup, problem: MatrixProblem, solver: Any, **options: Any) -> Result:
    """Solve the recipe's problem, with its bound if it has one."""
    from ..solvers import solve, solve_constrained

    part = setup.recipe.subject_to
    if part is None:
        return solve(problem, solver, **options)
    return solve_constrained(
        problem, solver, rounds=part.rounds, feasibility_tol=part.tol, repair=part.repair, **options
    )


def constraint_summary(result: Result) -> dict[str, Any]:
    """What a constrained result has more than another; nothing for another."""
    names = ("constraint", "bound", "violation", "multiplier", "complementarity", "repair")
    return {name: getattr(result, name) for name in names if hasattr(result, name)}


def many_rows(result: Result) -> Mapping[str, str]:
    """Rows of the summary about bound and worst task."""
    from ..solvers import worst_gap
    from .console import number

    rows: dict[str, str] = {}
    if hasattr(result, "bound"):
        rows["constraint"] = (
            f"{number(result.constraint)}, at most {number(result.bound)} asked for; "  # type: ignore[attr-defined]
            f"violation {number(result.violation)}"  # type: ignore[attr-defined]
        )
        rows["price"] = (
            f"{number(result.multiplier)}: the objective falls by about that "  # type: ignore[attr-defined]
            "for each unit that the bound grows"
        )
    tasks = ", ".join(f"{name} {number(value)}" for name, value in result.tasks.items())
    if "scalarization" in result.described_objective:
        rows["tasks"] = tasks
        above = worst_gap(result)
        if above is not None:
            rows["worst task"] = f"at most {number(above)} above the least possible, if the losses are convex"
    return rows
