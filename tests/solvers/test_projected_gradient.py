import itertools

import numpy as np
import pytest
from mergesolve.solvers import FunctionProblem, OptionError, ProjectedGradient, solve


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("domain", ["simplex", "capped", "box", "free"])
def test_reaches_the_optimum_of_cvxpy_at_high_accuracy(accelerated, domain, located):
    quadratic, _ = located
    result = solve(quadratic.problem(domain), ProjectedGradient(accelerated), max_iter=5000, tol=1e-9)
    assert result.success
    assert abs(result.objective - quadratic.optimum(domain)) < 3e-8


@pytest.mark.parametrize("domain", ["simplex", "capped"])
def test_satisfies_the_kkt_conditions_at_the_answer(domain, located):
    """With multiplier ν of Σλ: S + ν ≥ 0, and S + ν = 0 where λ > 0; here ν = 0 by construction."""
    quadratic, x = located
    result = solve(quadratic.problem(domain), "projected-gradient", max_iter=5000, tol=1e-12)
    scores = quadratic(result.coefficients)[1]
    assert scores.min() > -1e-5
    assert np.abs(scores[result.coefficients > 1e-6]).max() < 1e-5
    np.testing.assert_allclose(result.coefficients, x, atol=1e-4)


def ill_conditioned(n=30, condition=1e2):
    """½ (Λ − 1/n) diag(q) (Λ − 1/n)ᵀ with q from 1 to ``condition``: its minimum over the simplex is 0, inside."""
    curvatures = np.geomspace(1, condition, n)

    def function(point):
        offset = point - 1 / n
        return 0.5 * np.sum(curvatures * offset**2), curvatures * offset

    return FunctionProblem(function, 1, n, "simplex")


def test_acceleration_pays_on_ill_conditioned_problems():
    nits = {}
    for accelerated in (True, False):
        solver = ProjectedGradient(accelerated, grow=1.0)
        result = solve(ill_conditioned(), solver, start="expert:expert0", max_iter=3000, tol=1e-8)
        assert result.success
        nits[accelerated] = result.nit
    assert nits[True] * 4 < nits[False]


def test_plain_steps_descend_monotonically(face):
    quadratic, _ = face
    trace = solve(quadratic.problem("simplex"), ProjectedGradient(accelerated=False), max_iter=100).trace
    values = [line["value"] for line in trace]
    assert all(after <= before + 1e-15 for before, after in itertools.pairwise(values))


def test_growth_below_one_is_refused():
    with pytest.raises(OptionError, match=r"'grow' parameter of ProjectedGradient must be a number in \[1, inf\)"):
        ProjectedGradient(grow=0.5)
