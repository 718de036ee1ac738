"""Small federations in memory: classifiers of points, and CLIP towers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from mergesolve.federated import Reply, TaskClient, Training, UpdateCache
from mergesolve.federated.step import ServerData
from mergesolve.objectives import CLIP, ModuleModel, Task, joint
from torch import Tensor, nn

NAMES = ("blue", "green", "red")
FAST = Training(epochs=3, batch=16, lr=1e-2, weight_decay=0.01)

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Federation:
    """A model, the weights that everybody starts from, and one task a client, classified among all classes."""

    model: Any
    anchor: dict[str, Tensor]
    tasks: tuple[Task, ...]
    tests: tuple[Task, ...]

    def clients(
        self, training: Training = FAST, *, fisher: int | None = None, cache: UpdateCache | None = None
    ) -> list[TaskClient]:
        """A client a task."""
        return [TaskClient(t.name, self.model, t, training, fisher=fisher, cache=cache) for t in self.tasks]


class Net(nn.Module):
    """Three layers' worth of parameters, and a counter that no training changes."""

    counter: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 16)
        self.last = nn.Linear(16, outputs)
        self.register_buffer("counter", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(6, 9)


def blobs(seed: int, split: str, n: int) -> Task:
    rng = np.random.default_rng(seed)
    centres = 1.5 * rng.normal(size=(3, 6))
    rng = np.random.default_rng([seed, len(split)])
    labels = rng.integers(0, 3, n)
    inputs = (centres[labels] + 0.7 * rng.normal(size=(n, 6))).astype(np.float32)
    return Task.from_arrays(NAMES[seed], inputs, labels, ("a", "b", "c"), split=split)


@pytest.fixture(scope="session")
def federation() -> Federation:
    """Three clients with 60 points [6] each; weights of Net, among them an integer. Not to be written to."""
    module = net()
    anchor = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    train = joint([blobs(i, "train", 60) for i in range(3)])
    test = joint([blobs(i, "test", 60) for i in range(3)])
    return Federation(ModuleModel(module), anchor, train, test)


@pytest.fixture(scope="session")
def clip_federation() -> Federation:
    """Two clients with 20 images each and a CLIP tower of one layer. Not to be written to."""
    rng = np.random.default_rng(0)
    heads = {name: torch.from_numpy(rng.normal(size=(3, 16)).astype(np.float32)) for name in NAMES[:2]}
    model = CLIP(CONFIG, heads=heads)

    def task(name: str, split: str) -> Task:
        images = rng.integers(0, 256, size=(20, 3, 16, 16), dtype=np.uint8)
        return Task.from_arrays(name, images, rng.integers(0, 3, 20), ("a", "b", "c"), split=split)

    train = joint([task(name, "train") for name in NAMES[:2]])
    test = joint([task(name, "test") for name in NAMES[:2]])
    return Federation(model, model.base_weights(), train, test)


class Sample(Protocol):
    """The factory of `sampled`."""

    def __call__(
        self, n: int = 4, dtype: torch.dtype = torch.float32, *, seed: int = 0, number: int = 1, anchor: Any = None
    ) -> tuple[dict[str, Tensor], list[Reply]]: ...


SHAPES = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (4, 6), "scale": ()}


@pytest.fixture(scope="session")
def sampled() -> Sample:
    """sampled(n): a model of normal entries with an integer buffer, and replies of n clients that moved by about 0.1 an
    entry, with different numbers of samples and steps; the same ones for the same arguments."""

    def make(
        n: int = 4, dtype: torch.dtype = torch.float32, *, seed: int = 0, number: int = 1, anchor: Any = None
    ) -> tuple[dict[str, Tensor], list[Reply]]:
        if anchor is None:
            rng = np.random.default_rng([seed, 0])
            anchor = {name: torch.tensor(rng.normal(size=shape)).to(dtype) for name, shape in SHAPES.items()}
            anchor["count"] = torch.tensor([3, 2**40])
        replies = []
        for i in range(n):
            rng = np.random.default_rng([seed, number, i])
            model = {
                name: (t.double() + 0.1 * torch.tensor(rng.normal(size=t.shape))).to(t.dtype)
                for name, t in anchor.items()
                if t.is_floating_point()
            }
            model["count"] = anchor["count"] + i
            fisher = {name: torch.tensor(rng.uniform(0.1, 1, t.shape)).float() for name, t in model.items()}
            replies.append(Reply(f"c{i}", model, number, samples=10 * (i + 1), steps=3 + i, fisher=fisher))
        return anchor, replies

    return make


@pytest.fixture(scope="session")
def server_data(federation: Federation) -> ServerData:
    """Eighteen labelled samples a client, 30 reference inputs, and a Fisher diagonal, for `federation`."""
    tasks = {task.name: task.subset(18, 0) for task in federation.tasks}
    rng = np.random.default_rng(5)
    inputs = torch.from_numpy(2 * rng.normal(size=(30, 6)).astype(np.float32))
    reference = replace(federation.tasks[0], name="reference", inputs=inputs, labels=None)
    floats = {name: tensor for name, tensor in federation.anchor.items() if tensor.is_floating_point()}
    fisher = {name: torch.from_numpy(rng.uniform(0.5, 1, t.shape).astype(np.float32)) for name, t in floats.items()}
    return ServerData(federation.model, tasks, reference, fisher)


@pytest.fixture(scope="session")
def trained(federation: Federation) -> list[Reply]:
    """What the clients of `federation` send in round 1, with Fisher diagonals."""
    return [client.fit(federation.anchor, 1) for client in federation.clients(fisher=8)]
