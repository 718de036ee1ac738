from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.federated import FederationError
from mergesolve.federated.state import HISTORY, ServerState
from safetensors.torch import save_file
from torch import Tensor

IDENTITY: dict[str, Any] = {"protocol": "p", "step": {"name": "fedavg", "lr": 0.1}, "seed": 0, "clients": ["a", "b"]}


@pytest.fixture
def weights() -> dict[str, Tensor]:
    tied = torch.arange(4.0)
    return {
        "full": torch.tensor([0.1, -0.0, 1e-45, torch.finfo().max]),
        "half": torch.tensor([[1.0, 3.14159], [-2.0, 65504.0]]).bfloat16(),
        "sixteen": torch.tensor([0.1]).half(),
        "double": torch.tensor(1 / 3, dtype=torch.float64),
        "count": torch.tensor([2**62, -1]),
        "mask": torch.tensor([True, False]),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "tied": tied,
        "tied.too": tied,
        "part": torch.arange(8.0)[2:5],
        "empty": torch.zeros(0, 3),
        "model/memory/odd": torch.ones(1),
    }


@pytest.fixture
def state(weights: dict[str, Tensor]) -> ServerState:
    memory = {
        "multiplier": np.array(1 / 3),
        "first/full": np.array([0.1, -0.0], dtype=np.float32),
        "steps": np.array(7),
        "inner/second/model/odd": np.arange(6.0).reshape(2, 3).T,
    }
    return ServerState(weights, 3, memory, {"a": "f1", "b": "ü"}, (0.1, 1e-300, 7.0))


def bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_round_trip_is_exact_to_the_bit(state: ServerState, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    state.save(path, weights, IDENTITY)
    found, model = ServerState.load(path, weights, IDENTITY)
    assert {n: bits(t) for n, t in model.items()} == {n: bits(t) for n, t in weights.items()}
    assert (found.round, found.fingerprints, found.norms) == (state.round, state.fingerprints, state.norms)
    assert found.origin is weights
    assert set(found.memory) == set(state.memory)
    for name, value in state.memory.items():
        other = found.memory[name]
        assert (other.dtype, other.shape, other.tobytes()) == (value.dtype, value.shape, value.tobytes()), name
        assert other.flags.writeable  # torch.from_numpy warns of arrays that are not
    again = tmp_path / "again.safetensors"
    found.save(again, model, IDENTITY)
    assert again.read_bytes() == path.read_bytes()


def test_a_new_file_replaces_the_old_one_and_leaves_nothing_beside_it(
    state: ServerState, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "state.safetensors"
    ServerState(weights).save(path, weights, IDENTITY)
    state.save(path, weights, IDENTITY)
    assert ServerState.load(path, weights, IDENTITY)[0].round == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "q"}, 'protocol differ .*was "p" and is "q"'),
        ({"seed": 1}, "seed differ .*was 0 and is 1"),
        ({"step": {"name": "fedavg", "lr": 0.2}}, r"step differ \(step.lr was 0.1 and is 0.2"),
        ({"clients": ["a"], "seed": 5}, "clients, seed differ"),
        ({"more": 1}, "more differ .*was null and is 1"),
    ],
)
def test_another_federation_is_refused_and_the_difference_named(
    change: dict[str, Any], message: str, state: ServerState, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "state.safetensors"
    state.save(path, weights, IDENTITY)
    with pytest.raises(FederationError, match=message):
        ServerState.load(path, weights, {**IDENTITY, **change})
    with pytest.raises(FederationError, match="seed differ"):
        ServerState.load(path, weights, {k: v for k, v in IDENTITY.items() if k != "seed"})


def test_identities_are_compared_as_they_are_stored(state: ServerState, weights: Any, tmp_path: Path) -> None:
    """Tuples and NumPy numbers are lists and numbers in the file."""
    path = tmp_path / "state.safetensors"
    state.save(path, weights, {"clients": ("a", "b"), "rate": np.float64(0.1), "top": float("inf")})
    ServerState.load(path, weights, {"clients": ["a", "b"], "rate": 0.1, "top": float("inf")})


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_says_that_it_is_none(
    kept: int, state: ServerState, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "state.safetensors"
    state.save(path, weights, IDENTITY)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FederationError, match=r"state.safetensors is no readable state .*Begin anew"):
        ServerState.load(path, weights, IDENTITY)


def test_other_files_and_none_are_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="does not exist; there is no federation to resume"):
        ServerState.load(tmp_path / "absent", weights, IDENTITY)
    for metadata in (None, {"state": "{"}, {"state": "{}"}):
        save_file({"x": torch.ones(1)}, tmp_path / "other", metadata=metadata)
        with pytest.raises(FederationError, match="no readable state"):
            ServerState.load(tmp_path / "other", weights, IDENTITY)


def test_after_a_round_the_newest_norms_and_fingerprints_remain(state: ServerState) -> None:
    norms = [float(i) for i in range(HISTORY)]
    later = state.after({"m": np.ones(1)}, {"b": "f2", "c": "f3"}, norms, "resident")
    assert later.backend == "resident"
    assert later.round == 4
    assert later.fingerprints == {"a": "f1", "b": "f2", "c": "f3"}
    assert later.norms == tuple(norms)
    assert list(later.memory) == ["m"]
    assert later.after({}, {}, [0.5], "resident").norms == (*norms[1:], 0.5)
    assert state.round == 3
    assert state.norms == (0.1, 1e-300, 7.0)
