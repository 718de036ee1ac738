"""A recipe: everything that decides a solve, as one tree of typed fields that YAML and flags both fill.

    preset  <  recipe file  <  flags  <  --set

The recipe that ran is written into the run folder with every default filled in; running it again gives the same
coefficients. Nothing here imports torch: a recipe is read, checked and printed before anything is loaded.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .names import UsageProblem, choose
from .schema import found, parse

SOURCES = ("npz", "folder", "hub", "zoo")


@dataclass(frozen=True)
class Choice:
    """An entry of a registry with its options: `name`, or `{name: ..., option: value}` in YAML."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, value: object, where: str) -> Choice:
        """From a name or a mapping with a name."""
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping):
            options = {str(key): item for key, item in value.items()}
            name = options.pop("name", None)
            if isinstance(name, str):
                return cls(name, options)
            raise UsageProblem(f"{where}: a mapping needs a 'name'; found {', '.join(options) or 'nothing'}.")
        raise UsageProblem(f"{where} must be a name, or a mapping of a name and options; found {found(value)}.")

    def plain(self) -> dict[str, Any]:
        """As YAML writes it."""
        return {"name": self.name, **self.options}


@dataclass(frozen=True)
class PoolPart:
    """The checkpoints: a base and experts (name -> path, or paths and globs); with the zoo, names of experts only.

    transforms: what is done to the task vectors, first to last (trim, dare, ...): names, or mappings with options.
    select: the selector by which some of the experts are chosen first, on the recipe's tasks.
    """

    base: str | None = None
    experts: dict[str, str] | tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: dict[str, str] = field(default_factory=dict)
    dtype: str | None = None
    backend: str = "auto"
    device: str = "cpu"
    transforms: tuple[Choice, ...] = ()
    select: Choice | None = None


@dataclass(frozen=True)
class ModelPart:
    """What the weights are weights of.

    architecture: a name that open_clip knows, a JSON configuration, or the configuration itself; weights: a local file
    with the whole model, for the text tower. Or module: "path/to/file.py:function", a function without arguments that
    returns a torch module, whose output are logits.
    """

    architecture: str | dict[str, Any] | None = None
    weights: str | None = None
    precision: str = "fp32"
    module: str | None = None


@dataclass(frozen=True)
class TaskPart:
    """One task: where its data are, what its classes are called, how much of it is used.

    npz, folder, hub: the data to solve with; test: the data of the same kind to evaluate on (for hub: split "test").
    classes: names, or for a folder a mapping of subfolders to names or a file of names; config, image, label: the
    configuration and the columns of a hub data set.
    limit: at most so many samples, class-balanced, drawn from `seed`. teacher: the expert that distillation listens to
    (the one named like the task unless told). mixed: this many inputs for what listens to teachers, the rest of them
    mixtures of two (drawn from `seed`). weight: relative to the other tasks (weights are divided by their sum).
    """

    name: str
    npz: str | None = None
    folder: str | None = None
    hub: str | None = None
    test: str | None = None
    split: str | None = None
    limit: int | None = None
    seed: int = 0
    classes: tuple[str, ...] | dict[str, str] | str | None = None
    config: str | None = None
    image: str | None = None
    label: str | None = None
    templates: tuple[str, ...] | None = None
    teacher: str | None = None
    mixed: int | None = None
    weight: float = 1.0

    @classmethod
    def read(cls, value: object, where: str) -> TaskPart:
        """From a mapping, or from a name alone (a task of the zoo)."""
        return cls(value) if isinstance(value, str) else parse(cls, value, where)


@dataclass(frozen=True)
class BoundPart:
    """What must not be exceeded while the rest is minimized: an objective over some tasks, at most `bound`.

    objective: the recipe's own unless told; then these tasks are bounded instead of minimized. tasks: all unless told.
    rounds: updates of the price, max_iter iterations of the solver each. tol: how far above the bound is no matter.
    repair: if the last point is above it, move it to where it is not.
    """

    bound: float
    objective: Choice | None = None
    tasks: tuple[str, ...] = ()
    rounds: int = 8
    tol: float = 1e-4
    repair: bool = False


@dataclass(frozen=True)
class Recipe:
    """A solve, completely.

    zoo: pool, model and tasks come from the embedded benchmark, or from the folder that `zoo build` left. split,
    limit, mixed: what tasks use that do not say it themselves. constraints: texts such as 'sum(digits, chess) <= 0.3',
    within the domain; groups: name -> experts and globs, for use in them. start: average, base,
    task-arithmetic:SCALE, expert:NAME, run:FOLDER (another run's result), or nearest:START, the nearest point that
    satisfies everything. scalarization: one number out of the tasks' losses (without one, their weighted sum).
    subject_to: what must not be exceeded. preset: the named recipe whose fields stand under these.
    """

    zoo: bool | str = False
    pool: PoolPart = field(default_factory=PoolPart)
    model: ModelPart = field(default_factory=ModelPart)
    tasks: tuple[TaskPart, ...] = ()
    split: str = "train"
    limit: int | None = None
    mixed: int | None = None
    objective: Choice | tuple[Choice, ...] = field(default_factory=lambda: Choice("cross-entropy"))
    scalarization: Choice | None = None
    subject_to: BoundPart | None = None
    blocks: str | tuple[str, ...] = "layer"
    domain: Choice = field(default_factory=lambda: Choice("simplex"))
    constraints: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    solver: Choice = field(default_factory=lambda: Choice("frank-wolfe"))
    start: str = "average"
    max_iter: int = 100
    tol: float = 1e-6
    rtol: float = 0.0
    time_limit: float | None = None
    seed: int = 0
    preset: str | None = None

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise UsageProblem(f"recipe: the task '{name}' is named twice. Give each task its own name.")
        for task in self.tasks:
            if not (math.isfinite(task.weight) and task.weight >= 0):
                raise UsageProblem(
                    f"recipe: task '{task.name}': the weight must be finite and not negative; found {task.weight}."
                )
        for where, mixed in (("", self.mixed), *((f" task '{task.name}':", task.mixed) for task in self.tasks)):
            if mixed is not None and mixed < 1:
                raise UsageProblem(f"recipe:{where} 'mixed' must be at least 1; found {mixed}.")
        if self.tasks and not any(task.weight for task in self.tasks):
            raise UsageProblem("recipe: the weights of all tasks are 0. Give one of them a positive weight.")

    @property
    def iterations(self) -> int:
        """How many there will be at most, over all rounds."""
        return self.max_iter if self.subject_to is None else (self.max_iter + 1) * self.subject_to.rounds - 1

    @property
    def objectives(self) -> tuple[Choice, ...]:
        """The objectives of the weighted sum; usually one."""
        return self.objective if isinstance(self.objective, tuple) else (self.objective,)


def plain(value: Any, *, brief: bool = False) -> Any:
    """A recipe or a part of it as YAML and JSON have it: mappings, lists, text, numbers.

    brief: leave out fields that are null or empty. Options of a choice stay: a null there may be on purpose, over a
    preset that says otherwise.
    """
    if isinstance(value, Choice):
        return plain(value.plain())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name), brief=brief) for f in dataclasses.fields(value)}
        return {k: v for k, v in fields.items() if not (brief and (v is None or v in ({}, [])))}
    if isinstance(value, Mapping):
        return {str(key): plain(item, brief=brief) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, brief=brief) for item in value]
    return value


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, fields in their order, those that are null or empty left out."""
    fields = {k: v for k, v in plain(recipe, brief=True).items() if k != "zoo" or v}
    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=110))


def from_mapping(
    fields: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]], *, where: str = "recipe"
) -> Recipe:
    """A recipe from plain fields; the fields of its preset, if it names one, are defaults under them."""
    fields = dict(fields)
    preset = fields.get("preset")
    if preset is not None:
        choose("preset", str(preset), presets, where=where)
        known = {f.name for f in dataclasses.fields(Recipe)}
        fields = merge({k: v for k, v in presets[str(preset)].items() if k in known}, fields)
    return parse(Recipe, fields, where)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `over` on top of those of `under`; mappings merge, but not those that name different things."""
    result = dict(under)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, str) and isinstance(value, Mapping) and value.get("name", old) == old:
            old = {"name": old}
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("name", old.get("name")) == old.get("name")
        ):
            value = merge(old, value)
        elif isinstance(old, Mapping) and value == old.get("name"):
            value = old
        result[key] = value
    return result


def assign(fields: dict[str, Any], path: str, value: Any) -> None:
    """Set one field by its path: `solver.step_rule=open-loop`. A name on the way becomes a mapping with that name.

    Where the recipe names no solver, objective or domain yet, options are those of the default.
    """
    *parents, last = path.split(".")
    at: Any = fields
    for depth, part in enumerate(parents):
        step = at.get(part)
        if isinstance(step, (list, tuple)):
            raise UsageProblem(f"--set '{path}': '{part}' is a list here; change it in the recipe file.")
        default = getattr(Recipe(), part, None)
        if step is None and depth == 1 and parents[0] == "solver" and last != "name":
            step = _default_option(at.get("name"), part)
        if step is None and depth == 0 and isinstance(default, Choice):
            step = default.name
        if isinstance(step, str):
            step = {"name": step}
        elif not isinstance(step, Mapping):
            step = {}
        at[part] = dict(step)
        at = at[part]
    at[last] = value


def _default_option(solver: object, option: str) -> Any:
    """What an option of a solver is unless told, with its own options; None if there is no such option."""
    from ..solvers import SOLVERS, make_solver

    return make_solver(solver).describe().get(option) if solver in SOLVERS else None


class _Loader(yaml.SafeLoader):
    """YAML as people write numbers: PyYAML follows YAML 1.1, which reads 1e-6 as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def from_yaml(text: str) -> Any:
    """The value of a YAML text; raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UsageProblem with file and line for anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise UsageProblem(f"{what} '{path}': there is no such file.") from None
    except UnicodeDecodeError:
        raise UsageProblem(f"{what} '{path}': not a text file, expected YAML.") from None
    try:
        value = from_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageProblem(f"{what} '{path}'{line}: not YAML ({error.problem}).") from None
    except yaml.YAMLError as error:
        raise UsageProblem(f"{what} '{path}': not YAML ({error}).") from None
    if not isinstance(value, dict):
        raise UsageProblem(f"{what} '{path}': expected a mapping of fields, found {found(value)}.")
    return value


# Fields that hold paths, which a recipe file gives relative to itself.
_PATHS = {"pool": ("base",), "model": ("architecture", "weights")}


def relative_to(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of a recipe file with its paths made relative to where the command runs."""
    fields = copy.deepcopy(fields)

    def place(path: Any) -> Any:
        if not isinstance(path, str) or Path(path).is_absolute():
            return path
        local = os.path.normpath(folder / Path(path).expanduser())
        # What is not there keeps its name: it may be an id of a hub or an architecture.
        return local if Path(local).exists() or any(c in path for c in "*?[") else path

    for part, names in _PATHS.items():
        if isinstance(fields.get(part), Mapping):
            fields[part] = {**fields[part], **{n: place(fields[part][n]) for n in names if n in fields[part]}}
    pool = fields.get("pool")
    if isinstance(pool, Mapping) and not fields.get("zoo"):
        experts = pool.get("experts")
        if isinstance(experts, Mapping):
            fields["pool"]["experts"] = {name: place(path) for name, path in experts.items()}
        elif isinstance(experts, (list, tuple)):
            fields["pool"]["experts"] = [place(path) for path in experts]
    if isinstance(pool, Mapping) and isinstance(pool.get("transforms"), (list, tuple)):
        fields["pool"]["transforms"] = [
            {**choice, "path": place(choice["path"])} if isinstance(choice, Mapping) and "path" in choice else choice
            for choice in pool["transforms"]
        ]
    form, of_a_run, folder_of_run = str(fields.get("start", "")).partition("run:")
    if of_a_run and form in ("", "nearest:"):
        fields["start"] = f"{form}run:{place(folder_of_run)}"
    if isinstance(fields.get("zoo"), str):
        fields["zoo"] = place(fields["zoo"])
    statistics = fields.get("statistics")
    if isinstance(statistics, Mapping):
        fields["statistics"] = {name: place(path) for name, path in statistics.items()}
    elif isinstance(statistics, str):
        fields["statistics"] = place(statistics)
    model = fields.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("module"), str) and ":" in model["module"]:
        file, _, function = model["module"].rpartition(":")
        fields["model"]["module"] = f"{place(file)}:{function}"
    tasks = fields.get("tasks")
    if isinstance(tasks, list):
        fields["tasks"] = [
            {**task, **{n: place(task[n]) for n in ("npz", "folder", "test", "classes") if n in task}}
            if isinstance(task, Mapping)
            else task
            for task in tasks
        ]
    return fields


def parse_assignments(pairs: Iterable[str], option: str, *, empty: bool = False) -> dict[str, str]:
    """`NAME=VALUE` pairs of a repeated option; with `empty`, the value may be."""
    result: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name or not (value or empty):
            raise UsageProblem(f"{option} '{pair}': expected NAME=VALUE.")
        if name in result:
            raise UsageProblem(f"{option} '{pair}': '{name}' is given twice.")
        result[name] = value
    return result
