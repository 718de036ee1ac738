"""Quadratic programs of a few variables, against the enumeration of every set of active constraints."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mergesolve.solvers import OptionError
from mergesolve.solvers.closed_form.convex import least_norm, minimize
from mergesolve.solvers.domains import Box, Capped, Free, Simplex

DOMAINS = {"simplex": Simplex(), "capped": Capped(), "box": Box(0.0, 0.4), "shifted": Box(-0.2, 1.5)}


def sampled(seed, n=4, rank=None, spread=1.0, copies=()):
    """Q = A Aᵀ and c = A b, from `rank` numbers an expert whose norms differ by up to 10^spread; rows may be copies."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, rank or 3 * n)) * 10 ** rng.uniform(0, spread, size=(n, 1))
    for copy, original in copies:
        a[copy] = a[original]
    return a @ a.T, a @ rng.normal(size=a.shape[1]) * 10**spread / n


def value(point, quadratic, linear):
    return point @ quadratic @ point - 2 * linear @ point


def enumerated(quadratic, linear, domain):
    """Return the best value over all choices of which constraints hold with equality: brute force, by definition."""
    n = len(linear)
    low, high = (domain.lower, domain.upper) if isinstance(domain, Box) else (0.0, None)
    states = [low, high, None] if high is not None else [low, None]
    sums = {Simplex: [True], Capped: [True, False]}.get(type(domain), [False])
    best = np.inf
    for choice in itertools.product(states, repeat=n):
        for bound in sums:
            free = [i for i in range(n) if choice[i] is None]
            point = np.array([0.0 if x is None else x for x in choice])
            if free:
                k = len(free)
                system = np.zeros((k + 1, k + 1))
                system[:k, :k] = quadratic[np.ix_(free, free)]
                right = np.append(linear[free] - quadratic[free] @ point, 1 - point.sum())
                system[k, k] = 1.0
                if bound:
                    system[k, :k] = system[:k, k] = 1.0
                    system[k, k] = 0.0
                point[free] = np.linalg.lstsq(system, right, rcond=None)[0][:k]
            if domain.violation(point[None])[0] < 1e-9:
                best = min(best, value(point, quadratic, linear))
    return best


@pytest.mark.parametrize("name", DOMAINS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 4),
    spread=st.floats(0, 2),
    rank=st.sampled_from([None, 2]),
)
def test_equals_the_enumeration_of_active_sets(name, seed, n, spread, rank):
    quadratic, linear = sampled(seed, n, rank, spread)
    domain = DOMAINS[name]
    found = minimize(quadratic, linear, domain)
    scale = max(quadratic.max(), abs(linear).max())
    assert domain.violation(found[None])[0] <= 1e-12
    assert value(found, quadratic, linear) - enumerated(quadratic, linear, domain) <= 1e-11 * scale


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("n", [1, 3, 20])
def test_karush_kuhn_tucker(name, n):
    """No vertex of the domain is better to first order, which proves optimality: the quadratic is convex."""
    domain = DOMAINS[name]
    for seed in range(5):
        quadratic, linear = sampled([seed, n], n, spread=1)
        found = minimize(quadratic, linear, domain)[None]
        scale = abs(quadratic).max()
        gradient = 2 * (quadratic @ found[0] - linear)[None] / scale
        assert domain.stationarity(found, gradient) <= 1e-11
        assert domain.gap(found, gradient) <= 1e-11


def test_an_interior_minimum_is_that_of_the_free_problem():
    quadratic, _ = sampled(3, 5)
    inside = np.array([0.1, 0.2, 0.15, 0.25, 0.05])
    for domain in (Capped(), Box(0.0, 1.0), Free()):
        np.testing.assert_allclose(minimize(quadratic, quadratic @ inside, domain), inside, atol=1e-12)


def test_experts_without_weight_are_exactly_zero():
    quadratic, _ = sampled(5, 4)
    outside = np.array([1.5, -0.5, 0.2, -0.2])
    found = minimize(quadratic, quadratic @ outside, Simplex())
    assert (found == 0).any()
    assert found.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("name", DOMAINS)
def test_duplicates_and_zeros_have_a_solution(name):
    quadratic, linear = sampled(1, 5, copies=[(3, 1), (4, 1)])
    quadratic[2], quadratic[:, 2], linear[2] = 0, 0, 0
    domain = DOMAINS[name]
    found = minimize(quadratic, linear, domain)[None]
    gradient = 2 * (quadratic @ found[0] - linear)[None] / abs(quadratic).max()
    assert domain.stationarity(found, gradient) <= 1e-9


def test_a_quadratic_of_zero_leads_to_the_point_next_to_the_base():
    zero, none = np.zeros((3, 3)), np.zeros(3)
    assert minimize(zero, none, Simplex()).tolist() == pytest.approx([1 / 3] * 3)
    assert minimize(zero, none, Capped()).tolist() == [0, 0, 0]
    assert minimize(zero, none, Free()).tolist() == [0, 0, 0]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), spread=st.floats(0, 3), copy=st.booleans())
def test_least_norm_solves_the_least_squares_problem(seed, n, spread, copy):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, 4 * n)) * 10 ** rng.uniform(0, spread, size=(n, 1))
    if copy and n > 1:
        a[-1] = a[0]
    b = rng.normal(size=4 * n)
    wanted = np.linalg.lstsq(a.T, b, rcond=1e-10)[0]
    found = least_norm(a @ a.T, a @ b)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9 * abs(wanted).max())


def test_least_norm_shares_among_copies():
    a = np.array([[1.0, 0], [1, 0], [0, 2], [0, 0]])
    found = least_norm(a @ a.T, a @ np.array([3.0, 4.0]))
    np.testing.assert_allclose(found, [1.5, 1.5, 2, 0], atol=1e-12)


def test_without_cvxpy_constraints_name_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    quadratic, linear = sampled(0)
    with pytest.raises(OptionError, match=r"pip install 'mergesolve\[convex\]'"):
        minimize(quadratic, linear, Simplex())
    assert minimize(quadratic, linear, Free()).shape == (4,)
