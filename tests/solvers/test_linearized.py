import cvxpy as cp
import numpy as np
import pytest
from mergesolve.solvers.linearized import least_maximum, proximal_maximum

DOMAINS = ("simplex", "capped", "box")


def linear_model(problem, rng):
    """Values and scores of the tasks at a feasible point."""
    point = problem.domain.project(rng.uniform(size=(problem.rows, problem.n)))
    found = problem.evaluate(point, tasks=True)
    return np.array(list(found.task_values.values())), found.task_scores, point


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("tasks", [1, 2, 6])
def test_the_least_maximum_is_that_of_a_linear_program_and_bounded_from_both_sides(domain, tasks, many, oracles):
    problem = many(tasks, tasks, domain=domain)
    values, scores, point = linear_model(problem, np.random.default_rng(1))
    found = least_maximum(values, scores, point, problem.domain)
    x = cp.Variable(point.size)
    table = scores.reshape(tasks, -1)
    oracle = cp.Problem(cp.Minimize(cp.max(values + table @ (x - point.ravel()))), oracles.inside(problem, x))
    oracle.solve(solver=cp.CLARABEL)
    assert found.lower == pytest.approx(oracle.value, abs=1e-7)
    assert found.upper == pytest.approx(found.lower, abs=1e-9)
    assert problem.domain.violation(found.target).max() <= 1e-9
    assert found.upper == pytest.approx(float((values + table @ (found.target - point).ravel()).max()), abs=1e-9)
    assert found.prices.min() >= 0
    assert found.prices.sum() == pytest.approx(1)


@pytest.mark.parametrize("domain", [*DOMAINS, "free"])
@pytest.mark.parametrize("tasks", [1, 2, 6])
@pytest.mark.parametrize("size", [0.1, 3.0])
def test_the_proximal_step_minimizes_its_model(domain, tasks, size, many, oracles):
    problem = many(tasks, tasks, domain=domain)
    values, scores, point = linear_model(problem, np.random.default_rng(2))
    found = proximal_maximum(values, scores, point, problem.domain, size)
    table = scores.reshape(tasks, -1)
    x = cp.Variable(point.size)
    step = x - point.ravel()
    model = cp.max(values + table @ step) + cp.sum_squares(step) / (2 * size)
    oracle = cp.Problem(cp.Minimize(model), oracles.inside(problem, x))
    oracle.solve(solver=cp.CLARABEL)
    reached = float((values + table @ found.step.ravel()).max() + np.sum(found.step**2) / (2 * size))
    assert reached == pytest.approx(oracle.value, abs=1e-6)
    assert problem.domain.violation(point + found.step).max() <= 1e-9


def test_scores_of_zero_leave_everything_where_it_is(many):
    problem = many(0, 3)
    point = problem.domain.project(np.zeros((2, 4)))
    zeros = np.zeros((3, 2, 4))
    assert not proximal_maximum(np.zeros(3), zeros, point, problem.domain, 1.0).step.any()
    found = least_maximum(np.zeros(3), zeros, point, problem.domain)
    assert found.upper == found.lower == 0.0
