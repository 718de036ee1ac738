import numpy as np
import pytest
from mergesolve.solvers import LazyFrankWolfe, OptionError, solve


@pytest.mark.parametrize("domain", ["simplex", "capped", "box", "l1-ball"])
def test_it_comes_near_the_optimum_with_a_valid_gap_and_falling_values(domain, face):
    quadratic, _ = face
    problem = quadratic.problem(domain)
    start = problem.domain.project(np.full(quadratic.c.shape, 1 / 6))
    result = solve(problem, "lazy-frank-wolfe", start=start, max_iter=400, tol=1e-9)
    values = [line["value"] for line in result.trace]
    assert (np.diff(values) <= 0).all()
    assert result.gap < 0.02 * result.trace[0]["gap"]
    reference = solve(problem, "projected-gradient", start=start, max_iter=2000, tol=1e-9)
    for line in result.trace:
        assert line["gap"] >= line["value"] - reference.objective - 1e-8


def test_the_target_only_falls_and_the_gap_is_above_it(face):
    quadratic, _ = face
    trace = solve(quadratic.problem("simplex"), "lazy-frank-wolfe", max_iter=100, tol=0).trace[:-1]
    targets = [line["extra"]["target"] for line in trace]
    assert (np.diff(targets) <= 0).all()
    assert all(line["gap"] >= line["extra"]["target"] for line in trace)


def test_vertices_are_used_again_and_the_cache_holds_each_once(face):
    quadratic, _ = face
    trace = solve(quadratic.problem("simplex"), "lazy-frank-wolfe", max_iter=200, tol=0).trace[:-1]
    kinds = [line["extra"]["kind"] for line in trace]
    assert kinds.count("lazy") > kinds.count("toward") > 0
    assert trace[-1]["extra"]["cache"] == kinds.count("toward") <= 6**3


def test_a_target_that_nothing_meets_brings_in_the_vertex_of_the_oracle(face):
    quadratic, _ = face
    first = solve(quadratic.problem("simplex"), "lazy-frank-wolfe", max_iter=1, tol=0).trace[0]
    assert first["extra"] == {"kind": "toward", "cache": 1, "target": pytest.approx(first["gap"] / 2)}


@pytest.mark.parametrize("rule", ["open-loop", "fixed", "logarithmic"])
def test_schedules_are_refused_with_the_reason(rule):
    with pytest.raises(OptionError, match=f"'{rule}' cannot drive LazyFrankWolfe: a cached vertex promises less"):
        LazyFrankWolfe(step_rule=rule)
