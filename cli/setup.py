"""From a recipe to live objects: pool, model, tasks, objective, problem, solver, start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .many import check_many, constrained_objective, framed
from .names import UsageProblem, choose, unknown
from .objective import check_objectives, filled, make_objective
from .recipe import Choice, ModelPart, PoolPart, Recipe, TaskPart

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..objectives import Task
    from ..pools import Blocks, Pool
    from ..solvers import Domain, MatrixProblem, Problem, Result, Solver
    from ..solvers.selection import Selection

Progress = Callable[[str, int, int], None]


@dataclass
class Setup:
    """The live counterpart of a recipe; every part is made when it is first asked for."""

    recipe: Recipe
    progress: Progress | None = None
    paths: dict[str, str] = field(default_factory=dict)  # of the experts, once the pool is open

    def another(self, recipe: Recipe) -> Setup:
        """The setup of another recipe, with what both share already made: zoo, pool, model."""
        new = Setup(recipe, paths=self.paths)
        same = {
            "zoo": recipe.zoo == self.recipe.zoo,
            "pool": (recipe.zoo, recipe.pool) == (self.recipe.zoo, self.recipe.pool) and recipe.pool.select is None,
            "selection": (recipe.zoo, recipe.pool, recipe.tasks, recipe.split, recipe.limit)
            == (self.recipe.zoo, self.recipe.pool, self.recipe.tasks, self.recipe.split, self.recipe.limit),
            "checkpoints": (recipe.zoo, recipe.pool) == (self.recipe.zoo, self.recipe.pool),
            "model": (recipe.zoo, recipe.pool, recipe.model) == (self.recipe.zoo, self.recipe.pool, self.recipe.model),
        }
        for name, shared in same.items():
            if shared and name in self.__dict__:
                new.__dict__[name] = self.__dict__[name]
        return new

    @cached_property
    def zoo(self) -> Any:
        """The embedded benchmark."""
        from ..zoo import load

        return load(data=self.recipe.zoo) if isinstance(self.recipe.zoo, str) else load()

    @cached_property
    def pool(self) -> Pool:
        """The pool that is merged: the checkpoints after the recipe's transforms."""
        from ..pools.transforms import make_transform

        made = [make_transform(choice.plain()) for choice in self.recipe.pool.transforms]
        pool = self.checkpoints if self.selection is None else self._chosen(self.selection.names)
        for transform in made:
            pool = pool.transform(transform)
        return pool

    def _chosen(self, names: Sequence[str]) -> Pool:
        """The pool of some experts, opened anew: which tensors are merged follows from these alone, as in a resume."""
        part = self.recipe.pool
        experts: Any = tuple(names) if self.recipe.zoo else {name: self.paths[name] for name in names}
        return Setup(replace(self.recipe, pool=replace(part, experts=experts, select=None))).checkpoints

    @cached_property
    def selection(self) -> Selection | None:
        """The experts that the recipe's selector chooses, if it names one."""
        choice = self.recipe.pool.select
        if choice is None:
            return None
        from .selecting import check_selector, evidence

        return check_selector(choice).select(evidence(self))

    @cached_property
    def checkpoints(self) -> Pool:
        """The checkpoints as they are, opened and checked."""
        from ..pools import BACKENDS, Pool
        from ..pools.spec import expand_experts

        part = self.recipe.pool
        base, experts = self._zoo_checkpoints() if self.recipe.zoo else (part.base, part.experts)
        if base is None:
            raise UsageProblem("the pool has no base. Give --base PATH (or 'pool: base:' in the recipe), or --zoo.")
        if not experts:
            raise UsageProblem(
                "the pool has no experts. Give --expert NAME=PATH or --expert 'GLOB' for each, a --pool file, or --zoo."
            )
        choose("backend", part.backend, BACKENDS)
        self.paths = expand_experts(experts if isinstance(experts, dict) else list(experts), base=base)
        return Pool.open(
            base=base,
            experts=self.paths,
            include=part.include,
            exclude=part.exclude,
            rename=part.rename or None,
            dtype=part.dtype,
            backend=part.backend,  # type: ignore[arg-type]
            device=part.device,
        )

    def _zoo_checkpoints(self) -> tuple[str, dict[str, str]]:
        part = self.recipe.pool
        if part.base is not None:
            raise UsageProblem(f"--zoo brings its own base; leave out --base {part.base}, or leave out --zoo.")
        names = tuple(part.experts) if part.experts else tuple(self.zoo.task_experts)
        for name in names:
            choose("expert of the zoo", name, self.zoo.experts)
        return str(self.zoo.base), {name: str(self.zoo.experts[name]) for name in names}

    @cached_property
    def model(self) -> Any:
        """What turns weights and inputs into logits."""
        part = self.recipe.model
        if self.recipe.zoo:
            return self.zoo.model(device=self.recipe.pool.device)
        if part.module is not None:
            return self._module(part.module)
        if part.architecture is None:
            raise UsageProblem(
                "nothing says what the checkpoints are weights of. Give --model ARCHITECTURE (a name of open_clip, "
                "such as ViT-B-32, or a JSON configuration) or --model FILE.py:FUNCTION, or --zoo."
            )
        from ..objectives import CLIP

        weights: Any = part.weights if part.weights is not None else self.recipe.pool.base
        if weights is not None and not Path(weights).expanduser().is_file():
            weights = load_weights(weights)  # a folder, maybe of shards, or a Hub id
        return CLIP(part.architecture, weights=weights, device=self.recipe.pool.device, precision=part.precision)

    def _module(self, spec: str) -> Any:
        from .module import OwnModel, load_module, told

        module = load_module(spec)
        if self.recipe.pool.base is not None:
            # Tensors that all models share are not merged: they must be the base's, not the constructor's.
            try:
                module.load_state_dict(self.checkpoints.base_weights(), strict=False)
            except RuntimeError as error:
                raise UsageProblem(f"model: the base does not fit the module of '{spec}': {told(error)}") from error
        return OwnModel(module.to(self.recipe.pool.device))

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The data of the objective; labels only where the objective asks for them."""
        if not self.recipe.tasks:
            known = f" Tasks of the zoo: {', '.join(self.zoo.tasks)}." if self.recipe.zoo else ""
            raise UsageProblem(f"there are no tasks. Give --task NAME (zoo) or --task NAME=DATA for each.{known}")
        return tuple(self.load_task(part) for part in self.recipe.tasks)

    @cached_property
    def unlabelled(self) -> tuple[Task, ...]:
        """The same data without labels."""
        return tuple(task.without_labels() for task in self.tasks)

    @cached_property
    def judged(self) -> tuple[Task, ...]:
        """What teachers judge: the same data without labels, and mixtures of them where the recipe asks for some."""
        counts = [part.mixed if part.mixed is not None else self.recipe.mixed for part in self.recipe.tasks]
        return tuple(
            task if count is None else task.mixed(count, part.seed)
            for task, count, part in zip(self.unlabelled, counts, self.recipe.tasks, strict=True)
        )

    def load_task(self, part: TaskPart) -> Task:
        """The data that one task of the recipe names."""
        split = part.split or self.recipe.split
        limit = part.limit if part.limit is not None else self.recipe.limit
        return self._load(part, split, limit, part.npz, part.folder)

    def load_test(self, part: TaskPart) -> Task:
        """The data to evaluate one task on."""
        if self._is_zoo(part) or part.hub is not None:
            return self._load(replace(part, test=None), "test", None, None, None)
        if part.test is None:
            raise UsageProblem(
                f"the task '{part.name}' has no data to evaluate on. Give 'test: PATH' in the recipe, or "
                f"--task {part.name}=PATH."
            )
        as_folder = part.folder is not None or Path(part.test).is_dir()
        return self._load(part, "test", None, None if as_folder else part.test, part.test if as_folder else None)

    def _is_zoo(self, part: TaskPart) -> bool:
        return bool(self.recipe.zoo) and part.npz is None and part.folder is None and part.hub is None

    def _load(self, part: TaskPart, split: str, limit: int | None, npz: str | None, folder: str | None) -> Task:
        from ..objectives import Task

        texts: dict[str, Any] = {}
        if part.templates is not None:
            texts["templates"] = part.templates
        if self._is_zoo(part):
            choose("task of the zoo", part.name, self.zoo.tasks)
            choose("split", split, ("train", "validation", "test"), where=f"task '{part.name}'")
            task: Task = self.zoo.task(part.name, split=split, limit=limit)
            return task
        if part.classes is not None:
            texts["classes"] = part.classes
        texts.update(getattr(self.model, "preprocess", {}))
        if npz is not None:
            task = Task.from_npz(npz, name=part.name, split=split, **texts)
        elif folder is not None:
            task = Task.from_folder(folder, name=part.name, split=split, **texts)
        elif part.hub is not None:
            columns = {k: v for k in ("config", "image", "label") if (v := getattr(part, k)) is not None}
            task = Task.from_hub(part.hub, split, name=part.name, **columns, **texts)
        else:
            raise UsageProblem(
                f"the task '{part.name}' names no data: give 'npz', 'folder' or 'hub' in the recipe, "
                f"--task {part.name}=PATH, or --zoo."
            )
        return task if limit is None else task.subset(limit, part.seed)

    @cached_property
    def objective(self) -> Any:
        """The objective, or the weighted sum of several."""
        return make_objective(self) if self.recipe.subject_to is None else constrained_objective(self)

    @cached_property
    def problem(self) -> Problem:
        """Pool, objective, blocks and domain together."""
        from ..solvers import Problem

        domain = self.domain  # before the objective: constraints without a solution cost nobody a model
        return Problem(self.pool, self.objective, blocks=self.blocks, domain=domain)

    @cached_property
    def minimized(self) -> MatrixProblem:
        """The problem, or the one number out of its tasks that the recipe asks for."""
        return framed(self, self.problem)

    @cached_property
    def domain(self) -> Domain:
        """The feasible set, with the constraints over the pool's experts and the blocks."""
        blocks = self.blocks
        return asked_domain(self.recipe).bind(self.pool.names, blocks.names, blocks.layers)

    @cached_property
    def blocks(self) -> Blocks:
        """The rows of Λ."""
        kind = self.recipe.blocks
        check_blocks(kind)
        return self.pool.blocks(kind if isinstance(kind, str) else list(kind))

    @cached_property
    def solver(self) -> Solver:
        """The solver with its options."""
        from ..solvers import make_solver

        return make_solver(self.recipe.solver.plain())

    @cached_property
    def start(self) -> str | Result | NDArray[np.float64]:
        """Where the solve begins."""
        from ..solvers import Result
        from ..solvers.points import nearest

        wanted = self.recipe.start.removeprefix("nearest:")
        form, _, argument = wanted.partition(":")
        start = Result.load(argument) if form == "run" else wanted
        return start if wanted == self.recipe.start else nearest(self.problem, start)

    @property
    def remark(self) -> str | None:
        """What to tell of a start that was moved to the nearest point of the domain."""
        import numpy as np

        from ..solvers import start_point
        from ..solvers.domains import FEASIBILITY

        wanted = self.recipe.start.removeprefix("nearest:")
        if wanted == self.recipe.start or wanted.startswith("run:"):
            return None
        domain, point = self.problem.domain, start_point(self.problem, wanted)
        violation = domain.violation(point)
        row = int(np.argmax(violation))
        if violation[row] <= FEASIBILITY:
            return None
        return (
            f"start: '{wanted}' is outside of the domain ({domain.breach(point, row)}); the solve begins at the point "
            "of the domain that is nearest."
        )

    def check_names(self) -> None:
        """Find misspelled names and options before any file is opened."""
        from ..solvers import DOMAINS

        self.solver  # noqa: B018 (made for its errors)
        for choice in self.recipe.pool.transforms:
            check_transform(choice)
        if self.recipe.pool.select is not None:
            from .selecting import check_selector

            check_selector(self.recipe.pool.select)
        choose("domain", self.recipe.domain.name, DOMAINS)
        check_domain_options(self.recipe.domain)
        self._check_constraints()
        check_objectives(self.recipe)
        check_many(self.recipe)
        check_blocks(self.recipe.blocks)

    def _check_constraints(self) -> None:
        """Refuse constraints that cannot be read, and where the recipe names its experts, those without a solution."""
        from ..solvers import Polytope

        domain, part = asked_domain(self.recipe), self.recipe.pool
        experts: Sequence[str] = tuple(part.experts) if self.recipe.zoo or isinstance(part.experts, dict) else ()
        if isinstance(domain, Polytope) and self.recipe.zoo and not experts:
            experts = tuple(self.zoo.task_experts)
        if isinstance(domain, Polytope) and experts and part.select is None:
            domain.check(experts)

    def resolved(self) -> Recipe:
        """The recipe with every default filled in and every path absolute."""
        recipe = self.recipe
        form, of_a_run, argument = recipe.start.partition("run:")
        of_a_run = of_a_run if form in ("", "nearest:") else ""
        domain = self.domain.describe()
        if recipe.constraints:
            domain = domain["domain"]  # the recipe's constraints stand beside it
        objectives = tuple(filled(choice, recipe.seed) for choice in recipe.objectives)
        return replace(
            recipe,
            zoo=_absolute(recipe.zoo) or False if isinstance(recipe.zoo, str) else recipe.zoo,
            pool=self._resolved_pool(recipe.pool),
            model=self._resolved_model(recipe.model),
            tasks=tuple(
                replace(
                    task,
                    npz=_absolute(task.npz),
                    folder=_absolute(task.folder),
                    test=_absolute(task.test),
                    classes=_absolute(task.classes) if isinstance(task.classes, str) else task.classes,
                    split=task.split or recipe.split,
                    limit=task.limit if task.limit is not None else recipe.limit,
                    mixed=task.mixed if task.mixed is not None else recipe.mixed,
                )
                for task in recipe.tasks
            ),
            objective=objectives[0] if len(objectives) == 1 else objectives,
            domain=Choice.read(domain, "domain"),
            solver=Choice.read(self.solver.describe(), "solver"),
            start=f"{form}run:{_absolute(argument)}" if of_a_run else recipe.start,
        )

    def _resolved_model(self, part: ModelPart) -> ModelPart:
        architecture = part.architecture
        if isinstance(architecture, str):
            architecture = _absolute(architecture)
        module = part.module
        if module is not None:
            file, _, function = module.rpartition(":")
            module = f"{_absolute(file)}:{function}"
        return replace(part, architecture=architecture, weights=_absolute(part.weights), module=module)

    def _resolved_pool(self, part: PoolPart) -> PoolPart:
        pool = self.pool  # opened, so that globs have become paths and "auto" a backend
        transforms = tuple(_placed(choice) for choice in part.transforms)
        part = replace(part, transforms=transforms)
        if self.recipe.zoo:
            return replace(part, experts=tuple(pool.names), backend=pool.backend, select=None)
        experts = {name: str(_absolute(self.paths[name])) for name in pool.names}
        return replace(part, base=_absolute(part.base), experts=experts, backend=pool.backend, select=None)


def asked_domain(recipe: Recipe) -> Domain:
    """The domain of a recipe with its constraints, before it is known what the experts and the blocks are called."""
    from ..solvers import constrain

    if recipe.groups and not recipe.constraints:
        raise UsageProblem(
            "groups name experts for constraints, and there is none. Give --constraint, or leave it out."
        )
    return constrain(recipe.domain.plain(), recipe.constraints, recipe.groups)


BLOCK_KINDS = ("model", "layer", "tensor", "row")


def check_blocks(kind: str | tuple[str, ...]) -> None:
    """Refuse a word that is no kind of blocks."""
    if isinstance(kind, str) and kind not in BLOCK_KINDS:
        raise UsageProblem(
            f"{unknown('block kind', kind, BLOCK_KINDS)} If a pattern is meant, write it so that it is no plain word: "
            f"--blocks '({kind})'."
        )


def check_transform(choice: Choice) -> None:
    """Refuse a transform that does not exist; its options are checked when it is made, which needs torch."""
    from ..pools.transforms import TRANSFORMS

    choose("transform", choice.name, TRANSFORMS)


def check_domain_options(domain: Choice) -> None:
    """Refuse options of a domain that has none."""
    from ..solvers import DOMAINS

    if domain.options and not dataclasses.fields(DOMAINS[domain.name]):  # type: ignore[arg-type]
        option = next(iter(domain.options))
        others = [n for n, cls in DOMAINS.items() if option in {f.name for f in dataclasses.fields(cls)}]  # type: ignore[arg-type]
        remedy = f"Domains that have it: {', '.join(others)}." if others else "Leave it out."
        raise UsageProblem(f"the domain '{domain.name}' has no options; found '{option}'. {remedy}")


def _placed(transform: Choice) -> Choice:
    """A transform whose file, if it reads one, is found from anywhere."""
    path = transform.options.get("path")
    return Choice(transform.name, {**transform.options, "path": _absolute(path)}) if path is not None else transform


def _absolute(path: str | None) -> str | None:
    """An absolute path for what exists, so that the recipe in a run folder works from anywhere."""
    return path if path is None or not Path(path).expanduser().exists() else str(Path(path).expanduser().absolute())


def load_weights(path: str | Path) -> dict[str, Any]:
    """All floating-point tensors of a checkpoint (file, folder or Hub id), float32, on the CPU."""
    from ..pools import Pool

    # Nothing is merged here: the checkpoint stands for base and expert, and only the base is read.
    weights = Pool.open(base=str(path), experts={"itself": str(path)}, backend="streaming").base_weights()
    return {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}


def model_weights(path: str | Path, model: Any) -> dict[str, Any]:
    """Those tensors of a checkpoint that the model has, in its names: of a whole CLIP, the visual tower.

    Raises UsageProblem if the checkpoint lacks parameters of the model.
    """
    weights = load_weights(path)
    parameters = set(model.parameter_names)
    if not parameters & weights.keys() or any(f"visual.{name}" in weights for name in parameters):
        # In a whole CLIP, names without the prefix are the text tower's, some of them equal to the visual tower's.
        weights = {n.removeprefix("visual."): tensor for n, tensor in weights.items() if n.startswith("visual.")}
    missing = [name for name in model.parameter_names if name not in weights]
    if missing:
        raise UsageProblem(
            f"'{path}' lacks {len(missing)} of the {len(parameters)} parameters of the model, '{missing[0]}' among "
            "them. It is a checkpoint of another model, or its tensors have other names."
        )
    if weights.keys() - parameters:  # buffers, and what the model has no use for
        known = model.base_weights()
        weights = {name: tensor for name, tensor in weights.items() if name in known}
    return weights


def merged_weights(setup: Setup, result: Result) -> dict[str, Any]:
    """The merged tensors of a result, θ0 + A Λ."""
    weights: dict[str, Any] = setup.pool.combine(result.coefficients, setup.blocks)
    return weights
