import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mergesolve.solvers import DOMAINS, Box, Capped, Free, OptionError, Simplex, make_domain

BOUNDED = [name for name in DOMAINS if name != "free"]
CONVEX = [name for name in DOMAINS if make_domain(name).convex]
matrices = arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 7)),
    elements=st.floats(-1e3, 1e3, allow_nan=False, allow_subnormal=False),
)


def oracle(domain, point):
    variable = cp.Variable(point.shape)
    constraints = {
        "simplex": [variable >= 0, cp.sum(variable, axis=1) == 1],
        "capped": [variable >= 0, cp.sum(variable, axis=1) <= 1],
        "box": [variable >= 0, variable <= 1],
        "l1-ball": [cp.sum(cp.abs(variable), axis=1) <= 1],
        "polytope": [variable >= 0, cp.sum(variable, axis=1) == 1],  # nothing is asked for but its simplex
        "free": [],
    }[domain]
    cp.Problem(cp.Minimize(cp.sum_squares(variable - point)), constraints).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12
    )
    return variable.value


@pytest.mark.parametrize("name", DOMAINS)
@given(point=matrices)
def test_projection_is_feasible_and_idempotent(name, point):
    domain = make_domain(name)
    projected = domain.project(point)
    assert domain.violation(projected).max() <= 1e-9
    np.testing.assert_allclose(domain.project(projected), projected, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in BOUNDED if name in CONVEX])
@given(point=matrices, direction=matrices)
def test_projection_satisfies_its_variational_inequality(name, point, direction):
    """p = Π(x) iff ⟨x − p, v − p⟩ ≤ 0 for all v in the domain; the worst v is the linear minimizer of p − x."""
    domain = make_domain(name)
    projected = domain.project(point)
    worst = domain.minimizer(projected - point)
    assert np.sum((point - projected) * (worst - projected)) <= 1e-6


@pytest.mark.parametrize("name", CONVEX)
def test_projection_equals_cvxpy(name):
    point = np.random.default_rng(0).normal(size=(6, 9))
    np.testing.assert_allclose(make_domain(name).project(point), oracle(name, point), atol=2e-6)


@pytest.mark.parametrize("name", ["simplex", "capped"])
@given(scores=matrices)
def test_minimizer_is_the_best_vertex_by_brute_force(name, scores):
    domain = make_domain(name)
    n = scores.shape[1]
    corners = np.vstack([np.eye(n), np.zeros((1, n))]) if domain.has_base else np.eye(n)
    best = (corners @ scores.T).min(axis=0)
    found = domain.minimizer(scores)
    np.testing.assert_array_equal(np.sum(found * scores, axis=1), best)
    assert domain.violation(found).max() == 0


@pytest.mark.parametrize("name", BOUNDED)
@given(scores=matrices, seed=st.integers(0, 1000))
def test_keys_stand_for_the_vertices_that_they_were_made_from(name, scores, seed):
    """matrix(atom(S)) is the minimizer, products are ⟨V_k, S⟩ and blend is Σ w_k V_k, whatever the key looks like."""
    domain = make_domain(name)
    rows, n = scores.shape
    rng = np.random.default_rng(seed)
    atoms = np.stack([domain.atom(scores), *(domain.atom(rng.normal(size=scores.shape)) for _ in range(3))])
    dense = np.stack([domain.matrix(atom, n) for atom in atoms])
    np.testing.assert_array_equal(dense[0], domain.minimizer(scores))
    np.testing.assert_allclose(domain.products(atoms, scores), np.sum(dense * scores, axis=(1, 2)), atol=1e-10)
    weights = rng.dirichlet(np.ones(4))
    np.testing.assert_allclose(domain.blend(atoms, weights, rows, n), np.tensordot(weights, dense, axes=1), atol=1e-14)


@pytest.mark.parametrize("name", BOUNDED)
def test_rows_that_nothing_couples_are_factors_of_their_own(name):
    cells = make_domain(name).cells(4)
    assert len(set(cells.tolist())) in (1, 4)
    if name in ("simplex", "capped", "box", "l1-ball"):
        np.testing.assert_array_equal(cells, np.arange(4))


@given(scores=matrices)
def test_soft_oracle_lists_vertices_by_ascending_score(scores):
    n = scores.shape[1]
    for domain in (Simplex(), Capped()):
        ranked = domain.vertices(scores, n + domain.has_base)
        with_base = np.hstack([scores, np.zeros((len(scores), 1))])  # BASE = −1 indexes the last column
        values = np.take_along_axis(with_base, ranked.T, axis=1)
        assert (np.diff(values, axis=1) >= 0).all()
        assert all(len(set(column)) == len(column) for column in ranked.T)


@pytest.mark.parametrize("name", BOUNDED)
@given(scores=matrices, point=matrices)
def test_gap_is_nonnegative_and_zero_at_the_minimizer(name, scores, point):
    domain = make_domain(name)
    feasible = domain.project(np.resize(point, scores.shape))
    assert domain.gap(feasible, scores) >= 0
    assert domain.gap(domain.minimizer(scores), scores) <= 1e-9
    assert domain.gap(feasible, np.zeros_like(scores)) == 0


@pytest.mark.parametrize("name", DOMAINS)
def test_projection_is_equivariant_to_the_order_of_experts(name):
    rng = np.random.default_rng(1)
    point, order = rng.normal(size=(5, 8)), rng.permutation(8)
    domain = make_domain(name)
    np.testing.assert_allclose(domain.project(point[:, order]), domain.project(point)[:, order], atol=1e-15)


def test_free_has_no_oracle_and_no_gap():
    assert Free().gap(np.ones((1, 2)), np.ones((1, 2))) is None
    with pytest.raises(OptionError, match="unbounded"):
        Free().minimizer(np.ones((1, 2)))


def test_stationarity_vanishes_exactly_at_optima_of_linear_functions():
    scores = np.array([[0.3, -0.2, 0.9]])
    for domain in (Simplex(), Capped(), Box()):
        assert domain.stationarity(domain.minimizer(scores), scores) == 0
        assert domain.stationarity(domain.project(np.full((1, 3), 1 / 3)), scores) > 0.1


@given(point=matrices, shift=st.floats(-1e9, 1e9))
def test_simplex_projection_survives_large_numbers(point, shift):
    """Π(x + c1) = Π(x): a common offset, however large, costs no feasibility."""
    projected = Simplex().project(point + shift)
    assert Simplex().violation(projected).max() <= 1e-12
    np.testing.assert_allclose(projected, Simplex().project(point), atol=1e-6)


def test_gap_of_nan_scores_is_nan():
    assert np.isnan(Simplex().gap(np.ones((1, 1)), np.full((1, 1), np.nan)))


def test_unknown_domain_names_the_nearest():
    with pytest.raises(OptionError, match=r"Unknown domain 'simplx'. Did you mean 'simplex'\?"):
        make_domain("simplx")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "box", "lower": 2}, "'upper' parameter of Box"),
        ({"name": "box", "lower": "a"}, "'lower' parameter of Box"),
        ({"name": "simplex", "total": 2}, "option of the domain 'simplex'"),
        ({"lower": 2}, "needs a 'name'"),
    ],
)
def test_bad_domain_options_are_explained(spec, message):
    with pytest.raises(OptionError, match=message):
        make_domain(spec)
