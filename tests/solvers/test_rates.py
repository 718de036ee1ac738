"""How fast the gap falls: linear variants by the iterations a digit takes, vanilla by the slope against log t."""

import functools

import numpy as np
import pytest
from mergesolve.solvers import SOLVERS, FunctionProblem, Simplex, solve
from mergesolve.solvers.instances import INSTANCES, gaussian, hull_rows, tilted
from mergesolve.solvers.mgda import min_norm
from mergesolve.solvers.polytope import Polytope

LINEAR = [name for name in SOLVERS if SOLVERS[name].promise == "linear"]
ON_FACES = ("edge", "face", "capped face", "capped face with base", "degenerate", "logistic")
"""Strongly convex, with the solution inside a face: where vanilla Frank-Wolfe zig-zags."""
ITERATIONS = 500


@functools.cache
def history(solver, name, iterations, rule=None, digits=12.0):
    """Lowest gap and lowest f − f* so far, at every iterate until the gap has fallen by so many digits."""
    instance = INSTANCES[name]
    spec = {"name": solver}
    if rule is not None:
        options = {"smoothness": instance.smoothness} if rule == "short-step" else {}
        spec["step_rule"] = {"name": rule, **options}
    first = instance.domain.gap(instance.start, instance.function(instance.start)[1])
    tol = first * 10.0**-digits
    result = solve(instance.problem(), spec, start=instance.start, max_iter=iterations, tol=tol)
    gaps = np.array([line["gap"] for line in result.trace])
    values = np.array([line["value"] for line in result.trace])
    return np.minimum.accumulate(gaps), np.minimum.accumulate(values) - instance.value


def slope(values, first, last):
    """The slope of log(values) against log(t) by least squares."""
    t = np.arange(first, last)
    return np.polyfit(np.log(t), np.log(values[t]), 1)[0]


@pytest.mark.parametrize("name", [*ON_FACES, "100 experts"])
@pytest.mark.parametrize("solver", LINEAR)
def test_what_promises_a_linear_rate_has_one_inside_a_face(solver, name):
    """log(gap) falls along a line: the second half of nine digits takes about as many iterations as the first.

    A rate of 1/t would need 10^4.5 times as many. Four times are allowed, since the first iterations, which look for
    the face, can be faster than those on it.
    """
    gaps, _ = history(solver, name, 1000, digits=9.0)
    assert gaps[-1] <= 1e-9 * gaps[0]
    half, whole = (int(np.argmax(gaps <= gaps[0] * 10.0**-digits)) for digits in (4.5, 9.0))
    assert whole - half <= 4 * half + 20


@pytest.mark.parametrize("name", ON_FACES)
@pytest.mark.parametrize("rule", ["line-search", "short-step"])
def test_vanilla_steps_that_descend_converge_like_one_over_t(rule, name):
    """The slope of log(gap) against log(t) is −1: not better (Canon and Cullum 1968), not worse (Jaggi 2013)."""
    gaps, excess = history("frank-wolfe", name, ITERATIONS, rule)
    assert -1.25 <= slope(gaps, 50, ITERATIONS) <= -0.75
    assert -1.25 <= slope(excess, 50, ITERATIONS) <= -0.75


@pytest.mark.parametrize("name", ON_FACES)
def test_the_open_loop_is_faster_than_line_search_inside_a_face(name):
    """f − f* falls like 1/t²: Wirth, Kerdreux and Pokutta (2023)."""
    _, excess = history("frank-wolfe", name, ITERATIONS, "open-loop")
    assert slope(excess, 50, ITERATIONS) <= -1.7


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("support", [5, 20])
def test_blended_pairwise_reaches_1e_8_on_100_experts_within_400_iterations(support, seed):
    rng = np.random.default_rng([support, seed])
    point, scores = hull_rows(rng, 1, 100, support)
    instance = tilted("100", gaussian(rng, 1, 100), point, scores, Simplex())
    result = solve(instance.problem(), "blended-pairwise-frank-wolfe", start=instance.start, max_iter=399, tol=1e-8)
    assert result.status == "optimal"
    assert result.gap <= 1e-8
    assert result.objective - instance.value <= 1e-8
    assert instance.smoothness / instance.modulus > 50


@pytest.mark.parametrize("solver", ["blended-pairwise-frank-wolfe", "corrective-frank-wolfe", "projected-gradient"])
def test_a_budget_of_the_user_is_kept_and_has_its_price_in_the_scores(solver):
    """sum(expert0, expert1) ≤ 0.3 in the simplex: s = ν + μ − y on the group, with the price y of the budget."""
    names = tuple(f"expert{i}" for i in range(5))
    budget = Polytope(Simplex(), ("sum(expert0, expert1) <= 0.3",))
    domain = budget.bind(names, ("block0",), {"block0": np.array([0])})
    point = np.array([[0.2, 0.1, 0.4, 0.3, 0.0]])
    scores = np.array([[0.1, 0.1, 0.4, 0.4, 0.6]])  # ν = 0.4, y = 0.3
    design = gaussian(np.random.default_rng(3), 1, 5)
    instance = tilted("budget", design, point, scores, domain)
    result = solve(instance.problem(), solver, start=instance.start, max_iter=100, tol=1e-6)
    assert result.status == "optimal"
    assert 0 <= result.objective - instance.value + 1e-9 <= 2e-6
    assert result.coefficients[0, :2].sum() <= 0.3 + 1e-9
    np.testing.assert_allclose(instance.function(result.coefficients)[1], scores, atol=1e-2)
    free = solve(FunctionProblem(instance.function, 1, 5, Simplex()), "projected-gradient", max_iter=500, tol=1e-9)
    assert free.coefficients[0, :2].sum() > 0.35, "without the budget the group would have more"


@pytest.mark.parametrize("active", [2, 7, 20])
def test_mgda_finds_the_least_norm_of_20_tasks_to_1e_8(active):
    """g_t = d + h_t with h_t ⟂ d and Σ p_t h_t = 0, or ⟨g_t, d⟩ > ‖d‖²: so d is the point of the hull next to 0."""
    rng = np.random.default_rng(active)
    d = rng.normal(size=60)
    h = rng.normal(size=(20, 60))
    h[:active] -= rng.dirichlet(np.full(active, 2.0)) @ h[:active]
    h -= np.outer(h @ d, d) / (d @ d)
    share = np.concatenate([np.ones(active), 1 + rng.uniform(0.1, 2.0, 20 - active)])
    gradients = share[:, None] * d + h
    found = min_norm(gradients) @ gradients
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(d), abs=1e-8)
    np.testing.assert_allclose(found, d, atol=1e-8)
    assert (gradients @ found).min() >= found @ found - 1e-8, "a common descent direction"
