"""Every mistake that reaches the command line: one line on stderr, exit code 2 (1 for the machine), nothing written."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from .conftest import recipe_fields


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny pool that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "pool"))


def change(path, edit):
    tensors = load_file(path)
    tensors = edit(tensors) or tensors
    save_file(tensors, path)


def refused(result, *words, code=2):
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output
    assert "defect" not in result.stderr
    for word in words:
        assert str(word) in result.stderr


SPOILED_POOLS = {
    "missing base": (lambda f: (f / "base.safetensors").unlink(), ["base.safetensors", "does not exist"]),
    "truncated expert": (
        lambda f: (f / "experts/red.safetensors").write_bytes((f / "experts/red.safetensors").read_bytes()[:-100]),
        ["red.safetensors", "cut short"],
    ),
    "not a checkpoint": (lambda f: (f / "experts/red.safetensors").write_bytes(b"hello"), ["red.safetensors"]),
    "wrong shape": (
        lambda f: change(f / "experts/red.safetensors", lambda t: t.update({"0.bias": torch.zeros(5)})),
        ["0.bias", "red", "[5]", "[12]"],
    ),
    "missing key": (
        lambda f: change(f / "experts/red.safetensors", lambda t: {k: v for k, v in t.items() if k != "2.bias"}),
        ["2.bias", "red"],
    ),
    "extra key": (
        lambda f: change(f / "experts/red.safetensors", lambda t: t.update({"head": torch.zeros(2)})),
        ["head", "red"],
    ),
    "no experts": (lambda f: shutil.rmtree(f / "experts"), ["matches no checkpoints"]),
    "identical experts": (
        lambda f: [shutil.copy(f / "base.safetensors", path) for path in (f / "experts").iterdir()],
        ["nothing to merge"],
    ),
    "labels outside the classes": (
        lambda f: np.savez(
            f / "red_train.npz", inputs=np.zeros((4, 6), "f4"), labels=[0, 1, 2, 3], classes=list("abc")
        ),
        ["red", "label 3", "outside the 3 classes"],
    ),
    "empty class list": (
        lambda f: np.savez(
            f / "red_train.npz", inputs=np.zeros((4, 6), "f4"), labels=[0, 0, 0, 0], classes=np.array([])
        ),
        ["red", "empty class list"],
    ),
    "no labels": (
        lambda f: np.savez(f / "red_train.npz", inputs=np.zeros((4, 6), "f4"), classes=list("abc")),
        ["red", "labels"],
    ),
    "other logits": (
        lambda f: np.savez(f / "red_train.npz", inputs=np.zeros((4, 6), "f4"), labels=[0] * 4, classes=list("abcd")),
        ["red", "expected logits [4, 4]"],
    ),
    "truncated data": (lambda f: (f / "red_train.npz").write_bytes(b"PK"), ["red_train.npz"]),
    "missing data": (lambda f: (f / "red_train.npz").unlink(), ["red_train.npz"]),
    "no recipe": (lambda f: (f / "recipe.yaml").unlink(), ["recipe.yaml", "no such file"]),
    "broken recipe": (lambda f: (f / "recipe.yaml").write_text("pool: {base"), ["recipe.yaml", "not YAML"]),
    "no model": (
        lambda f: (f / "recipe.yaml").write_text(
            (f / "recipe.yaml").read_text().replace("module: net.py:mlp", "precision: fp32")
        ),
        ["what the checkpoints are weights of"],
    ),
    "unknown function": (
        lambda f: (f / "recipe.yaml").write_text((f / "recipe.yaml").read_text().replace("net.py:mlp", "net.py:mpl")),
        ["unknown function 'mpl'. Did you mean 'mlp'?"],
    ),
    "not a module": (
        lambda f: (f / "recipe.yaml").write_text((f / "recipe.yaml").read_text().replace("py:mlp", "py:nothing")),
        ["returned int, expected a torch.nn.Module"],
    ),
    "no such python file": (
        lambda f: (f / "net.py").unlink(),
        ["there is no Python file"],
    ),
}


@pytest.mark.parametrize("name", SPOILED_POOLS)
def test_a_spoiled_file_is_named(name, copy, run):
    spoil, words = SPOILED_POOLS[name]
    spoil(copy)
    refused(run("solve", copy / "recipe.yaml", "--max-iter", 1, "--run", "r"), *words)
    assert not Path("r/result.json").exists()
    assert not Path("r/merged.safetensors").exists()


def test_an_expert_with_nan_is_named_with_its_tensor(copy, run):
    def spoil(tensors):
        tensors["2.weight"][0, 0] = float("nan")

    change(copy / "experts" / "red.safetensors", spoil)
    refused(run("solve", copy / "recipe.yaml", "--max-iter", 1, "--run", "r"), "red", "2.weight", "NaN")
    assert not Path("r/merged.safetensors").exists()


WRONG_FLAGS = {
    "solver": (["--solver", "frank-wolf"], ["frank-wolf", "frank-wolfe", "adaptive"]),
    "rule": (["--set", "solver.step_rule=line-serch"], ["line-serch", "line-search", "open-loop"]),
    "solver option": (["--set", "solver.step=1"], ["step", "step_rule"]),
    "option out of range": (["--solver", "adaptive", "--set", "solver.lr=-1"], ["lr", "-1"]),
    "domain": (["--domain", "simplx"], ["unknown domain 'simplx'. Did you mean 'simplex'?", "capped"]),
    "domain option": (["--domain", "box", "--set", "domain.uper=2"], ["uper", "upper"]),
    "option of a domain without": (["--domain", "simplex", "--set", "domain.upper=3"], ["no options", "upper", "box"]),
    "objective": (["--objective", "crossentropy"], ["unknown objective", "'cross-entropy'?", "distillation"]),
    "objective option": (["--set", "objective.batchsize=3"], ["batchsize", "batch_size"]),
    "objective option out of range": (["--set", "objective.batch_size=0"], ["batch_size", "0"]),
    "blocks": (["--blocks", "layr"], ["unknown block kind 'layr'. Did you mean 'layer'?", "tensor"]),
    "blocks by a word": (["--blocks", "weight"], ["unknown block kind 'weight'", "--blocks '(weight)'"]),
    "preset": (["--preset", "fw-sof"], ["unknown preset 'fw-sof'. Did you mean 'fw-soft'?", "adamerging"]),
    "backend": (["--backend", "stream"], ["unknown backend 'stream'. Did you mean 'streaming'?", "resident"]),
    "field": (["--set", "max_itr=3"], ["unknown field 'max_itr'. Did you mean 'max_iter'?"]),
    "start": (["--start", "averge"], ["averge", "average"]),
    "start of nowhere": (["--start", "run:nowhere"], ["nowhere"]),
    "infeasible start": (["--start", "task-arithmetic:0.9", "--domain", "simplex"], ["outside the domain 'simplex'"]),
    "no oracle": (["--domain", "free"], ["free", "linear minimization oracle"]),
    "negative iterations": (["--max-iter", "-1"], ["max_iter", "-1"]),
    "expert unnamed": (["--expert", "a=x", "--expert", "y"], ["--expert 'y'"]),
    "expert twice": (["--expert", "a=x", "--expert", "a=y"], ["'a' is given twice"]),
    "rename": (["--rename", "module."], ["--rename 'module.': expected NAME=VALUE"]),
    "set": (["--set", "seed"], ["--set 'seed': expected FIELD=VALUE"]),
    "task without data": (["--task", "a"], ["the task 'a' names no data"]),
    "task of nowhere": (["--task", "a=nowhere.npz"], ["no file or folder 'nowhere.npz'"]),
    "pool file": (["--pool", "nowhere.yaml"], ["pool file 'nowhere.yaml': there is no such file"]),
    "resume with flags": (["--resume", "r", "--seed", "3"], ["--seed", "--start run:FOLDER"]),
    "architecture": (["--set", "model.module=null", "--model", "ViT-B-23"], ["ViT-B-23", "ViT-B-32"]),
}


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_a_wrong_flag_is_named_with_what_is_valid(name, tiny, run):
    flags, words = WRONG_FLAGS[name]
    refused(run("solve", tiny / "recipe.yaml", *flags, "--run", "r"), *words)
    assert not Path("r").exists()


def test_no_pool_at_all_is_told_what_to_give(run):
    refused(run("solve", "--task", "a"), "no base", "--base PATH", "--zoo")


def test_a_teacher_that_is_no_expert_is_named(tiny, run):
    fields = recipe_fields(tiny)
    fields["tasks"][2]["teacher"] = "rde"
    Path("r.yaml").write_text(yaml.safe_dump(fields))
    result = run("solve", "r.yaml", "--objective", "distillation", "--run", "r")
    refused(result, "task 'red': unknown teacher 'rde'. Did you mean 'red'?", "teacher:")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_asked_for_and_absent(tiny, run):
    refused(run("solve", tiny / "recipe.yaml", "--device", "cuda", "--run", "r"), "cuda")


def test_an_existing_run_is_not_overwritten_by_accident(solved, tiny, run):
    shutil.copytree(solved, "r")
    before = Path("r/result.json").read_bytes()
    refused(run("solve", tiny / "recipe.yaml", "--run", "r"), "--resume r", "--overwrite")
    assert Path("r/result.json").read_bytes() == before
    done = run("solve", tiny / "recipe.yaml", "--run", "r", "--overwrite", "--max-iter", 1, "--quiet", "--no-figures")
    assert done.exit_code == 0
    assert Path("r/result.json").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["solve", "--resume", "nowhere"], ["nowhere", "no such folder"]),
        (["evaluate", "nowhere.safetensors", "--zoo"], ["nowhere.safetensors"]),
        (["evaluate", "nowhere.safetensors"], ["--zoo, --recipe FILE, or --model"]),
        (["materialize", "nowhere", "--out", "m.safetensors"], ["nowhere", "no such folder"]),
        (["plot", "nowhere"], ["nowhere", "no such folder"]),
        (["plot"], ["Missing argument"]),
        (["list", "solver"], ["unknown kind 'solver'. Did you mean 'solvers'?"]),
        (["pool", "inspect"], ["no base"]),
        (["pool", "inspect", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["demo", "--method", "fw-sotf"], ["unknown method 'fw-sotf'. Did you mean 'fw-soft'?"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_not_there_is_named(arguments, words, run, zoo):
    refused(run(*arguments), *words)


def test_materialize_into_a_folder_that_cannot_be_written(solved, run):
    Path("file").write_text("")
    result = run("materialize", solved, "--out", "file/merged.safetensors")
    assert result.exit_code in (1, 2)
    assert "file" in result.stderr
    assert result.stderr.count("\n") == 1


def test_materialize_on_a_full_disk_leaves_nothing(solved, run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "m.safetensors")

    monkeypatch.setattr("os.fsync", full)
    result = run("materialize", solved, "--out", "m.safetensors")
    refused(result, "No space left on device", code=1)
    assert list(Path.cwd().iterdir()) == []


def test_materialize_refuses_other_names(solved, run):
    refused(run("materialize", solved, "--out", "m.safetensors", "--dtype", "float61"), "float61", "float16")
    refused(run("plot", solved, "--format", "pgn"), "unknown format 'pgn'. Did you mean 'png'?")


def test_out_of_gpu_memory_names_backend_and_batch(tiny, run, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("mergesolve.solvers.solve", full)
    result = run("solve", tiny / "recipe.yaml", "--run", "r")
    refused(result, "--backend streaming", "--set objective.microbatch=N", code=1)
