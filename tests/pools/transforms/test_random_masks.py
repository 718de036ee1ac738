"""Random masks: the same for an element however its tensor is cut, and as random as they say."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mergesolve.pools.transforms.random_masks import keep, random_words
from scipy import stats


def whole(seed, expert, name, size):
    """The stream as NumPy's own generator draws it from the beginning."""
    key = np.frombuffer(hashlib.sha256(f"{seed}\0{expert}\0{name}".encode()).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).integers(0, 2**32, size=size, dtype=np.uint32)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 300), st.integers(0, 2**40))
def test_any_piece_is_a_piece_of_the_stream(start, length, seed):
    found = random_words(seed, "expert", "layer.weight", start, start + length)
    np.testing.assert_array_equal(found, whole(seed, "expert", "layer.weight", start + length)[start:])


def test_far_into_a_large_tensor():
    start = 3_000_000_019
    one = random_words(0, "a", "b", start, start + 64)
    np.testing.assert_array_equal(one[5:37], random_words(0, "a", "b", start + 5, start + 37))


@pytest.mark.parametrize("probability", [1e-3, 0.1, 0.5, 0.999])
def test_kept_as_often_as_said(probability):
    size = 1_000_000
    kept = int(keep(random_words(3, "a", "b", 0, size), probability).sum())
    assert abs(kept - size * probability) < 4 * np.sqrt(size * probability * (1 - probability))


@pytest.mark.parametrize("probability", [0.0, 1e-12, 1 - 1e-12, 1.0])
def test_probabilities_next_to_0_and_1(probability):
    kept = keep(random_words(0, "a", "b", 0, 10_000), probability)
    assert kept.dtype == np.bool_
    assert kept.all() if probability > 0.5 else not kept.any()


def test_words_are_uniform():
    """Pearson's χ² of 256 bins, of the upper and of the lower byte."""
    words = random_words(1, "a", "b", 0, 1 << 18)
    for byte in (words >> 24, words & 255):
        assert stats.chisquare(np.bincount(byte, minlength=256)).pvalue > 1e-3


@pytest.mark.parametrize(
    "other",
    [(1, "a", "w", 0), (0, "b", "w", 0), (0, "a", "v", 0), (0, "aw", "", 0), (0, "a", "w", 1), (0, "a", "w", 8)],
)
def test_other_seeds_experts_tensors_and_elements_are_independent(other):
    size = 200_000
    seed, expert, name, shift = other
    one = keep(random_words(0, "a", "w", 0, size), 0.5)
    two = keep(random_words(seed, expert, name, shift, size + shift), 0.5)
    assert abs(int((one == two).sum()) - size / 2) < 4 * np.sqrt(size / 4)
