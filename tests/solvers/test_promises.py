"""Every registered solver on every test problem: it is run once, and many claims are checked on what it did."""

import functools
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from mergesolve.solvers import SOLVERS, STEP_RULES, FunctionProblem, OptionError, make_solver, make_step_rule, solve
from mergesolve.solvers.instances import INSTANCES
from mergesolve.solvers.solver import PROMISES
from mergesolve.solvers.step_rules import SCHEDULE

TOLERANCE = 1e-8
ITERATIONS = {"linear": 1000, "sublinear": 100, "none": 40}
"""How many iterations a check gives a solver: a linear rate ends within them, the other promises hold at each."""
FEW = {"bayesian": 7}
"""Of these, each iteration takes long."""
CHEAP = {
    "soft-frank-wolfe": {"inner_iterations": 5},
    "bayesian": {"initial": 60},  # values before the first fit, which is what takes time
}
SLOW = {
    "interior": "a vertex of the product is one expert in every block, and the solution needs many of them",
    "capped interior": "as interior",
    "40 blocks": "as interior",
    "scaled": "condition number 4e5",
    "quartic": "not strongly convex",
}
"""Where a linear rate may be too slow, and why: there the gap falls to 1e-2 of its first in 400 iterations."""
RUNNING = [name for name in SOLVERS if not name.startswith("released")]
"""The released variants compare gradients with checkpoints, which these problems do not have."""


class Watched(FunctionProblem):
    """A problem that remembers where it was evaluated, and how often its function was called."""

    def __init__(self, instance):
        self.calls = 0
        self.worst = 0.0

        def function(point):
            self.calls += 1
            self.worst = max(self.worst, float(instance.domain.violation(point).max()))
            return instance.function(point)

        super().__init__(function, *instance.shape, instance.domain, quadratic=instance.function.link == "square")


@dataclass(frozen=True)
class Ran:
    """One solver on one problem: the result, or why it was refused."""

    instance: object
    problem: Watched
    result: object
    refusal: str | None = None


def spec(solver):
    return {"name": solver, **CHEAP.get(solver, {})}


def iterations(solver, name):
    usual = ITERATIONS[SOLVERS[solver].promise]
    return FEW.get(solver, min(usual, 400) if name in SLOW else usual)


@functools.cache
def run(solver, name):
    instance = INSTANCES[name]
    problem = Watched(instance)
    made = make_solver(spec(solver))
    try:
        result = solve(problem, made, start=instance.start, max_iter=iterations(solver, name), tol=TOLERANCE)
    except OptionError as error:
        return Ran(instance, problem, None, str(error))
    return Ran(instance, problem, result)


@pytest.fixture(params=list(itertools.product(RUNNING, INSTANCES)), ids=" on ".join)
def ran(request):
    """A solve that was not refused."""
    found = run(*request.param)
    if found.refusal is not None:
        pytest.skip(found.refusal)
    return found


def noise(instance):
    """What rounding may do to a value of the problem."""
    return 1e-11 * max(1.0, instance.smoothness)


def diameter_squared(instance):
    """D² of the domain; where it is no hull of experts, of the box around it."""
    rows, n = instance.shape
    if instance.domain.has_vertices:
        return 2.0 * rows if n > 1 else 1.0 * rows
    axes = np.eye(rows * n).reshape(-1, rows, n)
    widths = [np.sum(instance.domain.minimizer(-axis) * axis - instance.domain.minimizer(axis) * axis) for axis in axes]
    return float(np.sum(np.square(widths)))


def test_every_point_at_which_the_model_is_evaluated_is_feasible(ran):
    assert ran.problem.worst <= 1e-9
    assert ran.instance.domain.violation(ran.result.coefficients).max() <= 1e-9


def test_the_gap_bounds_the_suboptimality_of_every_iterate(ran):
    best, slack = ran.instance.value, noise(ran.instance)
    for line in ran.result.trace:
        assert line["value"] >= best - slack
        if line["gap"] is not None:
            assert line["gap"] >= line["value"] - best - slack
    assert ran.result.objective >= best - slack
    if ran.instance.domain.name != "free":
        assert ran.result.gap >= ran.result.objective - best - slack


def test_an_optimal_answer_satisfies_the_conditions_of_the_known_solution(ran):
    """By convexity with modulus μ and smoothness L: ½μ‖Λ − Λ*‖² ≤ f − f* and ‖S − S*‖² ≤ 2L(f − f*)."""
    if ran.result.status != "optimal":
        return
    instance, point = ran.instance, ran.result.coefficients
    value, scores = instance.function(point)
    excess = TOLERANCE + noise(instance)
    if instance.domain.name == "free":  # the certificate is ‖S‖ ≤ tol, and f − f* ≤ ‖S‖²/2μ
        excess = TOLERANCE**2 / (2 * instance.modulus) + noise(instance)
    assert value - instance.value <= excess
    assert np.linalg.norm(scores - instance.multipliers) <= math.sqrt(2 * instance.smoothness * excess)
    if instance.modulus > 1e-6:
        assert np.linalg.norm(point - instance.minimizer) <= math.sqrt(2 * excess / instance.modulus)
    if instance.domain.has_vertices:  # complementarity: what scores worse than the best vertex has no weight
        level = np.minimum(scores.min(axis=1), 0) if instance.domain.has_base else scores.min(axis=1)
        assert np.sum(point * (scores - level[:, None])) <= TOLERANCE + noise(instance)


def test_calls_are_counted_one_by_one(ran):
    counts = ran.result.counts
    assert ran.problem.calls == counts["gradients"] + counts["evaluations"]
    assert counts["gradients"] >= 1


def promised(promise):
    """The solvers with that promise, on the problems where they run."""
    names = [name for name in RUNNING if SOLVERS[name].promise == promise]
    return [pytest.param(solver, name, id=f"{solver} on {name}") for solver in names for name in INSTANCES]


@pytest.mark.parametrize(("solver", "name"), promised("linear"))
def test_a_linear_solver_ends_optimal(solver, name):
    found = run(solver, name)
    if found.refusal is not None:
        pytest.skip(found.refusal)
    if name in SLOW:
        assert found.result.gap <= 1e-2 * found.result.trace[0]["gap"]
    else:
        assert found.result.status == "optimal", found.result.message


@pytest.mark.parametrize(("solver", "name"), promised("sublinear"))
def test_a_sublinear_solver_keeps_its_bound_in_every_iteration(solver, name):
    """Jaggi (2013), theorem 1, with the curvature constant bounded by LD²."""
    found = run(solver, name)
    if found.refusal is not None:
        pytest.skip(found.refusal)
    constant = 2 * found.instance.smoothness * diameter_squared(found.instance)
    lowest = math.inf
    for line in found.result.trace:
        lowest = min(lowest, line["value"])
        if line["iteration"]:
            assert lowest - found.instance.value <= constant / (line["iteration"] + 2) + noise(found.instance)


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_a_solver_promises_is_known_and_runs_somewhere(solver):
    made = make_solver(solver)
    assert made.promise in PROMISES
    refused = [found for found in (run(solver, name) for name in INSTANCES) if found.refusal is not None]
    for found in refused:
        assert len(found.refusal) > 40
        assert found.refusal.endswith((".", "'")), "a refusal is a sentence"
        assert found.problem.calls == 0, "refused before anything is computed"
    assert (len(refused) < len(INSTANCES)) == (solver in RUNNING)


@pytest.mark.parametrize("name", ["face", "capped logistic", "box face"])
@pytest.mark.parametrize("solver", RUNNING)
def test_another_order_of_the_experts_gives_the_same_answer(solver, name):
    instance = INSTANCES[name]
    order = np.random.default_rng(5).permutation(instance.shape[1])
    function = replace(
        instance.function, design=instance.function.design[:, :, order], tilt=instance.function.tilt[:, order]
    )
    other = replace(instance, function=function, minimizers=instance.minimizers[:, :, order])
    made = make_solver(spec(solver))
    if run(solver, name).refusal is not None or not made.equivariant:
        pytest.skip("refused, or depends on the order by its nature")
    options = {"start": instance.start, "max_iter": min(12, iterations(solver, name)), "tol": 0}
    first, second = solve(instance.problem(), made, **options), solve(other.problem(), made, **options)
    assert second.objective == pytest.approx(first.objective, abs=1e-9)
    np.testing.assert_allclose(second.coefficients, first.coefficients[:, order], atol=1e-6)


@pytest.mark.parametrize("solver", RUNNING)
def test_a_pool_that_holds_everything_twice_has_the_same_optimum(solver):
    """f(Λ, Λ') = f(Λ + Λ'): copies widen the pool and not the hull, so that promises hold as before."""
    single, made = INSTANCES["one block"], make_solver(spec(solver))
    if run(solver, single.name).refusal is not None:
        pytest.skip("refused")

    def function(point):
        value, scores = single.function(point[:, :5] + point[:, 5:])
        return value, np.hstack([scores, scores])

    problem = FunctionProblem(function, 1, 10, single.domain)
    result = solve(problem, made, max_iter=iterations(solver, single.name), tol=TOLERANCE)
    excess = result.objective - single.value
    assert -noise(single) <= excess <= result.gap + noise(single)
    if made.promise == "linear":
        assert result.status == "optimal"
    elif made.promise == "sublinear":
        assert excess <= 2 * 2 * single.smoothness * 2 / (result.nit + 2)


RULED = [name for name in RUNNING if hasattr(make_solver(name), "step_rule")]


def with_rule(solver, rule):
    """The solver with the rule, or why there is no such thing."""
    options = {"smoothness": INSTANCES["face"].smoothness} if rule == "short-step" else {}
    try:
        return make_solver({**spec(solver), "step_rule": {"name": rule, **options}})
    except OptionError as error:
        return str(error)


@pytest.mark.parametrize(("solver", "rule"), list(itertools.product(RULED, STEP_RULES)))
def test_every_rule_drives_every_variant_or_is_refused_with_the_reason(solver, rule):
    instance, made = INSTANCES["face"], with_rule(solver, rule)
    if isinstance(made, str):
        assert rule in made or type(make_step_rule(rule)).__name__ in made
        assert len(made) > 60, "the reason is missing"
        return
    result = solve(Watched(instance), made, start=instance.start, max_iter=60, tol=TOLERANCE)
    assert result.nit > 0
    for line in result.trace:
        assert line["gap"] >= line["value"] - instance.value - noise(instance)
    values = [line["value"] for line in result.trace]
    assert result.objective < values[0]
    if solver.endswith("frank-wolfe") and SCHEDULE not in made.step_rule.traits:  # each step goes downhill on a line
        assert all(after <= before + noise(instance) for before, after in itertools.pairwise(values))


RULE_COSTS = {
    "open-loop": (0, 0),
    "logarithmic": (0, 0),
    "square-root": (0, 0),
    "fixed": (0, 0),
    "short-step": (0, 0),
    "exact": (0, 1),
    "secant": (0, 1),
    "line-search": (10, 0),
    "brent": (15, 0),
}
"""Values and further gradients that a step takes at most on a known quadratic, as the rules document it."""
LINES = ("frank-wolfe", "away-frank-wolfe", "pairwise-frank-wolfe", "blended-pairwise-frank-wolfe", "lazy-frank-wolfe")
"""Solvers whose step is one search along one line."""
ONE_GRADIENT = ("projected-gradient", "mirror-descent", "adaptive", "softmax-gradient", "mgda", "pcgrad")
"""Solvers that need no gradient but that of the iterate."""


@pytest.mark.parametrize(("solver", "rule"), list(itertools.product(LINES, RULE_COSTS)))
def test_an_iteration_calls_the_model_as_often_as_its_rule_documents(solver, rule):
    made = with_rule(solver, rule)
    if isinstance(made, str):
        pytest.skip(made)
    values, gradients = RULE_COSTS[rule]
    result = solve(Watched(INSTANCES["face"]), made, max_iter=30, tol=0)
    before = [(line["evaluations"], line["gradients"]) for line in result.trace]
    for (values_0, gradients_0), (values_1, gradients_1) in itertools.pairwise(before[:-1]):
        assert values_1 - values_0 <= values
        assert 1 <= gradients_1 - gradients_0 <= 1 + gradients
    assert result.counts["gradients"] <= (1 + gradients) * result.nit + 2, "and one at the end, and one for the result"


@pytest.mark.parametrize("solver", ONE_GRADIENT)
def test_a_gradient_method_takes_one_gradient_an_iteration(solver):
    result = solve(Watched(INSTANCES["face"]), solver, max_iter=30, tol=0)
    assert result.counts["gradients"] == result.nit + 2


def test_values_only_means_no_gradient_before_the_certificate():
    for solver, cls in SOLVERS.items():
        if not cls.needs_scores and not cls.certifies_iterates:
            result = solve(Watched(INSTANCES["capped one expert"]), solver, max_iter=7, tol=0)
            assert result.counts["gradients"] == 1
