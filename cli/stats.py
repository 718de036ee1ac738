"""`mergesolve stats`: Fisher diagonals and Grams of experts on their tasks, written for later merges."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import Interrupted
from .flags import data_flags, json_flag, pool_flags, recipe_from
from .names import UsageProblem, choose, unknown
from .recipe import Recipe, TaskPart, parse_assignments

if TYPE_CHECKING:
    from ..objectives import Statistic, Task
    from .setup import Setup

LIMIT = 256  # samples of each task, unless told
FOLDER = "statistics"  # for experts that have no place of their own: those of the zoo, of the Hub


@click.command()
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="fisher or gram. Repeatable; required.")
@click.option("--recipe", "recipe_file", metavar="FILE", help="Take pool, model and tasks from this recipe.")
@pool_flags
@data_flags
@click.option(
    "--on",
    "assigned",
    multiple=True,
    metavar="EXPERT=TASK",
    help="The task of an expert that is not named like it. Repeatable.",
)
@click.option("--split", metavar="SPLIT", help="train (default), validation or test.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help=f"Samples of each task (default {LIMIT}).")
@click.option(
    "--estimator",
    metavar="NAME",
    help="Labels of the Fisher: exact (all classes, weighted by the predictions; the default), sampled (one draw from "
    "them; as many times faster as there are classes), empirical (the data's own).",
)
@click.option("--microbatch", type=click.IntRange(min=1), metavar="N", help="Samples in one pass.")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Of the samples, and of sampled labels.")
@click.option(
    "--out",
    metavar="FOLDER",
    help=f"Write NAME.KIND.safetensors there (default: beside each expert; with --zoo in ./{FOLDER}).",
)
@click.option("--overwrite", is_flag=True, help="Replace files that were computed from something else.")
@json_flag
def command(
    kinds: tuple[str, ...],
    recipe_file: str | None,
    assigned: tuple[str, ...],
    estimator: str | None,
    microbatch: int | None,
    out: str | None,
    overwrite: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Statistics of each expert on its task: Fisher diagonals, Grams of the inputs of its linear maps.

    Merges that weigh experts by them (fisher, regmean, ...) read the files. Of labels, only the empirical Fisher makes
    use. The task of an expert is the one of its name, or what --on says. Files that the same computation left are kept,
    so a command that was interrupted goes on where it stopped.

    \b
    Examples:
      mergesolve stats --kind fisher --kind gram --zoo --task digits --task shapes
      mergesolve stats --kind gram --base clip.safetensors --expert cars=cars.safetensors --include '^visual' \\
        --model ViT-B-32 --task cars=data/cars --limit 512
      mergesolve stats --kind fisher --estimator sampled --recipe clip.yaml --on cars-v2=cars --out statistics
    """
    from ..objectives.statistics import ESTIMATORS
    from ..pools import STATISTICS
    from .console import print_json
    from .setup import Setup

    if not kinds:
        raise UsageProblem(f"nothing says what to compute. Give --kind {' or --kind '.join(STATISTICS)}, or both.")
    for kind in kinds:
        choose("kind of statistics", kind, STATISTICS)
    if estimator is not None:
        choose("estimator", estimator, ESTIMATORS)
        if "fisher" not in kinds:
            raise UsageProblem(f"--estimator {estimator}: only the Fisher has one; add --kind fisher, or leave it out.")
    recipe: Recipe = recipe_from(flags, recipe_file)
    if getattr(recipe.pool, "transforms", ()):
        raise UsageProblem("statistics are those of the experts as they are. Leave out the transforms of the pool.")
    if recipe.pool.select is not None:
        raise UsageProblem(
            "--select: statistics are computed for every expert that is named; name those with --expert."
        )
    options = Options(
        estimator or "exact", microbatch, recipe.limit if recipe.limit is not None else LIMIT, recipe.seed
    )
    # One expert is read at a time, whatever there would be room for; and the samples are drawn here, by --seed.
    backend = "streaming" if recipe.pool.backend == "auto" else recipe.pool.backend
    recipe = replace(recipe, limit=None, pool=replace(recipe.pool, backend=backend))
    setup = Setup(recipe)
    pairs = pairing(setup, parse_assignments(assigned, "--on"))
    jobs = [
        job for expert, part in pairs for job in plan(setup, expert, part, tuple(dict.fromkeys(kinds)), options, out)
    ]
    check(jobs, overwrite)
    rows = run(setup, jobs, options, quiet=as_json)
    if as_json:
        print_json({"files": rows})
    else:
        table(rows)


@dataclass(frozen=True)
class Options:
    """How statistics are computed."""

    estimator: str
    microbatch: int | None
    limit: int
    seed: int


@dataclass(frozen=True)
class Job:
    """One file: the statistics of one kind, of one expert, on one task; `identity` says what it is computed from."""

    expert: str
    kind: str
    task: Task
    path: Path
    identity: Mapping[str, str]

    @property
    def done(self) -> bool:
        """Whether the file is there, by the same computation."""
        return self.path.is_file() and not self.differences()

    def differences(self) -> list[str]:
        """What the file that is there was computed from, where that is something else."""
        from ..pools import PoolError
        from ..pools.checkpoint import open_safetensors
        from ..pools.statistics import read_metadata

        try:
            open_safetensors(self.path)
        except PoolError:
            return ["it is no complete safetensors file"]
        header = read_metadata(self.path)
        changed = [key for key in self.identity if header.get(key) != self.identity[key]]
        return [f"{key} {header.get(key, 'unknown')}, not {self.identity[key]}" for key in changed]


def pairing(setup: Setup, assigned: Mapping[str, str]) -> list[tuple[str, TaskPart]]:
    """The experts that statistics are computed for, in the order of the pool, and their tasks.

    With the zoo, these are the experts of the tasks that are named, or all that have one.
    """
    recipe = setup.recipe
    parts = {part.name: part for part in recipe.tasks}
    chosen: list[str] | None = None
    if recipe.zoo:
        for part in recipe.tasks:
            if part.npz is None and part.folder is None and part.hub is None:
                choose("task of the zoo", part.name, setup.zoo.tasks)
        parts = {name: TaskPart(name) for name in setup.zoo.tasks} | parts
        if not recipe.pool.experts:
            # The pool has all of them, so that the merged tensors are those of the whole zoo.
            named = [part.name for part in recipe.tasks] or ([] if assigned else list(setup.zoo.tasks))
            names = tuple(dict.fromkeys((*setup.zoo.task_experts, *assigned)))
            chosen = [name for name in names if name in assigned or name in named]
            setup.recipe = replace(recipe, pool=replace(recipe.pool, experts=names))
    if chosen is None:
        chosen = list(setup.pool.names)
    if not parts:
        raise UsageProblem("there are no tasks. Give --task NAME (zoo) or --task NAME=DATA for each expert.")
    for expert, task in assigned.items():
        if expert not in setup.pool.names:
            raise unknown("expert", expert, setup.pool.names, where=f"--on '{expert}={task}'")
        if task not in parts:
            raise unknown("task", task, parts, where=f"--on '{expert}={task}'")
    result = []
    for expert in chosen:
        task = assigned.get(expert, expert)
        if task not in parts:
            raise UsageProblem(
                f"nothing says which task the expert '{expert}' is for. Give --task {expert}=DATA, or "
                f"--on {expert}=TASK with one of the tasks: {', '.join(parts)}."
            )
        result.append((expert, parts[task]))
    used = {part.name for _, part in result}
    idle = [part.name for part in recipe.tasks if part.name not in used]
    if idle:
        raise UsageProblem(
            f"the task '{idle[0]}' is no expert's: there is none of that name. Give --on EXPERT={idle[0]}, or leave it "
            f"out. Experts: {', '.join(chosen)}."
        )
    return result


def plan(
    setup: Setup, expert: str, part: TaskPart, kinds: Sequence[str], options: Options, out: str | None
) -> Iterable[Job]:
    """The files of one expert and what they are computed from; data are opened, nothing is computed."""
    task = setup.load_task(part)
    task = task.subset(options.limit, options.seed) if options.limit < len(task) else task
    if "fisher" in kinds and options.estimator == "empirical" and task.labels is None:
        raise UsageProblem(
            f"task '{task.name}': the empirical Fisher needs labels, and there are none. Take --estimator exact or "
            "sampled."
        )
    common = {
        "expert": setup.pool.expert_fingerprint(expert),
        "task": task.name,
        "task_fingerprint": task.fingerprint,
        "samples": str(len(task)),
        "seed": str(options.seed),
        "model": model_identity(setup, task),
    }
    for kind in kinds:
        identity = {"statistics": kind, **common}
        if kind == "fisher":
            identity["estimator"] = options.estimator
        yield Job(expert, kind, task, place(setup, expert, kind, out), identity)


def model_identity(setup: Setup, task: Task) -> str:
    """A checksum of the model around the expert's weights: architecture, code, frozen head, tensors left out."""
    from ..pools import model_fingerprint

    model = setup.model
    described = {key: value for key, value in model.describe().items() if key != "weights"}
    digest = hashlib.sha256(json.dumps([described, list(setup.pool.tensors)], default=str).encode())
    if setup.recipe.model.module is not None:
        digest.update(Path(setup.recipe.model.module.rpartition(":")[0]).read_bytes())
    if hasattr(model, "head"):
        digest.update(model.head(task).cpu().numpy().tobytes())
    if set(model.parameter_names) - {name.removeprefix("visual.") for name in setup.pool.tensors}:
        base = setup.zoo.base if setup.recipe.zoo else setup.recipe.pool.base
        assert base is not None  # the pool is open
        digest.update(model_fingerprint(base).encode())
    return digest.hexdigest()[:16]


def place(setup: Setup, expert: str, kind: str, out: str | None) -> Path:
    """Where the statistics of an expert go."""
    from ..pools import statistics_name
    from ..pools.statistics import beside

    if out is None and not setup.recipe.zoo and Path(setup.paths[expert]).exists():
        return beside(setup.pool, expert, kind)
    return Path(out or FOLDER).expanduser() / statistics_name(expert, kind)


def check(jobs: Sequence[Job], overwrite: bool) -> None:
    """Refuse places that cannot be written, before anything is computed."""
    taken: dict[Path, Job] = {}
    for job in jobs:
        other = taken.setdefault(job.path.absolute(), job)
        if other is not job:
            raise UsageProblem(
                f"the experts '{other.expert}' and '{job.expert}' would both write {job.path}. Give --out FOLDER, "
                "where files are named after experts."
            )
        if job.path.is_dir() or (job.path.parent.exists() and not job.path.parent.is_dir()):
            raise UsageProblem(f"'{job.path}' cannot be written: there is a folder or a file in its place.")
        if job.path.exists() and not overwrite and (found := job.differences()):
            raise UsageProblem(
                f"'{job.path}' is there, from another computation ({'; '.join(found)}). Give --overwrite to replace "
                "it, or --out another folder."
            )


def run(setup: Setup, jobs: Sequence[Job], options: Options, *, quiet: bool) -> list[dict[str, Any]]:
    """Compute what is not there yet, expert by expert; each file is complete as soon as it has its name."""
    from ..pools import write_statistics
    from .console import counting, note
    from .objective import one_expert

    rows: list[dict[str, Any]] = []
    held: tuple[str, Any] | None = None
    try:
        for job in jobs:
            row = {"expert": job.expert, "kind": job.kind, "task": job.task.name, "samples": len(job.task)}
            if job.done:
                rows.append({**row, "path": str(job.path), "status": "kept", "seconds": 0.0})
                continue
            began = time.monotonic()
            if held is None or held[0] != job.expert:
                held = None  # free it before the next is read
                held = job.expert, one_expert(setup.pool, job.expert)
            with counting(f"{job.kind} of {job.expert} on", quiet=quiet) as progress:
                statistic = compute(setup, job, held[1], options, progress)
            write_statistics(job.path, job.kind, statistic.tensors, {**statistic.metadata, **job.identity})
            seconds = time.monotonic() - began
            rows.append({**row, "path": str(job.path), "status": "written", "seconds": seconds,
                         "tensors": len(statistic.tensors), "left_out": dict(statistic.left_out)})  # fmt: skip
            if not quiet:
                note(f"{job.expert}: {job.kind} of {len(job.task)} samples of {job.task.name}, {seconds:.1f} s")
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {len(rows)} of {len(jobs)} files are complete. The same command goes on with the others."
        ) from None
    return rows


def compute(setup: Setup, job: Job, weights: Any, options: Options, progress: Any) -> Statistic:
    """One kind of statistics of one expert."""
    from ..objectives import fisher_diagonal, grams

    given: dict[str, Any] = {"seed": options.seed, "progress": progress}
    if options.microbatch is not None:
        given["microbatch"] = options.microbatch
    if job.kind == "fisher":
        return fisher_diagonal(setup.model, weights, job.task, estimator=options.estimator, **given)
    return grams(setup.model, weights, job.task, **given)


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The files, and why some tensors are in none."""
    from ..reports.tables import listing, size
    from .console import note, show

    cells = [
        (
            row["expert"],
            row["kind"],
            row["task"],
            str(row["samples"]),
            size(Path(row["path"]).stat().st_size),
            "already there" if row["status"] == "kept" else f"{row['seconds']:.1f} s",
            row["path"],
        )
        for row in rows
    ]
    show(listing(("expert", "kind", "task", "samples", "size", "computed in", "file"), cells, numeric=(3, 4, 5)))
    reasons: dict[tuple[str, str], None] = {}
    for row in rows:
        reasons.update(dict.fromkeys(row.get("left_out", {}).items()))
    for name, reason in reasons:
        note(f"{name} has no Gram: {reason}.")
