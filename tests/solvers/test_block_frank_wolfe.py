import itertools

import numpy as np
import pytest
from mergesolve.solvers import BlockFrankWolfe, OptionError, solve
from mergesolve.solvers.polytope import constrain

RULES = ["backtracking", "line-search", "exact", "secant", "open-loop", "short-step"]


@pytest.mark.parametrize("order", ["full", "cyclic", "random", "gap"])
@pytest.mark.parametrize("rule", RULES)
def test_every_order_and_rule_comes_near_the_optimum_with_a_valid_gap(order, rule, face):
    quadratic, _ = face
    best = quadratic.optimum("simplex")
    smoothness = float(np.linalg.norm(quadratic.q, 2, axis=(1, 2)).max())
    step = {"name": rule, **({"smoothness": smoothness} if rule == "short-step" else {})}
    result = solve(quadratic.problem("simplex"), BlockFrankWolfe(step_rule=step, order=order), max_iter=150, tol=1e-9)
    for line in result.trace:
        assert line["gap"] >= line["value"] - best - 1e-8
    updates = 150 * (3 if order == "full" else 1)
    constant = 2 * smoothness * 2 * 3  # of three simplices of squared diameter 2
    # Lacoste-Julien et al. (2013), theorem 2: 2B/(t + 2B) (C + h_0) after t block updates, in expectation
    assert result.objective - best <= 2 * 3 / (updates + 6) * (constant + result.trace[0]["value"] - best)


@pytest.mark.parametrize(("order", "count"), [("cyclic", 1), ("cyclic", 2), ("random", 2), ("gap", 1)])
def test_an_iteration_moves_the_blocks_that_were_chosen_and_no_others(order, count, face):
    quadratic, _ = face
    solver = BlockFrankWolfe(order=order, blocks_per_step=count)
    trace = solve(quadratic.problem("simplex"), solver, max_iter=12, tol=0).trace
    moved = [
        np.flatnonzero(np.any(np.array(a["coefficients"]) != np.array(b["coefficients"]), axis=1)).tolist()
        for a, b in itertools.pairwise(trace)
    ]
    assert all(len(rows) <= count for rows in moved)
    if order == "cyclic":
        assert all(set(rows) <= {(t * count + k) % 3 for k in range(count)} for t, rows in enumerate(moved))
    assert set(itertools.chain(*moved)) == {0, 1, 2}


def test_the_block_of_the_largest_gap_is_drawn_most_often():
    drawn = [int(BlockFrankWolfe(order="gap").pick(np.array([6.0, 3.0, 1.0, 0.0]), t)[0]) for t in range(2000)]
    counts = np.bincount(drawn, minlength=4)
    assert counts[3] == 0
    expected = 2000 * np.array([0.6, 0.3, 0.1])
    assert np.sum((counts[:3] - expected) ** 2 / expected) < 13.8  # chi-square with 2 degrees of freedom, 0.1%


def test_one_seed_decides_the_order(face):
    quadratic, _ = face

    def run(seed):
        return solve(quadratic.problem("simplex"), BlockFrankWolfe(order="random", seed=seed), max_iter=9, tol=0)

    np.testing.assert_array_equal(run(1).coefficients, run(1).coefficients)
    assert not np.array_equal(run(1).coefficients, run(2).coefficients)


@pytest.mark.parametrize("rule", ["exact", "line-search", "secant"])
def test_on_a_separable_objective_each_block_goes_as_if_it_were_alone(rule, quadratics):
    quadratic, _ = quadratics(3)
    factor = np.array([1.0, 30.0, 900.0])
    unlike = type(quadratic)(quadratic.q * factor[:, None, None], quadratic.c * factor[:, None])

    def run(blocks, name):
        part = type(quadratic)(unlike.q[blocks], unlike.c[blocks])
        return solve(part.problem("simplex", quadratic=True), {"name": name, "step_rule": rule}, max_iter=12, tol=0)

    together = run(slice(None), "block-frank-wolfe")
    alone = [run([block], "frank-wolfe").trace[-1]["coefficients"][0] for block in range(3)]
    np.testing.assert_allclose(together.trace[-1]["coefficients"], alone, atol=1e-6)


def test_steps_found_at_once_cost_one_evaluation_a_trial(face):
    quadratic, _ = face
    result = solve(quadratic.problem("simplex"), "block-frank-wolfe", max_iter=50, tol=0)
    assert result.counts["gradients"] == 50 + 1 + 1
    assert result.counts["evaluations"] <= 50 * 1.5 + 10  # M is halved on the way up, and shrinks by a tenth a step


def test_blocks_that_a_constraint_couples_move_together(face):
    """Their own steps would leave the domain: with expert0 the same in two blocks, those two have one step."""
    quadratic, _ = face
    domain = constrain("simplex", ["expert0[block0] == expert0[block2]"])
    problem = quadratic.problem(domain)
    cells = problem.domain.cells(3)
    assert cells[0] == cells[2] != cells[1]
    result = solve(problem, "block-frank-wolfe", max_iter=60, tol=1e-9)
    assert problem.domain.violation(result.coefficients).max() <= 1e-9
    assert result.coefficients[0, 0] == pytest.approx(result.coefficients[2, 0], abs=1e-9)
    assert result.gap < 0.2 * result.trace[0]["gap"]


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(OptionError, match="order 'full' moves all"):
        BlockFrankWolfe(blocks_per_step=2)
    with pytest.raises(OptionError, match="'order' parameter"):
        BlockFrankWolfe(order="greedy")
