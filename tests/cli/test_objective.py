"""Objectives of a recipe: their tasks, teachers, wrappers and weights, on the tiny pool."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mergesolve.cli.names import UsageProblem
from mergesolve.cli.objective import center_weights, merged_base, one_expert
from mergesolve.cli.recipe import from_mapping
from mergesolve.cli.setup import Setup
from mergesolve.objectives import (
    CrossEntropy,
    Distillation,
    Proximity,
    RelativeLoss,
    Retention,
    SharpnessAware,
    WeightedSum,
)
from safetensors.torch import load_file, save_file

from .conftest import recipe_fields


@pytest.fixture
def setup(zoo):
    def make(objective, **fields):
        tasks = fields.pop("tasks", [{"name": "red"}, {"name": "blue"}])
        return Setup(from_mapping({"zoo": True, "tasks": tasks, "objective": objective, **fields}, {}))

    return make


def checked(setup, *arguments, **fields):
    made = setup(*arguments, **fields)
    made.check_names()
    return made


def test_each_objective_is_about_the_tasks_it_names_with_what_is_wrapped_around_it(setup):
    made = checked(
        setup,
        [
            {"name": "cross-entropy", "tasks": ["blue"], "normalize_by": "excess"},
            {"name": "retention", "tasks": "red", "weight": 0.5},
            {"name": "distillation", "sharpness": 0.1},
            {"name": "proximity", "center": "average", "weight": 0.01},
        ],
    )
    objective = made.objective
    assert isinstance(objective, WeightedSum)
    (_, relative), (half, retention), (_, sharp), (small, near) = objective.parts
    assert isinstance(relative, RelativeLoss)
    assert (relative.kind, relative.tasks, type(relative.objective)) == ("excess", ("blue",), CrossEntropy)
    assert isinstance(retention, Retention)
    assert (half, retention.tasks) == (0.5, ("red",))
    assert isinstance(sharp, SharpnessAware)
    assert (sharp.radius, sharp.tasks, type(sharp.objective)) == (0.1, ("red", "blue"), Distillation)
    assert isinstance(near, Proximity)
    assert small == 0.01
    base = merged_base(made.checkpoints)
    assert retention.value(base) == pytest.approx(0, abs=1e-9)
    assert relative.value(one_expert(made.checkpoints, "blue")) == pytest.approx(0, abs=1e-6)


def test_the_recipe_that_ran_names_every_option_and_gives_the_same_objective(setup):
    made = setup([{"name": "proximity"}, {"name": "entropy", "logit_norm": 5, "tasks": ["red"]}])
    resolved = made.resolved()
    assert resolved.objectives[0].options == {"center": "base"}
    assert resolved.objectives[1].options["temperature"] == 1.0
    assert resolved.objectives[1].options["seed"] == 0
    assert Setup(resolved).objective.describe() == made.objective.describe()


@pytest.mark.parametrize("center", ["base", "average", "expert:blue"])
def test_proximity_stays_close_to_what_is_named(setup, center):
    made = setup({"name": "proximity", "center": center})
    pool = made.pool
    coefficients = {"base": np.zeros(pool.n), "average": np.full(pool.n, 1 / pool.n)}.get(center)
    if coefficients is None:
        coefficients = np.array([float(name == "blue") for name in pool.names])
    at = pool.combine(coefficients[None], pool.blocks("model"))
    assert made.objective.value(at) == 0
    assert set(center_weights(made, center)) == set(pool.tensors)


def test_teachers_judge_mixtures_and_labels_stay_with_the_images(setup):
    both = [{"name": "distillation"}, {"name": "cross-entropy"}]
    made = checked(setup, both, tasks=[{"name": "red", "limit": 5, "mixed": 40}, {"name": "blue", "limit": 5}])
    assert [len(task) for task in made.judged] == [40, 5]
    (_, taught), (_, labelled) = made.objective.parts
    assert [task["samples"] for task in taught.describe()["tasks"]] == [40, 5]
    assert [task["samples"] for task in labelled.describe()["tasks"]] == [5, 5]
    used = made.objective.data_used
    assert used["labelled"] + used["unlabelled"] == 10
    assert [len(t) for t in setup("distillation", mixed=12, limit=5).judged] == [12, 12]


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        ("entropy", {"mixed": 9}, "'mixed' inputs have no labels: only an objective with teachers can judge them"),
        ("distillation", {"mixed": 0}, "recipe: 'mixed' must be at least 1; found 0"),
        ({"name": "entropy", "tasks": ["rad"]}, {}, "objective 'entropy': unknown task 'rad'. Did you mean 'red'"),
        ({"name": "entropy", "tasks": []}, {}, "'tasks' must be a list of names of tasks"),
        ({"name": "entropy", "sharpness": 0}, {}, "'sharpness' must be a number above 0"),
        ({"name": "entropy", "normalize_by": "experts"}, {}, "unknown normalizer 'experts'. Did you mean 'expert'"),
        ({"name": "distillation", "normalize_by": "expert"}, {}, "needs a loss that the experts have, too, and theirs"),
        ({"name": "proximity", "metric": 3}, {}, "unknown option of the objective 'proximity': 'metric'.*center"),
        ({"name": "cross-entropy", "smoothing": 0.1}, {}, "Did you mean 'label_smoothing'"),
        (
            ({"name": "entropy", "weight": "many"}, "cross-entropy"),
            {},
            "'weight' must be a finite number of at least 0",
        ),
        (({"name": "entropy", "weight": -1}, "cross-entropy"), {}, "objective 'entropy': 'weight'.* found -1"),
        ("weighted-sum", {}, "unknown objective 'weighted-sum'"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_is_loaded(setup, objective, fields, message):
    with pytest.raises(UsageProblem, match=message):
        checked(setup, objective, **fields)


def test_a_center_that_is_not_there_is_refused(setup):
    with pytest.raises(UsageProblem, match=r"objective 'proximity': unknown center 'averages'. Did you mean 'average'"):
        _ = setup({"name": "proximity", "center": "averages"}).objective


def test_the_command_mixes_inputs_and_counts_the_real_ones(run, zoo):
    flags = ["--limit", 5, "--mixed", 40, "--objective", "distillation", "--max-iter", 2, "--no-figures", "--run", "r"]
    done = run("solve", "--zoo", "--task", "red", *flags)
    assert done.exit_code == 0, done.stderr
    data = json.loads(Path("r/result.json").read_text())["data"]
    assert (data["labelled"], data["unlabelled"], data["teacher_samples"]) == (0, 5, 40)
    fields = yaml.safe_load(Path("r/recipe.yaml").read_text())
    assert (fields["mixed"], fields["tasks"][0]["mixed"]) == (40, 40)
    refused = run("solve", "--zoo", "--task", "red", "--mixed", 40)
    assert refused.exit_code == 2
    assert "--objective distillation" in refused.stderr


def test_what_teachers_saw_adds_up_over_resumed_parts(run, zoo):
    flags = ["--limit", 5, "--objective", "distillation", "--tol", 0, "--no-figures", "--run", "r"]
    assert run("solve", "--zoo", "--task", "red", *flags, "--max-iter", 1).exit_code == 0
    resumed = run("solve", "--resume", "r", "--max-iter", 2, "--no-figures")
    assert resumed.exit_code == 0, resumed.stderr
    data = json.loads(Path("r/result.json").read_text())["data"]
    assert data["teacher_samples"] == 10
    assert data["samples_seen"] == data["gradient_samples"] + data["value_samples"] + data["teacher_samples"]


def test_a_mask_is_found_beside_the_recipe_and_named_in_full_in_the_run(tiny, tmp_path, run):
    base = load_file(tiny / "base.safetensors")
    (tmp_path / "masks").mkdir()
    save_file(
        {name: torch.full_like(tensor, 0.5) for name, tensor in base.items()}, tmp_path / "masks/half.safetensors"
    )
    fields = recipe_fields(tiny)
    fields["pool"]["transforms"] = [{"name": "mask", "path": "half.safetensors"}]
    (tmp_path / "masks/recipe.yaml").write_text(yaml.safe_dump(fields))
    flags = ["--start", "expert:red", "--solver", "point", "--max-iter", 0, "--no-figures", "--run", "r"]
    done = run("solve", "masks/recipe.yaml", *flags)
    assert done.exit_code == 0, done.stderr
    expert, merged = load_file(tiny / "experts/red.safetensors"), load_file("r/merged.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (base[name] + expert[name]) / 2)
    written = yaml.safe_load(Path("r/recipe.yaml").read_text())["pool"]["transforms"][0]["path"]
    assert written == str(tmp_path / "masks/half.safetensors")
