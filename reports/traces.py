"""A trace as a table: one row an iteration (wide), or one row an iteration, layer and expert (long).

A wide row has flat names: the counters and numbers of the record as they are, then `tasks.TASK`, `parts.PART` and
`extra.KEY`, `mean.EXPERT` (mean coefficient over the layers), `coefficients.LAYER.EXPERT` and `scores.LAYER.EXPERT`.
Missing values are None in every form.
"""

from __future__ import annotations

import csv
import io
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..solvers.files import dumps, write_bytes
from .run import Run, RunError

Row = dict[str, Any]

SCALARS = (
    "iteration", "value", "gap", "stationarity", "estimate", "step", "evaluations", "gradients", "bytes_read",
    "samples", "seconds",
)  # fmt: skip
NESTED = ("tasks", "parts", "extra")
MATRICES = ("coefficients", "scores")
LONG = ("iteration", "layer", "expert", "coefficient", "score")
FORMATS = (".csv", ".jsonl", ".json", ".parquet")
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """`COLUMN OP VALUE`, such as `gap < 0.1` or `extra.kind == drop`; a missing value fulfils no condition."""

    column: str
    comparison: str
    value: float | str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition. Raises RunError unless it is a name, one of < <= > >= == != and a value."""
        found = re.fullmatch(r"\s*([^<>=!]+?)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*", text)
        if found is None:
            raise RunError(
                f"condition '{text}': expected COLUMN OP VALUE with < <= > >= == or !=, such as 'gap < 0.1'."
            )
        column, comparison, given = found.groups()
        value: float | str = given.strip("'\"")
        try:
            value = float(given)
        except ValueError:
            if comparison not in ("==", "!="):
                raise RunError(
                    f"condition '{text}': '{given}' is not a number; texts compare by == and != only."
                ) from None
        return cls(column, comparison, value)

    def holds(self, row: Row) -> bool:
        """Whether a wide row fulfils it. Raises RunError where a text meets a number."""
        found = row.get(self.column)
        if found is None:
            return False
        if isinstance(self.value, str):
            return COMPARISONS[self.comparison](str(found), self.value)
        if isinstance(found, str):
            raise RunError(f"column '{self.column}' holds texts such as '{found}', which do not compare to a number.")
        return COMPARISONS[self.comparison](float(found), self.value)


def wide(run: Run, *, experts: Sequence[str] | None = None, layers: Sequence[str] | None = None) -> list[Row]:
    """One row a record, with the same columns in every row; matrices only of the given experts and layers.

    Raises RunError for an expert or a layer that the run does not have.
    """
    columns = _positions("expert", run.experts, experts, run)
    places = _positions("layer", run.layers, layers, run)
    nested = {
        f"{group}.{key}": (group, key)
        for group in NESTED
        for key in dict.fromkeys(key for record in run.records for key in _leaves(record.get(group)))
    }
    rows = []
    for k, record in enumerate(run.records):
        row: Row = {name: record.get(name) for name in SCALARS}
        row["iteration"] = record.get("iteration", k)
        row["vertices"] = "; ".join(f"{name} {share:.4g}" for name, share in run.choices(record).items()) or None
        row |= {name: _leaves(record.get(group)).get(key) for name, (group, key) in nested.items()}
        matrix = record.get("coefficients")
        for i in columns:
            mean = None if matrix is None else sum(line[i] for line in matrix) / len(matrix)
            row[f"mean.{run.experts[i]}"] = mean
        for kind in MATRICES:
            matrix = record.get(kind)
            for layer in places:
                for i in columns:
                    name = f"{kind}.{run.layers[layer]}.{run.experts[i]}"
                    row[name] = None if matrix is None else matrix[layer][i]
        rows.append(row)
    return rows


def long(
    run: Run, rows: Iterable[Row], *, experts: Sequence[str] | None = None, layers: Sequence[str] | None = None
) -> list[Row]:
    """One row for each of the given wide rows × layer × expert: iteration, layer, expert, coefficient, score."""
    columns = _positions("expert", run.experts, experts, run)
    places = _positions("layer", run.layers, layers, run)
    return [
        {
            "iteration": row["iteration"],
            "layer": run.layers[layer],
            "expert": run.experts[i],
            "coefficient": row[f"coefficients.{run.layers[layer]}.{run.experts[i]}"],
            "score": row[f"scores.{run.layers[layer]}.{run.experts[i]}"],
        }
        for row in rows
        for layer in places
        for i in columns
    ]


def select(
    rows: Sequence[Row],
    *,
    first: int | None = None,
    last: int | None = None,
    every: int = 1,
    conditions: Sequence[Condition] = (),
) -> list[Row]:
    """Rows with first ≤ iteration ≤ last, iteration a multiple of `every`, and all conditions fulfilled.

    Raises RunError for a condition on a column that the trace does not have.
    """
    for condition in conditions:
        if rows and condition.column not in rows[0]:
            raise RunError(f"the trace has no column '{condition.column}'. Columns: {_some(rows[0])}.")
    return [
        row
        for row in rows
        if (first is None or row["iteration"] >= first)
        and (last is None or row["iteration"] <= last)
        and row["iteration"] % every == 0
        and all(condition.holds(row) for condition in conditions)
    ]


def pick(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """The columns that match names or shell patterns (`tasks.*`), in the order of the patterns.

    Raises RunError for a pattern that matches none.
    """
    known = list(rows[0]) if rows else []
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in known if name == pattern] or [name for name in known if fnmatchcase(name, pattern)]
        if rows and not found:
            raise RunError(f"the trace has no column '{pattern}'. Columns: {_some(rows[0])}.")
        chosen.update((name, None) for name in found)
    return [{name: row[name] for name in chosen} for row in rows]


def export(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """Write rows as .csv, .jsonl, .json or .parquet, by the name of the file. Raises RunError for another name."""
    form = path.suffix.lower()
    if form not in FORMATS:
        raise RunError(f"{path}: cannot tell the format. Name a file that ends in {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise RunError(f"{path}: there is no folder '{path.parent}'. Make it first.")
    if form == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([row[name] for name in columns] for row in rows)
        content = text.getvalue().encode()
    elif form == ".parquet":
        content = _parquet(rows, columns)
    elif form == ".jsonl":
        content = "".join(dumps(row) + "\n" for row in rows).encode()
    else:
        content = (dumps(list(rows), indent=1) + "\n").encode()
    write_bytes(path, content)


def _parquet(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise RunError(
            "Parquet needs pyarrow, which is not installed: pip install 'mergesolve[parquet]'. Or write .csv or .jsonl."
        ) from None
    counters = {"iteration", "evaluations", "gradients", "bytes_read", "samples"}
    types = {
        **dict.fromkeys(counters, pyarrow.int64()),
        **dict.fromkeys(("layer", "expert", "vertices"), pyarrow.string()),
        "estimate": pyarrow.bool_(),
    }
    arrays = []
    for name in columns:
        values = [row[name] for row in rows]
        texts = any(isinstance(value, str) for value in values)
        kind = types.get(name) or (pyarrow.string() if texts else pyarrow.float64())
        if kind == pyarrow.string():
            values = [None if value is None else str(value) for value in values]
        elif kind == pyarrow.float64():
            values = [None if value is None else float(value) for value in values]
        arrays.append(pyarrow.array(values, kind))
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=list(columns)), sink)
    return sink.getvalue()


def _positions(kind: str, names: Sequence[str], wanted: Sequence[str] | None, run: Run) -> list[int]:
    if not wanted:
        return list(range(len(names)))
    for name in wanted:
        if name not in names:
            raise RunError(f"run '{run.name}': no {kind} '{name}'. It has {', '.join(names[:30])}.")
    return [names.index(name) for name in dict.fromkeys(wanted)]


def _leaves(group: Mapping[str, Any] | None) -> Row:
    """The entries of an object; those of objects in it as KEY.NAME, lists as JSON text."""
    found: Row = {}
    for key, value in (group or {}).items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": entry for name, entry in _leaves(value).items()}
        else:
            found[key] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return found


def _some(row: Mapping[str, Any]) -> str:
    plain = [name for name in row if not name.startswith(("coefficients.", "scores.", "mean."))]
    return ", ".join(plain) + ", mean.EXPERT, coefficients.LAYER.EXPERT, scores.LAYER.EXPERT"
