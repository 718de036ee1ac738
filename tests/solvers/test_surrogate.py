import numpy as np
import pytest
from mergesolve.solvers import FunctionProblem, OptionError
from mergesolve.solvers.surrogate import fit_surrogate, positive


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("domain", ["capped", "box"])
def test_a_quadratic_is_found_exactly(domain, gradients, many):
    problem = many(0, 3, rows=1, n=4, domain=domain)
    calls = []
    found = fit_surrogate(
        problem, gradients=gradients, convex=False, seed=1, progress=lambda done, total: calls.append((done, total))
    )
    np.testing.assert_allclose(found.problem.hessians, problem.hessians, atol=1e-7)
    np.testing.assert_allclose(found.problem.linear, problem.linear, atol=1e-7)
    np.testing.assert_allclose(found.problem.constants, problem.constants, atol=1e-7)
    assert min(found.r2.values()) > 1 - 1e-9
    assert max(found.error.values()) < 1e-8
    assert calls[-1] == (found.samples + found.held_out,) * 2
    assert found.samples == (6 if gradients else 30)  # 15 unknowns


def test_on_the_simplex_its_values_are_exact_on_the_simplex(many):
    problem = many(1, 2, rows=2, n=3)
    found = fit_surrogate(problem, gradients=False, seed=2)
    point = np.random.default_rng(5).dirichlet(np.ones(3), size=2)
    np.testing.assert_allclose(found.problem.losses(point), problem.losses(point), atol=1e-7)


def test_what_is_not_quadratic_is_told_by_the_held_out_error():
    def quartic(point):
        return float(np.sum((4 * point) ** 4) * np.cos(9 * point.sum())), 256 * point**3

    found = fit_surrogate(FunctionProblem(quartic, 1, 3, "box"), gradients=False, seed=0)
    assert found.r2["objective"] < 0.9
    assert found.error["objective"] > 1


def test_curvature_can_be_kept_from_being_negative():
    def saddle(point):
        x = point.ravel()
        return float(x[0] ** 2 - x[1] ** 2), np.array([[2 * x[0], -2 * x[1]]])

    problem = FunctionProblem(saddle, 1, 2, "box")
    assert np.linalg.eigvalsh(fit_surrogate(problem, convex=False).problem.hessians[0])[0] == pytest.approx(-2)
    assert np.linalg.eigvalsh(fit_surrogate(problem).problem.hessians[0])[0] >= -1e-12
    np.testing.assert_allclose(positive(np.diag([3.0, -1.0])), np.diag([3.0, 0.0]), atol=1e-12)


def test_what_cannot_be_fitted_is_refused(many):
    with pytest.raises(OptionError, match="'free' has no bounds"):
        fit_surrogate(many(0, 2, domain="free"))
    with pytest.raises(OptionError, match="curvatures a task"):
        fit_surrogate(FunctionProblem(lambda point: (0.0, point), 100, 10, "box"))
    with pytest.raises(OptionError, match="'samples' parameter"):
        fit_surrogate(many(0, 2), samples=0)
