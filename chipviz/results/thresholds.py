"""Binary tasks: from which probability on the answer is yes.

Chosen on validation, by the share of false alarms or by what errors cost. Reads the predictions of
a finished run.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chipviz.errors import ConfigError
from chipviz.keys import Cut, Record, Split
from chipviz.results.run_folder import Predictions

_HINT = "Write fpr=5% for at most 5 % false alarms, or cost=1:10 where a miss costs ten of them."


class Rates(Record):
    """Errors of a threshold on one split."""

    n_positive: int
    n_negative: int
    false_positive_rate: float
    true_positive_rate: float
    accuracy: float


class Threshold(Record):
    """From which probability on a text is of the positive class."""

    rule: str
    """As the user wrote it."""
    positive: int
    """Class, 0 or 1."""
    at: float
    """Probability of the positive class, in [0, 1]."""
    validation: Rates
    test: Rates

    def decide(self, row: Sequence[float]) -> int:
        """The class of a text with these probabilities of both classes."""
        return self.positive if row[self.positive] >= self.at else 1 - self.positive


@dataclass(frozen=True)
class Wish:
    """What a threshold is to reach: a rate of false alarms, or the price of both errors."""

    rate: float | None = None
    false_alarm: float = 1.0
    miss: float = 1.0


def parse_wish(text: str) -> Wish:
    """Read `fpr=5%`, `fpr=0.05` or `cost=1:10` (a false alarm to a miss).

    Raises:
        ConfigError: If it cannot be read.
    """
    number = r"(\d{1,6}(?:\.\d{1,6})?)"
    compact = "".join(text.split()).lower()
    if found := re.fullmatch(rf"fpr={number}(%?)", compact):
        rate = float(found[1]) / (100 if found[2] else 1)
        if 0 < rate < 1:
            return Wish(rate)
    if found := re.fullmatch(rf"cost={number}:{number}", compact):
        false_alarm, miss = float(found[1]), float(found[2])
        if false_alarm > 0 and miss > 0:
            return Wish(None, false_alarm, miss)
    raise ConfigError(f"The threshold {text[:60]!r} cannot be read.", _HINT, "threshold")


def choose_threshold(
    said: Predictions, cut: Cut, rule: str, names: list[str], positive: str | None = None
) -> Threshold:
    """The threshold that a rule asks for, chosen on validation.

    Args:
        said: Of a finished run.
        cut: Whose chip answers.
        rule: See `parse_wish`.
        names: Of the classes.
        positive: Name of the class that is looked for. None is the second.

    Raises:
        ConfigError: If the rule cannot be read, the task is not binary, or validation is too small
            for so low a rate.
    """
    wish = parse_wish(rule)
    if len(names) != 2:
        raise ConfigError(
            f"A threshold is for two classes, and this task has {len(names)}.",
            "Leave the threshold out.",
            "threshold",
        )
    if positive is not None and positive not in names:
        raise ConfigError(
            f"There is no class {positive[:60]!r}.",
            f"Classes: {names[0][:60]}, {names[1][:60]}.",
            "positive",
        )
    if cut.chip not in said.temperatures:
        raise ConfigError(
            "This run kept no confidences: an older version trained it.", "Train it again."
        )
    wanted = names.index(positive) if positive is not None else 1
    shares = _shares(said, cut, "validation", wanted)
    is_positive = said.labels["validation"] == wanted
    at = _at(shares, is_positive, wish, names[1 - wanted])
    rates: dict[Split, Rates] = {
        split: _rates(_shares(said, cut, split, wanted), said.labels[split] == wanted, at)
        for split in ("validation", "test")
    }
    return Threshold(rule=rule, positive=wanted, at=at, **rates)


def _at(
    shares: NDArray[np.float64], is_positive: NDArray[np.bool_], wish: Wish, negative: str
) -> float:
    """Probability from which on the answer is yes: between two that were seen."""
    seen = np.unique(shares)
    between = np.concatenate([[0.0], (seen[:-1] + seen[1:]) / 2, [(seen[-1] + 1) / 2]])
    negatives = np.sort(shares[~is_positive])
    false_alarms = len(negatives) - np.searchsorted(negatives, between)
    if wish.rate is not None:
        most = int(wish.rate * len(negatives) + 1e-9)
        if most == 0:
            raise ConfigError(
                f"Validation has {len(negatives)} rows of class {negative[:60]!r}, too few to "
                f"tell {100 * wish.rate:g} % of them.",
                "Give a higher rate, or train with more validation rows.",
                "threshold",
            )
        return float(between[np.flatnonzero(false_alarms <= most)[0]])
    misses = np.searchsorted(np.sort(shares[is_positive]), between)
    costs = wish.false_alarm * false_alarms + wish.miss * misses
    best = np.flatnonzero(costs == costs.min())
    return float(between[best[np.abs(between[best] - 0.5).argmin()]])


def _shares(said: Predictions, cut: Cut, split: Split, positive: int) -> NDArray[np.float64]:
    """Probability of the positive class as the chip gives it, shape (N,): not calibrated."""
    logit = said.sure[split, cut.chip][cut.layer].astype(np.float64)
    logit *= float(said.temperatures[cut.chip][cut.layer])
    is_positive = said.classes[split, cut.chip][cut.layer] == positive
    return 1 / (1 + np.exp(np.where(is_positive, -logit, logit)))


def _rates(shares: NDArray[np.float64], is_positive: NDArray[np.bool_], at: float) -> Rates:
    said = shares >= at
    return Rates(
        n_positive=int(is_positive.sum()),
        n_negative=int((~is_positive).sum()),
        false_positive_rate=float(said[~is_positive].mean()),
        true_positive_rate=float(said[is_positive].mean()),
        accuracy=float((said == is_positive).mean()),
    )
