"""Fronts from the front door."""

import json

import numpy as np
import pytest
from mergesolve.reports import read_run
from mergesolve.solvers import Front, Result

TWO = ("--blocks", "model", "--divisions", 2, "--max-iter", 4)


@pytest.fixture
def two(tiny, tmp_path):
    """The recipe of the tiny pool with two tasks."""
    import yaml

    fields = yaml.safe_load((tiny / "recipe.yaml").read_text())
    fields["tasks"] = fields["tasks"][:2]
    fields["solver"] = "projected-gradient"
    path = tiny / "two.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_a_front_is_written_with_a_run_a_preference_and_goes_on(two, run, tmp_path):
    result = run("pareto", two, *TWO, "--out", "front", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert [record["name"] for record in told["records"][:2]] == ["only-blue", "only-green"]
    assert (tmp_path / "front/front.png").stat().st_size > 5000
    assert len((tmp_path / "front/front.csv").read_text().splitlines()) == 4
    front = Front.load("front")
    assert front.losses[0, 0] < front.losses[2, 0] < front.losses[1, 0]
    middle = told["records"][2]["name"]
    assert read_run(f"front/{middle}").finished
    assert run("materialize", f"front/{middle}", "--out", "merged.safetensors").exit_code == 0
    (tmp_path / "front/front.json").unlink()
    (tmp_path / "front" / middle / "result.json").unlink()
    (tmp_path / "front" / middle / "checkpoint.safetensors").unlink()
    resumed = run("pareto", "--resume", "front", "--no-figures")
    assert resumed.exit_code == 0, resumed.stderr
    assert "hypervolume" in resumed.stdout
    np.testing.assert_array_equal(Front.load("front").coefficients, front.coefficients)
    assert Result.load(f"front/{middle}").described_objective["scalarization"]["name"] == "chebyshev"


def test_a_surrogate_tells_its_error_beside_true_losses(two, run):
    flags = ("--blocks", "model", "--domain", "simplex", "--divisions", 2)
    result = run("pareto", two, *flags, "--surrogate", "--samples", 8, "--out", "front")
    assert result.exit_code == 0, result.stderr
    assert "R²" in result.stdout
    front = Front.load("front")
    assert front.predicted.shape == front.losses.shape == (3, 2)
    assert front.about["surrogate"]["samples"] == 8
    assert min(front.about["surrogate"]["r2"].values()) > 0.5


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--preference", "rad=1"), "unknown task 'rad'"),
        (("--preference", "blue=1", "--divisions", 3), "two ways"),
        (("--preference", "blue"), "--preference 'blue': expected TASK=NUMBER"),
        (("--reference", ""), "--reference '': expected TASK=NUMBER"),
        (("--samples", 3), "Add --surrogate"),
        (("--solver", "mgda"), "weighs tasks itself"),
        (("--divisions", 0), "at least 1 division"),
        (("--method", "best"), "'method' parameter of Plan"),
        (("--surrogate", "--domain", "free"), "'free' has no bounds"),
        (("--set", "scalarization=worst"), "cannot have 'scalarization'"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(flags, match, two, run, tmp_path):
    result = run("pareto", two, "--blocks", "model", *flags, "--out", "front")
    assert result.exit_code == 2
    assert match.lower() in result.stderr.lower()
    assert not (tmp_path / "front").exists()
    assert run("pareto", "--resume", "front").exit_code == 2


def test_losses_of_several_objectives_are_preferred_by_their_own_names(two, run, tmp_path):
    import yaml

    fields = yaml.safe_load(two.read_text())
    first, second = (task["name"] for task in fields["tasks"])
    fields["objective"] = [{"name": "cross-entropy"}, {"name": "entropy", "tasks": [first], "weight": 0.5}]
    two.write_text(yaml.safe_dump(fields))
    asked = ("--preference", f"{second}=1,{first} (2)=3", "--blocks", "model", "--max-iter", 1, "--no-figures")
    done = run("pareto", two, *asked, "--out", "front")
    assert done.exit_code == 0, done.stderr
    front = Front.load("front")
    assert front.tasks == (first, second, f"{first} (2)")
    np.testing.assert_allclose(front.preferences, [[0, 0.25, 0.75]])
    alone = run("pareto", two, "--set", "objective={name: entropy, tasks: [" + first + "]}", "--out", "one")
    assert alone.exit_code == 2
    assert f"has one alone: {first}" in alone.stderr
    assert not (tmp_path / "one").exists()


def test_resume_takes_nothing_beside_it(run):
    result = run("pareto", "--resume", "front", "--divisions", 3)
    assert result.exit_code == 2
    assert "--divisions" in result.stderr
