"""How sure a chip may be: one temperature a chip, fitted on texts that it has not seen."""

import numpy as np
from numpy.typing import NDArray

COLDEST, WARMEST = 0.05, 20.0
"""Ends of the search. A chip that errs nowhere would be cooled for ever."""
_STEPS = 14
_SMALLEST = 1e-30


def fit_temperature(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """The temperature at which probabilities, shape (N, C), fit labels, shape (N,), best.

    The log-loss is convex in the inverse temperature, so its slope has one root: halving finds it
    to 0.1 %.

    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """
    logits = _logits(probabilities)
    right = logits[np.arange(len(labels)), labels].mean()
    low, high = np.log(1 / WARMEST), np.log(1 / COLDEST)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        weights = _softmax(logits * np.float32(np.exp(middle)))
        if (weights * logits).sum(axis=1).mean() < right:  # colder fits better still
            low = middle
        else:
            high = middle
    return float(np.exp(-(low + high) / 2))


def log_odds(probabilities: NDArray[np.floating], temperature: float) -> NDArray[np.float32]:
    """Log-odds of the likeliest class at a temperature, shape (N,), float32.

    Probabilities near 1 have no room for how sure a chip is. Log-odds have.
    """
    logits = _logits(probabilities) / np.float32(temperature)
    rest = logits.copy()
    rest[np.arange(len(rest)), logits.argmax(axis=1)] = -np.inf
    most = rest.max(axis=1)  # the largest of `logits` is zero
    return -(most + np.log(np.exp(rest - most[:, None]).sum(axis=1)))


def _logits(probabilities: NDArray[np.floating]) -> NDArray[np.float32]:
    """Class scores but for a constant a text: the largest is zero."""
    logits = np.log(np.maximum(probabilities, _SMALLEST, dtype=np.float32))
    return logits - logits.max(axis=1, keepdims=True)


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shares = np.exp(logits)
    return shares / shares.sum(axis=1, keepdims=True)
