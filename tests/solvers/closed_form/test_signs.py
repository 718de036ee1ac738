"""TIES, MagMax and EMR: identities, and what they do with zeros and ties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergesolve.pools import Pool
from mergesolve.solvers.closed_form import make_merge, merge_weights


def merged(pool, name, **options):
    return merge_weights(pool, make_merge({"name": name, **options}))


def vectors(*rows):
    """A pool whose base is 0 and whose task vectors are given."""
    base = {"w": torch.zeros(len(rows[0]))}
    return Pool.from_state_dicts(base, {f"e{i}": {"w": torch.tensor(row)} for i, row in enumerate(rows)})


@pytest.fixture
def disjoint(sampled):
    """A pool whose task vectors have disjoint supports."""
    base, experts = sampled("normal", 3, "float32")
    owners = {name: torch.randint(0, 3, value.shape, generator=torch.manual_seed(1)) for name, value in base.items()}
    parts = {
        name: {key: torch.where(owners[key] == i, value, base[key]) for key, value in state.items()}
        for i, (name, state) in enumerate(experts.items())
    }
    return Pool.from_state_dicts(base, parts)


@pytest.mark.parametrize("zero", ["drop", "plus", "majority"])
@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_disjoint_supports_are_added(disjoint, merge, zero):
    """Catalogue of properties, 9: TIES without trimming = MagMax = EMR = task arithmetic, all at scale 1."""
    wanted = merged(disjoint, "task-arithmetic", scale=1.0)
    found = [
        merged(disjoint, "ties", density=1.0, scale=1.0, merge=merge, zero=zero),
        merged(disjoint, "magmax", scale=1.0),
        merged(disjoint, "emr", scale=1.0),
    ]
    for weights in found:
        for name, value in wanted.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), [("ties", {"density": 1.0}), ("magmax", {}), ("emr", {})])
def test_one_expert_is_task_arithmetic(name, options, sampled):
    base, experts = sampled("grid", 1, "float32")
    pool = Pool.from_state_dicts(base, experts)
    found = merged(pool, name, scale=0.3, **options)
    for key, value in merged(pool, "task-arithmetic", scale=0.3).items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)


def test_equal_experts_are_one_expert(sampled):
    """The disjoint mean of n copies is the copy; their sum is n times it."""
    base, experts = sampled("normal", 1, "float32")
    one = Pool.from_state_dicts(base, experts)
    three = Pool.from_state_dicts(base, dict.fromkeys("xyz", experts["e0"]))
    for trim in ("model", "tensor"):
        alone = merged(one, "ties", trim=trim, scale=1.0)
        mean = merged(three, "ties", trim=trim, scale=1.0)
        total = merged(three, "ties", trim=trim, merge="sum", scale=1.0)
        for name, value in alone.items():
            torch.testing.assert_close(mean[name], value, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(total[name], base[name] + 3 * (value - base[name]), rtol=1e-6, atol=1e-5)


def test_totals_of_zero_follow_the_option():
    """Entries: +1 −1 0 cancel; +2 −1 does not; zeros never agree with anything."""
    pool = vectors([1.0, 2.0, 0.0, -3.0], [-1.0, -1.0, 0.5, -1.0], [0.0, 0.0, 0.0, 4.0])
    for zero, cancelled, balanced in [("drop", 0, 0), ("plus", 1, 4), ("majority", 1, 4)]:
        found = merged(pool, "ties", density=1.0, scale=1.0, zero=zero)["w"]
        np.testing.assert_allclose(found, [cancelled, 2, 0.5, balanced])
    mirrored = vectors([1.0, -2.0, 0.0, 3.0], [-1.0, 1.0, -0.5, 1.0], [0.0, 0.0, 0.0, -4.0])
    found = merged(mirrored, "ties", density=1.0, scale=1.0, zero="majority")["w"]
    np.testing.assert_allclose(found, [-1, -2, -0.5, -4])


def test_a_balance_of_signs_counts_as_negative():
    """As in the authors' code: where the majority is itself undecided, entries that cancel keep their negative part."""
    pool = vectors([1.0, 1.0, -1.0], [-1.0, 1.0, -2.0])
    np.testing.assert_allclose(merged(pool, "ties", density=1.0, scale=1.0, zero="majority")["w"], [-1, 1, -1.5])


def test_negative_weights_turn_an_expert_around():
    pool = vectors([1.0, -2.0, 4.0], [-1.0, 1.0, 1.0])
    found = merged(pool, "ties", density=1.0, scale=1.0, weights={"e1": -1.0}, merge="sum")["w"]
    np.testing.assert_allclose(found, [2, -3, 4])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-4, 4), min_size=6, max_size=6), min_size=1, max_size=5))
def test_every_merged_entry_is_within_the_experts_range(rows):
    """TIES' mean, MagMax and EMR never leave [min(0, τ), max(0, τ)], and MagMax and EMR are entries of experts or 0."""
    if not np.any(rows):
        return
    stack = np.array(rows, dtype=np.float64)
    pool = vectors(*(row.tolist() for row in stack.astype(np.float32)))
    low, high = np.minimum(stack.min(0), 0), np.maximum(stack.max(0), 0)
    for name, options in [("ties", {"density": 0.5}), ("magmax", {}), ("emr", {})]:
        found = merged(pool, name, scale=1.0, **options)["w"].numpy()
        assert ((found >= low - 1e-6) & (found <= high + 1e-6)).all()
        if name != "ties":
            assert all(value == 0 or value in stack[:, i] for i, value in enumerate(found))
    np.testing.assert_array_equal(np.abs(merged(pool, "magmax", scale=1.0)["w"].numpy()), np.abs(stack).max(0))


def test_magmax_of_opposite_entries_is_positive_in_any_order():
    for rows in ([2.0, -1.0], [-2.0, 1.0]), ([-2.0, 1.0], [2.0, -1.0]):
        np.testing.assert_array_equal(merged(vectors(*rows), "magmax", scale=1.0)["w"], [2, 1])
