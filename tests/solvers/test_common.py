"""Checks that every registered solver passes by being listed."""

import dataclasses
import json

import numpy as np
import pytest
from mergesolve.solvers import SOLVERS, STATUSES, OptionError, Result, Secant, Solver, make_solver, solve

FAST = {
    "released-soft-frank-wolfe": {"inner_iterations": 5},
    "soft-frank-wolfe": {"inner_iterations": 5},
    "corrective-frank-wolfe": {"inner_iterations": 5},
    "bayesian": {"initial": 8},  # values before the first fit, which is what takes time
}
CONSTRAINED = [name for name in SOLVERS if not name.startswith("released") and name != "scan"]


def spec(name):
    return {"name": name, **FAST.get(name, {})}


def domain_of(name):
    return "free" if name.startswith("released") or name == "scan" else "capped"


def looks_ahead(name):
    """Whether a step asks for gradients of its own."""
    inner = name.endswith(("soft-frank-wolfe", "corrective-frank-wolfe"))
    return inner or isinstance(getattr(make_solver(name), "step_rule", None), Secant)


@pytest.mark.parametrize("name", SOLVERS)
def test_documentation_source_and_description(name):
    solver = make_solver(name)
    assert type(solver).__doc__.splitlines()[0].endswith((".", ".)"))
    assert solver.source
    assert make_solver(json.loads(json.dumps(solver.describe()))) == solver
    assert dataclasses.is_dataclass(solver)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.anything = 1


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize("blocks", ["model", "layer", "row"])
def test_every_iterate_is_feasible(name, blocks, merge):
    problem = merge(blocks)
    points = []
    original = problem.evaluate
    problem.evaluate = lambda point, **options: points.append(point) or original(point, **options)
    look = problem.look
    problem.look = lambda point: points.append(point) or look(point)
    result = solve(problem, spec(name), max_iter=12, tol=0)
    assert points
    assert max(problem.domain.violation(point).max() for point in [*points, result.coefficients]) <= 1e-9


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize("domain", ["simplex", "capped"])
def test_gap_bounds_suboptimality_on_every_iterate(name, domain, located):
    quadratic, _ = located
    best = quadratic.optimum(domain)
    options = {"soft-frank-wolfe": {"vertices": 3}, "bayesian": {"over": "experts"}}.get(name, {})
    solver = make_solver({**spec(name), **options})
    certified = solver.needs_scores or solver.certifies_iterates
    result = solve(quadratic.problem(domain), solver, max_iter=40 if certified else 8, tol=1e-10)
    assert len(result.trace) > 0
    for line in result.trace:
        assert (line["gap"] is not None) == certified
        assert not certified or line["gap"] >= line["value"] - best - 1e-8
        assert line["value"] >= best - 1e-8
    assert result.gap >= result.objective - best - 1e-8


@pytest.mark.parametrize("name", SOLVERS)
def test_the_certificate_of_the_result_is_recomputed_from_scratch(name, merge):
    result = solve(merge(domain=domain_of(name)), spec(name), max_iter=4, tol=0)
    solver = make_solver(spec(name))
    fresh = solver.view(merge(domain=domain_of(name)))
    evaluation = fresh.evaluate(result.coefficients, tasks=solver.certifies_by_task)
    assert result.objective == evaluation.value
    if solver.certifies_by_task:
        assert result.gap == solver.certificate(fresh, result.coefficients, evaluation).gap
    else:
        assert result.gap == fresh.domain.gap(result.coefficients, evaluation.scores)
    assert result.status in STATUSES
    assert result.nit <= 4


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_resumed_solve_equals_uninterrupted_solve(name, stochastic, merge, tmp_path):
    """Killed at iteration 7, between checkpoints: goes on from the last one to the same bits."""
    if stochastic and SOLVERS[name].compares_values:
        with pytest.raises(OptionError, match="those of minibatches do not compare"):
            solve(merge(stochastic=True), spec(name))
        return

    def run(folder, **options):
        problem = merge(domain=domain_of(name), stochastic=stochastic)
        return solve(
            problem, spec(name), start="average", max_iter=11, tol=0, checkpoint_every=3, run=folder, **options
        )

    def die(line):
        if line["iteration"] == 7:
            raise RuntimeError("killed")

    whole = run(tmp_path / "whole")
    if whole.nit > 7:
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path / "killed", callback=die)
        assert not (tmp_path / "killed/result.json").exists()
    resumed = run(tmp_path / "killed", resume=True)
    np.testing.assert_array_equal(resumed.coefficients, whole.coefficients)
    assert resumed.objective == whole.objective
    assert [line["value"] for line in resumed.trace] == [line["value"] for line in whole.trace]
    assert [line["iteration"] for line in resumed.trace] == list(range(len(whole.trace)))
    assert resumed.counts["gradients"] == whole.counts["gradients"] == whole.data["samples_seen"]
    assert resumed.data == whole.data


@pytest.mark.parametrize("name", [name for name, cls in SOLVERS.items() if cls.equivariant])
def test_equivariant_to_the_order_of_the_pool(name, merge):
    order = ["e3", "e0", "e4", "e1", "e2"]
    one = solve(merge(domain=domain_of(name)), spec(name), max_iter=5, tol=0)
    other = solve(merge(domain=domain_of(name), order=order), spec(name), max_iter=5, tol=0)
    columns = [other.experts.index(expert) for expert in one.experts]
    np.testing.assert_allclose(other.coefficients[:, columns], one.coefficients, atol=2e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_both_backends_agree(name, merge):
    results = [
        solve(merge(domain=domain_of(name), backend=backend), spec(name), max_iter=3, tol=0)
        for backend in ("streaming", "resident")
    ]
    np.testing.assert_allclose(results[0].coefficients, results[1].coefficients, atol=2e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_result_and_trace_survive_the_disk(name, merge, tmp_path):
    result = solve(merge(domain=domain_of(name)), spec(name), max_iter=3, tol=0, run=tmp_path)
    loaded = Result.load(tmp_path)
    np.testing.assert_array_equal(loaded.coefficients, result.coefficients)
    assert loaded.trace == result.trace
    for field in dataclasses.fields(Result):
        if field.name not in ("coefficients", "trace", "solver", "domain"):
            assert getattr(loaded, field.name) == getattr(result, field.name), field.name
    assert make_solver(loaded.solver) == make_solver(result.solver)
    again = solve(merge(domain=domain_of(name)), spec(name), start=loaded, max_iter=0)
    assert again.objective == result.objective


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "point"])
def test_nan_ends_as_nonfinite_with_the_last_finite_point(name, merge):
    problem = merge(domain=domain_of(name))
    scored = SOLVERS[name].needs_scores or SOLVERS[name].certifies_iterates
    asked = "value_and_grad" if scored else "task_losses"
    original = getattr(problem.objective, asked)
    calls = []

    def poisoned(weights, **options):
        evaluation = original(weights, **options)
        calls.append(1)
        if len(calls) == 2 and not scored:
            return dict.fromkeys(evaluation, float("nan"))
        if len(calls) == 2:
            evaluation.loss = float("nan")
        return evaluation

    setattr(problem.objective, asked, poisoned)
    result = solve(problem, spec(name), max_iter=3, tol=0)
    assert np.isfinite(result.coefficients).all()
    assert np.isfinite(result.objective)
    if result.nit >= 1 and not looks_ahead(name):  # there the second gradient is an inner one
        assert result.status == "nonfinite"
        assert not result.success


@pytest.mark.parametrize("name", SOLVERS)
def test_callback_and_time_limit_end_the_solve(name, merge):
    seen = []

    def stop(line):
        seen.append(line["iteration"])
        raise StopIteration

    stopped = solve(merge(domain=domain_of(name)), spec(name), max_iter=50, tol=0, callback=stop)
    assert (stopped.status, seen) == ("interrupted", [0])
    noisy = merge(domain=domain_of(name), stochastic=not SOLVERS[name].compares_values)
    limited = solve(noisy, spec(name), max_iter=50, tol=0, time_limit=0.0)
    assert (limited.status, len(limited.trace)) == ("stalled" if name == "point" else "time_limit", 1)


def test_unknown_solver_and_option_name_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'frank-wolfe'"):
        make_solver("frank-wolf")
    with pytest.raises(OptionError, match="Did you mean 'step_rule'"):
        make_solver({"name": "frank-wolfe", "step_rul": "fixed"})


def test_the_base_class_has_no_step(merge):
    with pytest.raises(NotImplementedError):
        Solver().step(merge(), None, None, None)
