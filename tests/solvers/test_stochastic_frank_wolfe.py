import numpy as np
import pytest
from mergesolve.solvers import Clock, FunctionProblem, OptionError, StochasticFrankWolfe, solve


class Sampled(FunctionProblem):
    """f = mean of ½‖Λ − t_j‖² over m targets, seen a few at a time; None draws them all."""

    stochastic = True

    def __init__(self, m=64, batch=2, seed=0):
        rng = np.random.default_rng(seed)
        self.targets = rng.normal(size=(m, 1, 5)) + np.array([0.8, 0.4, 0.0, 0.0, 0.0])
        self.batch, self.drawn = batch, []
        self.draw(None)
        super().__init__(self.sampled, 1, 5, "simplex")

    def draw(self, iteration):
        self.drawn.append(iteration)
        rng = np.random.default_rng([1, 0 if iteration is None else iteration])
        chosen = slice(None) if iteration is None else rng.choice(len(self.targets), self.batch, replace=False)
        self.now = self.targets[chosen]

    def sampled(self, point):
        difference = point - self.now
        return 0.5 * float(np.mean(np.sum(difference**2, axis=(1, 2)))), difference.mean(axis=0)

    def excess(self, point):
        mean = self.targets.mean(axis=0)
        best = self.domain.project(mean)
        return 0.5 * float(np.sum((point - mean) ** 2) - np.sum((best - mean) ** 2))


def final(solver, iterations=150, **options):
    problem = Sampled(**options)
    return problem, solve(problem, solver, max_iter=iterations, tol=0)


@pytest.mark.parametrize("estimate", ["momentum", "spider", "svrf"])
def test_estimates_take_the_noise_out_of_the_oracle(estimate):
    """The same schedule on single batches keeps jumping between vertices; averaged gradients settle."""
    schedule = {"name": "open-loop", "offset": 8, "scale": 0.25}
    noisy, plain = final({"name": "frank-wolfe", "step_rule": schedule})
    problem, result = final(StochasticFrankWolfe(estimate=estimate, step_rule=schedule))
    assert problem.excess(result.coefficients) < 0.5 * noisy.excess(plain.coefficients)


@pytest.mark.parametrize("estimate", ["spider", "svrf"])
def test_variance_reduction_is_exact_where_batches_differ_by_a_constant(estimate):
    """S_j(Λ) − S_j(Λ') is the same for all batches of this f, so G equals the scores of all the data at every step."""
    problem = Sampled()
    estimates = []
    original = problem.domain.minimizer
    object.__setattr__(problem.domain, "minimizer", lambda scores: estimates.append(scores) or original(scores))
    solver = StochasticFrankWolfe(estimate=estimate, snapshot=4)
    state = solver.init(problem, np.full((1, 5), 0.2))
    for t in range(9):
        problem.draw(t)
        here = state.coefficients
        estimates.clear()
        state = solver.step(problem, state, problem.evaluate(here), Clock(t, 9)).state
        np.testing.assert_allclose(estimates[0], here - problem.targets.mean(axis=0), atol=1e-12)


def test_what_an_iteration_costs():
    costs = {}
    for estimate in ("momentum", "spider", "svrf"):
        problem, _ = final(StochasticFrankWolfe(estimate=estimate, snapshot=5), iterations=10)
        costs[estimate] = problem.counts.gradients - 2  # the last iterate and the certificate
    assert costs == {"momentum": 10, "spider": 20, "svrf": 20}


def test_the_batch_of_an_iteration_is_seen_at_both_points_and_all_data_at_snapshots():
    problem, result = final(StochasticFrankWolfe(estimate="spider", snapshot=3), iterations=6)
    assert problem.drawn[1:] == [0, None, 0, 1, 2, 3, None, 3, 4, 5, 6, None]
    kinds = [line["extra"]["kind"] for line in result.trace[:-1]]
    assert kinds == ["snapshot", "spider", "spider"] * 2


def test_momentum_forgets_at_its_rate():
    memory, solver = {}, StochasticFrankWolfe()
    problem = Sampled()
    seen = []
    for t in range(3):
        problem.draw(t)
        evaluation = problem.evaluate(np.full((1, 5), 0.2))
        seen.append(evaluation.scores)
        _, estimate = solver.update(problem, np.full((1, 5), 0.2), memory, evaluation, t)
    rates = [4 / (t + 8) ** (2 / 3) for t in range(3)]
    first = seen[0] + rates[1] * (seen[1] - seen[0])
    np.testing.assert_allclose(estimate, first + rates[2] * (seen[2] - first), rtol=1e-14)


@pytest.mark.parametrize("rule", ["line-search", "secant", "backtracking", "monotone"])
def test_rules_that_search_are_refused_with_the_reason(rule):
    with pytest.raises(OptionError, match=f"'{rule}' cannot drive StochasticFrankWolfe: it evaluates the objective"):
        StochasticFrankWolfe(step_rule=rule)
