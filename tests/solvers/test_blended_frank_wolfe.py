import numpy as np
import pytest
from mergesolve.solvers import solve
from mergesolve.solvers.active_set import ORACLE
from mergesolve.solvers.blended_frank_wolfe import BlendedPairwiseFrankWolfe


def test_pairwise_inside_the_set_while_it_pays():
    products, weights = np.array([1.0, 5.0, 2.0]), np.full(3, 1 / 3)
    inside = BlendedPairwiseFrankWolfe().choose(products, weights, 2.0, 0.0)
    assert (inside.gains, inside.loses, inside.kind) == (0, 1, "pairwise")
    outside = BlendedPairwiseFrankWolfe().choose(products, weights, 2.0, -3.0)
    assert (outside.gains, outside.loses, outside.kind) == (ORACLE, None, "toward")
    alone = BlendedPairwiseFrankWolfe().choose(products[:1], weights[:1], 1.0, 1.0)
    assert alone.kind == "toward"


def test_a_vertex_enters_by_a_full_step_only(face):
    """There are no swaps: the set grows by one where the oracle's vertex is fetched, and nowhere else."""
    quadratic, _ = face
    trace = solve(quadratic.problem("simplex"), "blended-pairwise-frank-wolfe", max_iter=400, tol=1e-9).trace
    sizes = [line["extra"]["active"] for line in trace[:-1]]
    kinds = [line["extra"]["kind"] for line in trace[:-1]]
    assert "swap" not in kinds
    assert {"toward", "pairwise", "drop"} <= set(kinds)
    for k in range(1, len(sizes)):
        assert sizes[k] - sizes[k - 1] <= (kinds[k] == "toward")
        assert (sizes[k] < sizes[k - 1]) == (kinds[k] == "drop") or kinds[k] == "toward"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_hundred_well_conditioned_experts_to_a_gap_of_1e_8_in_fewer_than_400_iterations(seed, quadratics):
    quadratic, _ = quadratics(seed, rows=1, n=100)
    eased = type(quadratic)(quadratic.q + np.eye(100), quadratic.c + 0.0)
    spec = {"name": "blended-pairwise-frank-wolfe", "step_rule": "exact"}
    result = solve(eased.problem("simplex", quadratic=True), spec, max_iter=400, tol=1e-8)
    assert result.status == "optimal"
    assert result.counts["gradients"] == 2 * result.nit + 2
