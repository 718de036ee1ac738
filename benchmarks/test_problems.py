"""Every solver on every test problem, and peers on the same ones: the tables of docs/test-problems.md.

    python benchmarks/test_problems.py            print them (about five minutes)
    python benchmarks/test_problems.py --write    and put them into the page

The peers, copt and TorchJD, come with ``pip install copt torchjd``; without them their tables are left as they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

from mergesolve.solvers import SOLVERS, OptionError, Result, make_solver, solve
from mergesolve.solvers.instances import INSTANCES

PAGE = Path(__file__).parents[1] / "docs" / "test-problems.md"
TOLERANCE = 1e-8
LOOSE = 1e-6
MAX_ITER = {"linear": 1000, "sublinear": 1000, "none": 300}  # by what is promised
FEW = {"bayesian": 20}  # each of its iterations fits a model
RUNNING = [name for name in SOLVERS if not name.startswith("released")]  # those compare checkpoints


@dataclass(frozen=True)
class Run:
    """What one solver did on one problem: when its gap fell below each tolerance, and what was left at the end."""

    loose: int | None
    tight: int | None
    left: float
    result: Result

    @property
    def cell(self) -> str:
        """Iterations to both tolerances, or the gap that was left."""
        if self.tight is not None:
            return f"{self.loose} / {self.tight}"
        return f"{'–' if self.loose is None else self.loose} / *{self.left:.0e}*"


def certified(line: dict[str, Any]) -> float:
    """The gap of a trace record, without one the stationarity, without scores nothing."""
    known = line["stationarity"] if line["gap"] is None else line["gap"]
    return math.inf if known is None else float(known)


@cache
def run(solver: str, name: str) -> Run | None:
    """Solve once; None where the solver refuses the domain."""
    instance, made = INSTANCES[name], make_solver(solver)
    try:
        result = solve(
            instance.problem(),
            made,
            start=instance.start,
            max_iter=FEW.get(solver, MAX_ITER[made.promise]),
            tol=TOLERANCE,
        )
    except OptionError:
        return None
    certificates = [certified(line) for line in result.trace]
    left = float(result.stationarity if result.gap is None else result.gap)
    if certificates[-1] == math.inf:  # only the answer is certified
        certificates[-1] = left
    return Run(first(certificates, LOOSE), first(certificates, TOLERANCE), left, result)


def first(values: Sequence[float], tolerance: float) -> int | None:
    """The first iteration whose value is within the tolerance."""
    return next((index for index, value in enumerate(values) if value <= tolerance), None)


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = True) -> str:
    """A Markdown table; ``numbers``: all columns but the first are aligned to the right."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(header) - 1))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, rule, *rows])


def problems() -> str:
    """What there is to solve."""
    rows = []
    for instance in INSTANCES.values():
        blocks, n = instance.shape
        condition = f"{instance.smoothness / instance.modulus:.0f}" if instance.modulus > 1e-9 else "∞"
        described = ", ".join(sorted(instance.properties))
        rows.append(
            (
                f"`{instance.name}`",
                f"{blocks} × {n}",
                instance.domain.name,
                instance.function.link,
                condition,
                described,
            )
        )
    return table(("problem", "blocks × experts", "domain", "φ", "L/μ", "what is special"), rows, numbers=False)


def summary() -> str:
    """One row a solver."""
    rows = []
    for solver in RUNNING:
        runs = [found for found in (run(solver, name) for name in INSTANCES) if found is not None]
        tight = [found for found in runs if found.tight is not None]
        rows.append(
            (
                f"`{solver}`",
                SOLVERS[solver].promise,
                len(runs),
                sum(found.loose is not None for found in runs),
                len(tight),
                number(found.tight for found in tight),
                number(found.result.counts["gradients"] / (found.result.nit + 2) for found in runs),
                number(found.result.counts["evaluations"] / max(1, found.result.nit) for found in runs),
                f"{max(found.result.objective - INSTANCES[name].value for name, found in solved(solver)):.0e}",
            )
        )
    header = (
        "solver", "promise", "runs on", "gap 1e-6", "gap 1e-8", "median iterations", "gradients an iteration",
        "values an iteration", "worst f − f*",
    )  # fmt: skip
    return table(header, rows)


def solved(solver: str) -> Iterable[tuple[str, Run]]:
    """The problems that a solver took."""
    return ((name, found) for name in INSTANCES if (found := run(solver, name)) is not None)


def number(values: Iterable[float | None]) -> str:
    """The median, short."""
    known = [value for value in values if value is not None]
    return f"{median(known):.3g}" if known else "–"


def matrix(promise: str, *, scores: bool = True) -> str:
    """Problems × solvers of one promise, with or without gradients: iterations to a gap of 1e-6 / 1e-8."""
    names = [name for name in RUNNING if SOLVERS[name].promise == promise and SOLVERS[name].needs_scores == scores]
    rows = []
    for problem in INSTANCES:
        runs = [run(solver, problem) for solver in names]
        rows.append((f"`{problem}`", *("refused" if found is None else found.cell for found in runs)))
    return table(("problem", *(f"`{name}`" for name in names)), rows)


def peer_tables() -> str:
    """Ours beside copt and TorchJD."""
    import peers

    return "\n\n".join(table(*rows) for rows in (peers.frank_wolfe_rows(), peers.min_norm_rows()))


def have_peers() -> bool:
    """Whether copt and TorchJD are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("copt", "torchjd"))


def write(name: str, content: str) -> None:
    """Put a table between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{PAGE} has no marks for '{name}'.")
    PAGE.write_text(f"{before}{begin}{content}\n{end}{after}", encoding="utf-8")


def main() -> int:
    """Print, and write on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="which ones; default: all")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    options = parser.parse_args()
    parts: dict[str, Callable[[], str]] = {
        "problems": problems,
        "linear": partial(matrix, "linear"),
        "sublinear": partial(matrix, "sublinear"),
        "none": partial(matrix, "none"),
        "values": partial(matrix, "none", scores=False),
        "summary": summary,
        **({"peers": peer_tables} if have_peers() else {}),
    }
    unknown = set(options.tables) - set(parts)
    if unknown:
        parser.error(f"no table {min(unknown)!r}; there are {', '.join(parts)}")
    for name in options.tables or parts:
        content = parts[name]()
        print(f"{name}\n\n{content}\n", flush=True)
        if options.write:
            write(name, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
