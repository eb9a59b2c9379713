"""How good a chip is: accuracy, macro-F1, log-loss and calibration, with intervals.

Knows labels and probabilities only; nothing of models, layers' meaning or files.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chipviz.config import ChipKind, Pooling, Split

EMBEDDING_LAYER = -1
"""Where a score table keeps the control that reads the embedding output; never a layer."""

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal."""


@dataclass(frozen=True)
class CurvePoint:
    """Validation accuracy of one chip after so many training texts: a dot of the live curve."""

    n_train: int
    layer: int
    pooling: Pooling
    chip: ChipKind
    accuracy: float


@dataclass(frozen=True)
class Score:
    """What one chip reached on one split."""

    layer: int
    """0 .. L-1; -1 is the embedding control."""
    pooling: Pooling
    chip: ChipKind
    split: Split
    n: int
    """Texts scored."""
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    """Wilson 95 % interval of the accuracy."""
    macro_f1: float
    log_loss: float
    """Mean negative log-likelihood, in nats."""
    ece: float
    """Expected calibration error over 15 equal-width bins of confidence."""


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion.

    Source: Wilson 1927; behaves at 0 and 1, where the normal interval has no width.
    """
    p = correct / n
    z2 = Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def macro_f1(labels: NDArray[np.int64], predicted: NDArray[np.int64], n_classes: int) -> float:
    """Mean F1 over the classes that occur in `labels` or `predicted`; both of shape (N,)."""
    confusion = confusion_matrix(labels, predicted, n_classes)
    hits = np.diag(confusion)
    either = confusion.sum(axis=0) + confusion.sum(axis=1)
    present = either > 0
    return float(np.mean(2 * hits[present] / either[present]))


def confusion_matrix(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], n_classes: int
) -> NDArray[np.int64]:
    """Counts of (true class, predicted class), shape (C, C)."""
    counts = np.bincount(labels * n_classes + predicted, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes)


def expected_calibration_error(
    confidence: NDArray[np.float64], hit: NDArray[np.bool_], n_bins: int = 15
) -> float:
    """Mean |accuracy - confidence| over equal-width bins, weighted by their texts.

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gap = np.bincount(bins, weights=hit - confidence, minlength=n_bins)
    return float(np.abs(gap).sum() / len(hit))


def score(
    probabilities: NDArray[np.floating],
    labels: NDArray[np.int64],
    *,
    layer: int,
    pooling: Pooling,
    chip: ChipKind,
    split: Split,
) -> Score:
    """Score one chip's probabilities, shape (N, C), against labels, shape (N,)."""
    n, n_classes = probabilities.shape
    predicted = probabilities.argmax(axis=1)
    hit = predicted == labels
    low, high = wilson_interval(int(hit.sum()), n)
    likelihood = np.clip(probabilities[np.arange(n), labels].astype(np.float64), 1e-12, 1.0)
    return Score(
        layer=layer,
        pooling=pooling,
        chip=chip,
        split=split,
        n=n,
        accuracy=float(hit.mean()),
        accuracy_low=low,
        accuracy_high=high,
        macro_f1=macro_f1(labels, predicted, n_classes),
        log_loss=float(-np.log(likelihood).mean()),
        ece=expected_calibration_error(probabilities.max(axis=1).astype(np.float64), hit),
    )
