from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.objectives import CLIP, ModuleModel, Task
from torch import nn

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def config() -> dict[str, Any]:
    return copy.deepcopy(CONFIG)


@pytest.fixture(scope="session")
def heads() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(5)
    return {"shapes": torch.randn(3, 16, generator=rng), "digits": torch.randn(5, 16, generator=rng)}


@pytest.fixture(scope="session")
def clip(heads: dict[str, torch.Tensor]) -> CLIP:
    return CLIP(copy.deepcopy(CONFIG), heads=heads)


@pytest.fixture(scope="session")
def clip_tasks() -> tuple[Task, Task]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(29, 3, 32, 32), dtype=np.uint8)
    shapes = Task.from_arrays("shapes", images[:12], rng.integers(0, 3, 12), ("disc", "ring", "cross"))
    digits = Task.from_arrays("digits", images[12:], rng.integers(0, 5, 17), tuple("01234"), split="test")
    return shapes, digits


@pytest.fixture(scope="session")
def clip_weights(clip: CLIP) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {n: t + 0.02 * torch.randn(t.shape, generator=rng) for n, t in clip.base_weights().items()}


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


@pytest.fixture
def mlp_model(mlp: nn.Module) -> ModuleModel:
    return ModuleModel(mlp)


@pytest.fixture
def mlp64_weights(mlp: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in mlp.state_dict().items()}


@pytest.fixture
def mlp_tasks() -> tuple[Task, Task]:
    rng = np.random.default_rng(3)
    one = Task(
        "one", torch.from_numpy(rng.normal(size=(11, 6))), torch.from_numpy(rng.integers(0, 4, 11)), tuple("abcd")
    )
    two = Task("two", torch.from_numpy(rng.normal(size=(7, 6))), torch.from_numpy(rng.integers(0, 4, 7)), tuple("efgh"))
    return one, two
