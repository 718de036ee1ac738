from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from mergesolve.solvers import Polytope, Result, make_domain
from safetensors.numpy import load_file

QUICK = ("--max-iter", 4, "--no-merge", "--no-figures")
BLUE, GREEN, RED = range(3)


def coefficients(folder):
    return load_file(Path(folder) / "coefficients.safetensors")["coefficients"]


def iterates(folder):
    """The coefficients of every iterate [iterations, layers, experts]; with blocks 'layer', these are the rows."""
    lines = (Path(folder) / "trace.jsonl").read_text().splitlines()[1:]
    return np.array([json.loads(line)["coefficients"] for line in lines])


@pytest.mark.parametrize("solver", ["projected-gradient", "frank-wolfe"])
def test_a_cap_changes_the_merge_and_every_iterate_obeys_it(solver, tiny, run):
    recipe, common = tiny / "recipe.yaml", ("--solver", solver, *QUICK, "--quiet")
    assert run("solve", recipe, *common, "--run", "plain").exit_code == 0
    asked = ("--constraint", "blue <= 0.1", "--constraint", "mean(green) >= 0.4")
    result = run("solve", recipe, *common, *asked, "--run", "r")
    assert result.exit_code == 0, result.stderr
    assert coefficients("plain")[:, BLUE].max() > 0.2
    seen = iterates("r")
    assert len(seen) > 2
    assert seen[:, :, BLUE].max() <= 0.1 + 1e-9
    assert seen[:, :, GREEN].mean(axis=1).min() >= 0.4 - 1e-9
    described = make_domain(Result.load("r").domain)
    assert isinstance(described, Polytope)
    assert described.constraints == ("blue <= 0.1", "mean(green) >= 0.4")


def test_groups_globs_and_recipes(tiny, run):
    fields = yaml.safe_load((tiny / "recipe.yaml").read_text())
    fields |= {"constraints": ["sum(warm) <= 0.2", "each(*) <= 0.7"], "groups": {"warm": ["re*", "blue"]}}
    Path("own.yaml").write_text(yaml.safe_dump(fields))
    for name in ("base.safetensors", "net.py", "experts", *(f"{task['name']}_train.npz" for task in fields["tasks"])):
        Path(name).symlink_to(tiny / name)
    assert run("solve", "own.yaml", *QUICK, "--quiet", "--run", "r").exit_code == 0
    assert (coefficients("r")[:, RED] + coefficients("r")[:, BLUE]).max() <= 0.2 + 1e-9
    flags = ("--group", "warm=green,red", "--constraint", "sum(warm) <= 0.1")
    assert run("solve", "own.yaml", *flags, *QUICK, "--quiet", "--run", "other").exit_code == 0
    assert (coefficients("other")[:, GREEN] + coefficients("other")[:, RED]).max() <= 0.1 + 1e-9


def test_the_recipe_of_the_run_and_its_resumption_keep_the_constraints(tiny, run):
    recipe, asked = tiny / "recipe.yaml", ("--constraint", "sum(blue, red) <= 0.15", "--solver", "projected-gradient")
    assert run("solve", recipe, *asked, "--quiet", *QUICK, "--run", "short").exit_code == 0
    written = yaml.safe_load(Path("short/recipe.yaml").read_text())
    assert written["constraints"] == ["sum(blue, red) <= 0.15"]
    assert (written["domain"], written["start"]) == ({"name": "capped"}, "nearest:average")
    assert run("solve", "short/recipe.yaml", "--quiet", *QUICK, "--run", "again").exit_code == 0
    np.testing.assert_array_equal(coefficients("again"), coefficients("short"))
    resumed = run("solve", "--resume", "short", "--max-iter", 7, "--quiet", "--no-merge", "--no-figures")
    assert resumed.exit_code == 0, resumed.stderr
    assert run("solve", recipe, *asked, "--quiet", *QUICK, "--max-iter", 7, "--run", "long").exit_code == 0
    np.testing.assert_array_equal(coefficients("short"), coefficients("long"))


def test_a_default_start_is_moved_and_says_so(tiny, run):
    asked = ("--constraint", "blue <= 0.1", *QUICK)
    moved = run("solve", tiny / "recipe.yaml", *asked, "--run", "r")
    assert moved.exit_code == 0
    assert "'average' is outside of the domain (it breaks 'blue <= 0.1'); the solve begins at the point" in moved.stderr
    inside = run("solve", tiny / "recipe.yaml", "--constraint", "blue <= 0.5", *QUICK, "--run", "i")
    assert "the solve begins" not in inside.stderr
    np.testing.assert_allclose(iterates("i")[0], 1 / 3)


def test_a_start_that_was_asked_for_is_refused_with_the_remedy(tiny, run):
    asked = ("--constraint", "blue <= 0.1", *QUICK, "--quiet")
    refused = run("solve", tiny / "recipe.yaml", *asked, "--start", "average", "--run", "r")
    assert refused.exit_code == 2
    assert "it breaks 'blue <= 0.1'" in refused.stderr
    assert "nearest:average" in refused.stderr
    assert not Path("r").exists()
    assert run("solve", tiny / "recipe.yaml", *asked, "--start", "nearest:expert:blue", "--run", "r").exit_code == 0
    np.testing.assert_allclose(iterates("r")[0][0], [0.1, 0, 0], atol=1e-9)
    assert run("solve", tiny / "recipe.yaml", *asked, "--start", "nearest:run:r", "--run", "s").exit_code == 0
    assert Path(yaml.safe_load(Path("s/recipe.yaml").read_text())["start"].removeprefix("nearest:run:")).is_absolute()


def test_a_budget_of_experts(tiny, run):
    asked = ("--constraint", "count(*) <= 1", "--solver", "projected-gradient", *QUICK, "--quiet")
    assert run("solve", tiny / "recipe.yaml", *asked, "--run", "r").exit_code == 0
    assert np.count_nonzero(iterates("r"), axis=2).max() == 1
    assert Result.load("r").domain["name"] == "sparse"
    assert run("solve", "--resume", "r", "--max-iter", 5, "--quiet", "--no-merge", "--no-figures").exit_code == 0


REFUSED = {
    "conflict": (
        ["blue >= 0.7", "green >= 0.5"],
        ["'blue >= 0.7' and 'green >= 0.5' within 'capped' (together they ask for blue + green >= 1.2", "Relax one"],
    ),
    "typing": (["blu <= 0.1"], ["unknown expert 'blu'. Did you mean 'blue'?", "  blu <= 0.1\n  ^^^"]),
    "grammar": (["blue < 0.1"], ["write '<='", "  blue < 0.1\n       ^"]),
    "block": (["blue[9] <= 0.1"], ["no block matches '9'"]),
    "budget beside others": (["count(*) <= 2", "blue <= 0.1"], ["cannot be combined with other constraints"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_end_with_exit_code_2_before_a_model_is_made(case, tiny, run, monkeypatch):
    def never(*_):
        raise AssertionError("a model was made")

    monkeypatch.setattr("mergesolve.cli.setup.Setup._module", never)
    texts, messages = REFUSED[case]
    result = run("solve", tiny / "recipe.yaml", *(part for text in texts for part in ("--constraint", text)), *QUICK)
    assert result.exit_code == 2
    for message in messages:
        assert message in result.stderr
    assert not Path("runs").exists()


def test_where_the_recipe_names_its_experts_no_file_is_opened(run):
    result = run(
        "solve", "--base", "no.safetensors", "--expert", "a=no.safetensors", "--expert", "b=no.safetensors",
        "--constraint", "sum(a, b) >= 1.1",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "ask" in result.stderr
    assert "has at most 1" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--group", "g"), "expected NAME=VALUE"), (("--group", "g=blue"), "groups name experts for constraints")],
)
def test_groups_that_are_of_no_use_are_refused(flags, message, tiny, run):
    result = run("solve", tiny / "recipe.yaml", *flags)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_zoo_knows_its_experts_before_it_is_loaded(zoo, run):
    result = run("solve", "--zoo", "--task", "blue", "--constraint", "pink <= 0.1", *QUICK)
    assert result.exit_code == 2
    assert "unknown expert 'pink'" in result.stderr
