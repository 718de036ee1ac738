"""Scalarizations and bounds from the front door."""

import json

import numpy as np
import pytest
from mergesolve.cli.many import bound_fields
from mergesolve.cli.names import UsageProblem
from mergesolve.solvers import ConstrainedResult, Result

FAST = ("--blocks", "model", "--solver", "projected-gradient", "--no-merge", "--no-figures", "--json")


def test_bounds_are_read_as_people_write_them():
    assert bound_fields("chess <= 0.3") == {"bound": 0.3, "tasks": ["chess"]}
    assert bound_fields(" chess, digits<=1e-1") == {"bound": 0.1, "tasks": ["chess", "digits"]}
    assert bound_fields("retention <= 0.02") == {"bound": 0.02, "objective": "retention"}
    assert bound_fields("entropy(chess, digits) <= 2") == {
        "bound": 2.0,
        "objective": "entropy",
        "tasks": ["chess", "digits"],
    }
    for text in ("chess", "chess >= 1", "chess <= low", "nothing(chess) <= 1"):
        with pytest.raises(UsageProblem):
            bound_fields(text)


def test_a_bound_on_a_task_is_held_and_has_a_price(tiny, run):
    flags = ("--max-iter", 15, "--subject-to", "red <= 0.5", "--set", "subject_to.rounds=4", "--run", "bounded")
    bounded = run("solve", tiny / "recipe.yaml", *FAST, *flags)
    assert bounded.exit_code == 0, bounded.stderr
    summary = json.loads(bounded.stdout)
    assert summary["constraint"] <= 0.5 + 0.02
    assert summary["multiplier"] > 0
    assert set(summary["tasks"]) == {"blue", "green"}
    assert isinstance(Result.load("bounded"), Result)
    assert ConstrainedResult.load("bounded").multiplier == summary["multiplier"]
    flags = ("--max-iter", 1, "--set", "subject_to.rounds=1", "--subject-to", "retention(red) <= 0.5")
    printed = run("solve", tiny / "recipe.yaml", *FAST[:-1], *flags)
    assert printed.exit_code == 0, printed.stderr
    assert "asked for; violation" in printed.stdout
    assert "price" in printed.stdout


def test_a_bounded_run_is_resumed_where_it_was(tiny, run):
    flags = ("--max-iter", 2, "--subject-to", "red <= 0.2", "--set", "subject_to.rounds=2")
    whole = run("solve", tiny / "recipe.yaml", *FAST, *flags, "--run", "whole")
    part = run("solve", tiny / "recipe.yaml", *FAST, *flags, "--time-limit", 0, "--run", "part")
    assert (whole.exit_code, part.exit_code) == (0, 0), whole.stderr + part.stderr
    assert json.loads(part.stdout)["status"] == "time_limit"
    resumed = run("solve", "--resume", "part", "--time-limit", 1000, "--json", "--no-merge", "--no-figures")
    assert resumed.exit_code == 0, resumed.stderr
    np.testing.assert_array_equal(Result.load("part").coefficients, Result.load("whole").coefficients)
    assert "Give a larger --rounds" in run("solve", "--resume", "part").stderr
    more = run("solve", "--resume", "part", "--rounds", 3, "--json", "--no-merge", "--no-figures")
    assert more.exit_code == 0, more.stderr
    assert len(ConstrainedResult.load("part").history) == 3
    assert "--resume part --rounds N" in more.stderr


def test_the_worst_task_is_minimized_smoothed_or_as_it_is(tiny, run):
    losses = {}
    for name, flags in {
        "mean": (),
        "worst": ("--scalarize", "worst:smoothing=0.02"),
        "minimax": ("--solver", "minimax"),
        "chebyshev": ("--scalarize", "chebyshev:preferences={red: 5},smoothing=0.02"),
    }.items():
        result = run("solve", tiny / "recipe.yaml", *FAST, *flags, "--max-iter", 20, "--run", name)
        assert result.exit_code == 0, result.stderr
        losses[name] = json.loads(result.stdout)["tasks"]
    worst = {name: max(found.values()) for name, found in losses.items()}
    assert worst["minimax"] < worst["mean"]
    assert worst["worst"] < worst["mean"]
    assert losses["chebyshev"]["red"] < losses["worst"]["red"]
    assert "scalarization" in Result.load("worst").described_objective
    again = run("solve", "worst/recipe.yaml", *FAST, "--run", "again")
    assert again.exit_code == 0, again.stderr
    np.testing.assert_array_equal(Result.load("again").coefficients, Result.load("worst").coefficients)


def test_a_bound_that_is_proven_out_of_reach_is_not_answered_with_more_rounds(tiny, run):
    flags = ("--subject-to", "retention <= -5", "--rounds", 2, "--max-iter", 3, "--run", "r")
    result = run("solve", tiny / "recipe.yaml", *FAST, *flags)
    assert result.exit_code == 0, result.stderr
    assert ConstrainedResult.load("r").least > -5
    assert "try a larger bound: none below" in result.stderr
    assert "--rounds" not in result.stderr


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--scalarize", "worse"), "Did you mean 'worst'"),
        (("--scalarize", "chebyshev:preferences={rad: 2}"), "Did you mean 'red'"),
        (("--scalarize", "worst", "--solver", "mgda"), "weighs the tasks itself"),
        (("--subject-to", "rad <= 1"), "Did you mean 'red'"),
        (("--subject-to", "retension <= 1"), "unknown task or objective 'retension'. Did you mean 'retention'"),
        (("--rounds", "3"), "--rounds is of a bound"),
        (("--subject-to", "red, green, blue <= 1"), "nothing is left to minimize"),
        (("--subject-to", "red 1"), "expected TASK <= NUMBER"),
        (("--subject-to", "red <= 1", "--solver", "mgda"), "price of a constraint"),
    ],
)
def test_mistakes_are_told_before_anything_runs(flags, match, tiny, run, tmp_path):
    result = run("solve", tiny / "recipe.yaml", *FAST, *flags)
    assert result.exit_code == 2
    assert match in result.stderr
    assert not list(tmp_path.iterdir())
