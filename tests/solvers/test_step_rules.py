import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mergesolve.solvers import (
    SOLVERS,
    STEP_RULES,
    Armijo,
    Backtracking,
    Brent,
    Exact,
    Fixed,
    FrankWolfe,
    LineSearch,
    Logarithmic,
    Monotone,
    OpenLoop,
    OptionError,
    Search,
    Secant,
    ShortStep,
    SquareRoot,
    make_solver,
    make_step_rule,
    solve,
)
from mergesolve.solvers.step_rules import SCHEDULE, SEARCH


def quadratic_search(value=1.0, slope=-1.0, curvature=2.0, limit=1.0, iteration=0, calls=None, **options):
    """f(γ) = value + slope γ + curvature γ²/2, as seen along a direction of norm 1."""

    def along(step):
        if calls is not None:
            calls.append(step)
        return value + slope * step + 0.5 * curvature * step**2

    def slope_along(step):
        if calls is not None:
            calls.append(("slope", step))
        return slope + curvature * step

    return Search(iteration, value, slope, 1.0, limit, along, slope_along=slope_along, **options)


def convex_search(seed, limit=1.0):
    """f(γ) = Σ log(1 + e^{aγ + b}) + cγ: convex and not a quadratic, descending at 0."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 6)) * 4
    tilt = -1.0 - float(np.sum(a / (1 + np.exp(-b))))

    def along(step):
        return float(np.sum(np.logaddexp(0, a * step + b)) + tilt * step)

    def slope_along(step):
        return float(np.sum(a / (1 + np.exp(-a * step - b))) + tilt)

    return Search(0, along(0.0), slope_along(0.0), 1.0, limit, along, 1e-15, slope_along)


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


SEARCHES = [LineSearch(), Brent(), Secant(), Exact(), Armijo(), Backtracking(), Monotone("short-step")]


@pytest.mark.parametrize("rule", SEARCHES, ids=lambda rule: type(rule).__name__)
@given(seed=st.integers(0, 10_000), limit=st.floats(0.01, 20))
def test_rules_that_search_never_go_up_on_convex_functions(rule, seed, limit):
    search = convex_search(seed, limit)
    found = rule(search, {})
    assert 0 <= found <= limit
    assert search.along(found) <= search.value + 1e-12 * abs(search.value)


@given(seed=st.integers(0, 10_000), limit=st.floats(0.01, 20))
def test_the_secant_finds_the_zero_of_the_slope(seed, limit):
    """|φ'(γ)| ≤ tol |φ'(0)|, or the limit is reached downhill, as scipy's bounded search agrees."""
    search = convex_search(seed, limit)
    found = Secant(evaluations=60)(search, {})
    slope = search.slope_along(found)
    assert abs(slope) <= 1e-3 * abs(search.slope) or (found == limit and slope <= 0)


@given(slope=st.floats(-10, -1e-3), curvature=st.floats(1e-3, 100), limit=st.floats(1e-6, 10))
def test_exact_and_secant_steps_are_exact_on_quadratics(slope, curvature, limit):
    best = min(limit, -slope / curvature)
    for known in (True, False):
        search = quadratic_search(slope=slope, curvature=curvature, limit=limit, quadratic=known, resolution=1e-15)
        assert Exact()(search, {}) == pytest.approx(best, rel=1e-9)
        assert Secant()(search, {}) == pytest.approx(best, rel=2e-3)


def test_what_exact_and_secant_steps_cost():
    for rule, known, expected in [(Exact(), True, 1), (Exact(), False, 2), (Secant(), True, 1), (Secant(), False, 2)]:
        calls = []
        rule(quadratic_search(curvature=4.0, calls=calls, quadratic=known), {})
        assert len(calls) == expected, rule
    memory, calls = {}, []
    Secant()(quadratic_search(curvature=4.0), memory)
    Secant()(quadratic_search(slope=-2.0, curvature=4.0, calls=calls), memory)
    assert calls == [("slope", 0.5)], "the remembered curvature is that of the next search"


def test_exact_is_safeguarded_where_f_is_no_quadratic():
    """φ(γ) = −γ + 20 max(γ − 0.3, 0)²: the secant from the limit overshoots far beyond the minimizer."""

    def along(step):
        return -step + 20 * max(step - 0.3, 0.0) ** 2

    search = Search(0, 0.0, -1.0, 1.0, 1.0, along, 1e-15, lambda step: -1 + 40 * max(step - 0.3, 0.0))
    assert along(Exact()(search, {})) < 0


def test_secant_and_exact_survive_what_is_not_finite_far_out():
    def slope(step):
        return np.nan if step > 0.1 else -1 + 20 * step

    def along(step):
        return np.nan if step > 0.1 else -step + 10 * step**2

    search = Search(0, 0.0, -1.0, 1.0, 1.0, along, 1e-15, slope)
    for rule in (Secant(evaluations=20), Exact()):
        assert rule(search, {}) == pytest.approx(0.05, rel=1e-2)


def test_rules_that_read_slopes_say_so_where_there_are_none():
    search = Search(0, 1.0, -1.0, 1.0, 1.0, lambda step: 1 - step)
    for rule in (Secant(), Exact()):
        with pytest.raises(OptionError, match=r"reads the slope along the line.*'line-search'"):
            rule(search, {})


@given(slope=st.floats(-10, -1e-3), curvature=st.floats(0.01, 100))
def test_armijo_takes_the_first_step_of_sufficient_decrease(slope, curvature):
    search = quadratic_search(slope=slope, curvature=curvature)
    step = Armijo(shrink=0.5, decrease=0.1)(search, {})
    assert search.along(step) <= search.value + 0.1 * step * slope + 1e-12
    if step < 1:
        assert search.along(2 * step) > search.value + 0.1 * 2 * step * slope - 1e-12


def test_schedules_follow_their_formulas():
    searches = [quadratic_search(iteration=t) for t in range(4)]
    logs = np.log(np.arange(1, 5))
    np.testing.assert_allclose([Logarithmic()(s, {}) for s in searches], (2 + logs) / (np.arange(2, 6) + logs))
    np.testing.assert_allclose([SquareRoot(scale=0.5)(s, {}) for s in searches], 0.5 / np.sqrt([1, 2, 3, 4]))
    for rule in (Logarithmic(), SquareRoot(), OpenLoop(), Fixed()):
        assert rule(quadratic_search(limit=0.01), {}) == 0.01


def test_monotone_halves_until_the_value_does_not_rise():
    search = quadratic_search(slope=-1.0, curvature=10.0)  # below f(0) up to γ = 0.2
    assert Monotone("open-loop")(search, {}) == 0.125
    assert Monotone({"name": "fixed", "step": 0.15})(search, {}) == 0.15
    assert Monotone("open-loop")(quadratic_search(slope=1.0), {}) == 0
    with pytest.raises(OptionError, match="monotone already"):
        Monotone(Monotone("fixed"))


@given(seed=st.integers(0, 10_000), count=st.integers(1, 6))
def test_joint_backtracking_ends_at_the_separable_bound(seed, count):
    """One M for all blocks: γ_b = min(−s_b / (M‖D_b‖²), 1), where f is below Σ (γ_b s_b + M γ_b² ‖D_b‖²/2)."""
    rng = np.random.default_rng(seed)
    slopes, norms = -rng.exponential(size=count), rng.exponential(size=count) + 0.1
    root = rng.normal(size=(count, count))
    hessian = root @ root.T

    def along(steps):
        return float(1.0 + slopes @ steps + 0.5 * steps @ hessian @ steps)

    memory = {}
    steps = Backtracking().jointly(slopes, norms, 1.0, along, 0.0, memory)
    smoothness = float(memory["smoothness"])
    np.testing.assert_allclose(steps, np.minimum(-slopes / (smoothness * norms), 1))
    assert along(steps) <= 1 + np.sum(slopes * steps + 0.5 * smoothness * steps**2 * norms) + 1e-12
    np.testing.assert_array_equal(Backtracking().jointly(-slopes, norms, 1.0, along, 0.0, {}), np.zeros(count))


def test_what_each_rule_relies_on_is_declared():
    traits = {name: rule().traits for name, rule in STEP_RULES.items()}
    assert {name for name, found in traits.items() if SEARCH not in found} == {
        *("short-step", "open-loop", "logarithmic", "square-root", "fixed")
    }
    assert {name for name, found in traits.items() if SCHEDULE in found} == {
        *("open-loop", "logarithmic", "square-root", "fixed", "monotone")
    }
    assert Monotone("short-step").traits == {SEARCH}


@pytest.mark.parametrize("name", [name for name in SOLVERS if hasattr(make_solver(name), "step_rule")])
def test_a_solver_refuses_what_it_cannot_work_with_by_the_traits(name):
    """Whatever is refused is refused for a trait, and so for every rule that has it."""

    def refusal(rule):
        try:
            make_solver({"name": name, "step_rule": rule})
        except OptionError as error:
            return str(error)
        return None

    reasons = {rule: refusal(rule) for rule in STEP_RULES}
    refused = {rule for rule, reason in reasons.items() if reason is not None}
    assert all(f"'{rule}' cannot drive" in reasons[rule] for rule in refused)
    by_trait = {
        trait: {rule for rule, made in STEP_RULES.items() if trait in made().traits} for trait in (SCHEDULE, SEARCH)
    }
    assert refused in (set(), by_trait[SCHEDULE], by_trait[SEARCH])


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
        lambda: Brent(evaluations=2),
        lambda: Secant(evaluations=0),
        lambda: Armijo(shrink=1),
        lambda: SquareRoot(scale=0),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(OptionError, match="parameter of"):
        make()
