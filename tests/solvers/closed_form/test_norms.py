"""MetaGPT and Model Stock: their coefficients, and what they minimize."""

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.solvers import OptionError
from mergesolve.solvers.closed_form import make_merge, merge_weights


def pool_of(*rows):
    base = {"w": torch.zeros(len(rows[0]))}
    return Pool.from_state_dicts(base, {f"e{i}": {"w": torch.tensor(row).float()} for i, row in enumerate(rows)})


def merged(pool, name, **options):
    return merge_weights(pool, make_merge({"name": name, **options}))


def coefficients(pool, name, **options):
    return make_merge({"name": name, **options}).coefficients(pool)[0]


def test_metagpt_is_on_the_simplex_and_minimizes_its_quadratic(sampled):
    """Catalogue of properties, 12: Σ_t ‖τ_t‖² ‖θ − θ_t‖² has gradient 0 there."""
    base, experts = sampled("normal", 4, "float32")
    pool = Pool.from_state_dicts(base, experts)
    found = coefficients(pool, "metagpt")
    assert found.shape == (1, 4)
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(1, abs=1e-12)
    weights = merged(pool, "metagpt")
    names = list(weights)
    squares = [sum(float(((e[k] - base[k]).double() ** 2).sum()) for k in names) for e in experts.values()]
    for name in names:
        gradient = sum(
            square * (weights[name].double() - state[name].double())
            for square, state in zip(squares, experts.values(), strict=True)
        )
        assert float(gradient.abs().max()) <= 1e-6 * sum(squares)


@pytest.mark.parametrize("average", ["cosine", "angle"])
def test_model_stock_of_parallel_and_orthogonal_experts(average):
    """Catalogue of properties, 12: cos φ = 1 gives the average (t = 1), cos φ = 0 the base (t = 0)."""
    parallel = pool_of([1.0, 2.0], [2.0, 4.0], [0.5, 1.0])
    np.testing.assert_allclose(merged(parallel, "model-stock", average=average)["w"], [3.5 / 3, 7 / 3], rtol=1e-6)
    orthogonal = pool_of([1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0])
    np.testing.assert_allclose(merged(orthogonal, "model-stock", average=average)["w"], [0, 0, 0], atol=1e-7)


@pytest.mark.parametrize("cosine", [-0.3, 0.2, 0.9])
def test_model_stock_of_two_is_where_the_published_ratio_says(cosine):
    """t = 2 cos φ / (1 + cos φ), the foot of the perpendicular from the origin's side, for two vectors of any norms."""
    pool = pool_of([3.0, 0.0], [2 * cosine, 2 * np.sqrt(1 - cosine**2)])
    t = 2 * cosine / (1 + cosine)
    mean = np.array([3 + 2 * cosine, 2 * np.sqrt(1 - cosine**2)]) / 2
    for average in ("cosine", "angle"):
        np.testing.assert_allclose(merged(pool, "model-stock", average=average)["w"], t * mean, rtol=1e-5, atol=1e-6)


def test_model_stock_averages_differ_beyond_two():
    pool = pool_of([1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    for average, cosine in [("cosine", 1 / 3), ("angle", np.cos(np.pi / 3))]:
        t = 3 * cosine / (1 + 2 * cosine)
        np.testing.assert_allclose(merged(pool, "model-stock", average=average)["w"], [t * 2 / 3, t / 3, 0], rtol=1e-6)


def test_model_stock_where_the_ratio_has_no_value_is_the_base():
    """Two opposite task vectors: 1 + cos φ = 0."""
    np.testing.assert_array_equal(merged(pool_of([1.0, 2.0], [-1.0, -2.0]), "model-stock")["w"], [0, 0])


def test_unknown_average_is_refused():
    with pytest.raises(OptionError, match="'average' parameter of ModelStock must be one of 'cosine', 'angle'"):
        make_merge({"name": "model-stock", "average": "median"})
