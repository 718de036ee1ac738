import itertools
import json
import math

import numpy as np
import pytest
from mergesolve.solvers import MGDA, OptionError
from mergesolve.solvers.pareto import (
    Front,
    Plan,
    das_dennis,
    hypervolume,
    nondominated,
    pareto_front,
    path,
    preference_grid,
    surrogate_front,
)


def test_das_dennis_has_every_multiple_once():
    for tasks, divisions in ((2, 5), (3, 4), (4, 3)):
        grid = das_dennis(tasks, divisions)
        every = {p for p in itertools.product(range(divisions + 1), repeat=tasks) if sum(p) == divisions}
        assert {tuple(row) for row in np.rint(grid * divisions).astype(int)} == every
        assert len(grid) == len(every) == math.comb(divisions + tasks - 1, tasks - 1)
    assert len(preference_grid(None, 3)) == 15
    np.testing.assert_allclose(preference_grid([[2, 2]], 2), [[0.5, 0.5]])


def test_the_path_visits_each_preference_once_in_short_steps():
    grid = das_dennis(2, 10)
    order = path(grid)
    assert sorted(map(tuple, order)) == sorted(map(tuple, grid))
    assert sorted(np.abs(np.diff(order, axis=0)).sum(axis=1))[:9] == pytest.approx([0.2] * 9)


def test_dominated_points_are_those_that_another_beats():
    rng = np.random.default_rng(0)
    losses = np.round(rng.uniform(size=(30, 3)), 1)
    found = nondominated(losses)
    for k, row in enumerate(losses):
        beaten = any((other <= row).all() and (other < row).any() for other in losses)
        assert found[k] == (not beaten)


def brute_volume(losses, reference):
    """The union of boxes [loss, reference], by cutting space at every coordinate."""
    cuts = [np.unique(np.append(losses[:, t], reference[t])) for t in range(len(reference))]
    total = 0.0
    for cell in itertools.product(*(range(len(c) - 1) for c in cuts)):
        low = np.array([c[k] for c, k in zip(cuts, cell, strict=True)])
        high = np.array([c[k + 1] for c, k in zip(cuts, cell, strict=True)])
        if (high <= reference).all() and (losses <= low).all(axis=1).any():
            total += float(np.prod(high - low))
    return total


@pytest.mark.parametrize("tasks", [1, 2, 3, 4])
def test_hypervolume_is_that_of_the_union_of_boxes(tasks):
    rng = np.random.default_rng(tasks)
    for count in (1, 2, 6):
        losses = np.vstack([rng.uniform(size=(count, tasks)), np.full((1, tasks), 0.8)])
        losses[-1, 0] = 2.0  # outside
        volume, error = hypervolume(losses, np.ones(tasks))
        assert error == 0.0
        assert volume == pytest.approx(brute_volume(losses[:-1], np.ones(tasks)), rel=1e-12)
    assert hypervolume(np.ones((2, tasks)), np.ones(tasks)) == (0.0, 0.0)


def test_a_sampled_hypervolume_is_within_its_stated_error():
    losses = np.random.default_rng(0).uniform(size=(8, 3))
    exact, _ = hypervolume(losses, np.ones(3))
    sampled, error = hypervolume(losses, np.ones(3), exact=2, seed=3)
    assert 0 < error < 0.01 * exact
    assert abs(sampled - exact) <= 4 * error
    assert hypervolume(losses, np.ones(3), exact=2, seed=3) == (sampled, error)


@pytest.mark.parametrize("method", ["chebyshev", "weighted-sum"])
def test_every_point_of_the_front_of_a_convex_problem_is_pareto_optimal(method, many, tmp_path):
    problem = many(3, 2, rows=1)
    plan = Plan(method=method, max_iter=300, tol=1e-7)
    front = pareto_front(problem, 4, plan, run=tmp_path)
    assert len(front.preferences) == 5
    assert front.nondominated.all()
    for point, preference in zip(front.coefficients, front.preferences, strict=True):
        found = problem.evaluate(point, tasks=True)
        if preference.min() > 0:
            assert MGDA().certificate(problem, point, found).gap <= 1e-4
    order = np.argsort(front.preferences[:, 0])
    assert (np.diff(front.losses[order, 0]) < 0).all()
    assert (np.diff(front.losses[order, 1]) > 0).all()
    np.testing.assert_allclose(front.ideal, front.losses.min(axis=0), atol=1e-6)
    assert front.hypervolume == pytest.approx(brute_volume(front.losses, front.reference))
    loaded = Front.load(tmp_path)
    np.testing.assert_array_equal(loaded.losses, front.losses)
    np.testing.assert_array_equal(loaded.coefficients, front.coefficients)
    assert loaded.records == front.records
    rows = (tmp_path / "front.csv").read_text().splitlines()
    assert rows[0].startswith("name,preference task0,preference task1,loss task0")
    assert len(rows) == 6


def test_a_killed_front_keeps_the_preferences_that_are_done(many, tmp_path):
    plan = Plan(max_iter=20, tol=1e-6)
    whole = pareto_front(many(3, 2, rows=1), 4, plan, run=tmp_path / "whole")

    def die(done, total, name):
        if done == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        pareto_front(many(3, 2, rows=1), 4, plan, run=tmp_path / "killed", progress=die)
    assert not (tmp_path / "killed/front.json").exists()
    problem = many(3, 2, rows=1)
    resumed = pareto_front(problem, 4, plan, run=tmp_path / "killed", resume=True)
    np.testing.assert_array_equal(resumed.coefficients, whole.coefficients)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    assert 0 < problem.counts.gradients < sum(record["nit"] for record in whole.records)
    with pytest.raises(OptionError, match="was solved for another problem"):
        pareto_front(problem, 4, Plan(max_iter=20, smoothing=0.5), run=tmp_path / "killed", resume=True)


def test_the_front_of_a_surrogate_is_the_front_where_losses_are_quadratic(many, tmp_path):
    problem = many(3, 2, rows=1)
    true = pareto_front(problem, 4, Plan(max_iter=400, tol=1e-8))
    front, model = surrogate_front(many(3, 2, rows=1), 4, run=tmp_path)
    np.testing.assert_allclose(front.losses, true.losses, atol=1e-5)
    np.testing.assert_allclose(front.predicted, front.losses, atol=1e-7)
    assert min(model.r2.values()) > 0.999999
    loaded = Front.load(tmp_path)
    np.testing.assert_array_equal(loaded.predicted, front.predicted)
    assert loaded.about["surrogate"]["samples"] == model.samples


def test_preferences_and_references_that_do_not_fit_are_named(many):
    problem = many(0, 2, rows=1)
    before = problem.counts.gradients
    for preferences, match in (
        (0, "at least 1 division"),
        ([[1, 1, 1]], r"\[K, 2\]"),
        ([[0, 0]], "no row of them all 0"),
        ([[-1, 2]], "not negative"),
    ):
        with pytest.raises(OptionError, match=match):
            pareto_front(problem, preferences)
    with pytest.raises(OptionError, match="no task"):
        pareto_front(problem, 1, Plan(max_iter=1), reference={"other": 1.0})
    with pytest.raises(OptionError, match=r"finite loss for each task\. Got inf for 'task0'"):
        pareto_front(problem, 1, Plan(max_iter=1), reference={"task0": np.inf})
    for reference in ({"other": 1.0}, {"task1": np.nan}):
        with pytest.raises(OptionError, match="reference"):
            surrogate_front(problem, 1, reference=reference)
    with pytest.raises(OptionError, match="matrix"):
        surrogate_front(problem, [[1.0]])
    assert problem.counts.gradients == before
    with pytest.raises(OptionError, match="needs run=FOLDER"):
        pareto_front(problem, resume=True)
    with pytest.raises(OptionError, match="holds no front"):
        Front.load("nowhere")
    assert json.dumps(Plan().solver.describe())
