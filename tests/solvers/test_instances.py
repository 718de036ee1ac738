"""The test problems are what they claim to be, by an independent oracle."""

import re
from pathlib import Path

import cvxpy as cp
import numpy as np
import pytest
from mergesolve.solvers import SOLVERS
from mergesolve.solvers.instances import INSTANCES, PROPERTIES

LINKS = {
    "square": lambda z: 0.5 * cp.sum_squares(z),
    "logistic": lambda z: cp.sum(cp.logistic(z)),
    "log-sum-exp": cp.log_sum_exp,
    "quartic": lambda z: 0.25 * cp.sum(cp.power(z, 4)),
}
CONSTRAINTS = {
    "simplex": lambda domain, point: [point >= 0, cp.sum(point, axis=1) == 1],
    "capped": lambda domain, point: [point >= 0, cp.sum(point, axis=1) <= 1],
    "box": lambda domain, point: [point >= domain.lower, point <= domain.upper],
    "l1-ball": lambda domain, point: [cp.norm1(point[row, :]) <= domain.radius for row in range(point.shape[0])],
    "polytope": lambda domain, point: [point >= 0, point <= 0.4, cp.sum(point, axis=1) == 1],
    "free": lambda domain, point: [],
}


def interior_point(instance):
    """The least value that Clarabel finds."""
    point = cp.Variable(instance.shape)
    function = instance.function
    design = function.design.reshape(len(function.design), -1)
    outputs = design @ cp.vec(point, order="C") - function.offset
    value = LINKS[function.link](outputs) - cp.sum(cp.multiply(function.tilt, point))
    if function.ridge:
        value += 0.5 * function.ridge * cp.sum_squares(point)
    problem = cp.Problem(cp.Minimize(value), CONSTRAINTS[instance.domain.name](instance.domain, point))
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return float(problem.value)


@pytest.fixture(params=INSTANCES.values(), ids=lambda instance: instance.name)
def instance(request):
    return request.param


def test_the_value_is_the_least_that_an_interior_point_method_finds(instance):
    assert instance.value == pytest.approx(interior_point(instance), abs=1e-7 * max(1, instance.smoothness))


def test_every_minimizer_is_feasible_and_has_the_value_and_the_scores(instance):
    for point in instance.minimizers:
        value, scores = instance.function(point)
        assert instance.domain.violation(point).max() <= 1e-14
        assert value == pytest.approx(instance.value, abs=1e-13 * instance.smoothness)
        np.testing.assert_allclose(scores, instance.multipliers, atol=1e-13 * instance.smoothness)


def test_no_point_of_the_domain_scores_better_than_the_minimizer(instance):
    """⟨S*, Λ* − V⟩ ≤ 0 for all V: the optimality condition, with the linear oracle as the judge."""
    if instance.domain.name == "free":
        np.testing.assert_array_equal(instance.multipliers, 0)
    else:
        assert instance.domain.gap(instance.minimizer, instance.multipliers) <= 1e-13


def test_scores_are_the_derivative_of_the_value(instance):
    rng = np.random.default_rng(1)
    point, direction = instance.start, rng.normal(size=instance.shape)
    ends = [instance.function(point + h * direction)[0] for h in (1e-5, -1e-5)]
    slope = np.sum(instance.function(point)[1] * direction)
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-5, abs=1e-6 * instance.smoothness)


def test_moduli_bound_the_curvature_between_feasible_points(instance):
    rng = np.random.default_rng(2)
    for _ in range(20):
        here, there = (instance.domain.project(rng.normal(size=instance.shape)) for _ in range(2))
        change, squared = instance.function(here)[1] - instance.function(there)[1], np.sum((here - there) ** 2)
        assert np.sum(change * (here - there)) >= instance.modulus * squared - 1e-12
        assert np.linalg.norm(change) <= instance.smoothness * np.sqrt(squared) + 1e-12


def test_properties_are_true(instance):
    claims, point, multipliers = instance.properties, instance.minimizer, instance.multipliers
    assert claims <= set(PROPERTIES)
    rows, n = instance.shape
    hull = instance.domain.has_vertices
    if hull:
        base = instance.domain.has_base and bool((point.sum(axis=1) < 1 - 1e-9).all())
        assert ("base" in claims) == base
        support = (point > 0).sum(axis=1) + base
        sizes = {"vertex": 1, "edge": 2, "interior": n + instance.domain.has_base}
        for place, size in sizes.items():
            if place in claims:
                assert (support == size).all()
        if "face" in claims:
            assert ((support > 1) & (support < sizes["interior"])).all()
        level = np.where(base, 0, multipliers.min(axis=1))
        idle = (np.abs(multipliers - level[:, None]) < 1e-12) & (point == 0)
        assert ("degenerate" in claims) == (idle.any() and len(instance.minimizers) == 1)
    elif instance.domain.name == "box":
        inside = (point > instance.domain.lower) & (point < instance.domain.upper)
        assert (inside == (multipliers == 0)).all()
        places = {0: "vertex", rows * n: "interior"}
        assert places.get(int(inside.sum()), "face") in claims
    elif instance.domain.name == "l1-ball":
        support, full = (point != 0).sum(axis=1), np.abs(point).sum(axis=1) > instance.domain.radius - 1e-9
        assert ("vertex" in claims) == bool((full & (support == 1)).all())
        assert ("face" in claims) == bool((full & (support > 1)).all())
        assert ("interior" in claims) == (not full.any())
    assert ("product" in claims) == (rows > 1)
    assert ("large" in claims) == (rows >= 40 or n >= 100)
    assert ("single" in claims) == (n == 1)
    assert ("many solutions" in claims) == (len(instance.minimizers) > 1)
    assert ("strongly convex" in claims) == (instance.modulus > 0.04)
    if "ill-conditioned" in claims:
        assert instance.smoothness / instance.modulus == pytest.approx(1e4)
    if "scaled" in claims:
        blocks = [np.abs(np.diff(row)).max() for row in instance.function(instance.start)[1]]
        assert max(blocks) > 1e3 * min(blocks)


def test_together_they_have_every_property():
    assert set().union(*(instance.properties for instance in INSTANCES.values())) == set(PROPERTIES)


def test_the_optimum_of_a_coupled_block_depends_on_the_others():
    for instance in INSTANCES.values():
        if "coupled" in instance.properties:
            moved = instance.start.copy()
            moved[1:] = instance.minimizer[1:]
            assert np.abs(instance.function(moved)[1][0] - instance.function(instance.start)[1][0]).max() > 1e-4


def section(name):
    """The cells of the table between two marks of the page, row by row."""
    page = (Path(__file__).parents[2] / "docs" / "test-problems.md").read_text(encoding="utf-8")
    body = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", page, re.DOTALL)[1]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in body.splitlines()]


@pytest.mark.parametrize("table", ["linear", "sublinear", "none", "values"])
def test_the_page_has_every_solver_on_every_problem(table):
    """If this fails, run `python benchmarks/test_problems.py --write`."""
    head, _, *rows = section(table)
    promise, scores = ("none", False) if table == "values" else (table, True)
    running = {name: cls for name, cls in SOLVERS.items() if not name.startswith("released")}
    assert head[1:] == [name for name, cls in running.items() if (cls.promise, cls.needs_scores) == (promise, scores)]
    assert [row[0] for row in rows] == list(INSTANCES) == [row[0] for row in section("problems")[2:]]
    assert [row[0] for row in section("summary")[2:]] == list(running)
