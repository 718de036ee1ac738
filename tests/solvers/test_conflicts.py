import itertools

import numpy as np
import pytest
from mergesolve.solvers.conflicts import System, elastic, find
from scipy.optimize import linprog
from scipy.sparse import csr_matrix


def system(rows, low, high, sources=None):
    """Rows over the simplex of as many coefficients as they have columns."""
    rows = np.asarray(rows, dtype=float)
    n = rows.shape[1]
    sources = np.arange(len(rows)) if sources is None else np.asarray(sources)
    return System(
        csr_matrix(rows), np.asarray(low, dtype=float), np.asarray(high, dtype=float), sources,
        csr_matrix(np.ones((1, n))), np.ones(1), csr_matrix(-np.eye(n)), np.zeros(n),
    )  # fmt: skip


def feasible(rows, low, high):
    """By linear programming of its own: a point of the simplex with low ≤ rows x ≤ high."""
    rows = np.asarray(rows)
    upper, lower = np.isfinite(high), np.isfinite(low)
    matrix, right = np.vstack([rows[upper], -rows[lower]]), np.append(high[upper], -low[lower])
    n = rows.shape[1]
    found = linprog(np.zeros(n), matrix, right, np.ones((1, n)), [1.0], bounds=(0, None))
    return found.status == 0


@pytest.mark.parametrize("seed", range(12))
def test_a_conflict_is_infeasible_and_minimal(seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-1, 3, (6, 4)).astype(float)
    rows[~rows.any(axis=1), 0] = 1.0
    target = rng.uniform(-0.3, 1.3, 6)
    below = rng.random(6) < 0.5
    low, high = np.where(below, -np.inf, target), np.where(below, target, np.inf)
    conflict = find(system(rows, low, high))
    if conflict is None:
        assert feasible(rows, low, high)
        return
    chosen = list(conflict.sources)
    assert not feasible(rows[chosen], low[chosen], high[chosen])
    for left_out in chosen:
        rest = [source for source in chosen if source != left_out]
        assert not rest or feasible(rows[rest], low[rest], high[rest])


def test_some_random_systems_conflict_and_some_do_not():
    """The test above is about both."""
    found = []
    for seed, shift in itertools.product(range(4), (-0.4, 0.8)):
        rows = np.random.default_rng(seed).integers(0, 3, (3, 4)).astype(float)
        rows[~rows.any(axis=1), 0] = 1.0
        found.append(find(system(rows, np.full(3, -np.inf), np.full(3, shift))) is None)
    assert 0 < sum(found) < len(found)


def test_the_contradiction_adds_up():
    """x0 ≥ 0.7 and x1 ≥ 0.5: x0 + x1 ≥ 1.2, of which the simplex allows 1."""
    conflict = find(system([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [0.7, 0.5, 0], [np.inf, np.inf, 0.9]))
    assert conflict is not None
    assert conflict.sources == (0, 1)
    assert conflict.domain
    assert conflict.miss == pytest.approx(0.2)
    np.testing.assert_allclose(conflict.weights, [-1, -1, 0], atol=1e-9)
    assert (conflict.limit, conflict.least) == (pytest.approx(-1.2), pytest.approx(-1.0))


def test_constraints_that_contradict_each_other_need_no_domain():
    conflict = find(system([[1, 0], [1, 0]], [0.5, -np.inf], [np.inf, 0.3]))
    assert conflict is not None
    assert not conflict.domain
    np.testing.assert_allclose(conflict.weights, 0, atol=1e-9)
    assert conflict.miss == pytest.approx(0.2)


def test_rows_of_one_constraint_stand_or_fall_together():
    assert find(system([[1, 0], [0, 1]], [0.6, 0.6], [np.inf, np.inf], sources=[3, 3])).sources == (3,)


def test_the_elastic_value_is_the_least_relaxation():
    made = system([[1, 0], [0, 1]], [0.9, 0.4], [np.inf, np.inf])
    value, _, _ = elastic(made, [0, 1], domain=True)
    assert value == pytest.approx(0.3)
    assert elastic(made, [0], domain=True)[0] == pytest.approx(0.0, abs=1e-12)
