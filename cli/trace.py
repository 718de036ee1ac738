"""`mergesolve trace`: the trace of a run as a table, filtered, shown or exported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .flags import json_flag
from .names import UsageProblem

SHOWN = 60  # rows in a terminal, unless --every or another filter says otherwise
COLUMNS = ("iteration", "value", "gap", "stationarity", "step", "vertices", "extra.active", "extra.kind", "gradients",
           "evaluations", "samples", "seconds")  # fmt: skip


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--from", "first", type=int, metavar="N", help="Iterations from N on.")
@click.option("--to", "last", type=int, metavar="N", help="Iterations up to N.")
@click.option("--every", type=click.IntRange(min=1), metavar="N", help="Iterations that are multiples of N.")
@click.option("--columns", metavar="NAME,...", help="These columns, in this order; patterns such as 'tasks.*' match.")
@click.option("--expert", "experts", multiple=True, metavar="NAME", help="Coefficients of this expert. Repeatable.")
@click.option("--layer", "layers", multiple=True, metavar="NAME", help="Coefficients in this layer. Repeatable.")
@click.option("--where", multiple=True, metavar="CONDITION", help="Such as 'gap < 0.1'. Repeatable: all must hold.")
@click.option("--long", "as_long", is_flag=True, help="One row an iteration, layer and expert.")
@click.option("--out", metavar="FILE", help="Write .csv, .jsonl, .json or .parquet instead of showing.")
@json_flag
def command(
    run: str,
    first: int | None,
    last: int | None,
    every: int | None,
    columns: str | None,
    experts: tuple[str, ...],
    layers: tuple[str, ...],
    where: tuple[str, ...],
    as_long: bool,
    out: str | None,
    as_json: bool,
) -> None:
    """Show, filter and export the trace of a run, also of one that is still going.

    Columns are the numbers of a record (iteration, value, gap, ..., seconds) and tasks.TASK, parts.PART, extra.KEY,
    mean.EXPERT, coefficients.LAYER.EXPERT and scores.LAYER.EXPERT; docs/traces.md has them all with their units.

    \b
    Examples:
      mergesolve trace runs/fw-hard
      mergesolve trace runs/fw-hard --where 'gap < 0.1' --columns 'iteration,value,tasks.*'
      mergesolve trace runs/fw-hard --expert digits --expert chess --every 5
      mergesolve trace runs/fw-hard --long --out coefficients.parquet
    """
    from ..reports import read_run
    from ..reports.traces import LONG, Condition, export, long, pick, select, wide
    from .console import note, print_json, show

    patterns = None if columns is None else [name.strip() for name in columns.split(",") if name.strip()]
    if patterns is not None and not patterns:
        raise UsageProblem(f"--columns '{columns}' names no column; give some, such as 'iteration,value,tasks.*'.")
    if as_long and patterns:
        raise UsageProblem(f"--long has the columns {', '.join(LONG)}; --columns cannot change them. Leave out one.")
    read = read_run(run)
    every_column = wide(read, experts=experts, layers=layers)
    conditions = [Condition.parse(text) for text in where]
    rows = select(every_column, first=first, last=last, every=every or 1, conditions=conditions)
    if as_long:
        shown, names = long(read, rows, experts=experts, layers=layers), list(LONG)
    elif patterns:
        names = [name for row in pick(every_column[:1], patterns) for name in row]
        shown = [{name: row[name] for name in names} for row in rows]
    elif out or as_json:
        names = [name for name in (every_column[0] if every_column else ()) if not name.startswith("mean.")]
        shown = [{name: row[name] for name in names} for row in rows]
    else:
        names = _default_columns(every_column, experts, layers)
        shown = [{name: row[name] for name in names} for row in rows]
    if not every_column:
        note(f"run '{read.name}' has made no iteration yet")
    elif not rows:
        note(f"none of the {len(every_column)} iterations is asked for: --from, --to, --every and --where leave none")
    if out:
        export(shown, names, Path(out))
        note(f"{out}: {len(shown)} rows, {len(names)} columns")
    elif as_json:
        print_json(shown)
    else:
        step = -(-len(shown) // SHOWN)
        if step > 1 and every is None and not as_long:
            note(f"every {step}th of {len(shown)} iterations and the last; --every 1 shows all")
            shown = [row for k, row in enumerate(shown) if k % step == 0 or k == len(shown) - 1]
        show(_table(shown, names))


def _default_columns(rows: Sequence[dict[str, Any]], experts: Sequence[str], layers: Sequence[str]) -> list[str]:
    """The columns that hold anything, then the coefficients that were asked for."""
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    if "gap" in names and "stationarity" in names:
        names.remove("stationarity")
    if layers:
        return names + [name for name in (rows[0] if rows else ()) if name.startswith("coefficients.")]
    return names + [f"mean.{expert}" for expert in experts]


def _table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Any:
    from ..reports.tables import listing

    texts = [[_cell(name, row[name]) for name in names] for row in rows]
    words = ("vertices", "extra.kind", "layer", "expert")
    return listing(names, texts, numeric=[k for k, name in enumerate(names) if name not in words])


def _cell(name: str, value: Any) -> str:
    """A value in a table for people."""
    if value is None:
        return "–"
    if name == "vertices":
        chosen = str(value).split("; ")
        return ", ".join(chosen[:3]) + (f" and {len(chosen) - 3} more" if len(chosen) > 3 else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}" if name == "seconds" else f"{value:.4g}"
    return str(value)
