"""What a record says of its visit."""

import itertools

import numpy as np
import pytest
from mergesolve.solvers import FunctionProblem, solve


@pytest.mark.parametrize("blocks", ["layer", "row"])
def test_scores_are_those_of_the_iterate_averaged_over_the_rows_of_each_layer(merge, blocks):
    problem = merge(blocks)
    seen = []
    original = problem.evaluate
    problem.evaluate = lambda point, **options: seen.append(original(point, **options)) or seen[-1]
    result = solve(problem, "frank-wolfe", max_iter=4, tol=0)
    for line, evaluation in zip(result.trace, seen, strict=False):
        expected = [evaluation.scores[rows].mean(axis=0) for rows in problem.layers.values()]
        np.testing.assert_allclose(line["scores"], expected, rtol=1e-6)


def test_samples_and_parts_add_up_over_resumed_parts(merge, tmp_path):
    """The objective counts one sample a gradient, so that the two counters agree however often a solve was stopped."""
    for limit in (3, 5, 9):
        trace = solve(merge(), "frank-wolfe", max_iter=limit, tol=0, run=tmp_path, resume=True).trace
    assert len(trace) == 10
    assert [line["samples"] for line in trace] == [line["gradients"] for line in trace]
    for before, after in itertools.pairwise(trace):
        assert all(after["parts"][part] >= spent > 0 for part, spent in before["parts"].items())
    assert all(sum(line["parts"].values()) <= line["seconds"] for line in trace)


def test_a_function_has_no_samples_and_no_parts():
    problem = FunctionProblem(lambda point: (float(np.sum(point**2)), 2 * point), 2, 3)
    for line in solve(problem, "frank-wolfe", max_iter=2, tol=0).trace:
        assert line["samples"] is None
        assert line["parts"] == {}
