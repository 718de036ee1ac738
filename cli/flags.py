"""Flags that several commands share, and the recipe that flags and files make together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from .names import UsageProblem
from .recipe import Recipe, assign, from_mapping, from_yaml, merge, parse_assignments, read_yaml, relative_to

F = TypeVar("F", bound=Callable[..., Any])


def _apply(options: Sequence[Callable[[F], F]]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


pool_flags = _apply(
    [
        click.option("--base", metavar="PATH", help="Base checkpoint: file, folder or Hugging Face id."),
        click.option(
            "--expert",
            "experts",
            multiple=True,
            metavar="[NAME=]PATH",
            help="An expert, or a glob in quotes (names are file stems). With --zoo: a name. Repeatable.",
        ),
        click.option("--pool", "pool_file", metavar="FILE", help="YAML with base, experts, include, exclude, rename."),
        click.option("--include", multiple=True, metavar="PATTERN", help="Merge only matching tensors. Repeatable."),
        click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave matching tensors alone. Repeatable."),
        click.option(
            "--rename", multiple=True, metavar="OLD=NEW", help="Rename a prefix of keys (OLD= drops it). Repeatable."
        ),
        click.option(
            "--transform",
            "transforms",
            multiple=True,
            metavar="NAME[:KEY=VALUE,...]",
            help="Transform the task vectors, such as trim:density=0.2 (see `list transforms`). Repeatable, in order.",
        ),
        click.option(
            "--select",
            metavar="NAME[:KEY=VALUE,...]",
            help="Choose experts first, such as dpp:k=6 (see `list selectors`), on the tasks' data.",
        ),
        click.option("--backend", metavar="KIND", help="streaming, resident, or auto (by memory; the default)."),
        click.option("--device", metavar="DEVICE", help="cpu (default) or cuda."),
    ]
)

data_flags = _apply(
    [
        click.option("--zoo", is_flag=True, default=None, help="Pool, model and tasks of the embedded benchmark."),
        click.option("--zoo-data", metavar="FOLDER", help="A zoo that `mergesolve zoo build` left, instead."),
        click.option(
            "--task",
            "tasks",
            multiple=True,
            metavar="NAME[=PATH]",
            help="A task: .npz file or image folder; with --zoo a name alone. Repeatable.",
        ),
        click.option(
            "--model", metavar="NAME", help="open_clip architecture, JSON configuration, or FILE.py:FUNCTION."
        ),
        click.option("--weights", metavar="PATH", help="The whole model, for its text tower (default: the base)."),
    ]
)

constraint_flags = _apply(
    [
        click.option(
            "--constraint",
            "constraints",
            multiple=True,
            metavar="TEXT",
            help="A linear constraint, such as 'sum(digits, chess) <= 0.3', or 'count(*) <= 3'. Repeatable.",
        ),
        click.option(
            "--group",
            "groups",
            multiple=True,
            metavar="NAME=EXPERT,...",
            help="A name for several experts (globs, too), for use in constraints. Repeatable.",
        ),
    ]
)

many_flags = _apply(
    [
        click.option(
            "--scalarize",
            metavar="NAME[:KEY=VALUE,...]",
            help="One number out of the tasks: weighted-sum, chebyshev:preferences={chess: 2}, worst (see `list`).",
        ),
        click.option(
            "--subject-to",
            metavar="TEXT",
            help="A bound: 'chess <= 0.3' (that task's loss), or 'retention <= 0.02' (another objective).",
        ),
        click.option("--rounds", type=int, metavar="N", help="Of a bound: updates of its price at most (default 8)."),
    ]
)

json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout instead of tables.")


def pool_fields(flags: Mapping[str, Any], *, zoo: bool) -> dict[str, Any]:
    """The recipe's `pool` from the pool flags."""
    fields: dict[str, Any] = {}
    if flags.get("pool_file"):
        path = Path(flags["pool_file"])
        fields = relative_to({"pool": read_yaml(path, "pool file")}, path.parent)["pool"]
    if flags.get("base"):
        fields["base"] = flags["base"]
    if flags.get("experts"):
        fields["experts"] = list(flags["experts"]) if zoo else named_paths(flags["experts"])
    for name in ("include", "exclude"):
        if flags.get(name):
            fields[name] = list(flags[name])
    if flags.get("rename"):
        fields["rename"] = parse_assignments(flags["rename"], "--rename", empty=True)
    for name in ("backend", "device"):
        if flags.get(name):
            fields[name] = flags[name]
    if flags.get("select"):
        fields["select"] = named_options(flags["select"], "--select")
    if flags.get("transforms"):
        fields["transforms"] = [named_options(text, "--transform") for text in flags["transforms"]]
    return fields


def constraint_fields(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's `constraints` and `groups` from --constraint and --group."""
    fields: dict[str, Any] = {}
    if flags.get("constraints"):
        fields["constraints"] = list(flags["constraints"])
    if flags.get("groups"):
        groups = parse_assignments(flags["groups"], "--group")
        fields["groups"] = {name: [part.strip() for part in members.split(",")] for name, members in groups.items()}
    return fields


def named_options(text: str, option: str) -> dict[str, Any]:
    """A name with options, `NAME[:KEY=VALUE,...]`, as a recipe has it; values are YAML."""
    name, _, rest = text.partition(":")
    fields: dict[str, Any] = {"name": name}
    for pair in re.split(r",(?![^\[{]*[\]}])", rest) if rest else ():  # commas in [ ] and { } belong to a value
        key, separator, value = pair.partition("=")
        if not separator or not key or not value:
            raise UsageProblem(f"{option} '{text}': expected NAME, or NAME:KEY=VALUE,KEY=VALUE.")
        try:
            fields[key] = from_yaml(value)
        except yaml.YAMLError:
            raise UsageProblem(f"{option} '{text}': the value of '{key}' is not YAML.") from None
    return fields


def named_paths(values: Sequence[str]) -> dict[str, str] | list[str]:
    """Experts as a mapping if all have names, as paths and globs if none has."""
    named = [value for value in values if "=" in value]
    if not named:
        return list(values)
    if len(named) < len(values):
        odd = next(value for value in values if "=" not in value)
        raise UsageProblem(f"--expert '{odd}': give a NAME=PATH for every expert, or for none of them.")
    return parse_assignments(values, "--expert")


def task_fields(values: Sequence[str], *, key: str | None = None) -> list[dict[str, Any]]:
    """The recipe's `tasks` from --task. `key`: the field for the data ('test' for evaluation)."""
    tasks: list[dict[str, Any]] = []
    for value in values:
        name, separator, path = value.partition("=")
        if not name or (separator and not path):
            raise UsageProblem(f"--task '{value}': expected NAME=PATH, or with --zoo a NAME.")
        task: dict[str, Any] = {"name": name}
        if separator:
            place = Path(path).expanduser()
            if not place.exists():
                raise UsageProblem(f"--task '{value}': there is no file or folder '{path}'.")
            source = "folder" if place.is_dir() else "npz"
            if source == "npz" and place.suffix != ".npz":
                raise UsageProblem(
                    f"--task '{value}': expected an .npz file or a folder of images, found '{place.name}'."
                )
            task[source] = path
            if key is not None:
                task[key] = path
        tasks.append(task)
    return tasks


def model_fields(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's `model` from --model and --weights."""
    fields: dict[str, Any] = {}
    model = flags.get("model")
    if model:
        python = ".py:" in model
        fields["module" if python else "architecture"] = model
    if flags.get("weights"):
        fields["weights"] = flags["weights"]
    return fields


def live_fields(flags: Mapping[str, Any], fields: Mapping[str, Any], *, test: bool = False) -> dict[str, Any]:
    """Zoo, pool, model and tasks from the flags that were given, over a recipe's fields."""
    over: dict[str, Any] = {}
    if flags.get("zoo") or flags.get("zoo_data"):
        over["zoo"] = flags.get("zoo_data") or True
    zoo = bool(over.get("zoo", fields.get("zoo")))
    if pool := pool_fields(flags, zoo=zoo):
        over["pool"] = pool
    if model := model_fields(flags):
        over["model"] = model
    if flags.get("tasks"):
        over["tasks"] = task_fields(flags["tasks"], key="test" if test else None)
    return over


def recipe_from(flags: Mapping[str, Any], recipe_file: str | None, *, test: bool = False) -> Recipe:
    """One recipe: preset under recipe file under flags under --set."""
    from ..solvers import PRESETS

    fields: dict[str, Any] = {}
    if recipe_file is not None:
        fields = relative_to(read_yaml(recipe_file, "recipe"), Path(recipe_file).parent)
    own_start = "start" in fields or flags.get("start") is not None
    over = {**live_fields(flags, fields, test=test), **constraint_fields(flags)}
    plain = ("preset", "solver", "objective", "domain", "start", "max_iter", "tol", "rtol", "time_limit", "seed")
    for name in (*plain, "split", "limit", "mixed"):
        if flags.get(name) is not None:
            over[name] = flags[name]
    if flags.get("scalarize"):
        over["scalarization"] = named_options(flags["scalarize"], "--scalarize")
    if flags.get("subject_to"):
        from .many import bound_fields

        over["subject_to"] = bound_fields(flags["subject_to"])
    if flags.get("rounds") is not None:
        if not (flags.get("subject_to") or fields.get("subject_to")):
            raise UsageProblem("--rounds is of a bound, and there is none. Add --subject-to, or leave it out.")
        over["subject_to"] = {**over.get("subject_to", {}), "rounds": flags["rounds"]}
    if flags.get("blocks"):
        blocks = flags["blocks"]
        over["blocks"] = blocks[0] if len(blocks) == 1 and blocks[0].isalpha() else list(blocks)
    preset = over.get("preset", fields.get("preset"))
    if preset in PRESETS:  # its options stay where a flag names the same solver, objective or domain again
        fields = merge({k: v for k, v in PRESETS[str(preset)].items() if k != "summary"}, fields)
    fields = merge(fields, over)
    for pair in flags.get("settings") or ():
        path, separator, value = pair.partition("=")
        if not separator or not path:
            raise UsageProblem(f"--set '{pair}': expected FIELD=VALUE, such as solver.step_rule=open-loop.")
        try:
            assign(fields, path, from_yaml(value))
        except yaml.YAMLError:
            raise UsageProblem(f"--set '{pair}': the value is not YAML.") from None
        own_start = own_start or path == "start"
    if fields.get("constraints") and not own_start:  # the default or the preset's start may not satisfy them
        fields["start"] = f"nearest:{fields.get('start', Recipe().start)}"
    return from_mapping(fields, PRESETS)
