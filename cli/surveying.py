"""Points of a landscape from what a user writes: base, average, expert:NAME, run:FOLDER, run:FOLDER@ITERATION."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import INTERVAL, counting, note, stderr
from .flags import recipe_from
from .names import UsageProblem
from .recipe import Choice, Recipe
from .running import RECIPE, open_run
from .setup import Setup

if TYPE_CHECKING:
    import numpy as np

    from ..pools import Blocks, Pool
    from ..solvers import Problem

    Array = np.ndarray[Any, Any]

FINENESS = ("model", "layer", "tensor", "row")
DESCRIBING = ("zoo", "zoo_data", "base", "experts", "pool_file")


class Survey:
    """One problem on a free domain, and the points that were asked for.

    Without flags that describe a pool, pool, model, tasks and objective are those of the first run that is named.
    """

    def __init__(
        self,
        flags: Mapping[str, Any],
        recipe_file: str | None,
        texts: Sequence[str] = (),
        *,
        runs: Sequence[str] = (),
    ) -> None:
        folders = [folder for folder, _ in map(_run_of, texts) if folder is not None] + [Path(run) for run in runs]
        kinds = [_fineness(open_run(folder)[0].blocks) for folder in folders]
        given = dict(flags)
        described = recipe_file is not None or any(given.get(name) for name in DESCRIBING)
        if not described and folders:
            recipe_file = str(folders[0] / RECIPE)
        elif not given.get("split") and recipe_file is None:
            given["split"] = "validation"
        recipe = recipe_from(given, recipe_file)
        finest = max(["layer", *kinds], key=FINENESS.index)
        self.recipe: Recipe = replace(
            recipe,
            blocks=recipe.blocks if given.get("blocks") else finest,
            domain=Choice("free"),  # a point may lie anywhere, whatever the run was constrained to
            constraints=(),
            groups={},
            start="average",
            preset=None,
        )
        self.setup = Setup(self.recipe)

    @property
    def problem(self) -> Problem:
        """The objective over the pool, on all its data."""
        first = "problem" not in self.setup.__dict__
        problem = self.setup.problem
        if first:
            problem.draw(None)
        return problem

    def point(self, text: str) -> Array:
        """The coefficients [rows, n] of one point."""
        from ..solvers import start_point

        folder, iteration = _run_of(text)
        if folder is None:
            return start_point(self.problem, text)
        if iteration is None:
            from ..solvers import Result

            return self._lifted(folder, Result.load(folder).coefficients)
        return self.iterates(folder, [iteration])[iteration]

    def points(self, texts: Sequence[str]) -> dict[str, Array]:
        """The points by their labels."""
        labels = self.labels(texts)
        return {label: self.point(text) for label, text in zip(labels, texts, strict=True)}

    @staticmethod
    def labels(texts: Sequence[str]) -> list[str]:
        """Short names, each once: of an expert its own, of a run its folder's."""
        names = []
        for text in texts:
            folder, iteration = _run_of(text)
            if folder is not None:
                names.append(folder.resolve().name + (f"@{iteration}" if iteration is not None else ""))
            else:
                names.append(text.removeprefix("expert:"))
        for text, name in zip(texts, names, strict=True):
            if texts.count(text) > 1:
                raise UsageProblem(f"the point '{text}' is given twice; every point must be another one.")
            if names.count(name) > 1:
                return list(texts)
        return names

    def iterates(self, folder: Path, wanted: Sequence[int] | None = None) -> dict[int, Array]:
        """Recorded iterates Λ_k of a run by their numbers, all unless some are wanted."""
        from ..reports.run import read_run

        run = read_run(folder)
        rows = run.header.get("rows")
        if rows != len(run.layers):
            raise UsageProblem(
                f"run '{folder}': its trace keeps the mean over each layer, and its coefficients have {rows} rows in "
                f"{len(run.layers)} layers, so its iterates are not known. Name its result (run:{folder}), or solve "
                "with --blocks layer."
            )
        numbers, path = run.trajectory()
        index = {int(number): k for k, number in enumerate(numbers)}
        chosen = list(index) if wanted is None else list(wanted)
        missing = [number for number in chosen if number not in index]
        if missing or not chosen:
            span = f"it has {min(index)} to {max(index)}" if index else "it has none yet"
            what = f"no iterate {missing[0]}" if missing else "no iterates"
            raise UsageProblem(f"run '{folder}' recorded {what}; {span}.")
        return {number: self._lifted(folder, path[index[number]]) for number in chosen}

    def _lifted(self, folder: Path, coefficients: Array) -> Array:
        """Coefficients of a run over this pool and these blocks."""
        import numpy as np

        recipe, _ = open_run(folder)
        pool, theirs = self.setup.pool, self._pool_of(folder, recipe)
        if theirs is not pool:
            _check_same(folder, recipe, theirs, self.recipe, pool)
        kind = recipe.blocks
        blocks = theirs.blocks(kind if isinstance(kind, str) else list(kind))
        if coefficients.shape != (blocks.count, theirs.n):
            raise UsageProblem(
                f"run '{folder}': coefficients of shape {list(coefficients.shape)}, and its pool has {blocks.count} "
                f"blocks and {theirs.n} experts. Its folder holds files of two runs; solve again."
            )
        lifted = np.zeros((self.problem.rows, pool.n))
        columns = [pool.names.index(name) for name in theirs.names]
        lifted[:, columns] = _spread(coefficients, blocks, self.problem.blocks, str(folder))
        return lifted

    def _pool_of(self, folder: Path, recipe: Recipe) -> Pool:
        """The pool of a run, checked against its result."""
        from .running import check_pool, load_outcome

        if (recipe.zoo, recipe.pool) == (self.recipe.zoo, self.recipe.pool):
            return self.setup.pool
        if (folder / "result.json").exists():
            outcome = load_outcome(folder)
            check_pool(outcome)
            return outcome.setup.pool
        return Setup(recipe).pool


def _run_of(text: str) -> tuple[Path | None, int | None]:
    """Folder and iteration of `run:FOLDER@K`; (None, None) for any other point."""
    form, _, rest = text.partition(":")
    if form != "run":
        return None, None
    if not rest:
        raise UsageProblem(f"the point '{text}' needs a folder after the colon, as in run:runs/fw-soft.")
    folder, separator, number = rest.rpartition("@")
    if separator and number.isdigit() and not Path(rest).is_dir():
        return Path(folder), int(number)
    return Path(rest), None


def _fineness(kind: str | tuple[str, ...]) -> str:
    """The named kind of blocks in which these can be written; the user's patterns group whole tensors."""
    return kind if isinstance(kind, str) else "tensor"


def _check_same(folder: Path, recipe: Recipe, theirs: Pool, ours: Recipe, pool: Pool) -> None:
    if recipe.pool.transforms != ours.pool.transforms:
        raise UsageProblem(f"run '{folder}' was solved over task vectors with other transforms; give the same.")
    for name in theirs.names:
        if name not in pool.names:
            raise UsageProblem(
                f"run '{folder}' merges the expert '{name}', which this pool lacks; it has {', '.join(pool.names)}. "
                "Leave out the flags of the pool to take the run's own."
            )
        if theirs.expert_fingerprint(name) != pool.expert_fingerprint(name):
            raise UsageProblem(f"run '{folder}': its expert '{name}' is not the one of this pool (other weights).")
    if set(theirs.tensors) != set(pool.tensors):
        raise UsageProblem(
            f"run '{folder}' merges other tensors than this pool; give the same --include and --exclude."
        )


def _spread(coefficients: Array, blocks: Blocks, target: Blocks, run: str) -> Array:
    """The same merge in finer blocks [rows of target, n]."""
    import numpy as np

    lifted = np.zeros((target.count, coefficients.shape[1]))
    for name, rows in target.rows.items():
        values = coefficients[blocks.rows[name]]
        count = rows.stop - rows.start
        if len(values) not in (1, count):
            raise UsageProblem(f"run '{run}' has finer blocks than --blocks says; leave that out.")
        lifted[rows] = values
    for name, rows in target.rows.items():
        if not np.array_equal(np.broadcast_to(coefficients[blocks.rows[name]], lifted[rows].shape), lifted[rows]):
            raise UsageProblem(f"run '{run}' has finer blocks than --blocks says; leave that out.")
    return lifted


@contextmanager
def telling(label: str, *, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Progress as a bar on a terminal and as a line every few seconds elsewhere; None if the command is to be quiet."""
    if quiet or stderr().is_terminal:
        with counting(label, quiet=quiet) as step:
            yield step
        return
    last = time.monotonic()

    def line(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= INTERVAL:
            last = time.monotonic()
            note(f"{label}: {done}/{total} {what}".rstrip())

    yield line


def evenly(numbers: Sequence[int], count: int) -> list[int]:
    """About ``count`` of some numbers, evenly apart, the first and the last among them."""
    if count < 2 or len(numbers) <= count:
        return list(numbers)
    return [numbers[round(k * (len(numbers) - 1) / (count - 1))] for k in range(count)]
