"""A pool of three small classifiers on disk, with their data, and a way to run the command on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergesolve.cli import main
from mergesolve.objectives import ModuleModel, Task
from safetensors.torch import save_file

NAMES = ("blue", "green", "red")
NET = """import torch

def mlp():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))

def nothing():
    return 3
"""


def recipe_fields(folder: str | Path = "") -> dict[str, Any]:
    """The recipe of the tiny pool, with paths in that folder."""
    place = f"{folder}/" if folder else ""
    return {
        "pool": {"base": f"{place}base.safetensors", "experts": [f"{place}experts/*.safetensors"]},
        "model": {"module": f"{place}net.py:mlp"},
        "tasks": [
            {"name": name, "npz": f"{place}{name}_train.npz", "test": f"{place}{name}_test.npz"} for name in NAMES
        ],
        "domain": "capped",
    }


Run = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.safetensors, experts/NAME.safetensors, NAME_{train,test}.npz, net.py, recipe.yaml; not to be written to."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "net.py").write_text(NET)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_fields()))
    (folder / "experts").mkdir()
    spec = importlib.util.spec_from_file_location("net", folder / "net.py")
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    net = code.mlp()
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    save_file(base, folder / "base.safetensors")
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        centres = 1.5 * torch.randn(3, 6, generator=generator)
        labels = torch.randint(0, 3, (60,), generator=generator)
        inputs = centres[labels] + 0.7 * torch.randn(60, 6, generator=generator)
        for split, part in (("train", slice(0, 30)), ("test", slice(30, 60))):
            np.savez(
                folder / f"{name}_{split}.npz",
                inputs=inputs[part].numpy(),
                labels=labels[part].numpy(),
                classes=np.array(["a", "b", "c"]),
            )
        net.load_state_dict(base)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(40):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(inputs[:30]), labels[:30]).backward()
            optimizer.step()
        save_file(
            {k: v.detach().clone() for k, v in net.state_dict().items()}, folder / "experts" / f"{name}.safetensors"
        )
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in an empty folder; returns exit_code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MERGESOLVE_DEBUG", raising=False)

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return call


@pytest.fixture(scope="session")
def solved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the tiny pool, with merged checkpoint and figures; not to be written to."""
    folder = tmp_path_factory.mktemp("solved") / "run"
    flags = ["--preset", "fw-soft", "--blocks", "layer", "--max-iter", "4", "--run", str(folder)]
    result = CliRunner().invoke(main, ["solve", str(tiny / "recipe.yaml"), *flags])
    assert result.exit_code == 0, result.output
    return folder


class SmallZoo:
    """What the commands use of the zoo, over the tiny pool: no pre-training, no images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tasks = NAMES
        self.base = folder / "base.safetensors"
        self.experts = {name: folder / "experts" / f"{name}.safetensors" for name in NAMES}
        self.task_experts = self.experts
        entries = {name: {"classes": 3, "zero_shot": 33.0, "expert": 90.0} for name in NAMES}
        self.record = {"experts": entries, "zero_shot_mean": 33.0, "expert_mean": 90.0}

    def task(self, name: str, split: str = "train", limit: int | None = None) -> Task:
        """The npz data of a task."""
        task = Task.from_npz(self.folder / f"{name}_{split}.npz", name=name, split=split)
        return task if limit is None else task.subset(limit)

    def model(self, device: str = "cpu") -> ModuleModel:
        """The classifier."""
        torch.manual_seed(0)
        return ModuleModel(torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)))


@pytest.fixture
def small_zoo(tiny: Path) -> SmallZoo:
    return SmallZoo(tiny)


@pytest.fixture
def zoo(small_zoo: SmallZoo, monkeypatch: pytest.MonkeyPatch) -> SmallZoo:
    """The commands find the small zoo instead of the embedded one."""
    import mergesolve.zoo

    monkeypatch.setattr(mergesolve.zoo, "load", lambda *_, **__: small_zoo, raising=False)
    return small_zoo
