import numpy as np
from mergesolve.solvers import solve
from mergesolve.solvers.away_frank_wolfe import AwayFrankWolfe


def test_the_steeper_direction_is_taken():
    products, weights = np.array([1.0, 5.0, 2.0]), np.array([0.6, 0.2, 0.2])
    assert AwayFrankWolfe().choose(products, weights, 2.0, -2.0).kind == "toward"
    choice = AwayFrankWolfe().choose(products, weights, 2.0, 0.5)
    assert (choice.gains, choice.loses, choice.kind) == (None, 1, "away")


def test_a_bad_start_is_left_for_good(face):
    """Vanilla steps only shrink the weight of the start; an away step takes all of it."""
    quadratic, optimum = face
    bad = int(np.flatnonzero(optimum.max(axis=0) == optimum.max(axis=0).min())[0])
    start = f"expert:expert{bad}"
    away = solve(quadratic.problem("simplex"), "away-frank-wolfe", start=start, max_iter=500, tol=1e-9)
    vanilla = solve(quadratic.problem("simplex"), "frank-wolfe", start=start, max_iter=500, tol=1e-9)
    unused = optimum == 0
    assert away.status == "optimal"
    assert (away.coefficients[unused] == 0).all()
    assert (vanilla.coefficients[unused] > 0).any()
