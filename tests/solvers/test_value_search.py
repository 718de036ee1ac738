"""What all searches by values share; each is run on functions with known optima."""

import json

import numpy as np
import pytest
from mergesolve.solvers import SOLVERS, FunctionProblem, OptionError, make_domain, make_solver, solve
from mergesolve.solvers.scalarization import Scalarized
from mergesolve.solvers.value_search import OVER, Cube, ValueSearch

SEARCHES = [name for name, cls in SOLVERS.items() if issubclass(cls, ValueSearch)]
BUDGET = {"cma-es": 250, "nelder-mead": 150, "bayesian": 13}
ERROR = {"cma-es": 1e-3, "nelder-mead": 1e-4, "bayesian": 1e-2}


def bowl(target, rows, domain, curvature=None):
    """f(Λ) = Σ c (Λ − target)², and a gradient that is not to be looked at."""
    target = np.broadcast_to(target, (rows, np.shape(target)[-1]))
    scale = np.ones(target.shape[1]) if curvature is None else np.asarray(curvature)

    def function(point):
        return float(np.sum(scale * (point - target) ** 2)), np.full(point.shape, np.nan)

    problem = FunctionProblem(function, rows, target.shape[1], domain)
    problem.has_gradient = False
    return problem


@pytest.mark.parametrize("name", SEARCHES)
def test_finds_the_best_scale_and_asks_for_no_gradient(name):
    problem = bowl(np.full((1, 4), 0.37), 3, "free")
    result = solve(problem, {"name": name, "over": "scale"}, max_iter=min(100, BUDGET[name]), tol=0)
    np.testing.assert_allclose(result.coefficients, 0.37, atol=ERROR[name])
    assert (result.gap, problem.counts.gradients) == (None, 0)
    assert np.isnan(result.stationarity)
    assert {(line["gap"], line["stationarity"]) for line in result.trace} == {(None, None)}
    assert problem.counts.evaluations == len(result.trace) + 1  # one a candidate, and one for the result
    assert result.status in ("max_iter", "stalled")


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("domain", ["simplex", "capped", "box"])
def test_finds_three_experts_weights_on_every_domain(name, domain):
    """The optimum is the projection of the target, known in closed form; outside, it is on the boundary."""
    for target in ([0.2, 0.5, 0.3], [0.9, 0.5, -0.3], [0.1, 0.2, 0.3])[: 1 if name == "bayesian" else 3]:
        problem = bowl(np.array([target]), 2, domain)
        result = solve(problem, {"name": name, "over": "experts"}, max_iter=BUDGET[name], tol=0)
        best = make_domain(domain).project(np.array([target]))
        excess = result.objective - problem.value(np.repeat(best, 2, axis=0))
        assert -1e-12 <= excess <= (0.05 if name == "bayesian" else 1e-4)
        assert problem.domain.violation(result.coefficients).max() <= 1e-9


@pytest.mark.parametrize("name", ["cma-es", "nelder-mead"])
def test_finds_a_scale_a_block_and_every_coefficient(name):
    target = np.array([[0.1, 0.1], [0.7, 0.7]])
    for over in ("blocks", "coefficients"):
        problem = bowl(target, 2, "free", [1.0, 3.0])
        result = solve(problem, {"name": name, "over": over}, max_iter=300, tol=0)
        np.testing.assert_allclose(result.coefficients, target, atol=3e-3)


@pytest.mark.parametrize("name", SEARCHES)
def test_goes_on_over_plateaus_as_accuracy_has_them(name):
    def steps(point):
        return float(np.ceil(10 * np.abs(point - 0.62).max()) / 10), None

    problem = FunctionProblem(steps, 1, 2, "free")
    problem.has_gradient = False
    result = solve(problem, {"name": name, "over": "experts"}, start="base", max_iter=min(60, BUDGET[name]), tol=0)
    assert result.objective <= 0.2 < steps(np.zeros((1, 2)))[0]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_constant_function_ends_in_order(name):
    problem = FunctionProblem(lambda point: (1.0, None), 1, 2, "capped")
    problem.has_gradient = False
    result = solve(problem, {"name": name, "over": "experts"}, max_iter=30 if name != "bayesian" else 8, tol=0)
    assert (result.objective, result.best_iteration) == (1.0, 0)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_same_seed_gives_the_same_candidates_and_numpys_generator_is_left_alone(name):
    before = np.random.get_state()[1].copy()  # noqa: NPY002 (the global generator is what must not change)
    runs = [
        solve(bowl(np.array([[0.3, 0.1]]), 1, "capped"), {"name": name, "over": "experts"}, max_iter=8, tol=0).trace
        for _ in range(2)
    ]
    assert [line["coefficients"] for line in runs[0]] == [line["coefficients"] for line in runs[1]]
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("name", ["cma-es", "nelder-mead"])
def test_a_search_that_cannot_repeat_its_candidates_does_not_go_on(name, tmp_path):
    """As after an update of the library: another history is told from the one that the strategy would make."""
    solver = make_solver({"name": name, "over": "experts"})
    problem = bowl(np.array([[0.3, 0.1]]), 1, "capped")
    state = solver.init(problem, np.full((1, 2), 0.5))
    for _ in range(4):
        state = solver.step(problem, state, problem.look(state.coefficients), None).state
    memory = dict(state.memory)
    again = type(solver)(over="experts")
    plain = again.step(problem, type(state)(state.coefficients, memory), problem.look(state.coefficients), None)
    same = solver.step(problem, state, problem.look(state.coefficients), None)
    np.testing.assert_array_equal(plain.state.coefficients, same.state.coefficients)
    memory["candidates"] = memory["candidates"] + [[0.0], [0.0], [0.1], [0.0], [0.0]]
    with pytest.raises(OptionError, match="does not repeat the candidates of the run"):
        again.step(problem, type(state)(state.coefficients, memory), problem.look(state.coefficients), None)


def test_a_state_may_be_stepped_from_twice():
    """The running strategy is a cache: what it was told elsewhere does not leak into another future."""
    solver = make_solver({"name": "nelder-mead", "over": "experts"})
    problem = bowl(np.array([[0.3, 0.1]]), 1, "capped")
    state = solver.init(problem, np.full((1, 2), 0.5))
    for _ in range(3):
        state = solver.step(problem, state, problem.look(state.coefficients), None).state
    evaluation = problem.look(state.coefficients)
    one = solver.step(problem, state, evaluation, None).state
    other = solver.step(problem, state, evaluation, None).state
    np.testing.assert_array_equal(one.coefficients, other.coefficients)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("domain", ["simplex", "capped", "box", "free"])
def test_every_point_of_the_cube_is_a_feasible_merge_and_the_nearest_point_undoes_it(over, domain):
    cube = Cube(over, 3, 4, make_domain(domain), 0.0, 1.0)
    rng = np.random.default_rng(0)
    for z in [*rng.random((20, cube.size)), np.zeros(cube.size), np.ones(cube.size)]:
        point = cube.merge(z)
        assert point.shape == (3, 4)
        assert cube.domain.violation(point).max() <= 1e-9
        if cube.domain.violation(np.broadcast_to(z.reshape(cube.shape), (3, 4))).max() <= 1e-9:
            np.testing.assert_array_equal(cube.nearest(point), z)
    assert cube.nearest(np.full((3, 4), 7.0)).max() == 1


def test_intervals_come_from_the_domain_where_it_has_them():
    def interval(domain, **options):
        cube = make_solver({"name": "nelder-mead", **options}).cube(bowl(np.zeros((1, 4)), 2, make_domain(domain)))
        return cube.lower, cube.upper

    assert interval("free") == (0, 1)
    assert interval("free", lower=-0.5, upper=2.0) == (-0.5, 2)
    assert interval("capped", over="scale") == (0, 0.25)
    assert interval("capped", over="experts", upper=0.5) == (0, 0.5)
    assert interval({"name": "box", "lower": -1, "upper": 3}, lower=0.0, upper=9.0) == (0, 3)


@pytest.mark.parametrize("name", SEARCHES)
def test_what_cannot_be_searched_is_refused_before_anything_runs(name):
    wide = bowl(np.zeros((1, 300)), 3, "free")
    for options, message in (
        ({"over": "experts"}, r"would search 300 numbers by values alone"),
        ({"over": "scale", "lower": 2.0}, r"empty interval \[2, 1\]"),
    ):
        with pytest.raises(OptionError, match=message):
            solve(wide, {"name": name, **options})
    assert wide.counts.evaluations == 0
    with pytest.raises(OptionError, match="nothing to choose on the domain 'simplex'"):
        solve(bowl(np.zeros((1, 3)), 1, "simplex"), {"name": name, "over": "blocks"})
    with pytest.raises(OptionError, match=r"'over' parameter of .* must be one of 'scale'"):
        make_solver({"name": name, "over": "layers"})


@pytest.mark.parametrize("name", [name for name, cls in SOLVERS.items() if cls.needs_scores])
def test_solvers_that_need_scores_refuse_an_objective_without_gradient(name):
    problem = bowl(np.zeros((1, 3)), 1, "capped")
    with pytest.raises(OptionError, match=r"needs gradients, and the objective has none. Take .*'cma-es'"):
        solve(problem, name)
    assert problem.counts.evaluations == problem.counts.gradients == 0


@pytest.mark.parametrize("name", ["point", "scan"])
def test_points_and_scans_need_no_gradient(name):
    problem = bowl(np.full((1, 3), 0.3), 1, "free")
    result = solve(problem, name, start="base", tol=0)
    assert result.objective == pytest.approx(0.0 if name == "scan" else 0.27)
    assert problem.counts.gradients == 0


@pytest.mark.parametrize("name", ["cma-es", "bayesian"])
def test_a_missing_library_is_named_with_the_line_that_installs_it(name, monkeypatch):
    monkeypatch.setattr("mergesolve.solvers.evolution.find_spec", lambda module: None)
    with pytest.raises(OptionError, match=r"pip install 'mergesolve\[search\]'"):
        make_solver(name)


@pytest.mark.parametrize("name", SEARCHES)
def test_options_are_checked_and_survive_json(name):
    solver = make_solver({"name": name, "over": "blocks", "lower": -0.1, "upper": 0.4})
    assert make_solver(json.loads(json.dumps(solver.describe()))) == solver
    for option in ("sigma", "edge", "xtol", "restarts", "initial", "xi", "seed", "population"):
        if hasattr(solver, option):
            with pytest.raises(OptionError, match=f"'{option}' parameter of {type(solver).__name__} must be"):
                make_solver({"name": name, option: -1})


def test_a_function_of_losses_without_gradients_has_none_either():
    problem = bowl(np.array([[0.3, 0.1]]), 1, "capped")
    result = solve(Scalarized(problem, "worst"), {"name": "nelder-mead", "over": "experts"}, max_iter=60, tol=0)
    np.testing.assert_allclose(result.coefficients, [[0.3, 0.1]], atol=1e-2)
    assert problem.counts.gradients == 0
    with pytest.raises(OptionError, match="needs gradients"):
        solve(Scalarized(problem, "worst"), "projected-gradient")
