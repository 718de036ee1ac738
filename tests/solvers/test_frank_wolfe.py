import itertools

import numpy as np
import pytest
from mergesolve.solvers import FrankWolfe, OptionError, solve


@pytest.mark.parametrize("domain", ["simplex", "capped", "box"])
def test_reaches_the_optimum_at_the_rate_of_the_vanilla_method(domain, located):
    quadratic, _ = located
    best = quadratic.optimum(domain)
    smoothness = float(np.linalg.norm(quadratic.q, 2, axis=(1, 2)).max())
    diameter2 = {"simplex": 2, "capped": 2, "box": quadratic.c.shape[1]}[domain] * len(quadratic.c)
    start = "average" if domain != "box" else "base"
    result = solve(quadratic.problem(domain), FrankWolfe(), start=start, max_iter=400, tol=1e-9)
    for line in result.trace[1:]:
        assert line["value"] - best <= 2 * smoothness * diameter2 / (line["iteration"] + 2) + 1e-9
    assert result.objective - best < 1e-2


def test_line_search_descends_monotonically(face):
    quadratic, _ = face
    values = [line["value"] for line in solve(quadratic.problem("simplex"), "frank-wolfe", max_iter=100).trace]
    assert all(after <= before for before, after in itertools.pairwise(values))


def test_each_step_is_toward_one_expert_a_block(merge):
    problem = merge("layer", "simplex")
    result = solve(problem, FrankWolfe(step_rule={"name": "open-loop"}), max_iter=1, tol=0)
    assert result.trace[0]["step"] == 1.0  # 2/(0 + 2): the first step forgets the start
    evaluation = merge("layer", "simplex").evaluate(np.full((problem.rows, 5), 0.2))
    chosen = result.trace[1]["coefficients"]
    np.testing.assert_array_equal(np.argmax(chosen, axis=1), np.argmin(evaluation.scores, axis=1))
    np.testing.assert_array_equal(np.sort(chosen, axis=1)[:, :-1], 0)


def test_layer_wise_optimum_is_at_most_the_task_wise_one(merge):
    optima = {
        blocks: solve(merge(blocks, "capped"), "projected-gradient", max_iter=500, tol=1e-5)
        for blocks in ("model", "layer", "tensor", "row")
    }
    assert all(result.gap < 1e-3 for result in optima.values())
    values = [result.objective for result in optima.values()]
    assert all(finer <= coarser + 1e-4 for coarser, finer in itertools.pairwise(values))
    assert values[-1] < values[0] - 1e-3


def test_layer_wise_gap_is_at_least_the_task_wise_gap_at_the_same_point(merge):
    gaps = [solve(merge(blocks), "point", start="average", max_iter=0).gap for blocks in ("model", "layer", "row")]
    assert gaps[0] <= gaps[1] + 1e-9 <= gaps[2] + 2e-9


def test_the_free_domain_is_refused(merge):
    with pytest.raises(OptionError, match="unbounded"):
        solve(merge(domain="free"), "frank-wolfe")


def test_an_iteration_reads_every_expert_once_for_the_scores_and_one_for_the_step(merge):
    problem = merge("model", "simplex", backend="streaming")
    problem.blocks  # noqa: B018 (opening has compared the tensors already)
    model = 4 * sum(int(np.prod(shape)) for shape in problem.pool.tensors.values())
    result = solve(problem, "frank-wolfe", start="expert:e0", max_iter=2, tol=0, checkpoint_every=100)
    first, second, _ = (line["bytes_read"] for line in result.trace)
    # correlate: base and 5 experts; the step: base and at most two experts
    assert second - first <= model * (6 + 3)
