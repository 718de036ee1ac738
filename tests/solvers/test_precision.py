"""Models compute in float32: what solvers make of values and scores that are rounded to it."""

import functools

import numpy as np
import pytest
from mergesolve.solvers import SOLVERS, STATUSES, FunctionProblem, OptionError, solve
from mergesolve.solvers.instances import INSTANCES

EPSILON = float(np.finfo(np.float32).eps)
RESOLUTION = 1e-6  # of Problem, whose objectives are models in float32
ITERATIONS = {"bayesian": 7}  # where not 80
RUNNING = [name for name in SOLVERS if not name.startswith("released")]
LINEAR = [name for name in RUNNING if SOLVERS[name].promise == "linear"]
CHEAP = {"soft-frank-wolfe": {"inner_iterations": 5}}
NAMES = ("edge", "logistic", "capped face")


def rounded(instance):
    """The problem as a model in float32 would give it: value and scores rounded."""

    def function(point):
        value, scores = instance.function(point)
        return float(np.float32(value)), scores.astype(np.float32).astype(np.float64)

    return FunctionProblem(function, *instance.shape, instance.domain, resolution=RESOLUTION)


@functools.cache
def both(solver, name):
    """The instance, and its solve in float32 and in float64; None where the domain is refused."""
    instance, spec = INSTANCES[name], {"name": solver, **CHEAP.get(solver, {})}
    options = {"start": instance.start, "max_iter": ITERATIONS.get(solver, 80), "tol": 1e-4}
    try:
        return instance, solve(rounded(instance), spec, **options), solve(instance.problem(), spec, **options)
    except OptionError:
        return None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", RUNNING)
def test_a_certificate_in_float32_holds_up_to_its_rounding(solver, name):
    """|gap − true gap| ≤ Σ_rows max|S| ε ‖Λ − V‖₁, and the true gap bounds the true f − f*."""
    found = both(solver, name)
    if found is None:
        pytest.skip("refused")
    instance, single, _ = found
    assert single.status in STATUSES[:3], "no rounding makes a solve nonfinite"
    value, scores = instance.function(single.coefficients)
    error = 2 * EPSILON * float(np.abs(scores).max(axis=1).sum()) + 1e-12
    assert single.gap == pytest.approx(instance.domain.gap(single.coefficients, scores), abs=error)
    assert value - instance.value <= single.gap + error
    assert single.objective == pytest.approx(value, abs=EPSILON * abs(value))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", LINEAR)
def test_float32_ends_where_float64_does(solver, name):
    """‖Λ − Λ*‖² ≤ 2(f − f*)/μ for both, with f − f* below the gap's tolerance and the resolution of the values."""
    instance, single, double = both(solver, name)
    excess = max(1e-4, 10 * RESOLUTION * abs(instance.value))
    for result in (single, double):
        assert instance.function(result.coefficients)[0] - instance.value <= excess
    distance = np.linalg.norm(single.coefficients - double.coefficients)
    assert distance <= 2 * np.sqrt(2 * excess / instance.modulus)


@pytest.mark.parametrize("solver", [name for name in RUNNING if name not in ("point", "scan")])
def test_a_solve_in_float32_ends_when_asked_for_more_than_float32_has(solver):
    """With tol = 0 nothing certifies the end: it stalls or uses its iterations, and keeps the best point it saw."""
    instance = INSTANCES["capped one expert"]
    spec = {"name": solver, **CHEAP.get(solver, {})}
    result = solve(rounded(instance), spec, start=instance.start, max_iter=ITERATIONS.get(solver, 80), tol=0)
    assert result.status in ("optimal", "stalled", "max_iter")
    assert result.objective == min(line["value"] for line in result.trace)


@pytest.mark.parametrize("solver", LINEAR)
def test_a_merge_of_float32_weights_is_the_one_of_the_quadratic_in_float64(solver, merge, states):
    """The same least squares through a pool of tensors, and as a function of Λ with NumPy in float64."""
    base, experts, targets = states
    problem = merge("tensor", "capped")
    names = list(problem.row_names)
    vectors = {k: np.stack([(e[k] - base[k]).double().numpy().ravel() for e in experts.values()]) for k in names}
    wanted = {k: [(t[k].double() - base[k].double()).numpy().ravel() for t in targets.values()] for k in names}

    def function(point):
        value, scores = 0.0, np.zeros_like(point)
        for row, name in enumerate(names):
            for target in wanted[name]:
                residual = point[row] @ vectors[name] - target
                value += 0.5 * residual @ residual / len(targets)
                scores[row] += vectors[name] @ residual / len(targets)
        return value, scores

    reference = FunctionProblem(function, len(names), problem.n, "capped")
    exact = solve(reference, "projected-gradient", max_iter=2000, tol=1e-10)
    found = solve(problem, solver, max_iter=300, tol=1e-3)
    assert exact.status == found.status == "optimal"
    assert -1e-6 <= function(found.coefficients)[0] - exact.objective <= 1e-3
