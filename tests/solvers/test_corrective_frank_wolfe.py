import numpy as np
import pytest
from mergesolve.solvers import CorrectiveFrankWolfe, OptionError, solve


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("inner", ["quadratic", "projected-gradient"])
def test_a_hundred_experts_to_a_gap_of_1e_8_in_fewer_than_400_iterations(inner, seed, quadratics):
    quadratic, optimum = quadratics(seed, rows=1, n=100)
    result = solve(quadratic.problem("simplex", quadratic=True), CorrectiveFrankWolfe(inner=inner), tol=1e-8)
    assert result.status == "optimal"
    assert result.nit < 100 < 400
    assert np.linalg.norm(result.coefficients - optimum) < 1e-3


def test_the_exact_inner_solve_costs_one_gradient_a_vertex_and_no_evaluation(face):
    quadratic, _ = face
    problem = quadratic.problem("simplex", quadratic=True)
    result = solve(problem, "corrective-frank-wolfe", tol=1e-10)
    assert result.status == "optimal"
    assert result.counts["gradients"] == 2 * result.nit + 2  # iterate and vertex; the last iterate; the certificate
    assert result.counts["evaluations"] == 0


@pytest.mark.parametrize("domain", ["simplex", "capped", "box", "l1-ball"])
def test_after_a_step_no_weight_can_be_moved_with_profit(domain, face):
    """w is optimal over the active set: the products ⟨V_k, S⟩ of all atoms of positive weight are equal."""
    quadratic, _ = face
    problem = quadratic.problem(domain, quadratic=True)
    start = problem.domain.project(np.full(quadratic.c.shape, 1 / 6))
    result = solve(problem, "corrective-frank-wolfe", start=start, max_iter=60, tol=1e-10)
    assert result.status == "optimal"
    for before, after in zip(result.trace, result.trace[1:-1], strict=False):
        assert before["extra"]["kind"] in ("corrective", "drop")
        assert after["extra"]["strong_gap"] == pytest.approx(after["gap"], abs=1e-10)


@pytest.mark.parametrize("inner", ["quadratic", "projected-gradient"])
def test_values_fall_and_iterates_are_sparser_than_the_oracle_is_asked(inner, face):
    quadratic, _ = face
    result = solve(quadratic.problem("simplex", quadratic=True), CorrectiveFrankWolfe(inner=inner), tol=1e-9)
    values = [line["value"] for line in result.trace]
    assert (np.diff(values) <= 1e-13).all()
    assert any(line["extra"]["kind"] == "drop" for line in result.trace[:-1])


def test_it_needs_fewer_iterations_than_any_other_variant(face):
    quadratic, _ = face
    needed = {
        name: solve(quadratic.problem("simplex", quadratic=True), name, max_iter=2000, tol=1e-7).nit
        for name in ("corrective-frank-wolfe", "blended-pairwise-frank-wolfe", "away-frank-wolfe", "frank-wolfe")
    }
    assert needed["corrective-frank-wolfe"] == min(needed.values())


def test_a_merge_is_solved_by_gradients_on_the_experts_of_the_active_set(merge):
    problem = merge("layer", "capped", backend="streaming")
    result = solve(problem, "corrective-frank-wolfe", start="base", max_iter=15, tol=1e-4)
    assert result.gap <= 1e-3
    assert result.objective <= solve(merge(), "projected-gradient", max_iter=300, tol=1e-5).objective + 1e-3


def test_the_exact_inner_solve_is_refused_where_it_would_not_be_exact(merge):
    for problem in (merge(), merge(stochastic=True)):
        with pytest.raises(OptionError, match="needs an objective that is known to be quadratic"):
            solve(problem, CorrectiveFrankWolfe(inner="quadratic"))
    with pytest.raises(OptionError, match="'inner' parameter"):
        CorrectiveFrankWolfe(inner="newton")
