from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mergesolve.solvers
import numpy as np
import pytest
import yaml
from mergesolve.cli.recipe import from_mapping
from mergesolve.solvers import PRESETS
from safetensors import safe_open
from safetensors.numpy import load_file

from .conftest import recipe_fields


def coefficients(folder):
    return load_file(Path(folder) / "coefficients.safetensors")["coefficients"]


def records(folder):
    lines = [json.loads(line) for line in (Path(folder) / "trace.jsonl").read_text().splitlines()]
    return lines[1:]


def test_a_solve_leaves_everything_that_it_produced(solved):
    assert {path.name for path in solved.iterdir()} >= {
        "recipe.yaml",
        "result.json",
        "coefficients.safetensors",
        "trace.jsonl",
        "merged.safetensors",
        "figures",
    }
    figures = {path.name for path in (solved / "figures").iterdir()}
    assert {"trajectories.png", "lines.svg", "heatmap.png", "convergence.svg", "vertices.png", "steps.png"} <= figures


def test_the_merged_checkpoint_is_the_combination_of_the_coefficients(solved, tiny):
    merged = load_file(solved / "merged.safetensors")
    base = load_file(tiny / "base.safetensors")
    result = json.loads((solved / "result.json").read_text())
    matrix = coefficients(solved)
    experts = [load_file(tiny / "experts" / f"{name}.safetensors") for name in result["experts"]]
    rows = {layer: index for layer, [index] in result["layers"].items()}
    for name, tensor in base.items():
        row = matrix[rows[name.split(".")[0]]]
        expected = tensor + sum(w * (e[name].astype(np.float64) - tensor) for w, e in zip(row, experts, strict=True))
        np.testing.assert_allclose(merged[name], expected, atol=1e-5)
    with safe_open(solved / "merged.safetensors", "numpy") as file:
        assert file.metadata()["solver"] == "soft-frank-wolfe"


def test_the_recipe_that_was_written_gives_the_same_coefficients(solved, run):
    again = run("solve", solved / "recipe.yaml", "--run", "again", "--no-merge", "--no-figures", "--quiet")
    assert again.exit_code == 0, again.stderr
    np.testing.assert_array_equal(coefficients("again"), coefficients(solved))


def test_the_recipe_that_was_written_has_all_defaults_and_no_relative_path(solved):
    fields = yaml.safe_load((solved / "recipe.yaml").read_text())
    recipe = from_mapping(fields, PRESETS)
    assert Path(recipe.pool.base or "").is_absolute()
    assert recipe.model.module is not None
    assert Path(recipe.model.module.rpartition(":")[0]).is_absolute()
    written = recipe.solver.plain()
    assert mergesolve.solvers.make_solver(written).describe() == written  # complete: nothing is left to defaults
    assert written == written | PRESETS["fw-soft"]["solver"]
    assert recipe.objectives[0].options.keys() >= {"batch_size", "microbatch", "seed", "label_smoothing"}
    assert set(recipe.pool.experts) == {"blue", "green", "red"}


def test_json_is_the_whole_result_and_nothing_else_is_on_stdout(tiny, run):
    result = run("solve", tiny / "recipe.yaml", "--max-iter", 2, "--run", "r", "--no-figures", "--json")
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["status"] == "max_iter"
    assert summary["success"] is False
    assert summary["run"] == "r"
    assert summary["data"]["labelled"] == 90
    assert summary["recipe"]["max_iter"] == 2
    assert summary["merged"] == ["r/merged.safetensors"]


def test_a_limit_that_was_reached_is_a_warning_that_says_what_to_do(tiny, run):
    result = run("solve", tiny / "recipe.yaml", "--max-iter", 1, "--run", "r", "--no-merge", "--no-figures")
    assert result.exit_code == 0
    assert "Warning: ended as max iter with gap" in result.stderr
    assert "--resume r --max-iter N" in result.stderr
    assert "90 labelled, 0 unlabeled examples" in result.stdout


def test_an_optimal_solve_warns_of_nothing(tiny, run):
    result = run("solve", tiny / "recipe.yaml", "--tol", 10, "--run", "r", "--no-merge", "--no-figures")
    assert result.exit_code == 0
    assert "Warning" not in result.stderr
    assert result.stdout.startswith("status        optimal\n")


def test_runs_get_their_own_folders(tiny, run):
    for expected in ("runs/frank-wolfe", "runs/frank-wolfe-2"):
        arguments = ("--max-iter", 1, "--no-merge", "--no-figures", "--json")
        assert json.loads(run("solve", tiny / "recipe.yaml", *arguments).stdout)["run"] == expected


def test_flags_alone_make_a_recipe(tiny, run):
    result = run(
        "solve", "--base", tiny / "base.safetensors", "--expert", tiny / "experts/*.safetensors",
        "--model", f"{tiny}/net.py:mlp", "--task", f"blue={tiny}/blue_train.npz", "--task", f"red={tiny}/red_train.npz",
        "--preset", "row-distillation", "--max-iter", 3, "--set", "objective.batch_size=8", "--seed", 5,
        "--run", "r", "--no-figures", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["data"] == summary["data"] | {"labelled": 0, "unlabelled": 60, "test_inputs": False}
    assert summary["recipe"]["objective"]["batch_size"] == 8
    assert summary["recipe"]["objective"]["seed"] == 5
    assert summary["blocks"] == "row"


def test_weighted_objectives_and_task_weights_reach_the_solve(tiny, run):
    recipe = recipe_fields(tiny)
    recipe["objective"] = [{"name": "cross-entropy"}, {"name": "entropy", "weight": 0.5}]
    for task, weight in zip(recipe["tasks"], (1.0, 2.0, 1.0), strict=True):
        task["weight"] = weight
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    result = run("solve", "r.yaml", "--max-iter", 0, "--run", "r", "--no-merge", "--no-figures", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    losses = summary["tasks"]
    assert len(losses) == 6
    weights = np.array([0.25, 0.5, 0.25, 0.125, 0.25, 0.125])
    assert summary["objective"] == pytest.approx(float(weights @ np.array(list(losses.values()))))


def test_a_run_can_start_from_another_runs_result(solved, tiny, run):
    arguments = ("--start", f"run:{solved}", "--max-iter", 0, "--run", "r", "--no-merge", "--no-figures", "--quiet")
    assert run("solve", tiny / "recipe.yaml", *arguments).exit_code == 0
    np.testing.assert_array_equal(coefficients("r"), coefficients(solved))


SLOW = """
import sys, time
import mergesolve.solvers.driver as driver
from mergesolve.cli import main
record = driver.record
def slow(*arguments):
    time.sleep(0.05)
    return record(*arguments)
driver.record = slow
main(sys.argv[1:])
"""


def killed_at(iteration: int, arguments: list[str], folder: Path) -> None:
    """Run the command in its own process and kill -9 it once the trace holds that many iterations."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", SLOW, *arguments], env=environment, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            trace = folder / "trace.jsonl"
            if trace.exists() and trace.read_bytes().count(b"\n") > iteration:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        assert process.wait(timeout=60) == -signal.SIGKILL, process.stderr.read() if process.stderr else ""


@pytest.mark.parametrize("preset", ["fw-soft", "row-distillation"])
def test_a_solve_killed_and_resumed_gives_the_coefficients_of_an_uninterrupted_one(preset, tiny, run):
    common = ["solve", str(tiny / "recipe.yaml"), "--preset", preset, "--max-iter", "24", "--no-merge", "--no-figures"]
    whole = run(*common, "--run", "whole", "--quiet")
    assert whole.exit_code == 0, whole.stderr
    killed_at(13, [*common, "--run", "killed"], Path("killed"))
    assert not Path("killed/result.json").exists()
    resumed = run("solve", "--resume", "killed", "--no-merge", "--no-figures", "--quiet")
    assert resumed.exit_code == 0, resumed.stderr
    np.testing.assert_array_equal(coefficients("killed"), coefficients("whole"))
    assert [r["value"] for r in records("killed")] == [r["value"] for r in records("whole")]


def test_an_interrupt_exits_with_130_and_says_how_to_go_on(tiny, run, monkeypatch):
    from mergesolve.cli import console

    def interrupt(self, record):
        if record["iteration"] == 3:
            raise KeyboardInterrupt

    common = ("--max-iter", 12, "--no-merge", "--no-figures")
    with monkeypatch.context() as patch:
        patch.setattr(console.Follower, "__call__", interrupt)
        stopped = run("solve", tiny / "recipe.yaml", *common, "--run", "stopped")
    assert stopped.exit_code == 130
    assert stopped.stderr == "Error: interrupted after 3 iterations; go on with: mergesolve solve --resume stopped\n"
    assert run("solve", "--resume", "stopped", "--no-merge", "--no-figures", "--quiet").exit_code == 0
    assert run("solve", tiny / "recipe.yaml", *common, "--run", "whole", "--quiet").exit_code == 0
    np.testing.assert_array_equal(coefficients("stopped"), coefficients("whole"))


def test_a_run_that_used_up_its_iterations_goes_on_with_more(tiny, run):
    common = ("--no-merge", "--no-figures", "--quiet")
    assert run("solve", tiny / "recipe.yaml", "--max-iter", 10, "--run", "r", *common).exit_code == 0
    refused = run("solve", "--resume", "r", *common)
    assert refused.exit_code == 2
    assert "Give a larger --max-iter to go on" in refused.stderr
    assert run("solve", "--resume", "r", "--max-iter", 15, *common).exit_code == 0
    assert run("solve", tiny / "recipe.yaml", "--max-iter", 15, "--run", "whole", *common).exit_code == 0
    np.testing.assert_array_equal(coefficients("r"), coefficients("whole"))
    assert yaml.safe_load(Path("r/recipe.yaml").read_text())["max_iter"] == 15


def test_a_nonfinite_objective_exits_with_1_and_names_the_remedy(tiny, run):
    result = run(
        "solve", tiny / "recipe.yaml", "--domain", "free", "--solver", "adaptive", "--set", "solver.lr=1e38",
        "--max-iter", 5, "--run", "r",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "NaN or infinite" in result.stderr
    assert "smaller step" in result.stderr
    assert not Path("r/merged.safetensors").exists()
