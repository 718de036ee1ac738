import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mergesolve.solvers import (
    STEP_RULES,
    Backtracking,
    Fixed,
    FrankWolfe,
    LineSearch,
    OpenLoop,
    OptionError,
    Search,
    ShortStep,
    make_step_rule,
    solve,
)


def quadratic_search(value=1.0, slope=-1.0, curvature=2.0, limit=1.0, iteration=0, calls=None):
    """f(γ) = value + slope γ + curvature γ²/2, as seen along a direction of norm 1."""

    def along(step):
        if calls is not None:
            calls.append(step)
        return value + slope * step + 0.5 * curvature * step**2

    return Search(iteration, value, slope, 1.0, limit, along)


@given(slope=st.floats(-10, -1e-3), curvature=st.floats(-5, 50), limit=st.floats(0.05, 1))
def test_line_search_is_exact_on_quadratics(slope, curvature, limit):
    search = quadratic_search(slope=slope, curvature=curvature, limit=limit)
    exact = min(limit, -slope / curvature) if curvature > 0 else limit
    found = LineSearch()(search, {})
    assert search.along(found) <= search.along(exact) + 1e-9
    assert 0 <= found <= limit


def test_line_search_needs_two_evaluations_on_a_quadratic():
    calls = []
    LineSearch()(quadratic_search(curvature=4.0, calls=calls), {})
    assert len(calls) == 2


@given(seed=st.integers(0, 10_000))
def test_line_search_never_goes_up(seed):
    rng = np.random.default_rng(seed)
    frequency, phase, tilt = rng.uniform(1, 20), rng.uniform(0, 6), rng.normal()

    def along(step):
        return float(np.sin(frequency * step + phase) + tilt * step)

    search = Search(0, along(0.0), -1.0, 1.0, 1.0, along)
    assert along(LineSearch()(search, {})) <= along(0.0)


def test_line_search_keeps_its_budget_and_survives_overflow():
    calls = []

    def along(step):
        calls.append(step)
        return float("inf") if step > 0.1 else 1.0 - step

    found = LineSearch(evaluations=15)(Search(0, 1.0, -1.0, 1.0, 1.0, along), {})
    assert 0 < found <= 0.1
    assert len(calls) <= 16


def test_open_loop_follows_its_formula():
    steps = [OpenLoop(offset=2)(quadratic_search(iteration=t), {}) for t in range(4)]
    np.testing.assert_allclose(steps, [1, 2 / 3, 1 / 2, 2 / 5])
    assert OpenLoop(scale=0.1)(quadratic_search(iteration=0), {}) == pytest.approx(0.1)


@given(slope=st.floats(-10, -1e-3), smoothness=st.floats(0.1, 100))
def test_short_step_minimizes_its_upper_bound(slope, smoothness):
    found = ShortStep(smoothness=smoothness)(quadratic_search(slope=slope, curvature=smoothness), {})
    assert found == pytest.approx(min(1.0, -slope / smoothness))


@given(slope=st.floats(-10, -1e-3), curvature=st.floats(0.01, 100))
def test_backtracking_ends_at_sufficient_decrease(slope, curvature):
    search, memory = quadratic_search(slope=slope, curvature=curvature), {}
    step = Backtracking()(search, memory)
    smoothness = float(memory["smoothness"])
    assert 0 < step <= 1
    assert search.along(step) <= search.value + step * slope + 0.5 * smoothness * step**2 + 1e-12
    assert smoothness <= 2 * max(curvature, -slope)


def test_rules_without_descent_stay():
    for rule in (ShortStep(), Backtracking()):
        assert rule(quadratic_search(slope=0.5), {}) == 0


@pytest.mark.parametrize("name", STEP_RULES)
def test_every_rule_drives_frank_wolfe_with_a_valid_gap(name, face):
    quadratic, _ = face
    best = quadratic.optimum("simplex")
    smoothness = float(np.linalg.norm(quadratic.q, 2, axis=(1, 2)).max())
    options = {"short-step": {"smoothness": smoothness}}
    rule = make_step_rule({"name": name, **options.get(name, {})})
    result = solve(quadratic.problem("simplex"), FrankWolfe(step_rule=rule), max_iter=300, tol=1e-9)
    for line in result.trace:
        assert line["gap"] >= line["value"] - best - 1e-8
    if name != "fixed":  # Jaggi (2013), theorem 1, with the squared diameter 2 of each of the simplices
        assert result.objective - best <= 2 * smoothness * 2 * len(quadratic.c) / (300 + 2)


@pytest.mark.parametrize("name", STEP_RULES)
def test_every_rule_is_rebuilt_from_its_description(name):
    rule = make_step_rule(name)
    assert make_step_rule(rule.describe()) == rule


@pytest.mark.parametrize(
    "make",
    [
        lambda: LineSearch(evaluations=1),
        lambda: LineSearch(xtol=0),
        lambda: OpenLoop(offset=0),
        lambda: OpenLoop(scale=1.5),
        lambda: ShortStep(smoothness=-1),
        lambda: Backtracking(shrink=0),
        lambda: Backtracking(grow=1),
        lambda: Fixed(step=0),
        lambda: Fixed(step=float("nan")),
        lambda: Fixed(step=True),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(OptionError, match="parameter of"):
        make()
