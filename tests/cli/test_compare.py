from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """A second run on the tiny pool, by projected gradient; not to be written to."""
    from click.testing import CliRunner
    from mergesolve.cli import main

    folder = tmp_path_factory.mktemp("other") / "pg"
    flags = ["--preset", "projected-gradient", "--max-iter", "7", "--run", str(folder), "--no-merge", "--no-figures"]
    result = CliRunner().invoke(main, ["solve", str(tiny / "recipe.yaml"), *flags])
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("by", ["iteration", "seconds", "gradients", "evaluations", "samples"])
def test_real_runs_are_aligned_by_every_axis(by, solved, other, run):
    result = run("compare", solved, other, "--by", by, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["distance"] == "layers"
    last = found["marks"][-1]["states"]
    assert last["pg"]["iteration"] == 7
    records = [json.loads(line) for line in (solved / "trace.jsonl").read_text().splitlines()][1:]
    assert last["run"]["value"] == records[-1]["value"]
    assert last["run"]["tasks"] == records[-1]["tasks"]
    assert last["run"]["distance"] == 0
    assert last["pg"]["distance"] > 0
    assert [end["status"] for end in found["final"]] == ["max_iter", "max_iter"]
    assert all(end["samples"] > 0 for end in found["final"])


def test_tables_and_figure(solved, other, run):
    result = run("compare", solved, other, "--marks", 3, "--figure", "both.svg")
    assert result.exit_code == 0, result.stderr
    for text in ("distance", "loss at iteration 7", "= ", "peak", "samples"):
        assert text in result.stdout
    assert "objective" in Path("both.svg").read_text()


def test_a_run_beside_itself_is_two_runs(solved, run):
    found = json.loads(run("compare", solved, solved, "--at", 1, "--json").stdout)
    assert found["runs"] == ["run", "run (2)"]
    assert list(found["marks"][0]["states"]) == found["runs"]


def test_a_mark_is_shown_as_it_was_given(solved, other, run):
    result = run("compare", solved, other, "--at", 2.5)
    assert "loss at iteration 2.5" in result.stdout
    assert "loss at seconds 0.004" in run("compare", solved, other, "--by", "seconds", "--at", 0.004).stdout


def test_mistakes_are_told_in_one_line(solved, other, run):
    for arguments, message in (
        ((solved,), "two runs or more"),
        ((solved, other, "--by", "sample"), "Did you mean 'samples'?"),
        ((solved, other, "--at", 1, "--marks", 3), "Leave out one"),
        ((solved, other, "--figure", "a.txt"), "ends in .png"),
        ((solved, other, "--figure", "none/a.png"), "there is no folder 'none'"),
        ((solved, other, "--at", "nan"), "Give a number of at least 0"),
        ((solved, other, "--at", "-1"), "Give a number of at least 0"),
        ((solved, "nowhere"), "there is no such folder"),
    ):
        result = run("compare", *arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
