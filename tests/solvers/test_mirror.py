import math

import numpy as np
import pytest
from mergesolve.solvers import FunctionProblem, MirrorDescent, OptionError, Simplex, solve
from mergesolve.solvers.entropic import coordinates


@pytest.mark.parametrize("domain", ["simplex", "capped", "box"])
def test_reaches_cvxpys_optimum_and_values_never_rise(domain, located):
    quadratic, _ = located
    result = solve(quadratic.problem(domain), MirrorDescent(), max_iter=400, tol=1e-9)
    values = [line["value"] for line in result.trace]
    assert result.objective - quadratic.optimum(domain) < 1e-6
    assert (np.diff(values) <= 1e-14).all()


@pytest.mark.parametrize("domain", ["simplex", "capped"])
def test_the_bound_of_relative_smoothness_holds_at_every_iterate(domain, located):
    """f(Λ_k) − f* ≤ D(Λ*, Λ_0) / Σ_{j<k} η_j: convexity and the accepted backtracking bound, summed up."""
    quadratic, best = located
    start = np.full(best.shape, 1 / 7)
    start /= 1 if domain == "capped" else start.sum(axis=1, keepdims=True)
    result = solve(quadratic.problem(domain), MirrorDescent(), start=start, max_iter=60, tol=1e-12)
    shares = [np.hstack([1 - p.sum(axis=1, keepdims=True), p]) if domain == "capped" else p for p in (best, start)]
    support = shares[0] > 1e-13
    distance = np.sum(shares[0][support] * np.log(shares[0][support] / shares[1][support]))
    optimum = quadratic(best)[0]
    assert quadratic.optimum(domain) == pytest.approx(optimum, abs=1e-9)
    total = 0.0
    for line in result.trace[:-1]:
        assert total == 0 or line["value"] - optimum <= distance / total + 1e-9
        total += line["step"]
    assert total > 10


def test_the_regret_of_constant_steps_is_bounded():
    """Σ_t ⟨S_t, Λ_t − V⟩ ≤ ln(n)/η + (η/2) Σ_t ‖S_t‖²_∞ for every V, on losses that change adversarially."""
    rng = np.random.default_rng(0)
    rounds, n, eta = 200, 8, 0.08
    losses = rng.uniform(-1, 1, (rounds, 1, n))
    losses[:, :, 3] -= 0.2
    problem = FunctionProblem(lambda point: (float(np.sum(losses[seen[-1]] * point)), losses[seen[-1]]), 1, n)
    problem.stochastic = True
    seen, points = [], []
    problem.draw = lambda t: seen.append(0 if t is None else min(t, rounds - 1))
    evaluate = problem.evaluate
    problem.evaluate = lambda point, **options: points.append(point) or evaluate(point, **options)
    solve(problem, MirrorDescent(schedule="constant", size=eta), max_iter=rounds - 1)
    played = sum(float(np.sum(losses[t] * points[t])) for t in range(rounds))
    regret = played - losses.sum(axis=0).min()
    assert regret <= math.log(n) / eta + eta / 2 * np.sum(np.abs(losses).max(axis=2) ** 2)
    weights = np.exp(-eta * losses[: rounds - 1].sum(axis=0))
    np.testing.assert_allclose(points[rounds - 1], weights / weights.sum(), rtol=1e-10)  # Hedge, in closed form


def test_decaying_steps_are_the_first_one_over_the_root_of_t(face):
    quadratic, _ = face
    result = solve(quadratic.problem("simplex"), MirrorDescent(schedule="decaying", size=0.5), max_iter=5, tol=0)
    assert [line["step"] for line in result.trace[:-1]] == pytest.approx([0.5 / math.sqrt(t + 1) for t in range(5)])
    assert result.counts["evaluations"] == 0


@pytest.mark.parametrize("start", ["base", "expert:expert1"])
def test_a_start_on_the_boundary_is_moved_inside_and_left_behind(start, located):
    quadratic, _ = located
    first = []
    result = solve(
        quadratic.problem("capped"), MirrorDescent(), start=start, max_iter=400, tol=1e-9, callback=first.append
    )
    assert (
        result.objective - quadratic.optimum("capped") < 1e-4
    )  # degenerate: the base has weight 0 and score 0, and comes out slowly
    begun = np.array(first[0]["coefficients"])
    assert (begun > 0).all()
    assert np.abs(begun - (start != "base") * np.eye(6)[1]).max() <= 1e-3


def test_a_coefficient_that_underflows_can_come_back():
    space = coordinates("Test", Simplex())
    u = space.normalized(np.array([[0.0, -2000.0]]))
    assert space.leave(u)[0, 1] == 0
    assert space.leave(space.normalized(u - 3000 * np.array([[1.0, 0.0]])))[0, 1] == 1


def test_nan_ahead_shortens_the_step(face):
    quadratic, _ = face

    def cliff(point):
        value, scores = quadratic(point)
        return (value if point.max() < 0.5 else math.nan), scores

    result = solve(FunctionProblem(cliff, 3, 6), MirrorDescent(size=100.0), max_iter=20, tol=0)
    assert math.isfinite(result.objective)
    assert result.objective < quadratic(np.full((3, 6), 1 / 6))[0]


@pytest.mark.parametrize("options", [{"schedule": "cosine"}, {"size": 0}, {"grow": 0.5}, {"mixing": 1.0}])
def test_bad_options_are_explained(options):
    with pytest.raises(OptionError, match="parameter of MirrorDescent must be"):
        MirrorDescent(**options)


def test_the_free_domain_is_refused_before_anything_runs(face):
    problem = face[0].problem("free")
    with pytest.raises(OptionError, match="'free' has none"):
        solve(problem, "mirror-descent")
    assert problem.counts.gradients == 0
