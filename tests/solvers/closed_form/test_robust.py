"""Robust merges: what they minimize, how little wrong models move them, and what they refuse."""

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.solvers import OptionError
from mergesolve.solvers.closed_form import make_merge, merge_weights
from mergesolve.solvers.closed_form.robust import krum_scores, middle, weiszfeld
from scipy.optimize import minimize

FAR = 1e6


def pool_of(rows, base=None):
    base = {"w": torch.zeros(len(rows[0])) if base is None else torch.as_tensor(base).float()}
    return Pool.from_state_dicts(
        base, {f"e{i}": {"w": base["w"] + torch.tensor(row).float()} for i, row in enumerate(rows)}
    )


def merged(rows, name, base=None, **options):
    return merge_weights(pool_of(rows, base), make_merge({"name": name, **options}))["w"].double().numpy()


def median_of(vectors, shares=None, smoothing=1e-9, max_iter=20000, tol=1e-12):
    """The geometric median as a vector, by the coefficients from inner products in float64."""
    shares = np.full(len(vectors), 1 / len(vectors)) if shares is None else shares / shares.sum()
    return weiszfeld(vectors @ vectors.T, shares, smoothing, max_iter, tol) @ vectors


# Order statistics


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_middle_is_the_mean_of_sorted_values(n, kind):
    rng = np.random.default_rng(n)
    values = rng.normal(size=(n, 50)) if kind == "normal" else rng.integers(-1, 2, (n, 50)) * 0.5
    for k in range((n + 1) // 2):
        found = middle(torch.from_numpy(values.astype(np.float32)), k)
        wanted = np.sort(values, axis=0)[k : n - k].mean(0)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.19])
def test_trimmed_mean_is_the_average_where_nothing_is_trimmed(share):
    rows = np.random.default_rng(0).normal(size=(5, 30))
    np.testing.assert_allclose(merged(rows, "trimmed-mean", share=share), rows.mean(0), atol=1e-6)


@pytest.mark.parametrize("n", [3, 4, 7])
def test_trimmed_mean_that_trims_all_it_can_is_the_median(n):
    rows = np.random.default_rng(n).normal(size=(n, 30))
    one, other = merged(rows, "trimmed-mean", share=0.4999999), merged(rows, "median")
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(other, np.median(rows, axis=0), atol=1e-6)


@pytest.mark.parametrize(("share", "n", "k"), [(0.29, 100, 29), (0.1, 30, 3), (0.3, 10, 3), (0.25, 7, 1)])
def test_as_many_are_trimmed_as_the_share_means(share, n, k):
    """Also where share · n is rounded to just below the integer: k far values at one end change nothing."""
    rows = np.random.default_rng(n).normal(size=(n, 3))
    rows[:k] += FAR
    wanted = np.sort(rows, axis=0)[k : n - k].mean(0)
    found = merged(rows, "trimmed-mean", share=share)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(found).max() < 10


@pytest.mark.parametrize(("name", "options", "wrong"), [("trimmed-mean", {"share": 0.3}, 2), ("median", {}, 3)])
def test_entries_stay_in_the_range_of_the_right_models(name, options, wrong):
    """With k wrong models, whatever they hold, each entry lies between right ones; the average does not."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(7, 40))
    right = rows[wrong:]
    for scale in (1.0, FAR):
        rows[:wrong] = scale * rng.normal(size=(wrong, 40))
        found = merged(rows, name, **options)
        assert (found >= right.min(0) - 1e-6).all()
        assert (found <= right.max(0) + 1e-6).all()
    assert (np.abs(merged(rows, "average")) > right.max()).any()


@pytest.mark.parametrize("name", ["trimmed-mean", "median"])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinity_is_not_trimmed_away_unseen(name, value):
    rows = np.ones((5, 3))
    rows[0, 0] = value
    with pytest.raises(ValueError, match="'w' holds NaN or infinity"):
        merged(rows, name)


@pytest.mark.parametrize("share", [-0.1, 0.5, float("nan"), "x"])
def test_share_is_below_a_half(share):
    with pytest.raises(OptionError, match=r"'share' parameter of TrimmedMean must be a number in \[0, 0.5\)"):
        make_merge({"name": "trimmed-mean", "share": share})


# Geometric median


@pytest.mark.parametrize("seed", range(3))
def test_geometric_median_is_where_scipy_finds_the_minimum(seed):
    rng = np.random.default_rng(seed)
    vectors, shares = rng.normal(size=(6, 4)), rng.uniform(0.5, 2, 6)

    def distance(point):
        return shares @ np.linalg.norm(vectors - point, axis=1)

    def slope(point):
        away = point - vectors
        return shares @ (away / np.linalg.norm(away, axis=1, keepdims=True))

    wanted = minimize(distance, vectors.mean(0), jac=slope, method="BFGS", options={"gtol": 1e-10}).x
    np.testing.assert_allclose(median_of(vectors, shares), wanted, atol=1e-7)
    weights = {f"e{i}": float(share) for i, share in enumerate(shares)}
    np.testing.assert_allclose(merged(vectors, "geometric-median", weights=weights), wanted, atol=1e-5)


@pytest.mark.parametrize("n", [3, 5, 9])
def test_unit_vectors_to_the_experts_sum_to_nothing_at_the_geometric_median(n):
    """The condition of optimality away from the experts; at one of them, the others' sum is at most its own weight."""
    vectors = np.random.default_rng(n).normal(size=(n, 20))
    away = median_of(vectors) - vectors
    assert np.linalg.norm((away / np.linalg.norm(away, axis=1, keepdims=True)).mean(0)) < 1e-9
    center = np.zeros((1, 20))
    star = np.concatenate([center, np.eye(20)[:3], -np.eye(20)[:3]])
    np.testing.assert_allclose(median_of(star + 1.0), 1 + center[0], atol=1e-8)


def test_geometric_median_at_an_expert_that_holds_most_of_the_weight():
    rows = [[0.0, 1.0], [3.0, 1.0], [2.0, -4.0]]
    np.testing.assert_allclose(merged(rows, "geometric-median", weights={"e1": 5.0}), rows[1], atol=1e-5)
    np.testing.assert_allclose(merged(rows, "geometric-median", weights={"e0": 0, "e2": 0}), rows[1], atol=1e-6)


def test_geometric_median_of_an_equilateral_triangle_is_its_center():
    corners = np.array([[np.cos(a), np.sin(a)] for a in 2 * np.pi / 3 * np.arange(3)])
    np.testing.assert_allclose(merged(corners + 5, "geometric-median"), [5, 5], atol=1e-6)


def test_geometric_median_moves_with_rotations_shifts_and_scales():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, 6))
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    shift = rng.normal(size=6)
    moved = 2.5 * vectors @ rotation + shift
    np.testing.assert_allclose(median_of(moved), 2.5 * median_of(vectors) @ rotation + shift, atol=1e-8)


def test_a_base_elsewhere_does_not_move_the_geometric_median():
    rows = np.random.default_rng(2).normal(size=(5, 6))
    base = np.full(6, 4.0)
    np.testing.assert_allclose(
        merged(rows - base, "geometric-median", base), merged(rows, "geometric-median"), atol=3e-6
    )


@pytest.mark.parametrize("place", [0, 4])
@pytest.mark.parametrize("scale", [10.0, FAR])
def test_wrong_models_move_the_geometric_median_by_a_bounded_amount(scale, place):
    """‖z − c‖ ≤ 2(1 − a)/(1 − 2a) max ‖x_i − c‖ over the right ones, for any center c and a share a of wrong ones.

    With D = ‖z − c‖ and r_i = ‖x_i − c‖: ‖z − x_i‖ is at least D − r_i for right ones and r_i − D for wrong ones, and
    the mean of ‖z − x_i‖ is at most that of r_i; so (1 − 2a) D ≤ twice the sum over right ones of r_i / n.
    """
    rng = np.random.default_rng(3)
    right = rng.normal(size=(4, 8))
    center = right.mean(0)
    radius = np.linalg.norm(right - center, axis=1).max()
    rows = np.insert(right, place, scale * rng.normal(size=8), axis=0)
    share = 1 / 5
    bound = 2 * (1 - share) / (1 - 2 * share) * radius
    assert np.linalg.norm(merged(rows, "geometric-median") - center) <= bound
    if scale == FAR:
        assert np.linalg.norm(merged(rows, "average") - center) > 1e4 * bound


def test_smoothing_and_limits_are_used():
    """One step from the average is the mean by inverse distances; smoothing beyond all distances is the average."""
    rows = np.random.default_rng(4).normal(size=(4, 5))
    pulls = 1 / np.linalg.norm(rows - rows.mean(0), axis=1)
    np.testing.assert_allclose(merged(rows, "geometric-median", max_iter=1), pulls @ rows / pulls.sum(), atol=1e-6)
    np.testing.assert_allclose(merged(rows, "geometric-median", smoothing=100.0), rows.mean(0), atol=1e-6)
    rough, fine = (median_of(rows, tol=tol) for tol in (0.1, 1e-12))
    away = rough - rows
    assert 1e-6 < np.linalg.norm((away / np.linalg.norm(away, axis=1, keepdims=True)).mean(0)) < 0.1
    assert np.linalg.norm(rough - fine) > 1e-6


@pytest.mark.parametrize("weights", [{"e0": -1.0}, {"e0": 0, "e1": 0, "e2": 0}])
def test_geometric_median_refuses_weights_below_and_all_at_nothing(weights):
    with pytest.raises(OptionError, match="'weights' parameter of GeometricMedian must hold numbers of 0 or more"):
        merged(np.eye(3), "geometric-median", weights=weights)


@pytest.mark.parametrize(
    ("option", "value"),
    [("smoothing", 0), ("smoothing", float("inf")), ("max_iter", 0), ("max_iter", 1.5), ("tol", -1), ("tol", 1)],
)
def test_geometric_median_refuses_options_out_of_range(option, value):
    with pytest.raises(OptionError, match=f"'{option}' parameter of GeometricMedian"):
        make_merge({"name": "geometric-median", option: value})


# Krum


def test_krum_scores_on_a_line():
    """At 0, 1, 2, 4, 10 with f = 1: each expert's 2 smallest squared distances, by hand."""
    points = np.array([[0.0], [1.0], [2.0], [4.0], [10.0]])
    np.testing.assert_allclose(krum_scores(points @ points.T, 1), [1 + 4, 1 + 1, 1 + 4, 4 + 9, 36 + 64])
    assert merged(points, "krum", byzantine=1)[0] == pytest.approx(1)
    assert merged(points, "krum", byzantine=1, keep=3)[0] == pytest.approx(1)
    assert merged(points, "krum", byzantine=1, keep=4)[0] == pytest.approx(7 / 4)


def test_krum_takes_no_wrong_model_however_many_are_allowed():
    """f wrong models that agree with each other, near or far, among n = 2f + 3: what it takes is a right one."""
    rng = np.random.default_rng(0)
    for wrong in (1, 2, 3):
        right = rng.normal(size=(wrong + 3, 12))
        rows = np.concatenate([np.full((wrong, 12), FAR), right])
        found = merged(rows, "krum")
        assert min(np.abs(found - row).max() for row in right) < 1e-6
        kept = merged(rows, "krum", keep=len(right))
        np.testing.assert_allclose(kept, right.mean(0), atol=1e-6)


def test_krum_that_keeps_all_is_the_average():
    rows = np.random.default_rng(1).normal(size=(5, 9))
    np.testing.assert_allclose(merged(rows, "krum", keep=5), rows.mean(0), atol=1e-6)


def test_of_equal_scores_the_first_name_wins():
    """The corners of a square, in both orders of the pool."""
    corners = {"d": [1.0, 1.0], "b": [1.0, -1.0], "c": [-1.0, 1.0], "a": [-1.0, -1.0]}
    for order in ("dbca", "abcd"):
        pool = Pool.from_state_dicts(
            {"w": torch.zeros(2)}, {name: {"w": torch.tensor(corners[name])} for name in order}
        )
        assert merge_weights(pool, make_merge("krum"))["w"].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (4, {"byzantine": 1}, r"needs 2 · 1 \+ 3 = 5 experts or more; the pool has 4: e0, .* 'byzantine' to at most 0"),
        (2, {}, r"needs 2 · 0 \+ 3 = 3 experts or more; the pool has 2: e0, e1\. Add experts, or take the median"),
        (3, {"keep": 4}, "'keep' parameter of Krum must be at most the number of experts. Got 4 instead, for 3: e0"),
    ],
)
def test_krum_says_how_many_experts_it_needs(n, options, message):
    with pytest.raises(OptionError, match=message):
        merged(np.eye(n), "krum", **options)


@pytest.mark.parametrize(("option", "value"), [("byzantine", -1), ("byzantine", 0.5), ("keep", 0), ("keep", True)])
def test_krum_refuses_options_out_of_range(option, value):
    with pytest.raises(OptionError, match=f"'{option}' parameter of Krum must be an integer"):
        make_merge({"name": "krum", option: value})


@pytest.mark.parametrize("name", ["geometric-median", "krum"])
def test_models_that_agree_are_returned_as_they_are(name):
    base = torch.randn(20, generator=torch.Generator().manual_seed(0))
    model = base + 0.1 * base.flip(0)
    pool = Pool.from_state_dicts({"w": base}, {f"e{i}": {"w": model.clone()} for i in range(5)})
    assert torch.equal(merge_weights(pool, make_merge(name))["w"], model)
