"""Tables of traces, and the page that says what is in a trace."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from mergesolve.reports import Run, RunError, read_run
from mergesolve.reports.traces import LONG, Condition, export, long, pick, select, wide
from mergesolve.solvers import SOLVERS, FunctionProblem, OptionError, make_solver, solve

PAGE = (Path(__file__).parents[2] / "docs/traces.md").read_text(encoding="utf-8")


def documented(heading: str) -> dict[str, str]:
    """Keys of the first table below a text of the page, with the rest of their row."""
    table = PAGE.split(heading, 1)[1].split("\n\n|", 1)[1].split("\n\n", 1)[0]
    return dict(re.findall(r"^\| `(\w+)` \|(.*)$", "|" + table, re.MULTILINE))


def quadratic(point):
    return float(0.5 * np.sum(point**2) - 0.3 * point[0, 0]), point - np.array([[0.3, 0, 0]] * 2)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(header, records) of a short run of every registered solver that runs on a function of Λ, by name."""
    specs = {name: {"name": name} for name in SOLVERS if not name.startswith("released")}  # those need raw checkpoints
    specs["scheduled"] = {"name": "adaptive", "schedule": "cosine"}
    found = {}
    for name, spec in specs.items():
        problem = FunctionProblem(quadratic, 2, 3, "free" if name == "scan" else "simplex")
        try:
            make_solver(spec).check(problem)
        except OptionError:  # it solves other problems
            continue
        folder = tmp_path_factory.mktemp("runs") / name
        solve(problem, spec, start="base" if name == "scan" else "average", max_iter=3, tol=0, run=folder)
        lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
        found[name] = (lines[0], lines[1:])
    assert {"frank-wolfe", "projected-gradient", "scan", "scheduled"} <= set(found)
    return found


def test_every_key_that_a_run_writes_is_documented(written):
    header, record = set(documented("### Header")), set(documented("### Record"))
    for name, (head, lines) in written.items():
        assert set(head) <= header, name
        for line in lines:
            assert set(line) <= record, name


def test_every_documented_key_is_written(written):
    """backend is written over a pool only, outer and inner by the outer loop of a constrained solve only."""
    heads = {key for head, _ in written.values() for key in head}
    keys = {key for _, lines in written.values() for line in lines for key in line}
    assert set(documented("### Header")) - {"backend"} == heads
    assert set(documented("### Record")) - {"outer", "inner", "extra"} == keys - {"extra"}


def test_the_documented_keys_of_extra_are_those_that_solvers_write(written):
    keys = {key for _, lines in written.values() for line in lines for key in line.get("extra") or {}}
    assert keys <= set(documented("Keys of `extra`"))


def test_types_and_nulls_are_as_documented(written):
    kinds = {"integer": int, "number": (int, float), "boolean": bool, "object": dict, "list of texts": list,
             "list of numbers": list, "layers × experts": list}  # fmt: skip
    for key, rest in documented("### Record").items():
        kind, *_, null = [cell.strip() for cell in rest.strip().strip("|").split("|")]
        for name, (_, lines) in written.items():
            for line in lines:
                if line.get(key) is None:
                    assert key not in line or not null.startswith("never"), (name, key)
                else:
                    assert isinstance(line[key], kinds[kind]), (name, key)


def test_wide_rows_hold_the_records(write_run):
    run = read_run(write_run(iterations=5))
    rows = wide(run)
    assert len({tuple(row) for row in rows}) == 1
    for row, record in zip(rows, run.records, strict=True):
        assert row["value"] == record["value"]
        assert row["tasks.two"] == record["tasks"]["two"]
        assert row["coefficients.second.b"] == record["coefficients"][1][1]
        assert row["mean.c"] == pytest.approx(np.mean([line[2] for line in record["coefficients"]]))
        assert row["scores.first.a"] is None  # a trace from before scores were recorded
    assert rows[0]["vertices"] == "a 0.75; base 0.25"
    assert rows[-1]["vertices"] is None


def test_records_without_a_number_count_by_their_place():
    run = Run("r", None, ("a",), ("l",), ({"value": 1.0}, {"value": 0.5}))
    assert [row["value"] for row in select(wide(run), first=1)] == [0.5]


def test_long_rows_are_the_matrices_entry_by_entry(write_run):
    run = read_run(write_run(iterations=4))
    rows = long(run, wide(run))
    _, path = run.trajectory()
    assert [row["coefficient"] for row in rows] == path.ravel().tolist()
    assert [(r["iteration"], r["layer"], r["expert"]) for r in rows[2:5]] == [
        (0, "first", "c"), (0, "second", "a"), (0, "second", "b"),
    ]  # fmt: skip
    chosen = long(run, wide(run, experts=["c"], layers=["second"]), experts=["c"], layers=["second"])
    assert [row["coefficient"] for row in chosen] == path[:, 1, 2].tolist()


def test_filters_are_conjunctions(write_run):
    rows = wide(read_run(write_run(iterations=12)))  # value 2/(k+1), gap 1/(k+1)²
    kept = select(
        rows, first=2, last=9, every=3, conditions=[Condition.parse("gap<0.05"), Condition.parse("value > .2")]
    )
    assert [row["iteration"] for row in kept] == [6]
    assert [row["iteration"] for row in select(rows, conditions=[Condition.parse("step >= 0")])] == list(range(11))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("gap < 0.1", ("gap", "<", 0.1)), ("extra.kind == 'drop'", ("extra.kind", "==", "drop")),
     ("a.b-c>=1e-3", ("a.b-c", ">=", 1e-3)), ("x!=y", ("x", "!=", "y"))],
)  # fmt: skip
def test_conditions_are_parsed(text, expected):
    condition = Condition.parse(text)
    assert (condition.column, condition.comparison, condition.value) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gap", "expected COLUMN OP VALUE"),
        ("gap =< 1", "expected COLUMN OP VALUE"),
        ("gap < small", "not a number"),
    ],
)
def test_conditions_that_are_none_are_refused(text, message):
    with pytest.raises(RunError, match=message):
        Condition.parse(text)


def test_names_that_do_not_exist_are_refused_with_those_that_do(write_run):
    run = read_run(write_run())
    with pytest.raises(RunError, match=r"no expert 'z'\. It has a, b, c"):
        wide(run, experts=["z"])
    with pytest.raises(RunError, match=r"no column 'gapp'. Columns: iteration, value"):
        select(wide(run), conditions=[Condition.parse("gapp < 1")])
    with pytest.raises(RunError, match=r"no column 'none\.\*'"):
        pick(wide(run), ["none.*"])
    with pytest.raises(RunError, match="do not compare to a number"):
        select(wide(run), conditions=[Condition.parse("vertices < 1")])


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "parquet"])
def test_exports_are_read_back_as_they_were(form, write_run, tmp_path):
    run = read_run(write_run(experts=('a"b', "c,d", "<e>"), iterations=4))
    rows = wide(run)
    path = tmp_path / f"out.{form}"
    if form == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    export(rows, list(rows[0]), path)
    if form == "csv":
        with path.open(newline="") as stream:
            back = list(csv.DictReader(stream))
        assert [row["vertices"] for row in back] == [row["vertices"] or "" for row in rows]
        assert [float(row["coefficients.second.<e>"]) for row in back] == [
            row["coefficients.second.<e>"] for row in rows
        ]
        return
    if form == "jsonl":
        back = [json.loads(line) for line in path.read_text().splitlines()]
    elif form == "json":
        back = json.loads(path.read_text())
    else:
        back = parquet.read_table(path).to_pylist()
    assert back == rows


def test_an_unknown_format_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(RunError, match=r"ends in \.csv"):
        export([], list(LONG), tmp_path / "a.xlsx")
    with pytest.raises(RunError, match="there is no folder"):
        export([], list(LONG), tmp_path / "no" / "a.csv")


def test_objects_in_extra_have_a_column_an_entry(write_run):
    folder = write_run(iterations=3)
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    lines[2]["extra"] = {"kind": "drop", "task_weights": {"one": 0.25, "two": 0.75}, "list": [1, 2]}
    (folder / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = wide(read_run(folder))
    assert [row["extra.task_weights.two"] for row in rows] == [None, 0.75, None]
    assert [row["extra.kind"] for row in rows] == [None, "drop", None]
    assert rows[1]["extra.list"] == "[1, 2]"
