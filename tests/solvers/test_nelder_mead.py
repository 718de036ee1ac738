import numpy as np
import pytest
from mergesolve.solvers import NelderMead
from scipy.optimize import minimize


def within(z):
    return bool(((z >= 0) & (z <= 1)).all())


def rosenbrock(z):
    x = 4 * z - 2
    return float(sum(10 * (x[1:] - x[:-1] ** 2) ** 2) + sum((1 - x) ** 2))


def corner(z):
    return float(np.sum((z - np.linspace(-0.3, 1.2, len(z))) ** 2 * (1 + np.arange(len(z)))))


@pytest.mark.parametrize("function", [rosenbrock, corner])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_candidates_are_scipys_one_by_one(function, size):
    """The same simplex, coefficients by dimension, and bounds: the same sequence of points."""
    start = np.linspace(0.3, 0.6, size)
    simplex = np.vstack([start, start + 0.25 * np.eye(size)])
    theirs = []

    def recorded(z):
        theirs.append(z.copy())
        return function(z)

    minimize(
        recorded,
        start,
        method="Nelder-Mead",
        bounds=[(0, 1)] * size,
        options={
            "initial_simplex": simplex,
            "adaptive": size > 1,
            "maxfev": 60,
            "xatol": 0,
            "fatol": 0,
            "maxiter": 10**6,
        },
    )
    strategy = NelderMead(xtol=1e-300, restarts=0).strategy(start, within)
    ours = [next(strategy)]
    while len(ours) < len(theirs):
        ours.append(strategy.send(function(ours[-1])))
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_ends_when_the_last_simplex_has_shrunk_and_restarts_around_the_best():
    counts = []
    for restarts in (0, 2):
        strategy = NelderMead(xtol=1e-3, restarts=restarts).strategy(np.full(2, 0.2), within)
        tried = [next(strategy)]
        try:
            while True:
                tried.append(strategy.send(corner(tried[-1])))
        except StopIteration:
            pass
        counts.append(len(tried))
        assert min(map(corner, tried)) == pytest.approx(corner(np.clip([-0.3, 1.2], 0, 1)), abs=1e-3)
    assert counts[1] > counts[0]
