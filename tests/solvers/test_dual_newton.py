import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mergesolve.solvers.dual_newton import Few


@st.composite
def sets(draw):
    """Bounds, equalities and inequalities around a point that is inside by construction."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, m, equalities = draw(st.integers(2, 8)), draw(st.integers(1, 4)), draw(st.integers(0, 1))
    inside = rng.random(n)
    lower = np.where(rng.random(n) < 0.7, inside * rng.random(n), -np.inf)
    upper = np.where(rng.random(n) < 0.5, inside + rng.random(n), np.inf)
    matrix = rng.integers(-1, 3, (m, n)).astype(float)
    matrix[~matrix.any(axis=1), 0] = 1.0
    room = np.where(np.arange(m) < equalities, 0.0, rng.exponential(0.3, m))
    domain = Few(lower, upper, matrix, matrix @ inside + room, equalities)
    return domain, inside + draw(st.sampled_from([0.05, 1.0])) * rng.normal(size=(4, n)), inside


@given(sets())
def test_what_is_called_optimal_is(case):
    """Feasible, and ½‖v − p‖² grows along the way to any point of the set; here to one that is inside."""
    domain, points, inside = case
    found, done = domain.project(points)
    for p, x in zip(points[done], found[done], strict=True):
        excess = domain.matrix @ x - domain.limits
        assert np.all(excess <= 1e-9)
        assert np.all(np.abs(excess[: domain.equalities]) <= 1e-9)
        assert np.all((x >= domain.lower) & (x <= domain.upper))
        assert (p - x) @ (inside - x) <= 1e-7


@pytest.mark.parametrize("seed", range(3))
def test_projection_equals_cvxpy_and_steps_suffice(seed):
    rng = np.random.default_rng(seed)
    n = 12
    matrix = np.vstack([np.ones(n), rng.integers(0, 2, (3, n))]).astype(float)
    limits = np.array([1.0, 0.3, 0.4, 0.5])
    domain = Few(np.zeros(n), np.full(n, np.inf), matrix, limits, 1)
    points = 1 / n + 0.2 * rng.normal(size=(20, n))
    found, done = domain.project(points)
    assert done.all()
    x = cp.Variable(points.shape)
    rules = [x >= 0, x @ matrix[0] == 1, x @ matrix[1:].T <= np.tile(limits[1:], (20, 1))]
    cp.Problem(cp.Minimize(cp.sum_squares(x - points)), rules).solve(solver=cp.CLARABEL)
    np.testing.assert_allclose(found, x.value, atol=1e-5)
