import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mergesolve.solvers import OptionError
from mergesolve.solvers.diversity import (
    averaging_error,
    bound_terms,
    delta_squared,
    diversity,
    ensemble_risk,
    mean_source_risk,
    pointwise_diversity,
    pointwise_ensemble_risk,
    source_risks,
)
from scipy.special import log_softmax, softmax


def predictions(models=4, samples=30, classes=5, spread=3.0, seed=0):
    rng = np.random.default_rng(seed)
    logits = spread * rng.normal(size=(models, samples, classes))
    return softmax(logits, axis=2), rng.integers(classes, size=samples), logits


@st.composite
def any_predictions(draw):
    """Softmax outputs of arbitrary logits, up to certainty and certain error, and labels of these classes."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(2, 5)))
    logits = draw(arrays(np.float64, shape, elements=st.floats(-300, 300)))
    labels = draw(arrays(np.int64, shape[1], elements=st.integers(0, shape[2] - 1)))
    return softmax(logits, axis=2), labels


@given(data=any_predictions())
def test_lemma_3_holds_for_every_sample(data):
    """−log mean_m p_m ≤ mean_m −log p_m − V_m(p_m / (√2 max_m p_m))."""
    probabilities, labels = data
    rows = np.arange(len(labels))
    individual = -np.log(probabilities[:, rows, labels])
    ensemble = -np.log(probabilities.mean(axis=0)[rows, labels])
    bound = individual.mean(axis=0) - pointwise_diversity(probabilities, labels)
    assert (ensemble <= bound + 1e-12 * np.maximum(1, individual.max(axis=0))).all()
    assert bound_terms(probabilities, labels).slack >= -1e-12 * max(1, individual.max())


def test_lemma_3_is_tight_to_second_order():
    """For p_m = p(1 ± ε) the gap of Jensen's inequality and the diversity agree to O(ε³): the constant is the best."""
    for epsilon in (1e-2, 1e-3):
        shares = 0.5 * np.array([1 - epsilon, 1 + epsilon])
        probabilities = np.stack([shares, 1 - shares], axis=1)[:, None, :]
        terms = bound_terms(probabilities, [0])
        assert terms.diversity == pytest.approx(terms.mean_source_risk - terms.ensemble_risk, rel=5 * epsilon)


def test_the_terms_are_what_they_say():
    probabilities, labels, logits = predictions()
    rows = np.arange(30)
    individual = -log_softmax(logits, axis=2)[:, rows, labels]
    np.testing.assert_allclose(source_risks(probabilities, labels), individual.mean(axis=1), rtol=1e-12)
    assert mean_source_risk(probabilities, labels) == pytest.approx(individual.mean(), rel=1e-12)
    expected = []
    for sample, label in enumerate(labels):
        values = [float(probabilities[m, sample, label]) for m in range(4)]
        scaled = [value / (math.sqrt(2) * max(values)) for value in values]
        mean = math.fsum(scaled) / 4
        expected.append(math.fsum((value - mean) ** 2 for value in scaled) / 4)
    np.testing.assert_allclose(pointwise_diversity(probabilities, labels), expected, rtol=1e-12)
    assert diversity(probabilities, labels) == pytest.approx(np.mean(expected), rel=1e-12)
    mixture = [-math.log(sum(probabilities[m, i, y] for m in range(4)) / 4) for i, y in enumerate(labels)]
    np.testing.assert_allclose(pointwise_ensemble_risk(probabilities, labels), mixture, rtol=1e-12)
    assert ensemble_risk(probabilities, labels) == pytest.approx(np.mean(mixture), rel=1e-12)


def test_one_call_gives_all_terms():
    probabilities, labels, _ = predictions()
    vectors = np.random.default_rng(1).normal(size=(4, 9))
    terms = bound_terms(probabilities, labels, vectors @ vectors.T)
    assert terms.mean_source_risk == mean_source_risk(probabilities, labels)
    assert terms.diversity == diversity(probabilities, labels)
    assert terms.ensemble_risk == ensemble_risk(probabilities, labels)
    assert terms.delta_squared == delta_squared(vectors @ vectors.T)
    assert terms.slack == terms.mean_source_risk - terms.diversity - terms.ensemble_risk
    assert bound_terms(probabilities, labels).delta_squared is None


@given(models=st.integers(1, 6), spread=st.floats(0, 50), seed=st.integers(0, 2**32 - 1))
def test_diversity_lies_between_0_and_an_eighth_and_ignores_the_order(models, spread, seed):
    probabilities, labels, _ = predictions(models, spread=spread, seed=seed)
    found = pointwise_diversity(probabilities, labels)
    assert ((found >= 0) & (found <= 1 / 8 + 1e-15)).all()
    np.testing.assert_allclose(pointwise_diversity(probabilities[::-1], labels), found, rtol=1e-9, atol=1e-16)


def test_diversity_reaches_both_of_its_ends():
    same = np.repeat(predictions(1)[0], 3, axis=0)
    assert diversity(same, predictions(1)[1]) == pytest.approx(0, abs=1e-30)
    opposite = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert diversity(opposite, [0]) == pytest.approx(1 / 8, rel=1e-15)


def test_certain_errors_have_infinite_risk_and_no_nan():
    half, both = np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), np.array([[[1.0, 0.0]], [[1.0, 0.0]]])
    assert source_risks(half, [1]).tolist() == [math.inf, 0]
    assert ensemble_risk(half, [1]) == pytest.approx(math.log(2))
    assert ensemble_risk(both, [1]) == math.inf
    assert diversity(both, [1]) == 0
    assert bound_terms(half, [1]).slack == bound_terms(both, [1]).slack == math.inf


@given(models=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_delta_squared_equals_distances_of_the_weights(models, seed):
    rng = np.random.default_rng(seed)
    base, vectors = rng.normal(size=12), rng.normal(size=(models, 12))
    weights = base + vectors
    average = weights.mean(axis=0)
    expected = max(float(np.sum((one - average) ** 2)) for one in weights)
    assert delta_squared(vectors @ vectors.T) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_averaging_error_vanishes_for_a_model_whose_probabilities_are_linear_in_its_weights():
    probabilities, labels, _ = predictions()
    assert averaging_error(probabilities.mean(axis=0), probabilities, labels) == pytest.approx(0, abs=1e-14)
    merged = predictions(1, seed=5)[0][0]
    expected = np.mean(-np.log(merged[np.arange(30), labels])) - ensemble_risk(probabilities, labels)
    assert averaging_error(merged, probabilities, labels) == pytest.approx(expected, rel=1e-12)


def test_averaging_error_shrinks_with_the_square_of_delta():
    """Lemma 1 for a linear softmax classifier: halving all distances to the average divides the error by four."""
    rng = np.random.default_rng(2)
    inputs, labels = rng.normal(size=(200, 6)), rng.integers(4, size=200)
    center, directions = rng.normal(size=(6, 4)), rng.normal(size=(5, 6, 4))
    directions -= directions.mean(axis=0)
    errors, squares = [], []
    for distance in (4e-2, 2e-2):
        weights = center + distance * directions
        experts = softmax(np.einsum("nd,mdc->mnc", inputs, weights), axis=2)
        merged = softmax(inputs @ weights.mean(axis=0), axis=1)
        errors.append(averaging_error(merged, experts, labels))
        flat = (weights - center).reshape(5, -1)
        squares.append(delta_squared(flat @ flat.T))
    assert squares[0] / squares[1] == pytest.approx(4)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_half_precision_probabilities_are_accepted():
    probabilities, labels, _ = predictions()
    half = probabilities.astype(np.float16)
    assert diversity(half, labels) == pytest.approx(diversity(probabilities, labels), rel=1e-2)


GOOD = np.full((2, 3, 4), 0.25)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (GOOD[0], [0, 1, 2], r"shape \(3, 4\); expected probabilities"),
        (GOOD[:0], [0, 1, 2], r"shape \(0, 3, 4\)"),
        (GOOD, [0, 1], r"labels have shape \(2,\).*expected 3 integers"),
        (GOOD, [0.0, 1.0, 2.0], "type float64"),
        (GOOD, [0, 1, 4], r"labels lie in \[0, 4\]; there are 4 classes"),
        (GOOD, [0, -1, 2], r"labels lie in \[-1, 2\]"),
        (GOOD * 8, [0, 1, 2], "model 0 at sample 0 are no probabilities: they sum to 8"),
        (np.where(np.arange(24).reshape(2, 3, 4) == 17, np.nan, GOOD), [0, 1, 2], "model 1 at sample 1 .* sum to nan"),
        (GOOD + np.array([0.5, -0.5, 0, 0]), [0, 1, 2], "smallest is -0.25"),
    ],
)
def test_what_are_no_predictions_is_explained(probabilities, labels, message):
    for function in (source_risks, diversity, ensemble_risk, bound_terms):
        with pytest.raises(OptionError, match=message):
            function(probabilities, labels)


@pytest.mark.parametrize("gram", [np.ones((2, 3)), np.array([[1.0, np.nan], [np.nan, 1.0]]), np.zeros((0, 0)), [1.0]])
def test_what_is_no_gram_matrix_is_explained(gram):
    with pytest.raises(OptionError, match="square Gram matrix"):
        delta_squared(gram)
    with pytest.raises(OptionError, match="Gram matrix"):
        bound_terms(GOOD, [0, 1, 2], gram)
