"""Mistakes in the user's own model file, and data that do not go through it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from .conftest import recipe_fields

NETS = {
    "import": ("import nowhere_at_all\n", ["net.py", "cannot be imported", "ModuleNotFoundError", "nowhere_at_all"]),
    "syntax": ("def mlp(:\n", ["net.py", "cannot be imported", "SyntaxError"]),
    "exit": ("raise SystemExit('bye')\n", ["net.py", "SystemExit: bye"]),
    "signature": ("def mlp(width):\n    pass\n", ["net.py:mlp", "without arguments", "TypeError", "width"]),
    "exception": ("def mlp():\n    raise KeyError('weights')\n", ["net.py:mlp", "KeyError: 'weights'"]),
    "other shapes": (
        "import torch\ndef mlp():\n    return torch.nn.Sequential(torch.nn.Linear(6, 5))\n",
        ["net.py:mlp", "base does not fit", "0.weight"],
    ),
}


@pytest.fixture
def copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "pool"))


def refused(result, *words):
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert "defect" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("name", NETS)
def test_a_mistake_in_the_model_file_is_told_with_the_file(name, copy, run):
    code, words = NETS[name]
    (copy / "net.py").write_text(code)
    refused(run("solve", copy / "recipe.yaml", "--run", "r"), *words)
    assert not Path("r").exists()


def test_inputs_of_another_shape_are_told_with_task_and_shape(copy, run):
    for split in ("train", "test"):
        np.savez(copy / f"red_{split}.npz", inputs=np.zeros((4, 7), "f4"), labels=[0, 1, 2, 0], classes=list("abc"))
    words = ("task 'red'", "[4, 7]", "Sequential", "RuntimeError")
    refused(run("solve", copy / "recipe.yaml", "--run", "r"), *words)
    assert not Path("r").exists()
    refused(run("evaluate", copy / "base.safetensors", "--recipe", copy / "recipe.yaml"), *words)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((0, 0, 0), ["weights of all tasks are 0"]),
        ((1, -1, 0), ["task 'green'", "-1.0"]),
        ((1, float("nan"), 1), ["task 'green'", "nan"]),
    ],
)
def test_task_weights_that_make_no_mean_are_refused(weights, words, tiny, run):
    fields = recipe_fields(tiny)
    for task, weight in zip(fields["tasks"], weights, strict=True):
        task["weight"] = weight
    Path("r.yaml").write_text(yaml.safe_dump(fields))
    refused(run("solve", "r.yaml", "--run", "r"), *words)


def test_a_weight_of_the_only_objective_is_refused(tiny, run):
    refused(run("solve", tiny / "recipe.yaml", "--set", "objective.weight=2", "--run", "r"), "'weight'", "only one")
