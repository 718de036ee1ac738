import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mergesolve.solvers import STEP_RULES, FunctionProblem, OptionError, make_domain, make_solver, solve
from mergesolve.solvers.active_set import ActiveSet, highest, longest, shifted
from mergesolve.solvers.domains import BASE, START
from mergesolve.solvers.loop import iterate

VARIANTS = ["away-frank-wolfe", "pairwise-frank-wolfe", "blended-pairwise-frank-wolfe"]
BOUNDED = ["simplex", "capped", "box", "l1-ball"]


def visits(problem, solver, start, iterations=60, tol=0.0):
    made = make_solver(solver)
    made.check(problem)
    return list(iterate(problem, made, made.init(problem, start), max_iter=iterations, tol=tol))


@pytest.mark.parametrize("domain", ["simplex", "capped"])
def test_a_start_of_one_row_is_decomposed_into_its_experts(domain):
    point = np.array([[0.5, 0.0, 0.25, 0.25]])
    active = ActiveSet.begin(make_domain(domain), point)
    assert active.start is None
    np.testing.assert_array_equal(active.keys, [[0], [2], [3]])
    np.testing.assert_array_equal(active.weights, [0.5, 0.25, 0.25])
    np.testing.assert_array_equal(active.point(), point)


def test_the_base_is_one_vertex_and_the_rest_of_a_short_row():
    expert = ActiveSet.begin(make_domain("simplex"), np.eye(3)[[1, 1]])
    np.testing.assert_array_equal(expert.keys, [[1, 1]])
    base = ActiveSet.begin(make_domain("capped"), np.zeros((2, 3)))
    np.testing.assert_array_equal(base.keys, [[BASE, BASE]])
    short = ActiveSet.begin(make_domain("capped"), np.full((1, 3), 0.2))
    np.testing.assert_allclose(short.weights, [0.2, 0.2, 0.2, 0.4], rtol=1e-15)


@pytest.mark.parametrize("domain", BOUNDED)
def test_any_other_start_is_one_atom(domain):
    rng = np.random.default_rng(0)
    made = make_domain(domain)
    point = made.project(rng.normal(size=(4, 5)))
    active = ActiveSet.begin(made, point)
    assert (len(active), len(active.keys)) == (1, 0)
    np.testing.assert_array_equal(active.point(), point)
    np.testing.assert_allclose(active.products(point), [np.sum(point**2)])
    if made.has_vertices:
        assert (active.vertex(0) == START).all()


@pytest.mark.parametrize("domain", BOUNDED)
@given(seed=st.integers(0, 10_000))
def test_weights_follow_the_iterate_through_any_steps(domain, seed):
    """Λ + γD for D = V_gains − V_loses, with Λ for None, is Σ_k w_k V_k of the shifted weights, a mixture again."""
    rng = np.random.default_rng(seed)
    made = make_domain(domain)
    active = ActiveSet.begin(made, made.project(rng.normal(size=(3, 4))))
    for _ in range(8):
        active, gains = active.with_vertex(made.atom(rng.normal(size=(3, 4))))
        loses = int(rng.integers(len(active)))
        if gains == loses or active.weights[loses] == 0:
            continue
        gains, loses = [(gains, None), (None, loses), (gains, loses)][rng.integers(3)]
        limit = longest(active.weights, gains, loses)
        size = limit * rng.choice([0.3, 1.0])
        if size == 0:
            continue  # there is nothing else to which the weight could go
        point = active.point()
        target = point if gains is None else active.matrix(gains)
        origin = point if loses is None else active.matrix(loses)
        exhausts = size >= limit
        active = active.weighted(shifted(active.weights, gains, loses, size, exhausts=exhausts))
        np.testing.assert_allclose(active.point(), point + size * (target - origin), atol=1e-12)
        assert active.weights.sum() == pytest.approx(1, abs=1e-14)
        assert active.weights.min() > 0
        assert made.violation(active.point()).max() <= 1e-12


@pytest.mark.parametrize("domain", BOUNDED)
def test_equal_vertices_are_one_atom(domain):
    made = make_domain(domain)
    scores = np.random.default_rng(1).normal(size=(3, 4))
    vertex = made.minimizer(scores)
    active, first = ActiveSet.begin(made, vertex).with_vertex(made.atom(scores))
    assert (len(active), first) == (1, 0), "the start is that vertex"
    active = ActiveSet.begin(made, made.project(np.full((3, 4), 0.1) + 0.01 * scores))
    active, first = active.with_vertex(made.atom(scores))
    active, second = active.with_vertex(made.atom(2 * scores))
    assert first == second == 0
    assert len(active) == 2


@pytest.mark.parametrize("domain", BOUNDED)
def test_arrays_bring_the_set_back(domain):
    made = make_domain(domain)
    rng = np.random.default_rng(2)
    active = ActiveSet.begin(made, made.project(rng.normal(size=(3, 4))))
    for _ in range(3):
        active, k = active.with_vertex(made.atom(rng.normal(size=(3, 4))))
        active = active.weighted(shifted(active.weights, k, None, 0.3, exhausts=False))
    again = ActiveSet.load(made, (3, 4), active.arrays())
    np.testing.assert_array_equal(again.point(), active.point())
    np.testing.assert_array_equal(again.products(np.ones((3, 4))), active.products(np.ones((3, 4))))


def test_a_vertex_of_70000_rows_and_24_experts_takes_70_kilobytes():
    made = make_domain("capped")
    active = ActiveSet.begin(made, np.zeros((70_000, 24)))
    active, _ = active.with_vertex(made.atom(np.random.default_rng(0).normal(size=(70_000, 24))))
    assert active.keys.nbytes == 2 * 70_000


def test_atoms_that_tie_are_told_apart_by_weight_and_not_by_rounding():
    products, weights = np.array([1.0, 1.0 + 1e-9, 0.0]), np.array([0.5, 0.2, 0.3])
    assert highest(products, weights) == highest(products[[1, 0, 2]][[1, 0, 2]], weights) == 0
    assert highest(np.array([1.0, 1.1, 0.0]), weights) == 1


@pytest.mark.parametrize("domain", BOUNDED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_iterate_is_the_combination_of_its_atoms_and_the_strong_gap_bounds_the_gap(variant, domain, face):
    quadratic, _ = face
    problem = quadratic.problem(domain)
    seen = visits(problem, variant, problem.domain.project(np.full(quadratic.c.shape, 1 / 6)))
    for visit in seen:
        active = ActiveSet.load(problem.domain, visit.state.coefficients.shape, visit.state.memory)
        np.testing.assert_allclose(active.point(), visit.state.coefficients, atol=1e-12)
        assert active.weights.min() > 0
        if visit.step is not None:
            assert visit.step.extra["strong_gap"] >= visit.certificate.gap - 1e-12
    for before, after in itertools.pairwise(seen):
        if before.step is not None:
            assert before.step.extra["active"] == len(after.state.memory["weights"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_vertices_are_dropped_and_the_answer_is_sparse(variant, face):
    """The average holds every expert; the optimum holds half of them, and the others have exactly the weight 0."""
    quadratic, optimum = face
    result = solve(quadratic.problem("simplex"), variant, max_iter=500, tol=1e-9)
    kinds = [line["extra"]["kind"] for line in result.trace[:-1]]
    assert result.status == "optimal"
    assert {"drop", "swap"} & set(kinds)
    np.testing.assert_allclose(result.coefficients, optimum, atol=1e-3)
    np.testing.assert_array_equal(result.coefficients > 0, optimum > 0)


@pytest.mark.parametrize("rule", ["exact", "secant"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rate_is_linear(variant, rule, face):
    """The last three decades of the gap take no more than thrice the iterations of the three before; at a rate of 1/t
    they would take a thousand times as many."""
    quadratic, _ = face
    problem = quadratic.problem("simplex", quadratic=rule == "exact")
    result = solve(problem, {"name": variant, "step_rule": rule}, max_iter=1000, tol=1e-8)
    assert result.status == "optimal"
    gaps = np.minimum.accumulate([line["gap"] for line in result.trace])
    reached = [int(np.argmax(gaps <= level)) for level in (1e-2, 1e-5, 1e-8)]
    assert reached[2] - reached[1] <= 3 * (reached[1] - reached[0]) + 10
    slope = np.polyfit(np.arange(len(gaps) - reached[0]), np.log(gaps[reached[0] :]), 1)[0]
    assert slope < -math.log(10) * 3 / (3 * (reached[1] - reached[0]) + 10)


@pytest.mark.parametrize("rule", [name for name, rule in STEP_RULES.items() if "schedule" in rule().traits])
@pytest.mark.parametrize("variant", VARIANTS)
def test_schedules_are_refused_with_the_reason(variant, rule):
    with pytest.raises(OptionError, match=f"'{rule}' cannot drive .*a step ends where a weight does"):
        make_solver({"name": variant, "step_rule": rule})


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_iteration_costs_one_gradient_and_what_the_rule_asks(variant, merge):
    problem = merge("layer", "capped")
    rule = {"name": "short-step", "smoothness": 30}
    solve(problem, {"name": variant, "step_rule": rule}, max_iter=5, tol=0, checkpoint_every=100)
    assert problem.counts.gradients == problem.counts.correlates == 5 + 1 + 1  # one an iterate, and the certificate
    assert problem.counts.evaluations == 0
    assert problem.counts.combines <= 5 + 2  # a line an iteration, whose end is the next iterate; start and certificate


@pytest.mark.parametrize("variant", ["away-frank-wolfe", "pairwise-frank-wolfe"])
def test_a_weight_too_small_for_values_to_see_is_taken_without_a_search(variant):
    """With values good to 1e-6, 1e-5 of the weight on a bad expert changes nothing that a line search could find."""

    def function(point):
        return 1.0 + 1e-2 * float(point[0, 2]), np.array([[0.0, 0.0, 1e-2]])

    problem = FunctionProblem(function, 1, 3, "simplex", resolution=1e-6)
    start = np.array([[0.5, 0.5 - 1e-5, 1e-5]])
    step = visits(problem, {"name": variant, "step_rule": "line-search"}, start, iterations=1)[0].step
    assert step.state.coefficients[0, 2] == 0
    assert problem.counts.evaluations == 0
