"""Singular value methods: what they are for orthogonal, single, equal and low-rank updates."""

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool, PoolError
from mergesolve.solvers.closed_form import make_merge, merge_weights, plan

RNG = np.random.default_rng(3)


def pool_of(matrices, base=None, **others):
    rows = np.asarray(matrices, dtype=np.float32)
    start = np.zeros(rows.shape[1:], dtype=np.float32) if base is None else base.astype(np.float32)
    return Pool.from_state_dicts(
        {"w": torch.from_numpy(start), **{name: torch.zeros_like(values[0]) for name, values in others.items()}},
        {
            f"e{i}": {"w": torch.from_numpy(start + row), **{name: values[i] for name, values in others.items()}}
            for i, row in enumerate(rows)
        },
    )


def merged(pool, name, **options):
    return merge_weights(pool, make_merge({"name": name, **options}))


def orthogonal(m, r):
    return np.linalg.qr(RNG.normal(size=(m, r)))[0]


@pytest.fixture
def updates():
    return RNG.normal(size=(3, 24, 18))


@pytest.fixture
def separate():
    """Three updates whose row and column spaces are orthogonal to those of the others."""
    u, v = orthogonal(24, 18), orthogonal(18, 18)
    return np.stack(
        [u[:, 6 * i : 6 * i + 6] @ np.diag(RNG.uniform(1, 3, 6)) @ v[:, 6 * i : 6 * i + 6].T for i in range(3)]
    )


def test_tsv_m_of_one_is_the_expert(updates):
    np.testing.assert_allclose(merged(pool_of(updates[:1]), "tsv-m")["w"], updates[0], atol=3e-6)


def test_tsv_m_leaves_updates_in_orthogonal_spaces_alone(separate):
    """Nothing to whiten and nothing cut off: the sum of the updates."""
    np.testing.assert_allclose(merged(pool_of(separate), "tsv-m")["w"], separate.sum(0), atol=3e-6)


def test_tsv_m_of_an_expert_twice_is_the_expert(separate):
    """Stacked singular vectors that are not independent: each direction is used once, not twice."""
    twice = merged(pool_of([separate[0], separate[0]]), "tsv-m")["w"]
    np.testing.assert_allclose(twice, separate[0], atol=3e-6)


def test_tsv_m_uses_no_directions_of_an_expert_that_left_the_matrix_alone(separate):
    found = merged(pool_of([separate[0], np.zeros((24, 18))], base=RNG.normal(size=(24, 18))), "tsv-m")["w"]
    alone = merged(pool_of([separate[0]]), "tsv-m")["w"]
    assert np.linalg.matrix_rank(alone.numpy(), tol=1e-4) == 6
    base = pool_of([separate[0], np.zeros((24, 18))])
    np.testing.assert_allclose(merged(base, "tsv-m")["w"], alone, atol=3e-6)
    assert bool(found.isfinite().all())


def test_iso_c_has_one_singular_value_which_is_the_mean(updates):
    found = np.linalg.svd(merged(pool_of(updates), "iso-c")["w"].double().numpy(), compute_uv=False)
    np.testing.assert_allclose(found, np.linalg.svd(updates.sum(0), compute_uv=False).mean(), rtol=1e-5)


def test_iso_c_leaves_a_flat_spectrum_alone():
    flat = 2.5 * orthogonal(24, 18)
    np.testing.assert_allclose(merged(pool_of([0.25 * flat, 0.75 * flat]), "iso-c")["w"], flat, atol=3e-6)


def test_iso_c_does_not_leave_the_space_of_the_updates(separate):
    """Of a sum of rank 6, singular values are 6/18 of the mean of the 6, and no direction is made up."""
    found = merged(pool_of(separate[:1]), "iso-c")["w"].double().numpy()
    values = np.linalg.svd(found, compute_uv=False)
    np.testing.assert_allclose(values[:6], np.linalg.svd(separate[0], compute_uv=False).sum() / 18, rtol=1e-5)
    np.testing.assert_allclose(values[6:], 0, atol=3e-6)


def test_iso_cts_with_everything_in_common_is_iso_c(updates):
    wanted = merged(pool_of(updates), "iso-c")["w"]
    np.testing.assert_allclose(merged(pool_of(updates), "iso-cts", common=1.0)["w"], wanted, atol=3e-6)


@pytest.mark.parametrize("common", [0.0, 0.3, 0.8])
def test_iso_cts_is_isotropic(common, updates):
    values = np.linalg.svd(merged(pool_of(updates), "iso-cts", common=common)["w"].double().numpy(), compute_uv=False)
    np.testing.assert_allclose(values, values.mean(), rtol=1e-4)


def test_iso_cts_shares_a_matrix_that_the_tasks_do_not_divide():
    """5 directions for 3 tasks and nothing in common: each gets one, the sum gets the other two."""
    found = merged(pool_of(RNG.normal(size=(3, 5, 5))), "iso-cts", common=0.0)["w"].double().numpy()
    assert np.linalg.matrix_rank(found) == 5


def test_knots_linear_is_task_arithmetic(updates):
    weights = {"e0": 0.5, "e2": -1.0}
    pool = pool_of(updates, base=RNG.normal(size=(24, 18)))
    wanted = merged(pool, "task-arithmetic", scale=0.3, weights=weights)["w"]
    np.testing.assert_allclose(
        merged(pool, "knots", inner="linear", scale=0.3, weights=weights)["w"], wanted, atol=3e-6
    )


def test_knots_of_one_is_the_expert(updates):
    np.testing.assert_allclose(merged(pool_of(updates[:1]), "knots", density=1.0)["w"], updates[0], atol=3e-6)


def test_knots_does_not_depend_on_the_basis_of_the_outputs(updates):
    """Turning the outputs of all updates turns the merge, unlike that of TIES on the entries."""
    turn = orthogonal(24, 24)
    found = merged(pool_of(turn @ updates), "knots", density=0.5)["w"]
    np.testing.assert_allclose(found, turn @ merged(pool_of(updates), "knots", density=0.5)["w"].numpy(), atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 3), (3, 40)])
def test_knots_of_low_rank_updates_stays_in_their_space(shape):
    """Both ways to the basis, through m × m and through n p × n p, against an SVD of all updates side by side."""
    rows = RNG.normal(size=(3, *shape))
    u = np.linalg.svd(np.concatenate(list(rows), axis=1), full_matrices=False)[0]
    found = merged(pool_of(rows), "knots", density=1.0)["w"].double().numpy()
    turned = u.T @ rows
    agrees = np.sign(turned) == np.sign(turned.sum(0))
    wanted = u @ ((turned * agrees).sum(0) / agrees.sum(0))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts", "knots"])
def test_what_is_no_matrix_gets_the_mean(name, updates):
    others = {"conv": torch.randn(3, 4, 2, 2, 2), "bias": torch.randn(3, 5), "scale": torch.randn(3)}
    found = merged(pool_of(updates, **others), name, scale=0.5)
    for key, values in others.items():
        torch.testing.assert_close(found[key], 0.5 * values.mean(0))


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts", "knots"])
def test_nan_is_an_error_that_names_the_tensor(name, updates):
    updates[1, 2, 3] = np.nan
    with pytest.raises(PoolError, match=r"'w'.*pool inspect"):
        merged(pool_of(updates), name)


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts", "knots"])
@pytest.mark.parametrize("kind", ["identity", "ones", "signs"])
def test_repeated_singular_values_are_no_obstacle(name, kind):
    """Matrices on which LAPACK's divide and conquer may not converge: hundreds of equal singular values, or zeros."""
    signs = np.sign(RNG.normal(size=128))
    matrix = {"identity": np.eye(128), "ones": np.ones((128, 128)), "signs": np.diag(signs) + np.diag(signs[:64], 64)}
    found = merged(pool_of([matrix[kind]] * 2), name)["w"]
    assert bool(found.isfinite().all())
    wanted = merged(pool_of([matrix[kind]]), name)["w"]
    if name in ("tsv-m", "knots") and kind == "ones":
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [1e-2, 1e-4])
def test_small_singular_values_count_as_the_large_ones_do(ratio):
    """Iso-C of a sum whose singular values fall by 10⁴ still has one singular value, to float32."""
    u, v, s = orthogonal(40, 30), orthogonal(30, 30), np.geomspace(1, ratio, 30)
    rows = (u * s) @ v.T
    stored = rows.astype(np.float32).astype(np.float64)
    found = merged(pool_of([rows]), "iso-c")["w"].double().numpy()
    left, values, right = np.linalg.svd(stored, full_matrices=False)
    np.testing.assert_allclose(found, values.mean() * left @ right, atol=1e-7)


def test_the_plan_of_knots_counts_its_basis():
    """A wide and a tall matrix of the same size: the tall one has a basis that is as large as it is, squared."""
    tall = plan(pool_of(RNG.normal(size=(8, 64, 4))), make_merge("knots")).host_memory
    wide = plan(pool_of(RNG.normal(size=(8, 4, 64))), make_merge("knots")).host_memory
    assert tall - wide >= 8 * 32**2
