"""Exact order statistics of magnitudes against NumPy's sort and partition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergesolve.pools import Pool, operator
from mergesolve.pools.magnitudes import EVERYTHING, NOTHING, Cut, bit_patterns, cut, model_cuts, tensor_cuts

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 1e-45, -1e-45, 3.4e38])
SHAPES = {"a": (7, 5), "b": (12,), "c": (), "d": (2000,)}


def pool_of(stacks, **options):
    """A pool with base 0 of task vectors {name: [n, *shape]}."""
    count = len(next(iter(stacks.values())))
    base = {name: torch.zeros(values.shape[1:]) for name, values in stacks.items()}
    experts = {
        f"e{i}": {name: torch.from_numpy(v[i : i + 1].copy())[0] for name, v in stacks.items()} for i in range(count)
    }
    return Pool.from_state_dicts(base, experts, **options)


def draw(seed, kind="normal", n=3):
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=(n, *shape)) for name, shape in SHAPES.items()}
    if kind == "few":
        values = {name: np.round(2 * value) / 2 for name, value in values.items()}
    if kind == "wide":
        values = {name: value * 10.0 ** rng.integers(-40, 30, value.shape) for name, value in values.items()}
    return {name: np.asarray(value, dtype=np.float32) for name, value in values.items()}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(floats, few), min_size=1, max_size=30), st.integers(0, 31), st.integers(1, 9))
def test_a_cut_keeps_the_k_largest_and_of_equal_ones_the_first(values, k, piece):
    array = np.abs(np.array(values, dtype=np.float32))
    found = cut(array.copy(), k)
    order = np.argsort(-array, kind="stable")[:k]
    wanted = np.zeros(len(array), dtype=bool)
    wanted[order] = True
    magnitudes = torch.from_numpy(array)
    np.testing.assert_array_equal(found.above(magnitudes, 0).numpy(), wanted)
    cuts = [found.above(magnitudes[a : a + piece], a).numpy() for a in range(0, len(array), piece)]
    np.testing.assert_array_equal(np.concatenate(cuts), wanted)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(floats, few), min_size=2, max_size=40))
def test_bit_patterns_are_ordered_as_magnitudes_are(values):
    array = np.array(values, dtype=np.float32)
    bits = bit_patterns(torch.from_numpy(array))
    np.testing.assert_array_equal(
        np.sign(np.diff(bits.astype(np.int64))), np.sign(np.diff(np.abs(array.astype(float))))
    )


@pytest.mark.parametrize("kind", ["normal", "few", "wide"])
@pytest.mark.parametrize("backend", ["streaming", "resident"])
def test_cuts_of_a_model_are_those_of_its_concatenation(kind, backend, monkeypatch):
    """The k-th largest of each expert, k of its own, by np.partition; in pieces that cut tensors."""
    monkeypatch.setattr(operator, "PIECE", 37)
    stacks = draw(4, kind)
    source, workers = pool_of(stacks, backend=backend).engine()
    flat = np.concatenate([np.abs(v.reshape(3, -1)) for v in stacks.values()], axis=1)
    size = flat.shape[1]
    for ks in [(1, 1, 1), (size - 1, 2, size // 2), (17, size, 0), (size // 5, size // 5, size // 5)]:
        found = model_cuts(source, workers, list(ks))
        for row, k, each in zip(flat, ks, found, strict=True):
            if k == 0:
                assert each == NOTHING
            elif k == size:
                assert each == EVERYTHING
            else:
                assert each.value == np.partition(row, size - k)[size - k]
                kept = each.above(torch.from_numpy(row), 0).numpy()
                np.testing.assert_array_equal(kept, row >= each.value)
                assert kept.sum() >= k


@settings(max_examples=40, deadline=None)
@given(st.lists(few, min_size=1, max_size=40), st.data())
def test_cuts_of_a_model_of_few_values(values, data):
    array = np.array([*values, 0.25], dtype=np.float32)
    source, workers = pool_of({"w": array[None]}).engine()
    k = data.draw(st.integers(1, len(array)))
    (found,) = model_cuts(source, workers, [k])
    expected = 0.0 if k == len(array) else np.partition(np.abs(array), len(array) - k)[len(array) - k]
    assert found.value == expected


@pytest.mark.parametrize("kind", ["normal", "few"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuts_of_tensors_keep_exactly_k(kind, dtype, monkeypatch):
    monkeypatch.setattr(operator, "PIECE", 64)
    stacks = draw(5, kind)
    base = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    experts = {
        f"e{i}": {name: torch.from_numpy(v[i : i + 1].copy())[0].to(dtype) for name, v in stacks.items()}
        for i in range(3)
    }
    source, workers = Pool.from_state_dicts(base, experts).engine()
    found = tensor_cuts(source, workers, lambda shape, expert: [expert, 1 + int(np.prod(shape)) // 3])
    for name, shape in SHAPES.items():
        for expert in range(3):
            magnitudes = experts[f"e{expert}"][name].float().abs().flatten()
            for k, each in zip([expert, 1 + int(np.prod(shape)) // 3], found[name][expert], strict=True):
                kept = each.above(magnitudes, 0).numpy()
                wanted = np.zeros(len(magnitudes), dtype=bool)
                wanted[np.argsort(-magnitudes.numpy(), kind="stable")[:k]] = True
                np.testing.assert_array_equal(kept, wanted)


def test_cuts_read_each_model_once_for_tensors_and_twice_for_a_model():
    stacks = draw(6)
    takes = [
        (1, lambda source, workers: tensor_cuts(source, workers, lambda shape, expert: [1])),
        (2, lambda source, workers: model_cuts(source, workers, [9] * 3)),
    ]
    for passes, take in takes:
        pool = pool_of(stacks, backend="streaming")
        source, workers = pool.engine()
        before = pool.bytes_read
        take(source, workers)
        assert pool.bytes_read - before == passes * pool.nbytes


def test_nothing_and_everything():
    values = torch.tensor([0.0, 1.0, float("inf")])
    assert not NOTHING.above(values, 5).any()
    assert EVERYTHING.above(values, 5).all()
    ties = torch.ones(3)
    assert Cut(1.0, 11).above(ties, 10).tolist() == [True, True, False]
    assert Cut(1.0, 9).above(ties, 10).tolist() == [False, False, False]
