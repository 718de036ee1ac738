"""Solves on accuracy from the command line: searches by values end to end, and what needs a gradient is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mergesolve.reports import read_run, save_figures
from safetensors.numpy import load_file


def answer(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("preset", ["evolution", "bayesian-scale"])
def test_presets_raise_accuracy_without_a_gradient_and_without_a_warning(preset, tiny, run, tmp_path):
    out = tmp_path / "run"
    iterations = "30" if preset == "evolution" else "7"
    done = run(
        "solve", tiny / "recipe.yaml", "--preset", preset, "--domain", "free", "--max-iter", iterations, "--run", out
    )
    assert done.exit_code == 0, done.output
    assert "none: the objective has no gradient" in done.output
    assert "Warning" not in done.output
    result = answer(out)
    assert (result["gap"], result["stationarity"], result["counts"]["gradients"]) == (None, None, 0)
    assert result["data"]["gradient_samples"] == 0
    lines = [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()][1:]
    assert result["objective"] == min(line["value"] for line in lines) < lines[0]["value"]
    assert set(lines[0]["tasks"]) == {"red", "green", "blue"}  # accuracies by task cost nothing more
    assert lines[0]["gap"] is None
    assert lines[0]["scores"] is None
    assert save_figures([read_run(out)], tmp_path / "figures")


def test_a_search_that_was_cut_short_goes_on_to_the_same_coefficients(tiny, run, tmp_path):
    common = ("solve", tiny / "recipe.yaml", "--objective", "accuracy", "--solver", "cma-es", "--blocks", "model")
    assert run(*common, "--max-iter", "20", "--run", tmp_path / "whole").exit_code == 0
    assert run(*common, "--max-iter", "9", "--run", tmp_path / "cut").exit_code == 0
    assert run("solve", "--resume", tmp_path / "cut", "--max-iter", "20").exit_code == 0
    whole, cut = (load_file(tmp_path / name / "coefficients.safetensors") for name in ("whole", "cut"))
    assert (whole["coefficients"] == cut["coefficients"]).all()
    assert answer(tmp_path / "whole")["best_iteration"] == answer(tmp_path / "cut")["best_iteration"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--solver", "frank-wolfe"), "FrankWolfe needs gradients, and the objective has none. Take a solver that"),
        (("--solver", "cma-es", "--set", "objective.batch_size=5"), "those of minibatches do not compare"),
        (("--solver", "bayesian", "--set", "solver.over=coefficients", "--blocks", "row"), "by values alone, and is"),
        (("--solver", "nelder-mead", "--set", "solver.over=scale", "--domain", "simplex"), "nothing to choose on"),
    ],
)
def test_what_cannot_run_on_accuracy_is_a_mistake_of_the_user_and_leaves_nothing(flags, message, tiny, run, tmp_path):
    out = tmp_path / "run"
    done = run("solve", tiny / "recipe.yaml", "--objective", "accuracy", *flags, "--run", out)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not out.exists()
