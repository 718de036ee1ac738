"""From a recipe's objectives to live ones: their data, teachers and weights, and what may be wrapped around any.

Besides its own options every objective of a recipe takes `weight` (relative to the others of a list), `tasks` (names of
the recipe's tasks that it is about, all unless told), `sharpness` (ρ: the worst weights within this distance) and
`normalize_by` (expert: losses divided by those of each task's expert; excess: above them).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .names import UsageProblem, choose, unknown
from .recipe import Choice, Recipe, TaskPart

if TYPE_CHECKING:
    from ..pools import Pool
    from .setup import Setup

SHARED = ("weight", "tasks", "sharpness", "normalize_by")
NORMALIZERS = {"expert": "ratio", "excess": "excess"}
CENTERS = ("base", "average", "expert:NAME")
# What a recipe gives by other fields, or not at all.
PROVIDED = ("self", "model", "tasks", "teachers", "base", "task_weights", "progress", "center", "metric", "device")


def objective_class(choice: Choice) -> Any:
    """The class behind an objective's name."""
    from ..objectives.registry import OBJECTIVES

    # The others take other objectives or a loss function: a list of objectives in the recipe is their weighted sum.
    known = [name for name, entry in OBJECTIVES.items() if entry.data != "any"]
    choose("objective", choice.name, known)
    return OBJECTIVES[choice.name].load()


def filled(choice: Choice, seed: int) -> Choice:
    """The choice with the options that it does not name."""
    parameters = inspect.signature(objective_class(choice)).parameters
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in PROVIDED and parameter.default is not inspect.Parameter.empty
    }
    if "seed" in parameters:
        defaults["seed"] = seed
    if "center" in parameters:
        defaults["center"] = "base"
    return Choice(choice.name, {**defaults, **choice.options})


def check_objectives(recipe: Recipe) -> None:
    """Refuse objectives that do not exist, options that they do not have, and what has no meaning in this recipe."""
    for choice in recipe.objectives:
        _check(choice, recipe)
    if len(recipe.objectives) == 1 and "weight" in recipe.objectives[0].options:
        raise UsageProblem(
            f"objective '{recipe.objectives[0].name}': a 'weight' is relative to other objectives, and there "
            "is only one. Leave it out, or give a list of objectives."
        )
    asked = [part.name for part in recipe.tasks if part.mixed is not None]
    if (recipe.mixed is not None or asked) and not any(_taught(choice) for choice in recipe.objectives):
        where = f"task '{asked[0]}': " if asked else ""
        raise UsageProblem(
            f"{where}'mixed' inputs have no labels: only an objective with teachers can judge them. Take "
            "--objective distillation, or leave it out."
        )


def _check(choice: Choice, recipe: Recipe) -> None:
    parameters = inspect.signature(objective_class(choice)).parameters
    centered = ("center",) if "center" in parameters else ()
    known = [*(name for name in parameters if name not in PROVIDED), *centered]
    for option in choice.options:
        if option not in known and option not in SHARED:
            raise unknown(f"option of the objective '{choice.name}':", option, [*known, *SHARED])
    _chosen(choice, recipe)
    where = f"objective '{choice.name}'"
    if (normalizer := choice.options.get("normalize_by")) is not None:
        choose("normalizer", str(normalizer), NORMALIZERS, where=where)
        if centered or _taught(choice):
            raise UsageProblem(
                f"{where}: 'normalize_by' needs a loss that the experts have, too, and theirs is 0 here. Leave it out."
            )
    weight = choice.options.get("weight", 1.0)
    counts = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not (counts and math.isfinite(weight) and weight >= 0):
        raise UsageProblem(f"{where}: 'weight' must be a finite number of at least 0; found {weight!r}.")
    sharpness = choice.options.get("sharpness")
    number = isinstance(sharpness, (int, float)) and not isinstance(sharpness, bool)
    if sharpness is not None and not (number and math.isfinite(sharpness) and sharpness > 0):
        raise UsageProblem(
            f"{where}: 'sharpness' must be a number above 0, a distance of weights; found {sharpness!r}."
        )


def _taught(choice: Choice) -> bool:
    return bool(getattr(objective_class(choice), "taught", False))


def _chosen(choice: Choice, recipe: Recipe) -> list[int]:
    """The numbers of the recipe's tasks that an objective is about."""
    names = [part.name for part in recipe.tasks]
    asked = choice.options.get("tasks")
    if asked is None:
        return list(range(len(names)))
    listed = [asked] if isinstance(asked, str) else asked
    if not isinstance(listed, (list, tuple)) or not listed:
        raise UsageProblem(f"objective '{choice.name}': 'tasks' must be a list of names of tasks; found {asked!r}.")
    for name in listed:
        choose("task", str(name), names, where=f"objective '{choice.name}'")
    return [k for k, name in enumerate(names) if name in listed]


def make_objective(setup: Setup) -> Any:
    """The objective of a recipe, or the weighted sum of several."""
    parts = [(choice.options.get("weight", 1.0), _made(setup, choice)) for choice in setup.recipe.objectives]
    if len(parts) == 1:
        return parts[0][1]
    from ..objectives import WeightedSum

    return WeightedSum(parts)


def _made(setup: Setup, choice: Choice) -> Any:
    """One objective, with what is wrapped around it."""
    made = _plain(setup, choice)
    normalizer, sharpness = choice.options.get("normalize_by"), choice.options.get("sharpness")
    if normalizer is not None:
        from ..objectives import RelativeLoss

        parts = {part.name: part for part in setup.recipe.tasks}
        experts = {name: teacher(setup, parts[name]) for name in made.tasks}
        made = RelativeLoss(made, experts, NORMALIZERS[normalizer])
    if sharpness is not None:
        from ..objectives import SharpnessAware

        made = SharpnessAware(made, sharpness)
    return made


def _plain(setup: Setup, choice: Choice) -> Any:
    recipe = setup.recipe
    cls = objective_class(choice)
    parameters = inspect.signature(cls).parameters
    options = {name: value for name, value in choice.options.items() if name not in SHARED}
    if "center" in parameters:
        center = center_weights(setup, options.pop("center", "base"))
        return cls(center, device=setup.model.device, **options)
    chosen = _chosen(choice, recipe)
    parts = [recipe.tasks[k] for k in chosen]
    if getattr(cls, "needs_labels", False):
        every = setup.tasks
    else:
        every = setup.judged if getattr(cls, "taught", False) else setup.unlabelled
    weights = [part.weight for part in parts]
    if any(weight != weights[0] for weight in weights):
        total = sum(weights)
        options["task_weights"] = {part.name: part.weight / total for part in parts}
    if "teachers" in parameters:
        options["teachers"] = {part.name: teacher(setup, part) for part in parts}
    if "base" in parameters:
        options["base"] = lambda: merged_base(setup.checkpoints)
    if "progress" in parameters and setup.progress is not None:
        options["progress"] = setup.progress
    return cls(setup.model, [every[k] for k in chosen], **{"seed": recipe.seed, **options})


def teacher(setup: Setup, part: TaskPart) -> Callable[[], Any]:
    """What returns the weights of a task's expert."""
    name = part.teacher or part.name
    if name == "base":
        return lambda: merged_base(setup.checkpoints)
    if name not in setup.checkpoints.names:
        known = ["base", *setup.checkpoints.names]
        message = unknown("teacher", name, known, where=f"task '{part.name}'")
        raise UsageProblem(f"{message} Name one with 'teacher:' in the recipe.")
    return lambda: one_expert(setup.checkpoints, name)


def center_weights(setup: Setup, center: object) -> Mapping[str, Any]:
    """The weights that `proximity` stays close to: the base, the average of the pool, or one expert."""
    import numpy as np

    form, _, name = str(center).partition(":")
    pool = setup.pool
    if center == "base":
        return merged_base(pool)
    if center == "average":
        return pool.combine(np.full((1, pool.n), 1 / pool.n), pool.blocks("model"))
    if form == "expert":
        choose("expert", name, pool.names, where="objective 'proximity': 'center'")
        return one_expert(pool, name)
    raise unknown("center", str(center), CENTERS, where="objective 'proximity'")


def merged_base(pool: Pool) -> dict[str, Any]:
    """The merged tensors of the base, θ0."""
    import numpy as np

    weights: dict[str, Any] = pool.combine(np.zeros((1, pool.n)), pool.blocks("model"))
    return weights


def one_expert(pool: Pool, name: str) -> dict[str, Any]:
    """The merged tensors of one expert, θ0 + τ_i."""
    import numpy as np

    one_hot = np.zeros((1, pool.n))
    one_hot[0, pool.names.index(name)] = 1.0
    weights: dict[str, Any] = pool.combine(one_hot, pool.blocks("model"))
    return weights
