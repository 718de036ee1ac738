from __future__ import annotations

import json
from pathlib import Path


def test_a_real_run_is_shown_filtered_and_exported(solved, run):
    shown = run("trace", solved)
    assert shown.exit_code == 0, shown.stderr
    assert len(shown.stdout.splitlines()) == 1 + 5
    assert all(name in shown.stdout for name in ("iteration", "gap", "vertices", "samples"))
    filtered = run("trace", solved, "--from", 1, "--every", 2, "--where", "iteration < 4", "--json")
    assert [row["iteration"] for row in json.loads(filtered.stdout)] == [2]
    for name in ("wide.csv", "wide.jsonl", "wide.json"):
        done = run("trace", solved, "--out", name)
        assert done.exit_code == 0, done.stderr
        assert Path(name).stat().st_size > 100
    long = run("trace", solved, "--long", "--expert", "red", "--out", "long.jsonl")
    assert long.exit_code == 0, long.stderr
    rows = [json.loads(line) for line in Path("long.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in (solved / "trace.jsonl").read_text().splitlines()]
    column = records[0]["experts"].index("red")
    assert [r["coefficient"] for r in rows] == [m[column] for line in records[1:] for m in line["coefficients"]]
    assert [r["score"] for r in rows] == [m[column] for line in records[1:] for m in line["scores"]]


def test_columns_of_experts_and_layers(solved, run):
    layer = json.loads((solved / "trace.jsonl").read_text().splitlines()[0])["layers"][0]
    mean = run("trace", solved, "--expert", "blue")
    assert "mean.blue" in mean.stdout
    one = run("trace", solved, "--expert", "blue", "--layer", layer)
    assert f"coefficients.{layer}.blue" in one.stdout
    assert "mean.blue" not in one.stdout
    tasks = run("trace", solved, "--columns", "iteration, tasks.*", "--json")
    assert list(json.loads(tasks.stdout)[0]) == ["iteration", "tasks.blue", "tasks.green", "tasks.red"]


def test_mistakes_are_told_in_one_line(solved, run):
    for flags, message in (
        (["--where", "gap"], "expected COLUMN OP VALUE"),
        (["--columns", "nothing"], "no column 'nothing'"),
        (["--columns", " , "], "names no column"),
        (["--columns", ""], "names no column"),
        (["--expert", "nobody"], "no expert 'nobody'"),
        (["--long", "--columns", "gap"], "--columns cannot change them"),
        (["--out", "a.xlsx"], "ends in .csv"),
    ):
        result = run("trace", solved, *flags)
        assert result.exit_code == 2, flags
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert "there is no such folder" in run("trace", "nowhere").stderr


def test_where_nothing_is_left_it_says_so(solved, run):
    shown = run("trace", solved, "--from", 99, "--json")
    assert (shown.exit_code, json.loads(shown.stdout)) == (0, [])
    assert "leave none" in shown.stderr


def test_a_run_that_has_only_begun_says_so(run):
    Path("begun").mkdir()
    Path("begun/trace.jsonl").write_text(json.dumps({"schema": 1, "experts": ["a"], "layers": ["l"]}) + "\n")
    shown = run("trace", "begun")
    assert shown.exit_code == 0
    assert "no iteration yet" in shown.stderr


def test_a_long_trace_is_thinned_on_the_terminal_and_says_so(run):
    Path("r").mkdir()
    header = {"schema": 1, "experts": ["a"], "layers": ["l"]}
    lines = [{"iteration": k, "value": 1.0 / (k + 1), "coefficients": [[0.1]], "seconds": k} for k in range(200)]
    Path("r/trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *lines]))
    shown = run("trace", "r")
    assert "every 4th of 200 iterations and the last" in shown.stderr
    assert shown.stdout.splitlines()[-1].split()[0] == "199"
    assert len(run("trace", "r", "--every", 1).stdout.splitlines()) == 201
