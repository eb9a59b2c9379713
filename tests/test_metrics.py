"""Scores equal those of scikit-learn and scipy, on drawn answers and at the edges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss

from chipviz import metrics
from chipviz.metrics import expected_calibration_error, macro_f1, wilson_interval


def drawn(seed, n=60, n_classes=4):
    """Labels and probabilities that agree more often than chance."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    logits = rng.normal(size=(n, n_classes)) + 1.5 * np.eye(n_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, probabilities


def score(probabilities, labels):
    return metrics.score(
        probabilities, labels, layer=3, pooling="mean", chip="linear", split="test"
    )


@given(st.integers(0, 10_000), st.integers(1, 80), st.integers(2, 6))
def test_a_score_is_what_scikit_learn_and_scipy_say(seed, n, n_classes):
    labels, probabilities = drawn(seed, n, n_classes)
    found = score(probabilities, labels)
    predicted = probabilities.argmax(axis=1)
    classes = list(range(n_classes))
    assert found.accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert found.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found.log_loss == pytest.approx(log_loss(labels, probabilities, labels=classes))
    interval = binomtest(int((labels == predicted).sum()), n).proportion_ci(method="wilson")
    assert found.accuracy_low == pytest.approx(interval.low, abs=1e-12)
    assert found.accuracy_high == pytest.approx(interval.high, abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 8)])
def test_the_interval_has_width_and_stays_between_zero_and_one_at_the_edges(correct, n):
    low, high = wilson_interval(correct, n)
    wilson = binomtest(correct, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((wilson.low, wilson.high), abs=1e-12)
    assert 0.0 <= low <= correct / n <= high <= 1.0
    assert high - low > 0.05


def test_the_confusion_matrix_has_true_classes_in_rows_and_keeps_absent_ones():
    labels, predicted = np.array([0, 0, 1, 3, 3, 3]), np.array([0, 1, 1, 0, 3, 3])
    found = metrics.confusion_matrix(labels, predicted, 5)
    assert (found == confusion_matrix(labels, predicted, labels=range(5))).all()
    assert found[3, 0] == 1
    assert found.shape == (5, 5)


def test_f1_is_the_mean_over_classes_that_occur_anywhere():
    labels, predicted = np.array([0, 0, 2]), np.array([0, 1, 1])
    expected = f1_score(labels, predicted, average="macro", zero_division=0)
    assert macro_f1(labels, predicted, n_classes=7) == pytest.approx(expected)


def calibration_by_hand(confidence, hit, n_bins):
    """Guo et al. 2017, equation 3, bin by bin."""
    total = 0.0
    for k in range(n_bins):
        upper = confidence <= 1 if k == n_bins - 1 else confidence < (k + 1) / n_bins
        inside = (confidence >= k / n_bins) & upper
        if inside.any():
            gap = abs(hit[inside].mean() - confidence[inside].mean())
            total += inside.sum() / len(hit) * gap
    return total


@given(st.integers(0, 10_000), st.integers(1, 200))
def test_calibration_error_is_the_weighted_gap_of_every_bin(seed, n):
    rng = np.random.default_rng(seed)
    confidence, hit = rng.random(n), rng.random(n) < 0.7
    found = expected_calibration_error(confidence, hit)
    assert found == pytest.approx(calibration_by_hand(confidence, hit, 15), abs=1e-12)


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not():
    sure = np.ones(8)
    assert expected_calibration_error(sure, np.ones(8, dtype=bool)) == 0.0
    assert expected_calibration_error(sure, np.zeros(8, dtype=bool)) == 1.0


def test_an_impossible_answer_costs_much_but_not_infinitely():
    found = score(np.array([[1.0, 0.0], [1.0, 0.0]], dtype=np.float32), np.array([1, 0]))
    assert found.accuracy == 0.5
    assert found.log_loss == pytest.approx(-np.log(1e-12) / 2)


def test_a_score_carries_where_it_was_taken():
    found = score(np.array([[0.2, 0.8]]), np.array([1]))
    assert (found.layer, found.pooling, found.chip, found.split, found.n) == (
        3,
        "mean",
        "linear",
        "test",
        1,
    )
