import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mergesolve.solvers import L1Ball, OptionError, make_domain, solve

from .conftest import make_quadratic

matrices = arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 5)), elements=st.floats(-50, 50))


@given(scores=matrices, radius=st.floats(0.1, 10))
def test_minimizer_is_the_best_signed_vertex_by_brute_force(scores, radius):
    ball, n = L1Ball(radius), scores.shape[1]
    corners = np.vstack([radius * np.eye(n), -radius * np.eye(n)])
    found = ball.minimizer(scores)
    np.testing.assert_array_equal(np.sum(found * scores, axis=1), (corners @ scores.T).min(axis=0))
    np.testing.assert_array_equal(ball.matrix(ball.atom(scores), n), found)
    assert np.abs(found).sum(axis=1).tolist() == [radius] * len(scores)


@given(point=matrices, radius=st.floats(0.1, 10))
def test_projection_shrinks_absolute_values_by_one_threshold(point, radius):
    """KKT: p = sign(x) max(|x| − τ, 0) with τ = 0 inside and ‖p‖₁ = r outside."""
    projected = L1Ball(radius).project(point)
    for row, result in zip(point, projected, strict=True):
        if np.abs(row).sum() <= radius:
            np.testing.assert_array_equal(result, row)
            continue
        assert np.abs(result).sum() == pytest.approx(radius, rel=1e-9)
        kept = result != 0
        shrunk = np.abs(row[kept]) - np.abs(result[kept])
        np.testing.assert_allclose(shrunk, shrunk[0], atol=1e-9)
        assert np.all(np.abs(row[~kept]) <= shrunk[0] + 1e-9)


def test_keys_of_opposite_vertices_differ():
    scores = np.array([[0.5, -2.0, 1.0]])
    keys = [L1Ball().atom(sign * scores).item() for sign in (1, -1)]
    assert keys == [1, 4]


@pytest.mark.parametrize(
    "solver", ["frank-wolfe", "projected-gradient", {"name": "adaptive", "method": "sgd", "lr": 0.05}]
)
def test_solvers_find_the_optimum_that_active_sets_by_brute_force_give(solver):
    """min ½ xᵀQx − cᵀx over the ball: the best of all sign patterns' stationary points with ‖x‖₁ = r (or inside)."""
    quadratic, _ = make_quadratic(5, rows=1, n=3, where="face")
    q, c = quadratic.q[0], -3 * quadratic.c[0]
    turned = type(quadratic)(q[None], c[None])  # the linear term is turned around: negative coefficients pay
    best = np.inf
    for signs in itertools.product((-1, 0, 1), repeat=3):
        support = np.flatnonzero(signs)
        if not len(support):
            continue
        s = np.array(signs)[support]
        sub = q[np.ix_(support, support)]
        free = np.linalg.solve(sub, c[support])
        system = np.block([[sub, s[:, None]], [s[None], np.zeros((1, 1))]])
        tight = np.linalg.solve(system, np.append(c[support], 0.8))[:-1]
        for x in (free, tight):
            if np.all(x * s >= 0) and np.abs(x).sum() <= 0.8 + 1e-12:
                best = min(best, 0.5 * x @ sub @ x - c[support] @ x)
    result = solve(turned.problem(L1Ball(0.8)), solver, start="base", max_iter=1500, tol=1e-9)
    assert result.objective == pytest.approx(best, abs=1e-4)
    assert result.gap >= result.objective - best - 1e-9
    assert (result.coefficients < 0).any()


def test_a_radius_must_be_positive():
    with pytest.raises(OptionError, match="'radius' parameter of L1Ball"):
        make_domain({"name": "l1-ball", "radius": 0})
