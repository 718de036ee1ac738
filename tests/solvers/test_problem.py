import numpy as np
import pytest
import torch
from mergesolve.solvers import OptionError, Problem, solve

BLOCKS = ["model", "layer", "tensor", "row"]


def reference(states, problem, point):
    """Weights, value and scores in float64 NumPy, straight from the definition."""
    base, experts, targets = states
    tau = {e: {k: (experts[e][k].double() - base[k].double()).numpy() for k in base} for e in experts}
    weights, scores = {}, np.zeros((problem.rows, problem.n))
    value = 0.0
    for k in base:
        rows = range(problem.rows)[problem.blocks.rows[k]]
        lam = np.broadcast_to(point[rows], (max(len(rows), 1), problem.n))
        stacked = np.stack([tau[e][k] for e in problem.experts])
        if len(rows) == 1:
            weights[k] = base[k].double().numpy() + np.tensordot(lam[0], stacked, axes=1)
        else:
            weights[k] = base[k].double().numpy() + np.einsum("ri,ir...->r...", lam, stacked)
        gradient = np.zeros_like(weights[k])
        for target in targets.values():
            difference = weights[k] - target[k].double().numpy()
            value += 0.5 * 0.5 * np.sum(difference**2)
            gradient += 0.5 * difference
        for i in range(problem.n):
            product = gradient * stacked[i]
            if len(rows) == 1:
                scores[rows[0], i] += product.sum()
            else:
                scores[list(rows), i] += product.reshape(len(rows), -1).sum(axis=1)
    return weights, value, scores


@pytest.mark.parametrize("backend", ["streaming", "resident"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_value_weights_and_scores_equal_a_float64_reference(blocks, backend, merge, states):
    problem = merge(blocks, "free", backend=backend)
    point = np.random.default_rng(0).normal(size=(problem.rows, problem.n))
    weights, value, scores = reference(states, problem, point)
    evaluation = problem.evaluate(point)
    assert evaluation.value == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(evaluation.scores, scores, rtol=1e-4, atol=1e-4)
    for k, w in problem.weights(point).items():
        np.testing.assert_allclose(w.numpy(), weights[k], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_scores_are_the_derivative_of_the_value(blocks, merge):
    problem = merge(blocks, "free")
    rng = np.random.default_rng(1)
    point, direction = rng.normal(size=(2, problem.rows, problem.n))
    scores = problem.evaluate(point).scores
    numeric = (problem.value(point + 1e-2 * direction) - problem.value(point - 1e-2 * direction)) / 2e-2
    assert np.sum(scores * direction) == pytest.approx(numeric, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("backend", ["streaming", "resident"])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("target", ["vertex", "away", "direction"])
def test_a_line_has_the_values_of_its_points(blocks, backend, target, merge):
    problem, other = merge(blocks, "free", backend=backend), merge(blocks, "free", backend=backend)
    rng = np.random.default_rng(2)
    point = rng.normal(size=(problem.rows, problem.n))
    direction = rng.normal(size=point.shape)
    if target != "direction":
        direction = -point
        direction[:, 1] += 1.0
    if target == "away":
        direction = -direction
    line = problem.line(point, direction)
    for step in (0.5, 0.0, 1.0, 0.25):
        assert line.value(step) == pytest.approx(other.value(point + step * direction), rel=1e-5)
    line.accept(0.25)
    accepted = point + 0.25 * direction
    before = problem.counts.combines
    weights = problem.weights(accepted)
    assert problem.counts.combines == before  # the line left the weights behind
    for k, w in other.weights(accepted).items():
        torch.testing.assert_close(weights[k], w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["streaming", "resident"])
def test_the_slope_of_a_line_is_its_derivative_and_reads_nothing(backend, merge):
    problem, other = merge("row", "free", backend=backend), merge("row", "free", backend=backend)
    point, direction = np.random.default_rng(4).normal(size=(2, problem.rows, problem.n))
    line = problem.line(point, direction)
    read = problem.counts.bytes_read
    for step in (0.5, 0.0, 1.0):
        expected = np.sum(other.evaluate(point + step * direction).scores * direction)
        assert line.slope(step) == pytest.approx(expected, rel=1e-4)
        losses, slopes = line.task_slopes(step)
        assert losses == pytest.approx(line.task_values(step), rel=1e-6)
        assert problem.task_weights @ slopes == pytest.approx(expected, rel=1e-4)
    assert (problem.counts.bytes_read, problem.counts.correlates, problem.counts.gradients) == (read, 0, 6)


def test_an_away_step_reads_the_vertex_that_it_leaves(merge):
    problem = merge("model", "simplex", backend="streaming")
    point = np.full((1, 5), 0.2)
    problem.weights(point)
    model = 4 * sum(int(np.prod(shape)) for shape in problem.pool.tensors.values())
    before = problem.counts.bytes_read
    problem.line(point, point - np.eye(5)[:1])
    assert problem.counts.bytes_read - before <= 2 * model  # the base and one expert


def test_refresh_makes_the_value_a_function_of_the_point_alone(merge):
    rng = np.random.default_rng(3)
    walked, fresh = merge("row", "free"), merge("row", "free")
    for _ in range(20):
        point = rng.normal(size=(walked.rows, walked.n))
        walked.value(point)
    walked.refresh()
    assert walked.evaluate(point).value == fresh.evaluate(point).value
    np.testing.assert_array_equal(walked.evaluate(point).scores, fresh.evaluate(point).scores)


def test_counts_hold_the_documented_cost_of_an_iteration(merge):
    problem = merge("layer", "capped")
    solve(problem, {"name": "frank-wolfe", "step_rule": {"name": "fixed", "step": 0.1}}, max_iter=5, tol=0)
    counts = problem.counts
    assert counts.gradients == counts.correlates == 5 + 1 + 1  # one an iterate, and the certificate
    assert counts.evaluations == 0


def test_domains_and_blocks_by_name(merge, states):
    problem = merge("layer", "simplex")
    again = Problem(problem.pool, problem.objective, problem.blocks, problem.domain)
    assert again.rows == problem.rows
    patterns = Problem(problem.pool, problem.objective, [r"layers\.", "head"], "simplex")
    assert patterns.rows == 2
    with pytest.raises(OptionError, match="Unknown domain 'hull'"):
        Problem(problem.pool, problem.objective, "layer", "hull")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("base", r"outside the domain 'simplex' at block 'head'|outside the domain 'simplex'"),
        ("task-arithmetic:0.3", "sum to 1.5"),
        ("task-arithmetic:x", "needs a number after the colon"),
        ("expert:e9", "Unknown expert 'e9'. Did you mean"),
        ("middle", "Unknown starting point 'middle'"),
        (np.zeros((2, 2)), r"has shape \[2, 2\]"),
        (np.full((3, 5), np.nan), "NaN"),
    ],
)
def test_bad_starting_points_are_explained(start, message, merge):
    with pytest.raises(OptionError, match=message):
        solve(merge("layer", "simplex"), "frank-wolfe", start=start)


def test_a_result_of_another_pool_is_refused(merge):
    result = solve(merge(order=["e0", "e1"]), "point", max_iter=0)
    with pytest.raises(OptionError, match="solved over the experts e0, e1"):
        solve(merge(), "frank-wolfe", start=result)


def test_a_task_wise_result_starts_a_layer_wise_solve(merge):
    coarse = solve(merge("model"), "projected-gradient", max_iter=30, tol=0)
    fine = solve(merge("layer"), "projected-gradient", start=coarse, max_iter=0)
    assert fine.objective == pytest.approx(coarse.objective, rel=1e-6)


@pytest.mark.parametrize("blocks", ["model", "layer"])
def test_task_values_are_those_of_the_evaluation_at_the_cost_of_one_value(blocks, merge):
    problem = merge(blocks)
    point = np.full((problem.rows, problem.n), 0.1)
    direction = np.linspace(-0.05, 0.1, problem.n) * np.ones((problem.rows, 1))
    found = problem.task_values(point)
    assert found == pytest.approx(problem.evaluate(point).task_values, rel=1e-6)
    assert list(found) == list(problem.tasks)
    assert (problem.counts.evaluations, problem.counts.gradients) == (1, 1)
    line = problem.line(point, direction)
    assert line.task_values(0.5) == pytest.approx(problem.task_values(point + 0.5 * direction), rel=1e-5)
