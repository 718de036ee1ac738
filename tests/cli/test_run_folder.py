"""What a solve does to a folder that holds something already."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from .conftest import recipe_fields

FEW = ("--max-iter", 1, "--quiet", "--no-merge", "--no-figures")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "mistake",
    [
        ("--set", "objective.batchsize=3"),
        ("--start", "expert:nobody"),
        ("--start", "task-arithmetic:0.9", "--domain", "simplex"),
        ("--max-iter", -1),
        ("--pool", "nowhere.yaml"),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_a_refused_overwrite_keeps_the_old_run(mistake, solved, tiny, run):
    shutil.copytree(solved, "r")
    result = run("solve", tiny / "recipe.yaml", "--run", "r", "--overwrite", *mistake)
    assert result.exit_code == 2, result.output
    assert contents("r") == contents(solved)


def test_an_overwritten_run_leaves_nothing_behind(solved, tiny, run):
    shutil.copytree(solved, "r")
    Path("r/notes.txt").write_text("mine")
    result = run("solve", tiny / "recipe.yaml", "--run", "r", "--overwrite", *FEW)
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in Path("r").iterdir()} == {
        "recipe.yaml", "result.json", "coefficients.safetensors", "trace.jsonl", "checkpoint.safetensors", "notes.txt",
    }  # fmt: skip
    assert yaml.safe_load(Path("r/recipe.yaml").read_text())["max_iter"] == 1


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--start", "expert:nobody")])
def test_a_recipe_of_the_user_is_neither_replaced_nor_removed(flags, tiny, run):
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe_fields(tiny)))
    before = contents(".")
    result = run("solve", "recipe.yaml", "--run", ".", *flags)
    assert result.exit_code == 2
    assert "holds a recipe.yaml and no run" in result.stderr
    assert contents(".") == before


def test_a_refused_request_removes_only_what_it_made(tiny, run):
    Path("mine").mkdir()
    Path("mine/merged.safetensors").write_text("mine")
    for folder in ("mine", "new/inner"):
        result = run("solve", tiny / "recipe.yaml", "--run", folder, "--start", "task-arithmetic:9")
        assert result.exit_code == 2
    assert contents(".") == {Path("mine/merged.safetensors"): b"mine"}
    assert not Path("new").exists()


def test_a_refused_resume_leaves_the_run_as_it_was(tiny, run):
    assert run("solve", tiny / "recipe.yaml", "--run", "r", *FEW, "--max-iter", 4).exit_code == 0
    before = contents("r")
    result = run("solve", "--resume", "r", "--max-iter", 2)
    assert result.exit_code == 2
    assert contents("r") == before


def test_a_pool_with_nan_is_told_once_and_leaves_no_run(tiny, tmp_path, run):
    pool = Path(shutil.copytree(tiny, tmp_path / "pool"))
    tensors = load_file(pool / "experts/red.safetensors")
    tensors["2.weight"][0, 0] = torch.nan
    save_file(tensors, pool / "experts/red.safetensors")
    for start in ("average", "base"):
        result = run("solve", pool / "recipe.yaml", "--run", "r", "--start", start)
        assert result.exit_code == 2
        assert result.stderr.lower().count("leave") == 1
        assert not Path("r").exists()


def test_a_scheduled_run_goes_on_as_a_new_run(tiny, run):
    common = ("--no-merge", "--no-figures")
    preset = ("--preset", "row-distillation", "--max-iter", 2)
    first = run("solve", tiny / "recipe.yaml", *preset, "--domain", "free", "--run", "r", *common)
    assert first.exit_code == 0, first.stderr
    assert "--start run:r" in first.stderr
    before = contents("r")
    for flags in ((), ("--max-iter", 4)):
        refused = run("solve", "--resume", "r", *flags, *common)
        assert refused.exit_code == 2
        assert "schedule over max_iter=2" in refused.stderr
        assert "--start run:r" in refused.stderr
    assert contents("r") == before


def test_a_run_that_started_from_another_resumes_from_anywhere(solved, tiny, run, monkeypatch):
    shutil.copytree(solved, "first")
    begun = run("solve", tiny / "recipe.yaml", "--run", "second", "--start", "run:first", *FEW)
    assert begun.exit_code == 0, begun.stderr
    start = yaml.safe_load(Path("second/recipe.yaml").read_text())["start"]
    assert start == f"run:{Path('first').absolute()}"
    second = Path("second").absolute()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    resumed = run("solve", "--resume", second, *FEW, "--max-iter", 3)
    assert resumed.exit_code == 0, resumed.stderr


def test_a_solve_takes_a_pattern_that_is_a_plain_word(tiny, run):
    blocks = ("--blocks", "(weight)", "--blocks", "(bias)")
    result = run("solve", tiny / "recipe.yaml", "--run", "r", *blocks, *FEW)
    assert result.exit_code == 0, result.stderr
    pair = run("solve", tiny / "recipe.yaml", "--run", "one", "--blocks", "(weight|bias)", *FEW)
    assert pair.exit_code == 0, pair.stderr
    assert yaml.safe_load(Path("one/recipe.yaml").read_text())["blocks"] == ["(weight|bias)"]
