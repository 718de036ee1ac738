import itertools

import numpy as np
import pytest
from mergesolve.solvers import Capped, Clock, OptionError, Restriction, Simplex, SoftFrankWolfe, solve
from mergesolve.solvers.soft_frank_wolfe import best_per_table, diverse


@pytest.mark.parametrize("shared", [True, False])
def test_restriction_has_the_gradient_of_its_value(shared, face):
    quadratic, _ = face
    parent = quadratic.problem("capped")
    rng = np.random.default_rng(0)
    point = Capped().project(rng.normal(size=quadratic.c.shape))
    vertices = rng.dirichlet(np.ones(quadratic.c.shape[1]), size=(3, len(point)))
    inner = Restriction(parent, point, vertices, Capped(), shared=shared)
    weights = rng.dirichlet(np.ones(4), size=inner.rows)[:, :3]
    scores = inner.evaluate(weights).scores
    numeric = np.zeros_like(weights)
    for index in np.ndindex(weights.shape):
        up, down = weights.copy(), weights.copy()
        up[index] += 1e-6
        down[index] -= 1e-6
        numeric[index] = (inner.value(up) - inner.value(down)) / 2e-6
    np.testing.assert_allclose(scores, numeric, atol=1e-6)


def test_restriction_reads_only_the_experts_that_matter(merge):
    problem = merge("layer", "capped", backend="streaming")
    point = np.zeros((problem.rows, problem.n))
    vertices = np.zeros((1, problem.rows, problem.n))
    vertices[0, :, 2] = 1.0
    inner = Restriction(problem, point, vertices, Capped(), shared=True)
    problem.evaluate(point)
    before = problem.counts.bytes_read
    inner.evaluate(np.zeros((1, 1)))
    model = 4 * sum(int(np.prod(shape)) for shape in problem.pool.tensors.values())
    assert problem.counts.bytes_read - before == 2 * model  # the base and expert 2


def test_the_iterate_stays_a_vertex_of_the_inner_problem(face):
    """Nothing improves on the optimum, so a step from it must stay there; with Σw = 1 it could not."""
    quadratic, x = face

    def after_one_step(solver):
        problem = quadratic.problem("simplex")
        return solver.step(problem, solver.init(problem, x), problem.evaluate(x), Clock(0, 1)).state.coefficients

    np.testing.assert_allclose(after_one_step(SoftFrankWolfe(vertices=2)), x, atol=1e-8)
    forgotten = after_one_step(SoftFrankWolfe(vertices=2, inner_domain="simplex"))
    assert quadratic(forgotten)[0] > quadratic(x)[0] + 1e-4


def test_with_all_vertices_one_iteration_solves_the_problem(face):
    quadratic, _ = face
    solver = SoftFrankWolfe(vertices=quadratic.c.shape[1], inner_iterations=400, oracle="layer-wise")
    result = solve(quadratic.problem("simplex"), solver, max_iter=1, tol=0)
    assert result.objective - quadratic.optimum("simplex") < 1e-8


def test_never_worse_than_the_hard_oracle_after_one_step(face):
    quadratic, _ = face
    hard = solve(quadratic.problem("simplex"), "frank-wolfe", max_iter=1, tol=0)
    solver = SoftFrankWolfe(vertices=1, oracle="layer-wise", weights="shared", inner_iterations=100)
    soft = solve(quadratic.problem("simplex"), solver, max_iter=1, tol=0)
    assert soft.objective <= hard.objective + 1e-9


def test_each_task_gets_its_best_expert(merge):
    problem = merge("layer", "capped")
    scores = merge("layer", "capped").evaluate(np.zeros((problem.rows, 5)), tasks=True).task_scores
    result = solve(problem, SoftFrankWolfe(inner_iterations=1), start="base", max_iter=1, tol=0)
    expected = {f"e{i}" for i in scores.sum(axis=1).argmin(axis=1)}
    assert set(result.trace[0]["vertices"]) == expected


def test_task_scores_add_up_to_the_scores(merge):
    evaluation = merge("tensor").evaluate(np.full((4, 5), 0.1), tasks=True)
    plain = merge("tensor").evaluate(np.full((4, 5), 0.1))
    np.testing.assert_allclose(evaluation.scores, plain.scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(0.5 * evaluation.task_scores.sum(axis=0), plain.scores, rtol=1e-4, atol=1e-5)


def test_distinct_vertices_follow_the_order_of_the_tasks():
    tables = np.array([[[-3.0, -2.0, -1.0]], [[-3.0, -1.0, -2.0]], [[-3.0, 1.0, 1.0]]])
    assert best_per_table(tables, Simplex(), distinct=False).ravel().tolist() == [0, 0, 0]
    assert best_per_table(tables, Simplex(), distinct=True).ravel().tolist() == [0, 2, 1]
    assert best_per_table(tables, Capped(), distinct=True).ravel().tolist() == [0, 2, -1]


def test_adaptive_inner_solver_draws_a_batch_for_each_inner_iteration(merge):
    problem = merge(stochastic=True)
    solver = SoftFrankWolfe(inner="adaptive", inner_iterations=4)
    solve(problem, solver, max_iter=2, tol=0)
    assert problem.objective.draws == [0, 0, 1, 2, 3, 4, 1, 4, 5, 6, 7, 8, 2, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vertices": 0}, "'vertices' parameter"),
        ({"vertices": "all"}, "'per-task' or an integer"),
        ({"oracle": "model"}, "'oracle' parameter"),
        ({"oracle": "diverse"}, "needs a number"),
        ({"weights": "x"}, "'weights' parameter"),
        ({"inner": "frank-wolfe"}, "'inner' parameter"),
        ({"inner_iterations": 0}, "'inner_iterations' parameter"),
    ],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(OptionError, match=message):
        SoftFrankWolfe(**options)


def test_more_vertices_than_experts_are_refused(merge):
    with pytest.raises(OptionError, match="offers 5"):
        solve(merge(domain="simplex"), SoftFrankWolfe(vertices=6))
    with pytest.raises(OptionError, match="'simplex' or 'capped'"):
        solve(merge(domain="box"), SoftFrankWolfe())


def test_an_inner_domain_that_leaves_the_hull_is_refused(merge):
    for domain in ("free", "box"):
        with pytest.raises(OptionError, match="would leave the hull"):
            solve(merge(domain="capped"), SoftFrankWolfe(inner_domain=domain))


def test_diverse_vertices_are_good_and_no_copies():
    scores = np.array([-1.0, -0.99, -0.5, 0.3, -0.4])
    similarity = np.eye(5)
    similarity[0, 1] = similarity[1, 0] = 1.0
    assert diverse(scores, similarity, 3).tolist() == [0, 2, 4]
    assert diverse(scores, np.eye(5), 3).tolist() == [0, 1, 2]
    assert set(diverse(scores, similarity, 5).tolist()) == {0, 2, 4}  # no copy, and none along which the loss rises
    assert diverse(-scores, similarity, 1).tolist() == [3]
    assert diverse(np.array([2.0, 1.0, 3.0]), np.eye(3), 2).tolist() == [1]


def test_diverse_vertices_come_from_the_pool(merge):
    problem = merge("layer", "capped")
    vectors = problem.pool.gram(problem.pool.blocks("model"))[0]
    norms = np.sqrt(np.diagonal(vectors))
    np.testing.assert_allclose(problem.similarity, vectors / np.outer(norms, norms), atol=1e-12)
    result = solve(problem, SoftFrankWolfe(vertices=2, oracle="diverse"), start="base", max_iter=3, tol=0)
    values = [record["value"] for record in result.trace]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values))
    assert values[-1] < values[0]
