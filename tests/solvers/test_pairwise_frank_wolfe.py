import numpy as np
from mergesolve.solvers import solve
from mergesolve.solvers.pairwise_frank_wolfe import PairwiseFrankWolfe


def test_weight_goes_from_the_worst_atom_to_the_vertex_of_the_oracle():
    choice = PairwiseFrankWolfe().choose(np.array([1.0, 5.0, 2.0]), np.full(3, 1 / 3), 2.0, 0.5)
    assert (choice.loses, choice.kind) == (1, "pairwise")


def test_a_step_touches_two_experts_only(face):
    quadratic, _ = face
    single = type(quadratic)(quadratic.q[:1], quadratic.c[:1])
    trace = solve(single.problem("simplex"), "pairwise-frank-wolfe", max_iter=20, tol=1e-10).trace
    points = np.array([line["coefficients"][0] for line in trace])
    changed = np.abs(np.diff(points, axis=0)) > 1e-10
    assert (changed.sum(axis=1) <= 2).all()
    np.testing.assert_allclose(points.sum(axis=1), 1, atol=1e-9)
