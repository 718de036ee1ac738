"""Trimming against NumPy's sort, where tensors are frozen, tie, or have one element."""

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.pools.transforms import make_transform


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (30, 20), "a.bias": (30,), "scale": (1,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def task_vectors(pool: Pool, i: int) -> dict[str, torch.Tensor]:
    coefficients = np.zeros((1, pool.n))
    coefficients[0, i] = 1.0
    return pool.displacement(coefficients, pool.blocks("model"))


@pytest.mark.parametrize("frozen", [0, 400, 5000])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.9])
def test_the_whole_model_counts_tensors_that_no_expert_has_changed(density, frozen):
    """What is kept is int(density · all parameters) + 1 of the largest, frozen tensors counted."""
    base, experts = weights(0), {"x": weights(1), "y": weights(2)}
    for state in (base, *experts.values()):
        state["frozen"] = torch.ones(frozen)
    pool = Pool.from_state_dicts(base, experts)
    assert "frozen" not in pool.tensors
    trimmed = pool.transform(make_transform({"name": "trim", "density": density, "per": "model"}))
    for i in range(2):
        whole = np.concatenate([value.numpy().ravel() for value in task_vectors(pool, i).values()])
        found = np.concatenate([value.numpy().ravel() for value in task_vectors(trimmed, i).values()])
        count = min(int(density * (whole.size + frozen)) + 1, whole.size)
        kept = np.argsort(-np.abs(whole))[:count]
        expected = np.zeros_like(whole)
        expected[kept] = whole[kept]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
def test_tensors_keep_their_share_and_at_least_one_entry(density):
    pool = Pool.from_state_dicts(weights(0), {"x": weights(1)})
    trimmed = pool.transform(make_transform({"name": "trim", "density": density, "per": "tensor"}))
    whole, found = task_vectors(pool, 0), task_vectors(trimmed, 0)
    for name, value in whole.items():
        count = max(1, int(density * value.numel()))
        kept = np.argsort(-np.abs(value.numpy().ravel()))[:count]
        expected = np.zeros(value.numel(), dtype=np.float32)
        expected[kept] = value.numpy().ravel()[kept]
        np.testing.assert_array_equal(found[name].numpy().ravel(), expected)
