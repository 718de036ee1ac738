import numpy as np
import pytest
from mergesolve.solvers import BayesianOptimization
from mergesolve.solvers.bayesian import spread
from mergesolve.solvers.solver import State


@pytest.mark.parametrize("size", [1, 2, 5])
def test_first_points_fill_the_cube_more_evenly_than_chance(size):
    points = np.array([spread(index, size, seed=3) for index in range(64)])
    assert ((points >= 0) & (points < 1)).all()
    for axis in points.T:  # each eighth of each axis holds 8 of 64, give or take three
        assert np.abs(np.histogram(axis, 8, (0, 1))[0] - 8).max() <= 3
    assert not np.array_equal(spread(1, size, seed=3), spread(1, size, seed=4))


def test_what_is_proposed_depends_on_history_and_seed_alone():
    candidates, values = np.array([[0.1], [0.5], [0.9]]), np.array([0.3, 0.1, 0.4])
    propose = [BayesianOptimization(initial=3, seed=seed).propose for seed in (0, 0, 1)]
    one, two, other = (ask(None, State(np.zeros((1, 1))), candidates, values)[0] for ask in propose)
    np.testing.assert_array_equal(one, two)
    assert 0.3 < one[0] < 0.7
    assert other is not None
