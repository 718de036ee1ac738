"""FedExP and the stable step: between average and sum, by how much the task vectors agree."""

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.solvers import OptionError
from mergesolve.solvers.closed_form import make_merge, merge_weights

UNIT = np.linalg.qr(np.random.default_rng(9).normal(size=(6, 6)))[0]
"""Orthonormal rows."""


def pool_of(rows):
    base = {"w": torch.zeros(len(rows[0]))}
    return Pool.from_state_dicts(base, {f"e{i}": {"w": torch.tensor(row).float()} for i, row in enumerate(rows)})


def coefficients(rows, name, **options):
    (found,) = make_merge({"name": name, **options}).coefficients(pool_of(rows))[0]
    return found


def eta(rows, **options):
    found = coefficients(rows, "fedexp", **options) * len(rows)
    np.testing.assert_allclose(found, found[0])
    return found[0]


# FedExP


@pytest.mark.parametrize("seed", range(5))
def test_fedexp_is_at_least_the_average_and_at_most_the_cap(seed):
    """Catalogue of properties, 21."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(rng.integers(1, 7), 6)) + rng.uniform(0, 2)
    for cap in (1.0, 1.3, None):
        assert 1 <= eta(rows, cap=cap) <= (cap or np.inf)
    assert eta(rows, cap=1.0) == 1


@pytest.mark.parametrize("cap", [1.5, None])
def test_fedexp_of_experts_that_agree_is_the_average(cap):
    rows = np.tile(UNIT[0], (4, 1))
    assert eta(rows, cap=cap) == 1
    assert eta(rows[:1], cap=cap) == 1
    found = merge_weights(pool_of(rows), make_merge({"name": "fedexp", "cap": cap}))["w"]
    np.testing.assert_allclose(found, rows[0], atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_fedexp_of_orthogonal_experts_of_equal_norm_is_half_their_number(n):
    rows = 3.0 * UNIT[:n]
    assert eta(rows, cap=None) == pytest.approx(max(1, n / 2), rel=1e-6)
    assert eta(rows) == pytest.approx(min(max(1, n / 2), 1.5), rel=1e-6)


def test_fedexp_is_the_published_ratio():
    """Two experts of norm r at an angle: η = 1 / (1 + cos), as mean ‖τ‖² = r² and ‖mean τ‖² = r² (1 + cos) / 2."""
    for cosine in (-0.9, -0.5, -0.2):
        rows = 2.0 * np.array([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]])
        assert eta(rows, cap=None) == pytest.approx(1 / (1 + cosine), rel=1e-5)
        guarded = 4 / (2 * (4 * (1 + cosine) / 2 + 0.1))
        assert eta(rows, cap=None, epsilon=0.1) == pytest.approx(max(1, guarded), rel=1e-5)


def test_fedexp_never_moves_away_from_a_model_that_all_experts_would_accept():
    """Its theorem: where experts project on sets with a common point, a step of η does not leave that point farther."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        directions = rng.normal(size=(4, 6))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        goal = rng.normal(size=6)
        rows = (directions @ goal)[:, None] * directions  # from 0, the projections on hyperplanes through the goal
        moved = coefficients(rows, "fedexp", cap=None) @ rows
        assert np.linalg.norm(moved - goal) <= np.linalg.norm(goal) + 1e-6


def test_fedexp_where_the_mean_vanishes_is_the_average():
    rows = np.stack([UNIT[0], -UNIT[0]])
    assert eta(rows, cap=None) == 1
    assert eta(np.stack([UNIT[0], UNIT[1], 0 * UNIT[0]]), cap=None) == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize(("option", "value"), [("cap", 0.9), ("cap", float("inf")), ("cap", "no"), ("epsilon", -1)])
def test_fedexp_refuses_options_out_of_range(option, value):
    with pytest.raises(OptionError, match=f"'{option}' parameter of FedExP must be a number in"):
        make_merge({"name": "fedexp", option: value})


# The stable step


@pytest.mark.parametrize("n", [1, 2, 5])
def test_stable_of_equal_directions_is_the_average_and_of_orthogonal_ones_the_sum(n):
    scales = np.arange(1, n + 1)[:, None]
    np.testing.assert_allclose(coefficients(scales * UNIT[0], "stable"), np.full(n, 1 / n), rtol=1e-6)
    np.testing.assert_allclose(coefficients(scales * UNIT[:n], "stable"), np.ones(n), rtol=1e-6)
    np.testing.assert_allclose(coefficients(UNIT[:n], "stable", safety=0.5), np.full(n, 0.5), rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_stable_lies_between_average_and_sum(seed):
    """λ_max of a matrix of cosines is between 1 and n."""
    rows = np.random.default_rng(seed).normal(size=(5, 4))
    found = coefficients(rows, "stable")
    assert np.ptp(found) == 0
    assert 1 / 5 <= found[0] <= 1


def quadratic(seed, n=5, size=7):
    """Directions u_i with a common part, and targets u_iᵀθ_i: expert i's loss is ½ (u_iᵀ (θ − θ_i))²."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(n, size)) + 0.7
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions, rng.normal(size=n)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("safety", [0.5, 1.0, 1.9, 2.1])
def test_rounds_of_the_step_converge_below_the_bound_and_diverge_above(seed, safety):
    """θ ← θ + s Σ τ_i with τ_i = u_i (target_i − u_iᵀθ) is iterated from 0 with the step of the first round.

    Its fixed points are the least squares solutions. Above the bound the error along the first eigenvector grows.
    """
    directions, targets = quadratic(seed)
    first = targets[:, None] * directions
    s = coefficients(first, "stable", safety=min(safety, 1.9))[0] * safety / min(safety, 1.9)
    goal = np.linalg.lstsq(directions, targets, rcond=None)[0]
    theta, errors = np.zeros(directions.shape[1]), []
    for _ in range(400):
        errors.append(np.linalg.norm(directions @ (theta - goal)))
        theta = theta + s * directions.T @ (targets - directions @ theta)
    if safety < 2:
        assert (np.diff(errors) <= 1e-9).all()
        slowest = np.linalg.eigvalsh(directions @ directions.T)
        rate = np.abs(1 - s * slowest).max()
        assert rate < 1
        assert errors[-1] <= 1.01 * rate**399 * errors[0] + 1e-9
    else:
        assert errors[-1] > 1e3 * errors[0]


def test_at_the_default_no_component_of_the_error_changes_its_sign():
    for seed in range(4):
        directions, targets = quadratic(seed)
        s = coefficients(targets[:, None] * directions, "stable")[0]
        factors = np.linalg.eigvalsh(np.eye(directions.shape[1]) - s * directions.T @ directions)
        assert factors.min() == pytest.approx(0, abs=1e-6)


def test_experts_without_a_direction_do_not_count():
    rows = np.stack([UNIT[0], 0 * UNIT[0], UNIT[0]])
    np.testing.assert_allclose(coefficients(rows, "stable"), [0.5, 0, 0.5], rtol=1e-6)
    nothing = pool_of(rows).transform(lambda name, base, taus: 0 * taus, "nothing")
    assert make_merge("stable").coefficients(nothing)[0].tolist() == [[0, 0, 0]]
    assert make_merge("fedexp").coefficients(nothing)[0] == pytest.approx(1 / 3)
    for name in ("stable", "fedexp", "geometric-median", "krum"):
        assert merge_weights(nothing, make_merge(name))["w"].tolist() == [0] * 6


@pytest.mark.parametrize("safety", [0, 2, -1, float("nan"), "x"])
def test_safety_lies_between_0_and_2(safety):
    with pytest.raises(OptionError, match=r"'safety' parameter of Stable must be a number in \(0, 2\)"):
        make_merge({"name": "stable", "safety": safety})
