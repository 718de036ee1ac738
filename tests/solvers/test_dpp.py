import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mergesolve.solvers import OptionError
from mergesolve.solvers.dpp import (
    Kernel,
    exhaustive_map,
    greedy_map,
    kdpp_marginals,
    log_det,
    log_esp,
    log_likelihood,
    marginals,
    numerical_rank,
    sample_dpp,
    sample_kdpp,
    swap_polish,
)
from scipy.stats import chisquare, ortho_group

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)  # enumerations take their time on a busy machine


def gram(n, rank, seed=0):
    """A kernel of known rank by construction: L = XXᵀ for X [n, rank] in general position."""
    features = np.random.default_rng(seed).normal(size=(n, rank))
    return features @ features.T


def definite(n, seed=0):
    """A kernel with eigenvalues in [0.2, 5] by construction: no subset is near to being dependent."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    kernel = basis * rng.uniform(0.2, 5, size=n) @ basis.T
    return (kernel + kernel.T) / 2


def minors(kernel):
    """Every principal minor, by the definition: {subset: det L_Y}."""
    n = len(kernel)
    subsets = itertools.chain.from_iterable(itertools.combinations(range(n), size) for size in range(n + 1))
    return {subset: np.linalg.det(kernel[np.ix_(subset, subset)]) for subset in subsets}


def law(kernel, k=None, include=(), exclude=()):
    """The distribution {subset: P} of the (k-)DPP under the conditions, by enumeration."""
    allowed = {
        subset: value
        for subset, value in minors(kernel).items()
        if k in (None, len(subset)) and set(include) <= set(subset) and not set(exclude) & set(subset)
    }
    total = math.fsum(allowed.values())
    return {subset: value / total for subset, value in allowed.items()}


def inclusion(distribution, n):
    return [math.fsum(p for subset, p in distribution.items() if i in subset) for i in range(n)]


CONDITIONS = [
    {},
    {"include": [2]},
    {"exclude": [0, 5]},
    {"include": [4, 1], "exclude": [3]},
]


# --- Elementary symmetric polynomials, normalization -----------------------------------------------------------------


@few
@given(n=st.integers(1, 6), seed=seeds)
def test_principal_minors_sum_to_det_of_l_plus_identity(n, seed):
    kernel = definite(n, seed)
    likelihoods = [math.exp(log_likelihood(kernel, subset)) for subset in minors(kernel)]
    assert math.fsum(likelihoods) == pytest.approx(1, rel=1e-9)
    assert log_likelihood(kernel, []) == pytest.approx(-np.linalg.slogdet(kernel + np.eye(n))[1], rel=1e-9, abs=1e-12)
    for subset, value in minors(kernel).items():
        assert log_likelihood(kernel, subset) == pytest.approx(
            math.log(value) - np.linalg.slogdet(kernel + np.eye(n))[1], rel=1e-6, abs=1e-6
        )


@few
@given(n=st.integers(1, 8), seed=seeds)
def test_minors_of_one_size_sum_to_the_elementary_symmetric_polynomial(n, seed):
    kernel = definite(n, seed)
    esp = log_esp(np.log(np.linalg.eigvalsh(kernel)), n)
    for k in range(n + 1):
        total = math.fsum(value for subset, value in minors(kernel).items() if len(subset) == k)
        assert esp[k] == pytest.approx(math.log(total), rel=1e-8, abs=1e-8)


def exact_log_esp(eigenvalues):
    esp = [Fraction(1)]
    for value in map(Fraction, eigenvalues):
        esp = [a + value * b for a, b in zip([*esp, Fraction(0)], [Fraction(0), *esp], strict=True)]
    return [math.log(e.numerator) - math.log(e.denominator) if e else -math.inf for e in esp]


@pytest.mark.parametrize("decades", [0.1, 8, 120])
def test_log_esp_equals_exact_fractions(decades):
    eigenvalues = 10 ** np.random.default_rng(3).uniform(-decades, decades, size=40)
    found = log_esp(np.log(eigenvalues), 40)
    # An error of ε in a logarithm of size |log λ| is all that can be asked of 40 additions in logarithms.
    largest = np.abs(np.cumsum(np.sort(np.abs(np.log(eigenvalues)))[::-1]))[-1]
    np.testing.assert_allclose(found, exact_log_esp(eigenvalues), atol=4e-16 * 40 * max(largest, 1), rtol=1e-13)


def test_log_esp_where_plain_floats_overflow():
    """e_k of n equal eigenvalues λ is binomial(n, k) λ^k."""
    found = log_esp(np.full(200, math.log(1e4)), 120)[120]
    assert found == pytest.approx(math.log(math.comb(200, 120)) + 120 * math.log(1e4), rel=1e-13)
    assert found > math.log(np.finfo(float).max)


def test_log_esp_with_zero_eigenvalues_is_that_without_them():
    logs = np.log([0.5, 2.0, 3.0])
    padded = log_esp([-np.inf, *logs[:2], -np.inf, logs[2]], 5)
    np.testing.assert_allclose(padded[:4], log_esp(logs, 3), rtol=1e-15)
    assert (padded[4:] == -np.inf).all()


@pytest.mark.parametrize(("logs", "k"), [([0.0, np.nan], 1), ([np.inf], 1), ([[0.0]], 1), ([0.0], -1), ([0.0], 1.5)])
def test_log_esp_refuses(logs, k):
    with pytest.raises(OptionError):
        log_esp(logs, k)


# --- Probabilities under conditions, against enumeration -------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 7, 9])
@pytest.mark.parametrize("conditions", CONDITIONS)
def test_marginals_equal_enumeration(conditions, rank):
    kernel = gram(7, rank)
    expected = inclusion(law(kernel, **conditions), 7)
    np.testing.assert_allclose(marginals(kernel, **conditions), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("rank", [4, 7, 9])
@pytest.mark.parametrize("conditions", CONDITIONS)
def test_kdpp_marginals_equal_enumeration(conditions, rank, k):
    kernel = gram(7, rank)
    expected = inclusion(law(kernel, k, **conditions), 7)
    found = kdpp_marginals(kernel, k, **conditions)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    assert found.sum() == pytest.approx(k)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("conditions", CONDITIONS)
def test_log_likelihood_equals_enumeration(conditions, k):
    kernel = gram(6, 8)
    distribution = law(kernel, k, **conditions)
    for subset in minors(kernel):
        found = log_likelihood(kernel, subset, k, **conditions)
        if subset in distribution:
            assert found == pytest.approx(math.log(distribution[subset]), rel=1e-8)
        else:
            assert found == -math.inf


def test_probabilities_of_a_large_kdpp_are_finite_and_sum_to_k():
    kernel = gram(200, 200) * 1e3
    found = kdpp_marginals(kernel, 120)
    assert found.sum() == pytest.approx(120, rel=1e-9)
    assert ((found > 0) & (found <= 1)).all()
    assert -1e4 < log_likelihood(kernel, range(120), 120) < 0


@pytest.mark.parametrize("seed", range(10))
def test_the_whole_pool_is_the_only_kdpp_of_its_size(seed):
    kernel = gram(5, 5, seed)
    assert log_likelihood(kernel, range(5), 5) <= 0
    np.testing.assert_allclose(kdpp_marginals(kernel, 5), np.ones(5), rtol=1e-12)
    assert log_likelihood(kernel, range(5), 5) == pytest.approx(0, abs=1e-12)
    assert sample_kdpp(kernel, 5, np.random.default_rng(0)).tolist() == list(range(5))


# --- Sampling --------------------------------------------------------------------------------------------------------


def p_value(counts, distribution):
    """Chi-square of the counts against the law; cells that expect fewer than 5 are pooled."""
    draws = sum(counts.values())
    assert all(distribution.get(subset, 0) > 0 for subset in counts)
    cells = [(counts[subset], draws * p) for subset, p in distribution.items() if draws * p >= 5]
    rest = [(counts[subset], draws * p) for subset, p in distribution.items() if draws * p < 5]
    pooled = tuple(map(sum, zip(*rest, strict=True))) if rest else (0, 0.0)
    if pooled[1] >= 1:
        cells.append(pooled)
    observed, expected = np.array(cells).T
    return chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


def draw(sampler, draws=4000):
    rng = np.random.default_rng(11)
    return Counter(tuple(sampler(rng).tolist()) for _ in range(draws))


@pytest.mark.parametrize("rank", [3, 6])
@pytest.mark.parametrize("conditions", CONDITIONS)
def test_dpp_samples_follow_the_law(conditions, rank):
    kernel = gram(6, rank) / 3
    counts = draw(lambda rng: sample_dpp(kernel, rng, **conditions))
    expected = {subset: p for subset, p in law(kernel, **conditions).items() if p > 1e-12}
    assert p_value(counts, expected) > 1e-3
    wrong = {subset: p for subset, p in law(kernel * 1.3, **conditions).items() if p > 1e-12}
    assert p_value(counts, wrong) < 1e-3  # so many draws would show an error of this size


@pytest.mark.parametrize("rank", [3, 6])
@pytest.mark.parametrize("conditions", CONDITIONS)
def test_kdpp_samples_follow_the_law(conditions, rank):
    kernel = gram(6, rank)
    counts = draw(lambda rng: sample_kdpp(kernel, 3, rng, **conditions))
    expected = {subset: p for subset, p in law(kernel, 3, **conditions).items() if p > 1e-12}
    assert p_value(counts, expected) > 1e-3
    uniform = {subset: 1 / len(expected) for subset in expected}
    assert p_value(counts, uniform) < 1e-3


def test_samples_of_a_projection_kernel_always_have_its_rank():
    """L = a·P with P a projection and a → ∞ is the projection DPP: its size does not vary."""
    basis = ortho_group.rvs(8, random_state=5)[:, :3]
    rng = np.random.default_rng(0)
    assert {len(sample_dpp(1e12 * basis @ basis.T, rng)) for _ in range(200)} == {3}


def test_sampling_depends_on_the_generator_only():
    kernel = gram(30, 12)
    for sampler in (sample_dpp, lambda kernel, rng: sample_kdpp(kernel, 5, rng)):
        first, second = (sampler(kernel, np.random.default_rng(4)) for _ in range(2))
        np.testing.assert_array_equal(first, second)
        others = [sampler(kernel, np.random.default_rng(seed)) for seed in range(5)]
        assert len({tuple(other.tolist()) for other in others}) > 1


# --- Maximization ----------------------------------------------------------------------------------------------------


def brute_greedy(kernel, k, include=(), exclude=()):
    chosen = list(include)
    while len(chosen) < k:
        rest = [i for i in range(len(kernel)) if i not in chosen and i not in exclude]
        values = [np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1] for i in rest]
        chosen.append(rest[int(np.argmax(values))])
    return chosen


@pytest.mark.parametrize("conditions", CONDITIONS)
@few
@given(n=st.integers(7, 14), seed=seeds)
def test_greedy_equals_brute_force_greedy(conditions, n, seed):
    kernel = definite(n, seed)
    found = greedy_map(kernel, 5, **conditions)
    assert found.indices.tolist() == brute_greedy(kernel, 5, **conditions)
    assert found.log_det == pytest.approx(
        np.linalg.slogdet(kernel[np.ix_(found.indices, found.indices)])[1], rel=1e-9, abs=1e-9
    )
    free = found.gains[len(conditions.get("include", ())) :]
    assert (np.diff(free) <= 1e-12).all()  # log det is submodular: gains only shrink


@few
@given(n=st.integers(2, 10), seed=seeds, scale=st.floats(0.01, 10))
def test_greedy_without_a_size_stops_when_no_gain_is_left(n, seed, scale):
    kernel = definite(n, seed) * scale / n
    found = greedy_map(kernel)
    assert (found.gains > 0).all()
    size = len(found.indices)
    for other in set(range(n)) - set(found.indices.tolist()):
        items = [*found.indices, other]
        assert np.linalg.slogdet(kernel[np.ix_(items, items)])[1] <= found.log_det + 1e-9
    assert found.indices.tolist() == brute_greedy(kernel, size)


def test_the_mode_of_the_paper_s_kernel_is_empty():
    """‖q‖ = 1 and S_ii = 1 make the trace 1, so every gain is negative, and the expected size is below 1."""
    quality = np.array([3.0, 2.0, 1.0])
    kernel = Kernel(quality / np.linalg.norm(quality), np.full((3, 3), 0.2) + 0.8 * np.eye(3))
    assert np.trace(kernel.matrix) == pytest.approx(1)
    assert greedy_map(kernel.matrix).indices.size == 0
    assert exhaustive_map(kernel.matrix).indices.size == 0
    assert kernel.expected_size < 1
    assert greedy_map(kernel.matrix, 2).indices.tolist() == [0, 1]


@pytest.mark.parametrize("k", [None, 3, 4])
@pytest.mark.parametrize("conditions", CONDITIONS)
@pytest.mark.parametrize("seed", range(5))
def test_exhaustive_equals_brute_force(conditions, k, seed):
    kernel = gram(8, 8, seed) / 4
    distribution = law(kernel, k, **conditions)
    found = exhaustive_map(kernel, k, **conditions)
    assert tuple(sorted(found.indices.tolist())) == max(distribution, key=distribution.__getitem__)
    assert found.log_det == pytest.approx(log_det(kernel, found.indices))
    assert found.indices.tolist()[: len(conditions.get("include", ()))] == conditions.get("include", [])


def test_exhaustive_search_is_never_beaten_by_rounding():
    """Of nine experts in pairs and triples of copies, every subset of three of different kinds beats a determinant of
    rounding; the best is found, and four do not exist."""
    features = np.repeat(np.random.default_rng(2).normal(size=(3, 5)), 3, axis=0) * np.linspace(1, 2, 9)[:, None]
    kernel = features @ features.T
    assert exhaustive_map(kernel, 3).indices.tolist() == greedy_map(kernel, 3).indices.tolist()
    assert sorted(exhaustive_map(kernel, 3).indices.tolist()) == [2, 5, 8]
    with pytest.raises(OptionError, match=r"rank of the kernel, which is 3"):
        exhaustive_map(kernel, 4)
    assert len(exhaustive_map(kernel * 1e6).indices) == 3


@pytest.mark.parametrize("seed", range(20))
def test_exhaustive_search_does_not_mistake_rounding_for_volume(seed):
    """Two copies of the strongest expert have a determinant of rounding, 1e-16 · 1e12 · 1e12, which is larger than the
    true one of the best three, 1e12 · 1 · 1e-8."""
    features = np.repeat(np.random.default_rng(seed).normal(size=(3, 5)), 2, axis=0)
    features *= np.array([1e6, 1.1e6, 1, 1.1, 1e-4, 1.1e-4])[:, None]
    kernel = features @ features.T
    assert exhaustive_map(kernel, 3).indices.tolist() == [1, 3, 5]


@pytest.mark.parametrize("conditions", CONDITIONS)
@few
@given(n=st.integers(8, 12), seed=seeds)
def test_polishing_never_lowers_and_ends_where_no_exchange_helps(conditions, n, seed):
    kernel = definite(n, seed)
    include, exclude = conditions.get("include", []), conditions.get("exclude", [])
    rest = [i for i in range(n) if i not in include and i not in exclude]
    start = [*include, *rest[: 4 - len(include)]]
    found = swap_polish(kernel, start, **conditions)
    items = found.indices.tolist()
    assert set(include) <= set(items)
    assert not set(exclude) & set(items)
    assert found.log_det >= log_det(kernel, start) - 1e-9
    assert found.log_det == pytest.approx(log_det(kernel, items), abs=1e-9)
    for leaves in set(items) - set(include):
        for enters in set(rest) - set(items):
            other = [enters if item == leaves else item for item in items]
            assert np.linalg.slogdet(kernel[np.ix_(other, other)])[1] <= found.log_det + 1e-6
    assert found.log_det <= exhaustive_map(kernel, 4, **conditions).log_det + 1e-9


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 5e-3])
def test_polishing_ends_on_nearly_dependent_experts(spread):
    """Ratios of determinants are then mostly rounding, which must neither lower log det nor exchange for ever."""
    rng = np.random.default_rng(6)
    features = 1 + spread * rng.normal(size=(12, 8))
    kernel = features @ features.T
    start = [11, 10, 9, 8]
    found = swap_polish(kernel, start)
    assert found.log_det >= log_det(kernel, start)
    np.testing.assert_allclose(found.log_det, exhaustive_map(kernel, 4).log_det, rtol=0.02)


def test_polishing_repairs_a_greedy_mistake():
    """The longest vector lies between two others: greedy takes it, and the best pair is the other two."""
    features = np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.8]])
    kernel = features @ features.T
    greedy = greedy_map(kernel, 2)
    assert 2 in greedy.indices
    assert sorted(swap_polish(kernel, greedy.indices).indices.tolist()) == [0, 1]
    assert sorted(exhaustive_map(kernel, 2).indices.tolist()) == [0, 1]


def test_log_det_of_dependent_and_empty_subsets():
    kernel = gram(5, 2)
    assert log_det(kernel, []) == 0
    assert log_det(kernel, [0, 1, 2]) == -math.inf
    assert log_det(kernel, [3, 1]) == pytest.approx(math.log(np.linalg.det(kernel[np.ix_([1, 3], [1, 3])])))


# --- Invariances -----------------------------------------------------------------------------------------------------


@few
@given(n=st.integers(4, 10), seed=seeds)
def test_everything_is_equivariant_to_the_order_of_experts(n, seed):
    kernel = definite(n, seed)
    order = np.random.default_rng(seed).permutation(n)
    permuted = kernel[np.ix_(order, order)]
    for search in (greedy_map, exhaustive_map, lambda matrix, k: swap_polish(matrix, greedy_map(matrix, k).indices)):
        np.testing.assert_array_equal(order[search(permuted, 3).indices], search(kernel, 3).indices)
    np.testing.assert_allclose(marginals(permuted), marginals(kernel)[order], atol=1e-9)
    np.testing.assert_allclose(kdpp_marginals(permuted, 2), kdpp_marginals(kernel, 2)[order], atol=1e-8)
    assert log_likelihood(permuted, [0, 2], 2) == pytest.approx(log_likelihood(kernel, order[[0, 2]], 2), abs=1e-8)


@pytest.mark.parametrize("scale", [1e-100, 1e-6, 1e6, 1e100])
def test_a_fixed_size_does_not_depend_on_the_scale_of_the_kernel(scale):
    kernel = gram(9, 6)
    assert numerical_rank(kernel * scale) == 6
    assert greedy_map(kernel * scale, 4).indices.tolist() == greedy_map(kernel, 4).indices.tolist()
    assert exhaustive_map(kernel * scale, 4).indices.tolist() == exhaustive_map(kernel, 4).indices.tolist()
    np.testing.assert_allclose(kdpp_marginals(kernel * scale, 4), kdpp_marginals(kernel, 4), rtol=1e-9)
    assert log_likelihood(kernel * scale, [1, 2], 2) == pytest.approx(log_likelihood(kernel, [1, 2], 2), rel=1e-9)


@few
@given(extra=st.integers(0, 6), rank=st.integers(1, 6), seed=seeds)
def test_rank_is_that_of_the_features_whatever_the_qualities(extra, rank, seed):
    """The first features are an orthonormal basis, the others lie in its span."""
    rng = np.random.default_rng(seed)
    features = np.vstack([np.eye(rank), rng.normal(size=(extra, rank))])[rng.permutation(rank + extra)]
    features *= 10 ** rng.uniform(-3, 3, size=(rank + extra, 1))
    assert numerical_rank(features @ features.T) == rank


# --- Duplicates and rank ---------------------------------------------------------------------------------------------


def with_duplicate(noise=0.0, qualities=(1.0, 2.0, 1.5, 2.0, 0.7)):
    """Five experts in six dimensions; expert 3 is expert 1, but for noise in its direction."""
    rng = np.random.default_rng(8)
    features = rng.normal(size=(5, 6))
    features[3] = features[1] + noise * rng.normal(size=6)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return Kernel(np.array(qualities), features @ features.T)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-5])
@pytest.mark.parametrize("qualities", [(1.0, 2.0, 1.5, 2.0, 0.7), (0.1, 30.0, 0.2, 50.0, 0.1)])
def test_duplicate_experts_are_never_selected_together(noise, qualities):
    kernel = with_duplicate(noise, qualities)
    assert kernel.duplicates == ((1, 3),)
    assert kernel.rank == 4
    rng = np.random.default_rng(0)
    subsets = [
        greedy_map(kernel.matrix, 4).indices,
        greedy_map(kernel.matrix * 1e9).indices,
        exhaustive_map(kernel.matrix, 4).indices,
        exhaustive_map(kernel.matrix * 1e9).indices,
        swap_polish(kernel.matrix, [0, 1, 2, 4]).indices,
        *(sample_kdpp(kernel.matrix, 4, rng) for _ in range(50)),
        *(sample_dpp(kernel.matrix * 1e9, rng) for _ in range(50)),
    ]
    for subset in subsets:
        assert not {1, 3} <= set(subset.tolist())
        assert len(subset) == 4
    assert log_likelihood(kernel.matrix, [1, 3]) == -math.inf
    assert log_likelihood(kernel.matrix, [1, 3], 2) == -math.inf
    assert marginals(kernel.matrix, include=[1])[3] == 0
    np.testing.assert_allclose(kdpp_marginals(kernel.matrix, 4)[[1, 3]].sum(), 1, rtol=1e-9)


def test_a_chain_of_near_duplicates_is_one_group():
    """Neighbours have cosines above 1 − 1e-6, the ends have not; the kernel stays positive semidefinite."""
    angles = 1.2e-3 * np.arange(5)
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    kernel = Kernel(np.ones(5), features @ features.T)
    assert kernel.duplicates == ((0, 1, 2, 3, 4),)
    assert kernel.rank == 1
    assert np.linalg.eigvalsh(kernel.matrix).min() > -1e-12


def test_experts_without_any_similarity_are_no_duplicates():
    """A task vector of 0 has similarity 0 to everything, itself included; two of them are never selected."""
    kernel = Kernel(np.ones(4), np.diag([1.0, 0.0, 1.0, 0.0]))
    assert kernel.duplicates == ()
    assert kernel.rank == 2
    assert greedy_map(kernel.matrix, 2).indices.tolist() == [0, 2]


def test_experts_that_are_only_alike_are_no_duplicates():
    kernel = Kernel(np.ones(2), np.array([[1.0, 0.9999], [0.9999, 1.0]]))
    assert kernel.duplicates == ()
    assert kernel.rank == 2


SIZED = [
    greedy_map,
    exhaustive_map,
    lambda kernel, k, **conditions: sample_kdpp(kernel, k, np.random.default_rng(0), **conditions),
    kdpp_marginals,
    lambda kernel, k, **conditions: log_likelihood(kernel, [0, 1], k, **conditions),
]


@pytest.mark.parametrize("function", SIZED)
def test_k_above_the_rank_names_the_rank(function):
    with pytest.raises(OptionError, match=r"k = 4 is above the rank of the kernel, which is 3: .* Select at most 3"):
        function(gram(6, 3), 4)
    with pytest.raises(OptionError, match=r"k = 3 is above .* with these experts forced in or out, which is 2"):
        function(with_duplicate().matrix, 3, include=[1], exclude=[0, 2])


@pytest.mark.parametrize("function", SIZED)
@pytest.mark.parametrize(
    ("k", "conditions", "message"),
    [
        (0, {}, r"integer in \[1, 6\] \(6 experts\). Got 0"),
        (-1, {}, "Got -1"),
        (7, {}, "Got 7"),
        (2.0, {}, "Got 2.0"),
        (True, {}, "Got True"),
        (1, {"include": [0, 1]}, r"\[2, 6\] \(6 experts, 2 forced in\). Got 1"),
        (4, {"include": [0], "exclude": [1, 2, 3]}, r"\[1, 3\] \(6 experts, 1 forced in and 3 forced out\). Got 4"),
        (2, {"include": [6]}, r"experts forced in must be distinct indices in \[0, 5\]. Got \[6\]"),
        (2, {"exclude": [1, 1]}, r"forced out must be distinct .* Got \[1, 1\]"),
        (2, {"include": [1, 2], "exclude": [2]}, r"experts \[2\] are forced both"),
    ],
)
def test_impossible_sizes_and_conditions_are_explained(function, k, conditions, message):
    with pytest.raises(OptionError, match=message):
        function(gram(6, 6), k, **conditions)


@pytest.mark.parametrize(
    "function",
    [greedy_map, exhaustive_map, marginals, lambda kernel, **c: sample_dpp(kernel, np.random.default_rng(0), **c)],
)
def test_forcing_both_of_two_duplicates_is_refused(function):
    with pytest.raises(OptionError, match=r"Expert 3 is forced in but adds no volume to \[1\]"):
        function(with_duplicate().matrix, include=[1, 3])


@few
@given(seed=seeds)
def test_forcing_more_than_the_rank_is_refused(seed):
    features = np.random.default_rng(seed).normal(size=(6, 3))
    features[[0, 2, 4]] = np.diag([1.0, 1e3, 1e-3])
    kernel = features @ features.T
    with pytest.raises(OptionError, match=r"Expert 5 is forced in but adds no volume to \[0, 2, 4\]"):
        marginals(kernel, include=[0, 2, 4, 5])
    assert marginals(kernel, include=[0, 2, 4]).tolist() == [1, 0, 1, 0, 1, 0]


def test_forcing_everything_leaves_nothing_to_choose():
    kernel = gram(3, 3)
    everyone = {"include": [2, 0], "exclude": [1]}
    assert greedy_map(kernel, 2, **everyone).indices.tolist() == [2, 0]
    assert exhaustive_map(kernel, **everyone).indices.tolist() == [2, 0]
    assert sample_dpp(kernel, np.random.default_rng(0), **everyone).tolist() == [0, 2]
    assert sample_kdpp(kernel, 2, np.random.default_rng(0), **everyone).tolist() == [0, 2]
    assert marginals(kernel, **everyone).tolist() == [1, 0, 1]
    assert kdpp_marginals(kernel, 2, **everyone).tolist() == [1, 0, 1]
    assert log_likelihood(kernel, [0, 2], **everyone) == 0
    assert swap_polish(kernel, [0, 2], **everyone).indices.tolist() == [0, 2]


def test_experts_of_quality_zero_are_never_selected():
    """What is worse than the base is clipped to 0; then no search and no draw can return it."""
    similarity = np.full((4, 4), 0.3) + 0.7 * np.eye(4)
    kernel = Kernel(np.array([1.0, 0.0, 2.0, 0.0]), similarity)
    assert kernel.rank == 2
    assert greedy_map(kernel.matrix, 2).indices.tolist() == [2, 0]
    assert exhaustive_map(kernel.matrix, 2).indices.tolist() == [2, 0]
    assert marginals(kernel.matrix)[[1, 3]].tolist() == [0, 0]
    with pytest.raises(OptionError, match="rank of the kernel, which is 2"):
        greedy_map(kernel.matrix, 3)
    with pytest.raises(OptionError, match="Expert 1 is forced in but adds no volume"):
        greedy_map(kernel.matrix, 2, include=[1])


def test_one_expert():
    kernel = Kernel([2.0], [[1.0]])
    assert greedy_map(kernel.matrix, 1).indices.tolist() == [0]
    assert exhaustive_map(kernel.matrix).indices.tolist() == [0]
    assert sample_kdpp(kernel.matrix, 1, np.random.default_rng(0)).tolist() == [0]
    assert kernel.expected_size == pytest.approx(4 / 5)


# --- Kernel ----------------------------------------------------------------------------------------------------------


@few
@given(n=st.integers(2, 9), seed=seeds, share=st.floats(0.01, 0.99))
def test_scaling_reaches_the_expected_size_and_keeps_the_directions(n, seed, share):
    features = definite(n, seed)
    scale = np.sqrt(np.diag(features))
    quality = np.random.default_rng(seed).uniform(0.1, 3, size=n)
    kernel = Kernel(quality, features / scale / scale[:, None])
    target = share * kernel.rank
    scaled = kernel.scaled_to(target)
    eigenvalues = np.linalg.eigvalsh(scaled.matrix)
    assert np.sum(eigenvalues / (1 + eigenvalues)) == pytest.approx(target, rel=1e-6)
    assert scaled.expected_size == pytest.approx(target, rel=1e-6)
    ratios = scaled.quality / kernel.quality
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-12)
    np.testing.assert_allclose(scaled.similarity, kernel.similarity, atol=1e-12)


@pytest.mark.parametrize("size", [0, -1, 4, 5.0, math.nan, "3", None])
def test_an_expected_size_outside_the_rank_is_refused(size):
    with pytest.raises(OptionError, match=r"in \(0, 4\), the rank of the kernel of 5 experts"):
        with_duplicate().scaled_to(size)


def test_an_indefinite_similarity_is_repaired_with_a_warning():
    """a ~ b and b ~ c but a ≁ c: no such three unit vectors."""
    similarity = np.array([[1.0, 0.9, -0.5], [0.9, 1.0, 0.9], [-0.5, 0.9, 1.0]])
    lowest = np.linalg.eigvalsh(similarity)[0]
    assert lowest < -0.1
    with pytest.warns(UserWarning, match=r"not positive semidefinite.*1 of 3 are negative") as caught:
        kernel = Kernel(np.ones(3), similarity)
    assert f"{lowest:.3g}" in str(caught[0].message)
    assert f"up to {np.abs(kernel.similarity - similarity).max():.3g}" in str(caught[0].message)
    assert caught[0].filename == __file__
    eigenvalues = np.linalg.eigvalsh(kernel.similarity)
    assert eigenvalues.min() > -1e-12
    assert eigenvalues.max() > 0.5
    np.testing.assert_allclose(np.diag(kernel.similarity), 1, rtol=1e-12)
    assert greedy_map(kernel.matrix, 2).log_det < 0
    kernel.scaled_to(1.5)  # what was repaired once does not warn again


@few
@given(n=st.integers(2, 8), seed=seeds)
def test_a_semidefinite_similarity_is_left_as_it_is(n, seed):
    similarity = definite(n, seed)
    kernel = Kernel(np.ones(n), similarity)
    np.testing.assert_allclose(kernel.similarity, similarity, rtol=1e-9, atol=1e-9 * np.abs(similarity).max())


def test_rounding_of_float32_similarities_is_not_worth_a_warning():
    features = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    similarity = features @ features.T
    assert np.linalg.eigvalsh(similarity.astype(np.float64))[0] < -1e-9
    kernel = Kernel(np.ones(12), similarity)
    assert np.linalg.eigvalsh(kernel.similarity).min() > -1e-12


def test_the_kernel_is_quality_times_similarity_and_read_only():
    kernel = with_duplicate()
    expected = np.diag(kernel.quality) @ kernel.similarity @ np.diag(kernel.quality)
    np.testing.assert_allclose(kernel.matrix, expected, rtol=1e-12)
    for array in (kernel.matrix, kernel.quality, kernel.similarity):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize(
    ("quality", "similarity", "message"),
    [
        ([1, np.nan], np.eye(2), "quality is nan at expert 'b'"),
        ([1, 1], [[1, np.inf], [np.inf, 1]], "similarity is inf at expert 'a' and 'b'"),
        ([1, -0.5], np.eye(2), r"quality of expert 'b' is -0.5, .* Clip"),
        ([0, 0], np.eye(2), "qualities of all 2 experts are 0"),
        ([1, 1], np.eye(3), r"shape \(3, 3\); 2 qualities need \(2, 2\)"),
        ([1, 1], np.ones((2, 3)), r"shape \(2, 3\)"),
        ([1, 1], [1, 1], r"similarity has shape \(2,\)"),
        ([[1, 1]], np.eye(2), r"quality has shape \(1, 2\)"),
        ([], np.zeros((0, 0)), r"quality has shape \(0,\)"),
        ([1, 1], [[1, 0.5], [0.4, 1]], r"not symmetric: 0.5 at \(0, 1\) and 0.4 at \(1, 0\)"),
        ([1, 1], [[1, 0], [0, -1]], "expert 'b' to itself is -1"),
        ([1e200, 1], np.eye(2), "kernel .* is inf at expert 'a' and 'a'"),
    ],
)
def test_bad_kernels_are_explained(quality, similarity, message):
    with pytest.raises(OptionError, match=message):
        Kernel(np.array(quality, dtype=float), np.array(similarity, dtype=float), ("a", "b"))


def test_names_have_to_fit():
    with pytest.raises(OptionError, match="3 names for 2 qualities"):
        Kernel(np.ones(2), np.eye(2), ("a", "b", "c"))


FUNCTIONS = [
    lambda kernel: greedy_map(kernel, 2),
    lambda kernel: exhaustive_map(kernel, 2),
    lambda kernel: swap_polish(kernel, [0]),
    lambda kernel: sample_dpp(kernel, np.random.default_rng(0)),
    lambda kernel: sample_kdpp(kernel, 2, np.random.default_rng(0)),
    marginals,
    lambda kernel: kdpp_marginals(kernel, 2),
    lambda kernel: log_likelihood(kernel, [0, 1]),
    lambda kernel: log_det(kernel, [0, 1]),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1, np.nan], [np.nan, 1]], "kernel is nan at expert 0 and 1"),
        ([[1, 0.3], [0.2, 1]], "kernel is not symmetric"),
        ([[1, 0], [0, -1]], "not positive semidefinite"),
        ([1, 2], r"kernel has shape \(2,\)"),
        (np.ones((2, 3)), r"shape \(2, 3\)"),
        (np.zeros((0, 0)), r"shape \(0, 0\)"),
    ],
)
def test_bad_matrices_are_explained(function, matrix, message):
    with pytest.raises(OptionError, match=message):
        function(np.array(matrix, dtype=float))


@pytest.mark.parametrize("function", [f for i, f in enumerate(FUNCTIONS) if i != 2])
def test_an_indefinite_kernel_is_refused(function):
    with pytest.raises(OptionError, match=r"not positive semidefinite.*Build it with Kernel"):
        function(np.array([[1.0, 2.0], [2.0, 1.0]]))


def test_too_many_experts_for_all_subsets():
    with pytest.raises(OptionError, match=r"at most 20 experts; there are 21\. Use the greedy"):
        exhaustive_map(np.eye(21), 2)


@pytest.mark.parametrize(
    ("subset", "conditions", "message"),
    [
        ([1, 3], {}, "determinant 0"),
        ([0, 2], {"include": [1]}, "has to hold"),
        ([0, 2], {"exclude": [2]}, "has to hold"),
        ([0, 9], {}, r"subset must be distinct indices in \[0, 4\]"),
        ([0, 0], {}, "distinct"),
        ([0.5], {}, "must be an integer"),
    ],
)
def test_bad_starts_of_polishing_are_explained(subset, conditions, message):
    with pytest.raises(OptionError, match=message):
        swap_polish(with_duplicate().matrix, subset, **conditions)
