import cvxpy as cp
import numpy as np
import pytest
from mergesolve.solvers import OptionError, make_solver, solve
from mergesolve.solvers.mgda import MGDA, min_norm, surgery
from mergesolve.solvers.scalarization import Scalarized

DOMAINS = ("simplex", "capped", "box", "free")


def sampled(kind, seed, tasks=20, size=60):
    """Task gradients [T, d] with a property by construction."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(tasks, size))
    if kind == "rank-deficient":
        found = rng.normal(size=(tasks, 5)) @ rng.normal(size=(5, size))
    if kind == "apart from 0":
        found = found + 2 * rng.normal(size=size)
    if kind == "duplicates":
        found[tasks // 2 :] = found[: tasks // 2] + 0.5 * np.ones(size)
        found[1] = found[0]
    if kind == "scales":
        found = (found + rng.normal(size=size)) * np.logspace(-4, 4, tasks)[:, None]
    if kind == "0 inside":  # a convex combination with positive weights vanishes
        found[-1] = -found[:-1].mean(axis=0)
    return found


def oracle(points):
    """The least norm in the hull by cvxpy with Clarabel at tight tolerances."""
    shares = cp.Variable(len(points))
    problem = cp.Problem(cp.Minimize(cp.norm(points.T @ shares)), [shares >= 0, cp.sum(shares) == 1])
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    return float(problem.value)


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")  # said where it is within 1e-9, too
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["plain", "rank-deficient", "apart from 0", "duplicates", "scales", "0 inside"])
def test_the_minimum_norm_of_20_tasks_is_exact(kind, seed):
    points = sampled(kind, seed)
    weights = min_norm(points)
    nearest = weights @ points
    norm = float(np.linalg.norm(nearest))
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert norm == pytest.approx(oracle(points), abs=1e-8)
    # Common descent, which is also the condition of optimality: ⟨d, g_t⟩ ≥ ‖d‖² for every t.
    assert (points @ nearest).min() >= norm**2 - 1e-10 * (1 + np.abs(points @ nearest).max())


def test_the_minimum_norm_is_0_exactly_where_the_hull_contains_0():
    assert np.linalg.norm(min_norm(sampled("0 inside", 1)) @ sampled("0 inside", 1)) < 1e-12
    assert np.linalg.norm(min_norm(sampled("apart from 0", 1)) @ sampled("apart from 0", 1)) > 1
    np.testing.assert_array_equal(min_norm(np.zeros((3, 2))), np.full(3, 1 / 3))
    np.testing.assert_allclose(min_norm(np.array([[1.0, 0], [0, 2.0]])), [0.8, 0.2])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("domain", DOMAINS)
def test_every_step_lowers_every_loss_and_the_trace_certifies_it(domain, normalize, many):
    problem = many(3, 4, domain=domain)
    result = solve(problem, {"name": "mgda", "normalize": normalize}, max_iter=15, tol=1e-7)
    losses = np.array([list(line["tasks"].values()) for line in result.trace])
    assert len(losses) > 5
    assert (np.diff(losses, axis=0) <= 1e-12).all()
    steps = [line["extra"] for line in result.trace if "extra" in line]
    assert min(extra["common_descent"] / extra["min_norm"] ** 2 for extra in steps) >= -1e-6


@pytest.mark.parametrize("domain", DOMAINS[:3])
def test_the_gap_bounds_what_all_tasks_together_could_still_gain(domain, many, oracles):
    """max_V min_t f_t(Λ) − f_t(V) ≤ gap for convex losses, by cvxpy; and it vanishes at the end."""
    problem = many(5, 3, rows=1, domain=domain)
    result = solve(problem, "mgda", max_iter=60, tol=1e-6)
    assert result.status == "optimal"
    for line in result.trace[:: max(1, len(result.trace) // 4)]:
        point, gain = cp.Variable(problem.rows * problem.n), cp.Variable()
        better = [
            line["tasks"][name] - oracles.expression(problem, t, point) >= gain for t, name in enumerate(problem.tasks)
        ]
        best = cp.Problem(cp.Maximize(gain), better + oracles.inside(problem, point))
        best.solve(solver=cp.CLARABEL)
        assert line["gap"] >= best.value - 1e-6
    assert best.value <= result.trace[0]["gap"]


def test_vertices_are_a_direction_too(many):
    problem = many(3, 3)
    result = solve(problem, MGDA(direction="vertex"), max_iter=15, tol=0)
    losses = np.array([list(line["tasks"].values()) for line in result.trace])
    assert (np.diff(losses, axis=0) <= 1e-12).all()
    assert result.gap < 0.5 * result.trace[0]["gap"]
    with pytest.raises(OptionError, match="unbounded"):
        solve(many(3, 3, domain="free"), MGDA(direction="vertex"))


def test_surgery_leaves_no_conflict_between_two_tasks():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(2, 6))
    gradients[1] -= 2 * gradients[0]
    mended, conflicts = surgery(gradients, rng)
    assert conflicts == 2
    assert mended[0] @ gradients[1] == pytest.approx(0, abs=1e-12)
    assert mended[1] @ gradients[0] == pytest.approx(0, abs=1e-12)
    same, none = surgery(np.abs(gradients), rng)
    np.testing.assert_array_equal(same, np.abs(gradients))
    assert none == 0


def test_the_order_of_the_surgery_is_that_of_the_seed(many):
    results = [solve(many(3, 5), {"name": "pcgrad", "seed": seed}, max_iter=5, tol=0) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(results[0].coefficients, results[1].coefficients)
    assert (results[0].coefficients != results[2].coefficients).any()


@pytest.mark.parametrize("name", ["mgda", "pcgrad"])
def test_a_scalarization_has_no_place_beside_it(name, many):
    with pytest.raises(OptionError, match="weighs the tasks itself"):
        solve(Scalarized(many(0, 2), "worst"), name)


def test_options_out_of_range_are_named():
    for options, match in (
        ({"name": "mgda", "direction": "down"}, "'direction' parameter of MGDA"),
        ({"name": "mgda", "normalize": 1}, "'normalize' parameter"),
        ({"name": "pcgrad", "lr": 0}, "'lr' parameter of PCGrad"),
    ):
        with pytest.raises(OptionError, match=match):
            make_solver(options)
