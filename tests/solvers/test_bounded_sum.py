import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mergesolve.solvers import OptionError
from mergesolve.solvers.bounded_sum import BoundedSum
from scipy.optimize import linprog


@st.composite
def sets(draw, infinite=True):
    """Bounds and a range of the sum around a point that is inside by construction."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 7))
    point = rng.normal(size=n).round(draw(st.sampled_from([0, 1, 12])))
    slack = rng.exponential(size=(2, n)) * rng.integers(0, 2, (2, n))
    lower, upper = point - slack[0], point + slack[1]
    if infinite:
        lower[rng.random(n) < 0.3], upper[rng.random(n) < 0.3] = -np.inf, np.inf
    low, high = point.sum() - rng.exponential(2), point.sum() + rng.exponential(2)
    kind = draw(st.sampled_from(["equal", "below", "above", "both", "none"]))
    low = {"equal": point.sum(), "below": -np.inf, "none": -np.inf}.get(kind, low)
    high = {"equal": point.sum(), "above": np.inf, "none": np.inf}.get(kind, high)
    scale = draw(st.sampled_from([0.1, 1.0, 1e3]))
    return BoundedSum(lower, upper, low, high), scale * rng.normal(size=(3, n)), point


def oracle(domain, point):
    variable = cp.Variable(point.shape)
    total = cp.sum(variable, axis=1)
    n = point.shape[1]
    limits = [variable[:, i] >= domain.lower[i] for i in range(n) if np.isfinite(domain.lower[i])]
    limits += [variable[:, i] <= domain.upper[i] for i in range(n) if np.isfinite(domain.upper[i])]
    limits += [total >= domain.low] if np.isfinite(domain.low) else []
    limits += [total <= domain.high] if np.isfinite(domain.high) else []
    cp.Problem(cp.Minimize(cp.sum_squares(variable - point)), limits).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
    )
    return variable.value


@given(sets())
def test_projection_is_feasible_idempotent_and_nearest(case):
    """Nearest: the residual x − p makes no acute angle with the way from p to any point of the set."""
    domain, x, inside = case
    p = domain.project(x)
    assert domain.violation(p).max() <= 1e-11
    np.testing.assert_allclose(domain.project(p), p, atol=1e-11)
    assert np.all(np.sum((x - p) * (inside - p), axis=1) <= 1e-8 * (1 + np.abs(x).max()))
    if domain.bounded:
        assert np.all(np.sum((x - p) * (domain.minimizer(p - x) - p), axis=1) <= 1e-8 * (1 + np.abs(x).max() ** 2))


@pytest.mark.parametrize("seed", range(4))
def test_projection_equals_cvxpy(seed):
    rng = np.random.default_rng(seed)
    lower, upper = rng.uniform(0, 0.1, 9), rng.uniform(0.15, 0.4, 9)
    ends = (1.0, 1.0) if seed % 2 else (0.5, 0.9)
    domain = BoundedSum(lower, np.where(rng.random(9) < 0.3, np.inf, upper), *ends)
    x = rng.normal(size=(5, 9))
    np.testing.assert_allclose(domain.project(x), oracle(domain, x), atol=1e-6)


@given(sets(infinite=False))
def test_minimizer_equals_linear_programming(case):
    domain, scores, _ = case
    found = domain.minimizer(scores)
    assert domain.violation(found).max() <= 1e-11
    n = scores.shape[1]
    for row, vertex in zip(scores, found, strict=True):
        finite = [(s, b) for s, b in ((1.0, domain.high), (-1.0, -domain.low)) if np.isfinite(b)]
        best = linprog(
            row,
            A_ub=[[s] * n for s, _ in finite] or None,
            b_ub=[b for _, b in finite] or None,
            bounds=list(zip(domain.lower, domain.upper, strict=True)),
        ).fun
        assert row @ vertex == pytest.approx(best, rel=1e-7, abs=1e-7)


def test_minimizer_fills_from_the_floors_in_the_order_of_the_scores():
    domain = BoundedSum(np.array([0.05, 0.0, 0.1]), np.array([1.0, 0.2, np.inf]), 1.0, 1.0)
    np.testing.assert_allclose(domain.minimizer(np.array([[3.0, 1.0, 2.0]])), [[0.05, 0.2, 0.75]], atol=1e-15)


def test_what_has_no_end_has_no_minimizer():
    domain = BoundedSum(np.zeros(2), np.array([1.0, np.inf]), -np.inf, np.inf)
    assert not domain.bounded
    with pytest.raises(OptionError, match="grow without end"):
        domain.minimizer(np.ones((1, 2)))


def test_from_above_where_only_the_caps_are_finite():
    domain = BoundedSum(np.full(3, -np.inf), np.ones(3), 0.0, 2.0)
    assert domain.bounded
    np.testing.assert_allclose(domain.minimizer(np.array([[1.0, 2.0, 3.0]])), [[1.0, 1.0, -2.0]])


@given(sets(), st.floats(-1e9, 1e9))
def test_large_numbers_cost_no_feasibility(case, shift):
    domain, x, _ = case
    assert domain.violation(domain.project(x + shift)).max() <= 1e-9
