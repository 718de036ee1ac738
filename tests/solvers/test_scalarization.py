import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from mergesolve.solvers import OptionError, solve
from mergesolve.solvers.scalarization import (
    SCALARIZATIONS,
    Chebyshev,
    Scalarized,
    WeightedSum,
    Worst,
    make_scalarization,
    worst_gap,
)

SPECS = {
    "weighted-sum": {"preferences": {"task1": 3.0}},
    "chebyshev": {"preferences": {"task0": 2.0, "task2": 0.3}, "ideal": {"task1": 0.05}, "smoothing": 0.05},
    "worst": {"smoothing": 0.02},
}


def spec(name):
    return {"name": name, **SPECS[name]}


@pytest.mark.parametrize("name", SCALARIZATIONS)
def test_documentation_source_and_description(name):
    made = make_scalarization(spec(name))
    assert type(made).__doc__.splitlines()[0].endswith(".")
    assert made.source
    assert make_scalarization(json.loads(json.dumps(made.describe()))) == made


@pytest.mark.parametrize("name", SCALARIZATIONS)
def test_scores_are_the_derivative_of_the_value(name, many):
    problem = Scalarized(many(1, 3, domain="free"), spec(name))
    rng = np.random.default_rng(0)
    point, direction = rng.normal(size=(2, problem.rows, problem.n))
    found = problem.evaluate(point)
    numeric = (problem.value(point + 1e-5 * direction) - problem.value(point - 1e-5 * direction)) / 2e-5
    assert np.sum(found.scores * direction) == pytest.approx(numeric, rel=1e-6)
    assert problem.value(point) == found.value
    line = problem.line(point, direction)
    assert line.value(0.3) == pytest.approx(problem.value(point + 0.3 * direction), rel=1e-12)
    assert line.task_values(0.3) == problem.parent.task_values(point + 0.3 * direction)
    slope = np.sum(problem.evaluate(point + 0.3 * direction).scores * direction)
    assert line.slope(0.3) == pytest.approx(slope, rel=1e-9)


def test_the_smoothed_maximum_is_above_the_maximum_by_at_most_mu_log_t():
    rng = np.random.default_rng(0)
    for smoothing in (1e-3, 0.1, 10.0):
        for losses in (rng.normal(size=6), np.zeros(6), 1e6 * rng.normal(size=6)):
            above = Worst(smoothing).value(losses) - losses.max()
            assert -1e-12 <= above <= smoothing * math.log(6) + 1e-12
            assert Worst(smoothing).slopes(losses).sum() == pytest.approx(1)
    assert Worst(0.1).value(np.zeros(6)) == pytest.approx(0.1 * math.log(6))


@pytest.mark.parametrize("solver", ["projected-gradient", "frank-wolfe"])
@pytest.mark.parametrize("domain", ["simplex", "capped"])
def test_gap_and_smoothing_together_bound_the_worst_task(domain, solver, many, oracles):
    problem = many(4, 4, domain=domain)
    result = solve(Scalarized(problem, Worst(smoothing=0.005)), solver, max_iter=60, tol=1e-7)
    bound = worst_gap(result)
    excess = max(result.tasks.values()) - oracles.worst_optimum(problem)
    assert -1e-7 <= excess <= bound + 1e-7
    assert bound <= result.gap + 0.005 * math.log(4) + 1e-12


def test_chebyshev_points_are_pareto_optimal(many):
    """No feasible point is better in all tasks: the common-descent gap of the many-task problem vanishes there."""
    problem = many(2, 3)
    mgda = pytest.importorskip("mergesolve.solvers.mgda").MGDA()
    for weights in ([1, 1, 1], [4, 1, 0.5], [0.3, 1, 3]):
        preferences = dict(zip(problem.tasks, weights, strict=True))
        result = solve(Scalarized(problem, Chebyshev(preferences=preferences)), "projected-gradient", max_iter=400)
        found = problem.evaluate(result.coefficients, tasks=True)
        assert result.status == "optimal"
        assert mgda.certificate(problem, result.coefficients, found).gap <= 1e-4


@pytest.mark.parametrize("solver", ["projected-gradient", "minimax"])
def test_a_task_without_weight_has_no_say_even_where_the_others_are_below_their_ideal(solver, many):
    problem = many(2, 3)
    only = Chebyshev(preferences={"task0": 1.0, "task1": 0.0, "task2": 0.0}, ideal={"task0": 100.0})
    scalarized = Scalarized(problem, only)
    result = solve(scalarized, solver, max_iter=300, tol=1e-7)
    alone = solve(Scalarized(problem, WeightedSum({"task1": 0.0, "task2": 0.0})), "projected-gradient", max_iter=300)
    assert result.tasks["task0"] == pytest.approx(alone.tasks["task0"], abs=1e-6)
    assert result.objective == pytest.approx(result.tasks["task0"] - 100.0)
    assert scalarized.slack == 0.0
    assert worst_gap(result) == pytest.approx(result.gap, abs=1e-12)


def test_the_bound_of_a_constrained_worst_task_counts_the_complementarity():
    """f(Λ) − f* ≤ gap + |μ (g − ε)|, and the gap is that of the Lagrangian."""
    about = {"scalarization": {"name": "worst", "smoothing": 0.0}, "slack": 0.0}
    plain = SimpleNamespace(described_objective=about, gap=0.1, tasks={"one": 1.0, "two": 2.0})
    bounded = SimpleNamespace(**vars(plain), complementarity=0.25)
    assert worst_gap(plain) == pytest.approx(0.1)
    assert worst_gap(bounded) == pytest.approx(0.35)


def test_preferences_move_the_point_toward_the_preferred_task(many):
    problem = many(2, 3)
    losses = [
        solve(Scalarized(problem, WeightedSum({"task1": weight})), "projected-gradient", max_iter=200).tasks["task1"]
        for weight in (0.2, 1, 5, 50)
    ]
    assert (np.diff(losses) < 0).all()


def test_a_weighted_sum_with_equal_preferences_is_the_problem_itself(many):
    problem = many(2, 3)
    point = problem.domain.project(np.zeros((problem.rows, problem.n)))
    one, other = Scalarized(problem, "weighted-sum").evaluate(point), problem.evaluate(point)
    assert one.value == pytest.approx(other.value)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-14)


@pytest.mark.parametrize("name", ["soft-frank-wolfe", "frank-wolfe", "adaptive"])
def test_a_merge_runs_scalarized_and_resumes(name, merge, tmp_path):
    def run(folder, **options):
        problem = Scalarized(merge(), Worst(smoothing=0.05))
        return solve(problem, name, max_iter=4, tol=0, run=folder, checkpoint_every=2, **options)

    def die(line):
        if line["iteration"] == 3:
            raise RuntimeError("killed")

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", callback=die)
    np.testing.assert_array_equal(run(tmp_path / "killed", resume=True).coefficients, whole.coefficients)
    assert whole.described_objective["scalarization"] == {"name": "worst", "smoothing": 0.05}
    with pytest.raises(OptionError, match="objective"):
        solve(merge(), name, max_iter=4, tol=0, run=tmp_path / "killed", resume=True)


def test_bad_preferences_are_named(many):
    for options, match in (
        ({"preferences": {"task9": 1}}, "task9"),
        ({"preferences": {"task0": -1}}, "Got -1"),
        ({"preferences": [1, 2]}, "must be a mapping"),
        ({"preferences": {"task0": 0, "task1": 0}}, "are 0"),
        ({"smoothing": -1}, "'smoothing' parameter of Chebyshev"),
        ({"ideal": {"task0": "low"}}, "'ideal' parameter"),
    ):
        with pytest.raises(OptionError, match=match):
            Scalarized(many(0, 2), {"name": "chebyshev", **options})
