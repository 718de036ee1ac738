import numpy as np
import pytest
from mergesolve.solvers import CMAES


def run(solver, function, start, most):
    strategy, tried = solver.strategy(start, lambda z: True), []
    candidate = next(strategy)
    while len(tried) < most:
        tried.append((function(candidate), candidate))
        try:
            candidate = strategy.send(tried[-1][0])
        except StopIteration:
            break
    return tried


@pytest.mark.parametrize("size", [1, 2, 3])
def test_finds_the_minimum_of_a_tilted_valley_and_ends_by_itself(size):
    rng = np.random.default_rng(size)
    root = rng.normal(size=(size, size)) + 2 * np.eye(size)
    target = rng.uniform(0.2, 0.8, size)
    tried = run(CMAES(), lambda z: float(np.sum((root @ (z - target)) ** 2)), np.full(size, 0.5), 2000)
    best = min(tried, key=lambda pair: pair[0])[1]
    np.testing.assert_allclose(best, target, atol=1e-5)
    assert len(tried) < 2000


def test_candidates_stay_in_the_cube_and_generations_have_the_size_asked_for():
    tried = run(CMAES(population=6, sigma=0.8), lambda z: float(z.sum()), np.zeros(4), 61)
    assert all(((z >= 0) & (z <= 1)).all() for _, z in tried)
    assert min(value for value, _ in tried[-6:]) < np.median([value for value, _ in tried[1:7]])


def test_another_seed_gives_other_candidates():
    first, second = (run(CMAES(seed=seed), lambda z: float(z.sum()), np.full(2, 0.5), 5)[3][1] for seed in (0, 1))
    assert np.abs(first - second).max() > 1e-3
