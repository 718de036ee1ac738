import numpy as np
import pytest
import torch
from mergesolve.solvers import OptionError, ReleasedFrankWolfe, SoftFrankWolfe, solve
from mergesolve.solvers.released import raw_cosine_scores


def direct_cosines(gradient, states):
    """Σ over tensors of cos(gradient, raw checkpoint), straight from the state dicts in float64."""
    return [
        sum(
            float(torch.dot(gradient[k].double().ravel(), state[k].double().ravel()))
            / float(gradient[k].double().norm() * state[k].double().norm())
            for k in gradient
        )
        for state in states
    ]


def test_raw_cosines_equal_those_of_the_checkpoints_themselves(merge, states):
    base, experts, _ = states
    problem = merge("model", "free")
    point = np.full((1, 5), 0.3)
    evaluation = problem.evaluate(point, tasks=True, raw=True)
    gradients = problem.objective.value_and_grad(problem.weights(point), per_task=True).gradient
    candidates = np.concatenate([np.eye(5)[:, None, :], point[None]])
    found = raw_cosine_scores(problem, evaluation, candidates)
    mixed = {k: base[k] + sum(0.3 * (experts[e][k] - base[k]) for e in experts) for k in base}
    for row, gradient in zip(found, gradients, strict=True):
        np.testing.assert_allclose(row, direct_cosines(gradient, [*experts.values(), mixed]), atol=1e-5)


def test_hard_steps_follow_the_published_schedule(merge):
    result = solve(merge("model", "free"), "released-frank-wolfe", start="task-arithmetic:0.3", max_iter=4, tol=0)
    np.testing.assert_allclose(
        [line["step"] for line in result.trace[:-1]], [0.03 * 2 / (t + 2) for t in range(4)], rtol=1e-12
    )
    assert result.gap is None


def test_the_released_oracle_is_not_the_papers(merge):
    """Over random directions the raw-cosine score often names another expert than ⟨gradient, τ_i⟩ does."""
    rng = np.random.default_rng(0)
    different = 0
    for _ in range(40):
        problem = merge("model", "free")
        for name, target in problem.objective.targets.items():
            problem.objective.targets[name] = {
                k: t + torch.from_numpy(rng.normal(size=t.shape).astype(np.float32)) for k, t in target.items()
            }
        evaluation = problem.evaluate(np.zeros((1, 5)), raw=True)
        released = raw_cosine_scores(problem, evaluation, np.eye(5)[:, None, :])[0].argmin()
        different += released != evaluation.scores[0].argmin()
    assert 4 <= different <= 36


def test_soft_gives_each_task_another_expert_and_may_leave_the_hull(merge):
    solver = {"name": "released-soft-frank-wolfe", "inner_iterations": 30, "inner": {"name": "adaptive", "lr": 0.1}}
    result = solve(merge("tensor", "free"), solver, start="base", max_iter=2, tol=0)
    assert len(result.trace[0]["vertices"]) == 2
    paper = solve(merge("tensor", "capped"), SoftFrankWolfe(), start="base", max_iter=2, tol=0)
    assert not np.allclose(result.trace[2]["coefficients"], paper.trace[2]["coefficients"], atol=1e-2)


@pytest.mark.parametrize("name", ["released-frank-wolfe", "released-soft-frank-wolfe"])
def test_refused_where_they_make_no_sense(name, merge, face):
    with pytest.raises(OptionError, match="need the domain 'free'"):
        solve(merge(), name)
    with pytest.raises(OptionError, match="need a pool of models"):
        solve(face[0].problem("free"), name)


def test_another_schedule_can_be_given():
    assert ReleasedFrankWolfe(step_rule="line-search").step_rule.describe()["name"] == "line-search"
