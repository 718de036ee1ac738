"""SLERP and the mean on the sphere: endpoints, norms, limits, and the minimum that the mean is."""

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.solvers.closed_form import make_merge, merge_weights


def pool_of(rows, base=None):
    rows = np.asarray(rows, dtype=np.float32)
    start = torch.zeros(rows.shape[1]) if base is None else torch.tensor(base).float()
    return Pool.from_state_dicts({"w": start}, {f"e{i}": {"w": torch.tensor(row)} for i, row in enumerate(rows)})


def merged(pool, name, **options):
    return merge_weights(pool, make_merge({"name": name, **options}))["w"].double().numpy()


@pytest.fixture
def unit():
    rows = np.random.default_rng(0).normal(size=(4, 40))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("of", ["weights", "task-vectors"])
def test_slerp_hits_its_ends(of, unit):
    """Catalogue of properties, 13."""
    pool = pool_of(3 * unit[:2], base=unit[3])
    np.testing.assert_allclose(merged(pool, "slerp", t=0.0, of=of), 3 * unit[0], atol=1e-6)
    np.testing.assert_allclose(merged(pool, "slerp", t=1.0, of=of), 3 * unit[1], atol=1e-6)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_slerp_keeps_the_norm_and_divides_the_angle(t, unit):
    one, other = unit[:2]
    found = merged(pool_of([2 * one, 2 * other], base=unit[3]), "slerp", t=t)
    angle = np.arccos(one @ other)
    assert np.linalg.norm(found) == pytest.approx(2, rel=1e-6)
    assert np.arccos(one @ found / 2) == pytest.approx(t * angle, abs=1e-5)
    assert np.arccos(other @ found / 2) == pytest.approx((1 - t) * angle, abs=1e-5)


def test_slerp_tends_to_the_line_as_the_angle_vanishes(unit):
    """The distance between arc and chord falls as the square of the angle, on both sides of the switch."""
    distances = []
    for angle in (0.3, 0.1, 0.03, 0.01):
        other = np.cos(angle) * unit[0] + np.sin(angle) * (unit[1] - (unit[1] @ unit[0]) * unit[0])
        pool = pool_of([unit[0], other])
        line = 0.75 * unit[0] + 0.25 * other
        distances.append(np.linalg.norm(merged(pool, "slerp", t=0.25, parallel=0.99999) - line))
        if angle < 0.03:
            np.testing.assert_allclose(merged(pool, "slerp", t=0.25), line, atol=1e-7)
    assert distances[0] / distances[1] == pytest.approx(9, rel=0.1)
    assert distances[1] / distances[2] == pytest.approx(11, rel=0.1)


def test_slerp_of_opposite_vectors_is_the_line(unit):
    np.testing.assert_allclose(merged(pool_of([unit[0], -unit[0]]), "slerp", t=0.25), 0.5 * unit[0], atol=1e-6)


@pytest.mark.parametrize("of", ["weights", "task-vectors"])
def test_the_mean_of_two_of_equal_norm_is_slerp_half_way(of, unit):
    pool = pool_of(2 * unit[:2] + (0 if of == "weights" else unit[3]), base=unit[3])
    wanted = merged(pool, "slerp", t=0.5, of=of, parallel=0.99999)
    np.testing.assert_allclose(merged(pool, "spherical-mean", of=of), wanted, atol=1e-6)


def test_the_mean_minimizes_the_squared_angles(unit):
    """No step along the sphere lowers Σ angle², and the norm is the mean of the norms."""
    rows = unit + 0.3
    norms = np.linalg.norm(rows, axis=1)
    found = merged(pool_of(rows, base=unit[0]), "spherical-mean")
    assert np.linalg.norm(found) == pytest.approx(norms.mean(), rel=1e-6)
    directions, point = rows / norms[:, None], found / np.linalg.norm(found)

    def cost(x):
        return (np.arccos(directions @ x / np.linalg.norm(x)) ** 2).sum()

    rng = np.random.default_rng(1)
    for size in (1e-2, 1e-3):
        steps = size * rng.normal(size=(50, 40)) / np.sqrt(40)
        assert min(cost(point + step) for step in steps) > cost(point) - 1e-9
    wrong = rows.mean(0)
    assert cost(wrong) > cost(point) + 1e-6


def test_the_mean_ignores_the_direction_of_nothing_and_counts_its_norm(unit):
    found = merged(pool_of([unit[0], 0 * unit[0]], base=unit[1]), "spherical-mean")
    np.testing.assert_allclose(found, unit[0] / 2, atol=1e-6)


def test_the_mean_of_directions_all_around_is_the_arithmetic_one():
    rows = [[1.0, 0.0], [-1.0, 0.1], [0.0, -1.0]]
    np.testing.assert_allclose(merged(pool_of(rows, base=[5.0, 5.0]), "spherical-mean"), np.mean(rows, 0), atol=1e-6)


def test_weights_of_fine_tuned_models_are_told_apart():
    """Angles of 1e-4 between long weights, which float32 inner products would not see."""
    rng = np.random.default_rng(2)
    base = rng.normal(size=20_000)
    rows = base + 1e-4 * rng.normal(size=(3, 20_000))
    stored = rows.astype(np.float32).astype(np.float64)
    found = merged(pool_of(rows, base=base), "spherical-mean")
    lengths = np.linalg.norm(stored, axis=1)
    wanted = (stored / lengths[:, None]).mean(0)
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted) * lengths.mean(), atol=1e-6)
