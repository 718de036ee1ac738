"""`mergesolve compare`: runs side by side, aligned by what they took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .flags import json_flag
from .names import UsageProblem, choose

if TYPE_CHECKING:
    from ..reports.alignment import Alignment, State

FORMATS = (".png", ".svg", ".pdf")
DASH = "–"


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
@click.option("--by", default="iteration", metavar="AXIS",
              help="iteration (default), seconds, gradients, evaluations or samples.")  # fmt: skip
@click.option("--at", "marks", type=float, multiple=True, metavar="X", help="Compare at this mark. Repeatable.")
@click.option("--marks", "count", type=click.IntRange(min=2), metavar="N", help="So many marks, evenly spaced (10).")
@click.option("--figure", "figure_file", metavar="FILE", help="Draw objective and gap over the axis: .png, .svg, .pdf.")
@json_flag
def command(
    runs: tuple[str, ...],
    by: str,
    marks: tuple[float, ...],
    count: int | None,
    figure_file: str | None,
    as_json: bool,
) -> None:
    """Compare runs at equal iterations, seconds, gradient evaluations, evaluations or samples.

    At each mark a run shows the last iterate that it had reached by then (every start costs nothing); one that has
    ended keeps what it ended with, marked by =. The distance is to the merge of the first run at the same mark: root
    mean square over the layers of the difference of the coefficients, where the runs have the same experts. Below: the
    losses by task at the last mark, how each run ended, and what it took.

    \b
    Examples:
      mergesolve compare runs/fw-hard runs/fw-soft
      mergesolve compare runs/fw-hard runs/fw-soft --by samples --figure samples.png
      mergesolve compare runs/fw-* --by seconds --at 10 --at 60 --json
    """
    from ..reports import read_runs
    from ..reports.alignment import AXES, align, default_marks, differences, figure
    from ..reports.alignment import final as ended
    from .console import note, print_json, show, warn

    choose("axis", by, AXES, where="--by")
    if len(runs) < 2:
        raise UsageProblem("compare needs two runs or more; `mergesolve trace` shows one.")
    if marks and count:
        raise UsageProblem("--at names the marks and --marks counts them. Leave out one.")
    for mark in marks:
        if not 0 <= mark < math.inf:
            raise UsageProblem(
                f"--at {mark:g}: marks count from 0, where every run starts. Give a number of at least 0."
            )
    if figure_file and Path(figure_file).suffix.lower() not in FORMATS:
        raise UsageProblem(f"--figure '{figure_file}': name a file that ends in {', '.join(FORMATS)}.")
    if figure_file and not Path(figure_file).parent.is_dir():
        raise UsageProblem(f"--figure '{figure_file}': there is no folder '{Path(figure_file).parent}'. Make it first.")
    read = read_runs(runs)
    aligned = align(read, by, marks or (default_marks(read, by, count) if count else None))
    for sentence in differences(read):
        warn(sentence)
    if figure_file:
        from ..reports import save_figure

        path = Path(figure_file)
        save_figure(lambda: figure(read, by), path.with_suffix(""), (path.suffix[1:].lower(),))
        note(str(path))
    endings = [ended(run) for run in read]
    if as_json:
        print_json({**_machine(aligned), "final": endings})
        return
    show(_marks_table(aligned))
    tasks = _tasks_table(aligned)
    if tasks is not None:
        show("")
        show(tasks)
    show("")
    show(_final_table(endings))


def _machine(aligned: Alignment) -> dict[str, Any]:
    def plain(state: State | None) -> dict[str, Any] | None:
        if state is None:
            return None
        record = state.record
        kept = {key: record.get(key) for key in ("iteration", "value", "gap", "stationarity", "estimate", "tasks")}
        cost = {key: record.get(key) for key in ("gradients", "evaluations", "samples", "bytes_read", "seconds")}
        return {**kept, **cost, "distance": state.distance, "ended": state.ended}

    return {
        "by": aligned.by,
        "runs": [run.name for run in aligned.runs],
        "distance": aligned.distance,
        "marks": [
            {aligned.by: float(mark), "states": dict(zip([run.name for run in aligned.runs], line, strict=True))}
            for mark, line in zip(
                aligned.marks, [[plain(state) for state in line] for line in aligned.states], strict=True
            )
        ],
    }


def _number(value: float | None) -> str:
    from .console import number

    return number(value)


def _place(mark: float, by: str) -> str:
    """A mark as it was given; seconds in tenths, or finer where these say nothing."""
    if by == "seconds":
        return f"{mark:.1f}" if mark == 0 or mark >= 1 else f"{mark:.2g}"
    return f"{mark:.0f}" if float(mark).is_integer() else f"{mark:.12g}"


def _marks_table(aligned: Alignment) -> Any:
    """Marks × runs: value, gap (stationarity on a free domain), distance to the first run."""
    from ..reports.tables import listing

    header = [aligned.by]
    for k, run in enumerate(aligned.runs):
        header += [f"{run.name}: value", "stationarity" if run.free else "gap"]
        header += ["distance"] if k and aligned.distance else []
    rows = []
    for mark, line in zip(aligned.marks, aligned.states, strict=True):
        cells = [_place(mark, aligned.by)]
        for k, (run, state) in enumerate(zip(aligned.runs, line, strict=True)):
            if state is None:
                cells += [DASH, DASH]
            else:
                value = _number(state.record.get("value"))
                cells += [f"= {value}" if state.ended else value]
                cells += [_number(state.record.get("stationarity" if run.free else "gap"))]
            if k and aligned.distance:
                cells.append(_number(state.distance if state else None))
        rows.append(cells)
    return listing(header, rows, numeric=range(len(header)))


def _tasks_table(aligned: Alignment) -> Any | None:
    """Loss by task at the last mark; None where there is only one task."""
    from ..reports.tables import listing

    last = [state.record.get("tasks") or {} if state else {} for state in aligned.states[-1]]
    names = list(dict.fromkeys(name for losses in last for name in losses))
    if len(names) < 2:
        return None
    rows = [[name, *(_number(losses.get(name)) for losses in last)] for name in names]
    header = [f"loss at {aligned.by} {_place(aligned.marks[-1], aligned.by)}", *(run.name for run in aligned.runs)]
    return listing(header, rows, numeric=range(1, len(header)))


def _final_table(endings: Sequence[dict[str, Any]]) -> Any:
    """How each run ended and what it took."""
    from ..reports.tables import listing, size

    header = ["run", "status", "solver", "domain", "rows", "objective", "gap", "iterations", "gradients", "values",
              "samples", "read", "seconds", "peak", "data seen"]  # fmt: skip
    rows = []
    for end in endings:
        counts = [
            DASH if end[key] is None else str(end[key]) for key in ("iterations", "gradients", "evaluations", "samples")
        ]
        data = DASH if end["labelled"] is None else f"{end['labelled']} labelled, {end['unlabelled']} unlabelled"
        rows.append(
            [
                end["run"],
                end["status"].replace("_", " "),
                *(DASH if end[key] is None else str(end[key]) for key in ("solver", "domain", "rows")),
                _number(end["objective"]),
                _number(end["gap"]),
                *counts,
                DASH if end["bytes_read"] is None else size(end["bytes_read"]),
                DASH if end["seconds"] is None else f"{end['seconds']:.1f}",
                DASH if not end["peak_memory"] else size(end["peak_memory"]),
                data + ("; test inputs" if end["test_inputs"] else ""),
            ]
        )
    return listing(header, rows, numeric=(4, *range(5, 14)))
