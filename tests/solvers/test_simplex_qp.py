import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mergesolve.solvers.simplex_qp import minimize_on_simplex


def instance(seed, k, rank):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(rank, k))
    return root.T @ root / rank, rng.normal(size=k), rng.dirichlet(np.ones(k))


@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), deficit=st.integers(0, 6))
def test_the_answer_satisfies_its_conditions_also_where_the_matrix_is_singular(seed, k, deficit):
    """w ≥ 0, Σw = 1 and ⟨g, w⟩ = min g with g = c + Mw: sufficient for a convex function."""
    quadratic, linear, start = instance(seed, k, max(1, k - deficit))
    weights = minimize_on_simplex(quadratic, linear, start)
    gradient = linear + quadratic @ weights
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1, abs=1e-14)
    assert weights @ gradient - gradient.min() <= 1e-11


@pytest.mark.parametrize(("k", "rank"), [(5, 5), (30, 40), (30, 10)])
def test_it_is_at_most_what_cvxpy_finds(k, rank):
    quadratic, linear, start = instance(3, k, rank)
    variable = cp.Variable(k)
    objective = 0.5 * cp.quad_form(variable, cp.psd_wrap(quadratic)) + linear @ variable
    best = cp.Problem(cp.Minimize(objective), [variable >= 0, cp.sum(variable) == 1])
    best.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    weights = minimize_on_simplex(quadratic, linear, start)
    assert 0.5 * weights @ quadratic @ weights + linear @ weights == pytest.approx(best.value, abs=1e-9)


def test_linear_functions_end_at_a_vertex_and_constants_stay():
    linear = np.array([3.0, 1.0, 2.0])
    weights = minimize_on_simplex(np.zeros((3, 3)), linear, np.array([1.0, 0.0, 0.0]))
    np.testing.assert_array_equal(weights, [0, 1, 0])
    start = np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(minimize_on_simplex(np.zeros((3, 3)), np.zeros(3), start), start, rtol=1e-15)
