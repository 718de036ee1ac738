import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mergesolve.solvers import OptionError, Sparse, constrain, make_domain, solve

from .conftest import make_quadratic

matrices = arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 6)), elements=st.floats(-3, 3))


@given(point=matrices, count=st.integers(1, 4), base=st.sampled_from(["simplex", "capped"]))
def test_projection_is_the_best_over_all_supports(point, count, base):
    domain = Sparse(count, base)
    projected = domain.project(point)
    assert domain.violation(projected).max() <= 1e-12
    assert np.count_nonzero(projected, axis=1).max() <= count
    for row, found in zip(point, projected, strict=True):
        distances = []
        for support in itertools.combinations(range(len(row)), min(count, len(row))):
            candidate = np.zeros_like(row)
            candidate[list(support)] = domain.domain.project(row[None, list(support)])[0]
            distances.append(np.linalg.norm(candidate - row))
        assert np.linalg.norm(found - row) <= min(distances) + 1e-12


def test_violation_is_the_entry_that_is_one_too_many():
    point = np.array([[0.5, 0.3, 0.2, 0.0], [1.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(Sparse(2).violation(point), [0.2, 0.0])
    np.testing.assert_allclose(Sparse(3).violation(point), 0.0, atol=1e-15)


@pytest.mark.parametrize("base", ["simplex", "capped"])
def test_solvers_that_project_stay_within_the_budget(base):
    quadratic, _ = make_quadratic(2, n=8, where="interior")
    domain = constrain(base, ["count(*) <= 3"])
    for solver in ("projected-gradient", {"name": "adaptive", "lr": 0.05}):
        result = solve(quadratic.problem(domain), solver, start="nearest:average", max_iter=30, tol=0)
        assert np.count_nonzero(result.coefficients, axis=1).max() <= 3
        assert result.objective < result.trace[0]["value"]
        assert result.gap >= result.objective - quadratic.optimum(base) - 1e-8  # the gap is that of the hull


@pytest.mark.parametrize("solver", ["frank-wolfe", "soft-frank-wolfe"])
def test_solvers_that_move_along_segments_are_refused(solver):
    quadratic, _ = make_quadratic(2)
    with pytest.raises(OptionError):
        solve(quadratic.problem("sparse"), solver, start="nearest:average", max_iter=1)


def test_a_budget_is_made_of_its_text_and_survives_json():
    domain = constrain({"name": "capped"}, ["count(*) <= 2"])
    assert domain == Sparse(2, "capped")
    assert make_domain(json.loads(json.dumps(domain.describe()))) == domain


@pytest.mark.parametrize(
    ("options", "message"),
    [({"count": 0}, "'count' parameter of Sparse"), ({"domain": "box"}, "'simplex' and 'capped' only; got 'box'")],
)
def test_bad_budgets_are_explained(options, message):
    with pytest.raises(OptionError, match=message):
        make_domain({"name": "sparse", **options})
