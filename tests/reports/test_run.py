from __future__ import annotations

import json

import numpy as np
import pytest
from mergesolve.reports import Run, RunError, read_run, read_runs


def test_a_finished_run_is_read_completely(write_run):
    run = read_run(write_run("mine", iterations=6))
    assert run.name == "mine"
    assert run.finished
    assert run.status == "max_iter"
    assert run.experts == ("a", "b", "c")
    assert run.layers == ("first", "second")
    np.testing.assert_array_equal(run.iterations, np.arange(6))
    np.testing.assert_allclose(run.series("value"), 2.0 / np.arange(1, 7))
    np.testing.assert_allclose(run.task_losses()["two"], 3.0 / np.arange(1, 7))


def test_null_becomes_nan_in_a_series(write_run):
    steps = read_run(write_run(iterations=4)).series("step")
    assert np.isnan(steps[-1])
    assert np.isfinite(steps[:-1]).all()


def test_final_is_the_mean_of_the_returned_rows_of_each_layer(write_run):
    run = read_run(write_run())
    last = np.asarray(run.records[-1]["coefficients"])
    assert run.coefficients is not None
    assert run.coefficients.shape == (4, 3)
    np.testing.assert_allclose(run.final, last)  # rows are the layer's mean ± 0.01


def test_final_of_a_run_that_is_going_is_its_last_iterate(write_run):
    run = read_run(write_run(finished=False))
    assert not run.finished
    assert run.status == "running"
    np.testing.assert_array_equal(run.final, run.records[-1]["coefficients"])


@pytest.mark.parametrize("tail", ['{"iteration": 6, "val', "{", '{"iteration": 6, "coefficients": [[0.1, '])
def test_a_last_half_line_is_ignored(write_run, tail):
    assert len(read_run(write_run(finished=False, tail=tail)).records) == 6


def test_a_damaged_complete_line_is_named(write_run):
    folder = write_run(finished=False)
    lines = (folder / "trace.jsonl").read_text().split("\n")
    lines[3] = lines[3][:20]
    (folder / "trace.jsonl").write_text("\n".join(lines))
    with pytest.raises(RunError, match=r"trace\.jsonl, line 4"):
        read_run(folder)


def test_records_that_a_resumed_run_wrote_again_count_once(write_run):
    folder = write_run(finished=False, iterations=4)
    again = json.loads((folder / "trace.jsonl").read_text().split("\n")[3])
    with (folder / "trace.jsonl").open("a") as file:
        file.write(json.dumps({**again, "value": 77.0}) + "\n")
    run = read_run(folder)
    assert len(run.records) == 4
    assert run.series("value")[2] == 77.0


def test_choices_are_shares_by_vertex(write_run):
    run = read_run(write_run())
    assert run.choices(run.records[0]) == {"a": 0.75, "base": 0.25}
    assert run.choices({"vertices": ["b", "b", "a", "b"]}) == {"b": 0.75, "a": 0.25}
    assert run.choices({"vertices": None}) == {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: [p.unlink() for p in f.iterdir()], "holds neither result.json nor trace.jsonl"),
        (lambda f: (f / "result.json").write_text("{"), r"result\.json: not JSON"),
        (lambda f: (f / "result.json").write_text("[1]"), "expected a JSON object, found list"),
        (
            lambda f: (f / "coefficients.safetensors").write_bytes(b"x" * 30),
            r"coefficients\.safetensors: cannot be read",
        ),
        (lambda f: (f / "trace.jsonl").write_text('{"iteration": 0}\n'), "first line is not a header"),
        (lambda f: (f / "trace.jsonl").write_text('{"schema": 99}\n'), "schema 99, this version reads 1"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_with_the_file(write_run, spoil, message):
    folder = write_run()
    spoil(folder)
    with pytest.raises(RunError, match=message):
        read_run(folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(RunError, match="there is no such folder"):
        read_run(tmp_path / "nothing")


def test_coefficients_of_another_shape_than_the_header_are_refused(write_run):
    folder = write_run(finished=False)
    lines = (folder / "trace.jsonl").read_text().split("\n")
    lines[0] = json.dumps({**json.loads(lines[0]), "experts": ["a", "b"]})
    (folder / "trace.jsonl").write_text("\n".join(lines))
    with pytest.raises(RunError, match=r"shape \[2, 3\]"):
        read_run(folder).trajectory()


def test_runs_of_one_name_are_told_apart_by_their_parents(write_run):
    runs = read_runs([write_run("x/run"), write_run("y/run", seed=1)])
    assert [run.name for run in runs] == ["x/run", "y/run"]


def test_as_many_parents_as_it_takes_and_one_that_is_given_again_counts_on(write_run):
    first, second = write_run("a/x/run"), write_run("b/x/run")
    assert [run.name for run in read_runs([first, second])] == ["a/x/run", "b/x/run"]
    assert [run.name for run in read_runs([first, first])] == ["run", "run (2)"]
    assert [run.name for run in read_runs([first, second, first])] == ["a/x/run", "b/x/run", "a/x/run (2)"]


@pytest.mark.parametrize(("base", "gap", "free"), [("free", None, True), ("free", 0.5, False), ("capped", None, False)])
def test_constraints_within_the_free_domain_are_free_where_no_gap_is_known(base, gap, free):
    header = {"domain": {"name": "polytope", "domain": {"name": base}}}
    assert Run("r", None, ("a",), ("l",), ({"gap": gap},), header).free is free
