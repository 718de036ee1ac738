"""Every method from the command line on the embedded zoo; what it writes loads in open_clip and computes."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from mergesolve.cli import main
from mergesolve.objectives import CLIP
from mergesolve.solvers.closed_form import MERGES, make_merge
from mergesolve.zoo import load
from safetensors.torch import load_file

EXPERTS = ("digits", "chess", "colours")
COUNTS = {"wise-ft": 1, "expo": 1, "slerp": 2, "ewc": 2, "tall-mask": 1}


@pytest.fixture(scope="module")
def zoo():
    return load()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Fisher and Gram statistics of three experts, on few images."""
    folder = tmp_path_factory.mktemp("measured")
    tasks = [flag for name in EXPERTS for flag in ("--expert", name, "--task", name)]
    flags = ["--kind", "fisher", "--kind", "gram", "--limit", "24", "--out", str(folder)]
    result = CliRunner().invoke(main, ["stats", "--zoo", *tasks, *flags])
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("method", MERGES)
def test_every_method_merges_the_zoo_into_a_model_of_open_clip(method, zoo, measured, tmp_path):
    place = tmp_path / "merged.safetensors"
    experts = [flag for name in EXPERTS[: COUNTS.get(method, 3)] for flag in ("--expert", name)]
    statistics = ["--statistics", str(measured)] if make_merge(method).statistics else []
    result = CliRunner().invoke(main, ["merge", method, "--zoo", *experts, *statistics, "--out", str(place)])
    assert result.exit_code == 0, result.output
    model = CLIP(zoo.record["architecture"], weights=place, heads=zoo.heads)
    task = zoo.task("digits", split="test").subset(20)
    logits = model.logits(load_file(place), task.batch(torch.arange(20).numpy()), task)
    assert logits.shape == (20, 10)
    assert torch.isfinite(logits).all()
    base = model.logits(load_file(zoo.base), task.batch(torch.arange(20).numpy()), task)
    assert not torch.equal(logits, base)
