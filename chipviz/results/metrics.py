"""How good a chip is: accuracy, macro-F1, log-loss and calibration, with intervals.

Knows labels and probabilities, neither models nor files.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chipviz.keys import ChipRecord, Cut, Split, fields_of

N_BINS = 15
"""Bins of confidence."""
N_RESAMPLES = 500
_BLOCK = 100
"""Samples summed at once: the counts are never all held as floats."""

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal."""


@dataclass(frozen=True)
class CurvePoint:
    """Validation accuracy of one chip after so many training texts: a dot of the live curve."""

    n_train: int
    cut: Cut
    accuracy: float

    def to_dict(self) -> dict[str, object]:
        """Plain JSON, flat."""
        return {
            "n_train": self.n_train,
            "layer": self.cut.layer,
            **fields_of(self.cut.chip),
            "accuracy": self.accuracy,
        }


class Score(ChipRecord):
    """What one chip reached on one split."""

    layer: int
    """0 .. L-1; -1 is the embedding control."""
    split: Split
    n: int
    """Texts scored."""
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    """Wilson 95 % interval of the accuracy."""
    macro_f1: float
    macro_f1_low: float
    macro_f1_high: float
    log_loss: float
    """Mean negative log-likelihood, in nats."""
    log_loss_low: float
    log_loss_high: float
    ece: float
    """Expected calibration error over 15 equal-width bins of confidence."""
    ece_low: float
    ece_high: float
    """Percentile bootstrap 95 % intervals over texts. The ECE's leans upwards, as the ECE does."""
    auroc: float | None = None
    """Area under the ROC curve, the second class as the positive one. None beyond two classes, or
    where a split has one of them only."""
    average_precision: float | None = None
    """Average precision of the second class. None where `auroc` is."""
    repeats: tuple[float, ...] = ()
    """Accuracies of the same chip fitted again on bootstrap samples of the training texts."""

    @property
    def cut(self) -> Cut:
        """The chip that was scored, and its layer."""
        return Cut(self.layer, self.key)


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion.

    Source: Wilson 1927. Behaves at 0 and 1, where the normal interval has no width.
    """
    p = correct / n
    z2 = Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def paired_lower_bound(correct: NDArray[np.bool_], best: NDArray[np.bool_]) -> float:
    """Lower end of Tango's 95 % score interval of how much more accurate a chip is than another.

    Where both get the same texts right it lies below 0 all the same, the further the fewer texts
    there are: agreement on a few texts is no proof. A percentile bootstrap says 0 there, and
    accepts a true loss of two points with probability 0.45 at 40 texts.

    Args:
        correct: Which texts the chip got right, shape (N,).
        best: Which texts the other did, shape (N,).

    Returns:
        In [-1, 1].

    Source: Tango 1998, Statistics in Medicine 17, 891-908, equations 17 to 19.
    """
    n = len(best)
    won, lost = int((correct & ~best).sum()), int((best & ~correct).sum())

    def too_low(difference: float) -> bool:
        """Whether so small a difference is rejected by what was seen."""
        # q: the likeliest share of texts that the other alone gets right, given the difference.
        b = -won - lost + (2 * n - won + lost) * difference
        c = -lost * difference * (1 - difference)
        q = (np.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * q + difference * (1 - difference))
        return won - lost - n * difference > Z_95 * np.sqrt(max(variance, 0.0))

    low, high = -1.0, (won - lost) / n
    for _ in range(60):  # halves to far below what a report shows
        middle = (low + high) / 2
        low, high = (middle, high) if too_low(middle) else (low, middle)
    return high


def mcnemar(correct: NDArray[np.bool_], best: NDArray[np.bool_]) -> float:
    """Two-sided probability that chance splits so unevenly the texts that only one chip gets right.

    Args:
        correct: Which texts a chip got right, shape (N,).
        best: Which texts another did, shape (N,).

    Source: McNemar 1947, exact binomial form.
    """
    won, lost = int((correct & ~best).sum()), int((best & ~correct).sum())
    n, few = won + lost, min(won, lost)
    tail = sum(math.comb(n, k) for k in range(few + 1))
    return min(1.0, 2 * tail / 2**n)


def macro_f1(labels: NDArray[np.int64], predicted: NDArray[np.int64], n_classes: int) -> float:
    """Mean F1 over the classes that occur in `labels` or `predicted`. Both of shape (N,)."""
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
    confidence: NDArray[np.float64], hit: NDArray[np.bool_], n_bins: int = N_BINS
) -> float:
    """Mean |accuracy - confidence| over equal-width bins, weighted by their texts.

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    gap = np.bincount(_bins(confidence, n_bins), weights=hit - confidence, minlength=n_bins)
    return float(np.abs(gap).sum() / len(hit))


def ranking(
    positive: NDArray[np.bool_], said: NDArray[np.floating]
) -> tuple[float, float] | tuple[None, None]:
    """AUROC and average precision of one score a text. Equal scores share a threshold.

    Args:
        positive: Which texts are of the positive class, shape (N,).
        said: How sure a chip is of it, shape (N,).

    Returns:
        None and None where a class has no text.
    """
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return None, None
    order = np.argsort(-said, kind="stable")
    ends = np.flatnonzero(np.diff(said[order], append=np.nan) != 0)  # last text of each threshold
    hits = np.cumsum(positive[order])[ends]
    alarms = ends + 1 - hits
    recall, false_rate = hits / n_positive, alarms / n_negative
    area = np.trapezoid(np.append(0.0, recall), np.append(0.0, false_rate))
    precision = hits / (ends + 1)
    return float(area), float(np.sum(np.diff(recall, prepend=0.0) * precision))


@dataclass(frozen=True)
class Resamples:
    """Bootstrap samples of one split, the same for all chips, so that chips compare in pairs."""

    counts: NDArray[np.uint8]
    """How often each text was drawn, shape (R, N). A byte is enough: at most N times, and the odds
    against 256 times in a larger split are beyond 10^500."""
    true: NDArray[np.float32]
    """Texts of each class in each sample, shape (R, C)."""

    @classmethod
    def of(cls, labels: NDArray[np.int64], n_classes: int, seed: int = 0) -> "Resamples":
        """Draw `N_RESAMPLES` samples of a split with these labels, shape (N,)."""
        random = np.random.default_rng(seed)
        n = len(labels)
        counts = np.empty((N_RESAMPLES, n), dtype=np.uint8)
        for row in counts:
            row[:] = np.bincount(random.integers(n, size=n), minlength=n)
        return cls(counts, _sums(counts, _onehot(labels, n_classes)))

    def macro_f1(
        self, labels: NDArray[np.int64], predicted: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Macro-F1 in each sample, shape (R,)."""
        said = _onehot(predicted, self.true.shape[1])
        either = self.true + _sums(self.counts, said)
        hits = _sums(self.counts, said * (labels == predicted)[:, None])
        f1 = np.divide(2 * hits, either, out=np.zeros(hits.shape), where=either > 0)
        return f1.sum(axis=1) / (either > 0).sum(axis=1)

    def mean(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """Mean of one value a text in each sample, shape (R,)."""
        sums = _sums(self.counts, values[:, None].astype(np.float32))[:, 0]
        return sums.astype(np.float64) / len(values)

    def ece(self, confidence: NDArray[np.float64], hit: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Expected calibration error in each sample, shape (R,)."""
        gap = _onehot(_bins(confidence, N_BINS), N_BINS) * (hit - confidence)[:, None]
        sums = _sums(self.counts, gap.astype(np.float32))
        return np.abs(sums.astype(np.float64)).sum(axis=1) / len(hit)


def interval(values: NDArray[np.floating]) -> tuple[float, float]:
    """The middle 95 % of bootstrap values."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _sums(counts: NDArray[np.uint8], values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums over the texts of each sample: (R, N) x (N, K) -> (R, K), in blocks of samples."""
    blocks = np.array_split(counts, -(-len(counts) // _BLOCK))
    return np.concatenate([block.astype(np.float32) @ values for block in blocks])


def _onehot(classes: NDArray[np.int64], n_classes: int) -> NDArray[np.float32]:
    return np.eye(n_classes, dtype=np.float32)[classes]


def _bins(confidence: NDArray[np.float64], n_bins: int) -> NDArray[np.int64]:
    return np.minimum((confidence * n_bins).astype(np.int64), n_bins - 1)


def score(
    probabilities: NDArray[np.floating],
    labels: NDArray[np.int64],
    *,
    cut: Cut,
    split: Split,
    resamples: Resamples | None = None,
    repeats: tuple[float, ...] = (),
) -> Score:
    """Score one chip's probabilities, shape (N, C), against labels, shape (N,).

    Args:
        probabilities: Shape (N, C).
        labels: Shape (N,).
        cut: The chip and its layer, written into the score, like `split` and `repeats`.
        split: See `cut`.
        resamples: Bootstrap samples of this split. None draws them.
        repeats: See `cut`.
    """
    n, n_classes = probabilities.shape
    predicted = probabilities.argmax(axis=1)
    hit = predicted == labels
    drawn = resamples or Resamples.of(labels, n_classes)
    low, high = wilson_interval(int(hit.sum()), n)
    likelihood = np.clip(probabilities[np.arange(n), labels].astype(np.float64), 1e-12, 1.0)
    confidence = probabilities.max(axis=1).astype(np.float64)
    f1_low, f1_high = interval(drawn.macro_f1(labels, predicted))
    loss_low, loss_high = interval(drawn.mean(-np.log(likelihood)))
    ece_low, ece_high = interval(drawn.ece(confidence, hit))
    auroc, precision = ranking(labels == 1, probabilities[:, 1]) if n_classes == 2 else (None, None)
    return Score(
        layer=cut.layer,
        **fields_of(cut.chip),
        split=split,
        n=n,
        accuracy=float(hit.mean()),
        accuracy_low=low,
        accuracy_high=high,
        macro_f1=macro_f1(labels, predicted, n_classes),
        macro_f1_low=f1_low,
        macro_f1_high=f1_high,
        log_loss=float(-np.log(likelihood).mean()),
        log_loss_low=loss_low,
        log_loss_high=loss_high,
        ece=expected_calibration_error(confidence, hit),
        ece_low=ece_low,
        ece_high=ece_high,
        auroc=auroc,
        average_precision=precision,
        repeats=repeats,
    )
