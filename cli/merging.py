"""A closed-form merge from a recipe: plan it, scan it, write it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import warn
from .names import UsageProblem
from .recipe import Choice, ModelPart, PoolPart, Recipe, TaskPart
from .selecting import record
from .setup import Setup, check_transform
from .stats import FOLDER

if TYPE_CHECKING:
    from ..objectives import Task
    from ..pools import Pool, Statistics
    from ..solvers.closed_form import Merge, Plan
    from ..solvers.closed_form.scan import Scan


@dataclass(frozen=True)
class Override:
    """Tensors whose names this regular expression finds take that method instead.

    optional: it is no mistake if it finds none.
    """

    match: str
    method: Choice
    optional: bool = False


@dataclass(frozen=True)
class MergeRecipe:
    """A closed-form merge, completely.

    out: a .safetensors file or a folder. statistics: a folder with files NAME.fisher.safetensors or
    NAME.gram.safetensors, or a mapping of experts to files; unless given they lie beside the experts, and those of the
    zoo in ./statistics. scan: option ->
    values to try on the tasks. zoo, pool, model, tasks, split and limit are those of a solve recipe.
    """

    method: Choice
    zoo: bool | str = False
    pool: PoolPart = field(default_factory=PoolPart)
    overrides: tuple[Override, ...] = ()
    statistics: str | dict[str, str] | None = None
    scan: dict[str, tuple[int | float, ...]] = field(default_factory=dict)
    model: ModelPart = field(default_factory=ModelPart)
    tasks: tuple[TaskPart, ...] = ()
    split: str = "validation"
    limit: int | None = None
    out: str | None = None
    dtype: str | None = None
    max_shard_size: float = 5e9

    def setup(self) -> Setup:
        """The live pool, model and tasks. Experts are streamed unless the recipe says otherwise: each is read once."""
        pool = self.pool if self.pool.backend != "auto" else replace(self.pool, backend="streaming")
        return Setup(
            Recipe(zoo=self.zoo, pool=pool, model=self.model, tasks=self.tasks, split=self.split, limit=self.limit)
        )


@dataclass
class Merging:
    """A recipe with its live objects."""

    recipe: MergeRecipe
    setup: Setup
    merge: Merge
    overrides: list[tuple[str, Merge]]

    @classmethod
    def of(cls, recipe: MergeRecipe) -> Merging:
        """Check names and options before any file is opened, then the pool's headers."""
        from ..solvers.closed_form import make_merge

        merge = make_merge(recipe.method.plain())
        overrides = [(override, make_merge(override.method.plain())) for override in recipe.overrides]
        for choice in recipe.pool.transforms:
            check_transform(choice)
        if recipe.scan and not recipe.tasks:
            raise UsageProblem(
                "a scan needs labelled data to choose by: give --task NAME (zoo) or --task NAME=DATA with --model."
            )
        setup = recipe.setup()
        kept = [
            (override.match, other)
            for override, other in overrides
            if not override.optional or any(re.search(override.match, name) for name in setup.pool.candidates)
        ]
        return cls(recipe, setup, merge, kept)

    @property
    def pool(self) -> Pool:
        """The pool after the recipe's transforms."""
        return self.setup.pool

    def plan(self) -> Plan:
        """What the merge will read, write and hold."""
        from ..solvers.closed_form import plan

        return plan(self.pool, self.merge, self.statistics(), overrides=self.overrides, dtype=self.recipe.dtype)

    def statistics(self) -> Statistics | None:
        """The statistics that the method needs, checked against the experts."""
        from ..pools import Statistics

        merges = [self.merge, *(other for _, other in self.overrides)]
        for merge in merges:
            merge.check(self.pool)
        kinds = {merge.statistics for merge in merges} - {None}
        if not kinds:
            if self.recipe.statistics is not None:
                raise UsageProblem(
                    f"the method '{self.recipe.method.name}' uses no statistics; leave out --statistics."
                )
            return None
        if len(kinds) > 1:
            raise UsageProblem(f"the method and its overrides need {' and '.join(sorted(map(str, kinds)))}; take one.")
        place = self.recipe.statistics
        if place is None and self.recipe.zoo and Path(FOLDER).is_dir():
            place = FOLDER
        return Statistics.open(self.pool, str(kinds.pop()), place)

    def scan(self, progress: Any = None) -> Scan:
        """Try the grid on the tasks; the merge becomes the best."""
        from ..objectives import evaluate
        from ..solvers.closed_form.scan import scan

        if self.overrides:
            raise UsageProblem("a scan changes one method's options; leave out the overrides, or the scan.")
        model, tasks = self.setup.model, self.setup.tasks
        for task in tasks:
            if task.labels is None:
                raise UsageProblem(f"a scan needs labels, and the task '{task.name}' has none.")
        grid: Mapping[str, Sequence[float]] = self.recipe.scan
        done = scan(
            self.pool, self.merge, grid, lambda weights: evaluate(model, weights, tasks), self.statistics(), progress
        )
        self.merge = done.merge
        return done

    def write(self, out: Path, metadata: Mapping[str, str], progress: Any = None) -> list[Path]:
        """Write the merged model; its metadata say which experts were selected, and by what."""
        from ..solvers.closed_form import write_merge

        statistics = self.statistics()
        if statistics is not None and statistics.kind == "fisher":
            without = [name for name in self.pool.tensors if name not in statistics.shapes]
            if without:
                warn(
                    f"{len(without)} of {len(self.pool.tensors)} merged tensors have no Fisher, '{without[0]}' among "
                    "them: they are averaged."
                )
        if self.setup.selection is not None:
            chosen = record(self.setup.selection, self.setup)
            metadata = {**metadata, "selection": json.dumps({k: chosen[k] for k in ("selector", "selected", "data")})}
        return write_merge(
            self.pool,
            self.merge,
            out,
            statistics=statistics,
            overrides=self.overrides,
            dtype=self.recipe.dtype,
            max_shard_size=self.recipe.max_shard_size,
            metadata=metadata,
            progress=progress,
        )

    def write_masks(self, path: Path) -> list[Path]:
        """Write the TALL masks that the method compares experts by."""
        from ..solvers.closed_form.masks import write_masks

        tall, multitask = (getattr(self.merge, name, None) for name in ("tall", "multitask"))
        if tall is None or multitask is None:
            raise UsageProblem(f"--masks: '{self.recipe.method.name}' has no masks; 'consensus' does.")
        return write_masks(self.pool, path, tall=tall, multitask=multitask)


def scan_record(found: Scan, tasks: Sequence[Task]) -> dict[str, Any]:
    """What a scan tried, what it chose, and on which data, as JSON has it."""
    from ..solvers.closed_form import describe_merge

    return {
        "method": describe_merge(found.merge),
        "chosen": dict(found.best.options),
        "mean": found.best.mean,
        "data": [
            {"task": task.name, "split": task.split, "samples": len(task), "fingerprint": task.fingerprint}
            for task in tasks
        ],
        "trials": [{"options": dict(trial.options), "scores": dict(trial.scores)} for trial in found.trials],
    }


def write_scan(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write scan.json and the curve as PNG and SVG."""
    from ..reports import save_figure, scan_curve

    folder.mkdir(parents=True, exist_ok=True)
    place, part = folder / "scan.json", folder / ".scan.json.part"
    part.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    part.replace(place)
    title = str(record["method"]["name"])
    return [place, *save_figure(lambda: scan_curve(record["trials"], title), folder / "scan")]
