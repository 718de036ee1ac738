"""Points of the pool: identities between averages, task arithmetic, PAINT, running means and norms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergesolve.pools import Pool
from mergesolve.solvers import OptionError
from mergesolve.solvers.closed_form import make_merge, merge_weights


def merged(pool, name, **options):
    return merge_weights(pool, make_merge({"name": name, **options}))


def close(one, other, atol=2e-6):
    assert list(one) == list(other)
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-6, atol=atol)


@pytest.fixture
def pool(sampled):
    return Pool.from_state_dicts(*sampled("normal", 4, "float32"))


def test_average_is_task_arithmetic_and_paint(pool):
    """Catalogue of properties, 7: FedAvg ≡ TA(1/n) ≡ PAINT(1/n), and PAINT(α) ≡ TA(α) on the same base."""
    average = merged(pool, "average")
    close(merged(pool, "task-arithmetic", scale=0.25), average)
    close(merged(pool, "paint", alpha=0.25), average)
    close(merged(pool, "swa"), average)
    close(merged(pool, "paint", alpha=0.7), merged(pool, "task-arithmetic", scale=0.7))
    close(merged(pool, "negation", scale=0.4), merged(pool, "task-arithmetic", scale=-0.4))


def test_average_of_one_is_the_expert_bit_for_bit(sampled):
    base, experts = sampled("normal", 3, "float32")
    alone = Pool.from_state_dicts(base, {"e1": experts["e1"]})
    pool = Pool.from_state_dicts(base, experts)
    for found in (merged(alone, "average"), merged(pool, "average", weights={"e0": 0, "e2": 0})):
        for name, value in found.items():
            assert torch.equal(value, experts["e1"][name])


def test_wise_ft_and_expo_lie_on_one_line(sampled):
    """WiSE-FT interpolates, ExPO extrapolates: θ0 + α τ and θ0 + (1 + α) τ."""
    pool = Pool.from_state_dicts(*sampled("normal", 1, "float32"))
    close(merged(pool, "wise-ft", alpha=0.3), merged(pool, "task-arithmetic", scale=0.3))
    close(merged(pool, "expo", alpha=0.3), merged(pool, "task-arithmetic", scale=1.3))
    base = pool.base_weights()
    for name, value in merged(pool, "wise-ft", alpha=0.0).items():
        assert torch.equal(value, base[name])


def test_analogy_needs_no_base(sampled):
    """θ_c + θ_b − θ_a: the base cancels at scale 1."""
    base, experts = sampled("grid", 3, "float32")
    found = merged(Pool.from_state_dicts(base, experts), "analogy")
    for name, value in found.items():
        torch.testing.assert_close(value, experts["e2"][name] + experts["e1"][name] - experts["e0"][name])


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 0.99), st.integers(1, 8), st.sampled_from(["first", "base"]))
def test_moving_averages_are_their_recursions(decay, n, start):
    """EMA against W ← decay W + (1 − decay) θ_k in float64, SWA against W ← (k W + θ_k) / (k + 1)."""
    points = np.random.default_rng(n).normal(size=(n + 1, 7))
    base = {"w": torch.from_numpy(points[0]).float()}
    experts = {f"step{k}": {"w": torch.from_numpy(point).float()} for k, point in enumerate(points[1:])}
    pool = Pool.from_state_dicts(base, experts)
    running = points[0] if start == "base" else points[1]
    for point in points[1:] if start == "base" else points[2:]:
        running = decay * running + (1 - decay) * point
    np.testing.assert_allclose(merged(pool, "ema", decay=decay, start=start)["w"], running, atol=2e-6)
    mean = points[1]
    for k, point in enumerate(points[2:], start=1):
        mean = (k * mean + point) / (k + 1)
    np.testing.assert_allclose(merged(pool, "swa")["w"], mean, atol=2e-6)


def test_weights_that_sum_to_zero_are_refused(pool):
    with pytest.raises(OptionError, match="'weights' parameter of Average must not sum to 0"):
        merged(pool, "average", weights={"e0": 1.0, "e1": -1.0, "e2": 0.0, "e3": 0.0})


def test_swa_from_beyond_the_sequence_is_refused(pool):
    with pytest.raises(OptionError, match="'first' parameter of SWA must be an index of one of the 4 checkpoints"):
        merged(pool, "swa", first=4)


@pytest.mark.parametrize("names", [("e0", "e0", "e1"), ("e0", "e1", None)])
def test_an_analogy_of_fewer_than_three_is_refused(names):
    with pytest.raises(OptionError, match="needs three different experts"):
        make_merge({"name": "analogy", **dict(zip("abc", names, strict=True))})


def test_an_analogy_with_two_models_is_refused(sampled):
    pool = Pool.from_state_dicts(*sampled("normal", 2, "float32"))
    with pytest.raises(OptionError, match=r"merges exactly 3 experts .* the pool has 2: e0, e1"):
        merged(pool, "analogy")
