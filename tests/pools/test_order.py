"""The order of experts by inner products with a gradient, which decides the vertex that Frank-Wolfe takes."""

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool

SIZE = 40_000


def stored(dtype, distance, n=12, seed=0):
    """Models at a relative distance from their base, in a storage type, and a gradient."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=SIZE)
    experts = {f"e{i}": base + distance * rng.normal(size=SIZE) for i in range(n)}
    pack = {name: {"w": torch.from_numpy(value).to(dtype)} for name, value in {"base": base, **experts}.items()}
    return pack.pop("base"), pack, {"w": torch.from_numpy(rng.normal(size=SIZE)).float()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_the_base_does_not_change_it(dtype, distance):
    """⟨g, τ_i⟩ orders experts as ⟨g, θ_i⟩ does in float64 for what is stored, and the differences agree."""
    base, experts, gradient = stored(dtype, distance)
    pool = Pool.from_state_dicts(base, experts)
    found = pool.correlate(gradient, pool.blocks("model"))[0]
    exact = np.array([float(state["w"].double() @ gradient["w"].double()) for state in experts.values()])
    np.testing.assert_array_equal(np.argsort(found), np.argsort(exact))
    spread = exact - exact.mean()
    np.testing.assert_allclose(found - found.mean(), spread, atol=1e-5 * np.abs(spread).max())


def test_half_precision_products_of_whole_models_would_change_it():
    """What the test above is about: with τ of 1e-3 of the weights, products in half precision pick other experts."""
    _, experts, gradient = stored(torch.float16, 1e-3)
    exact = np.array([float(state["w"].double() @ gradient["w"].double()) for state in experts.values()])
    half = np.array([float((state["w"] * gradient["w"].half()).sum(dtype=torch.float16)) for state in experts.values()])
    assert (np.argsort(half) != np.argsort(exact)).any()
