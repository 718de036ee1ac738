import numpy as np
import pytest
from mergesolve.solvers import OptionError, solve
from mergesolve.solvers.minimax import Minimax
from mergesolve.solvers.scalarization import Chebyshev, Scalarized, WeightedSum, Worst

DOMAINS = ("simplex", "capped", "box", "free")


@pytest.mark.parametrize(("domain", "tasks"), [("simplex", 5), ("capped", 2), ("box", 5), ("free", 4)])
def test_the_worst_task_is_the_least_possible(domain, tasks, many, oracles):
    problem = many(tasks, tasks, domain=domain)
    result = solve(problem, "minimax", max_iter=100, tol=1e-6)
    assert result.status == "optimal"
    assert result.objective == max(result.tasks.values())
    assert result.objective == pytest.approx(oracles.worst_optimum(problem), abs=2e-6)


@pytest.mark.parametrize("direction", ["gradient", "vertex"])
@pytest.mark.parametrize("domain", ["simplex", "box"])
def test_the_certificate_bounds_the_suboptimality_of_every_iterate(domain, direction, many, oracles):
    problem = many(7, 4, domain=domain)
    best = oracles.worst_optimum(problem)
    result = solve(problem, Minimax(direction=direction, accelerated=False), max_iter=12, tol=1e-9)
    assert len(result.trace) > 10
    values = [line["value"] for line in result.trace]
    for line in result.trace:
        assert line["value"] == max(line["tasks"].values())
        assert line["gap"] >= line["value"] - best - 1e-7
    assert result.gap < 0.5 * result.trace[0]["gap"]
    assert (np.diff(values) <= 1e-12).all()
    weights = result.trace[0]["extra"]["task_weights"]
    assert sum(weights.values()) == pytest.approx(1)


def test_preferences_and_ideal_point_come_from_a_chebyshev_scalarization(many, oracles):
    problem = many(1, 3)
    spec = Chebyshev(preferences={"task0": 3, "task2": 0.5}, ideal={"task1": 0.05}, smoothing=0.1)
    result = solve(Scalarized(problem, spec), "minimax", max_iter=100, tol=1e-7)
    best = oracles.worst_optimum(problem, np.array([3, 1, 0.5]), np.array([0, 0.05, 0]))
    assert result.objective == pytest.approx(best, abs=1e-6)
    assert result.described_objective["scalarization"]["smoothing"] == 0.0


def test_with_one_task_the_gap_is_that_of_frank_wolfe(face):
    quadratic, _ = face
    problem = quadratic.problem("simplex")
    result = solve(problem, "minimax", max_iter=200, tol=1e-8)
    evaluation = problem.evaluate(result.coefficients)
    assert result.gap == pytest.approx(problem.domain.gap(result.coefficients, evaluation.scores), abs=1e-12)
    assert result.objective == pytest.approx(quadratic.optimum("simplex"), abs=1e-7)


def test_a_weighted_sum_is_refused_and_a_maximum_without_smoothing_is_kept(many):
    problem = many(0, 2)
    with pytest.raises(OptionError, match="cannot take the scalarization 'weighted-sum'"):
        solve(Scalarized(problem, WeightedSum()), "minimax")
    plain = Scalarized(problem, Worst(smoothing=0.0))
    assert Minimax().view(plain) is plain


def test_vertices_need_a_bounded_domain(many):
    with pytest.raises(OptionError, match="unbounded"):
        solve(many(0, 2, domain="free"), Minimax(direction="vertex"))
