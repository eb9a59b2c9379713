"""Early exits: each text leaves at the first chip that is sure. What that saves, and what it costs.

Reads the predictions of a finished run. Nothing is computed anew.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chipviz.config import DEFAULT_MARGIN
from chipviz.errors import ConfigError
from chipviz.keys import Cut, Record, Split
from chipviz.results.metrics import paired_lower_bound, wilson_interval
from chipviz.results.run_folder import Predictions

MOST_EXITS = 6
"""Layers at which a text may leave, the last one included."""
N_THRESHOLDS = 200
"""Thresholds that are looked at, from the safest on."""
NEVER = 1e9
"""A threshold above all log-odds."""


class ExitScore(Record):
    """What early exits reach on one split."""

    n: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    """95 % interval."""
    fixed_accuracy: float
    """The same texts, all read to the last exit."""
    mean_layers: float
    """Layers that a text runs through."""
    shares: list[float]
    """Share of the texts that leaves at each exit."""


class ExitPlan(Record):
    """Where texts may leave, and how sure a chip must be."""

    layers: list[int]
    """Exits, shallow to deep. The last one is the cut: whoever gets there leaves."""
    temperatures: list[float]
    """Temperature of each exit's chip."""
    threshold: float
    """Calibrated log-odds of its class from which on a text leaves. `NEVER` where none may."""
    margin: float
    """Accuracy that is not to be lost."""
    validation: ExitScore
    test: ExitScore
    fixed_layer: int
    """The shallowest single cut that passes the same test."""

    @property
    def sure(self) -> float:
        """The threshold as a probability."""
        return 1 / (1 + math.exp(-min(self.threshold, 500.0)))

    @property
    def pays(self) -> bool:
        """Whether texts run through fewer layers than at the single cut that is as good."""
        return self.test.mean_layers < self.fixed_layer + 1


@dataclass(frozen=True)
class _Chips:
    """What the chips of all exits say of the texts of one split."""

    classes: NDArray[np.int32]
    """Shape (E, N)."""
    sure: NDArray[np.float32]
    """Log-odds, shape (E, N)."""
    labels: NDArray[np.int32]
    """Shape (N,)."""
    layers: NDArray[np.int64]
    """Shape (E,)."""

    @classmethod
    def of(cls, said: Predictions, cut: Cut, split: Split, layers: Sequence[int]) -> "_Chips":
        rows = list(layers)
        return cls(
            said.classes[split, cut.chip][rows],
            said.sure[split, cut.chip][rows],
            said.labels[split],
            np.array(rows),
        )

    def leave(self, threshold: float) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The exit of each text, and whether the answer there is right, shape (N,) both."""
        may = self.sure >= threshold
        may[-1] = True
        at = may.argmax(axis=0)
        return at, self.classes[at, np.arange(len(at))] == self.labels

    def score(self, threshold: float) -> ExitScore:
        at, right = self.leave(threshold)
        low, high = wilson_interval(int(right.sum()), len(right))
        shares = np.bincount(at, minlength=len(self.layers)) / len(at)
        return ExitScore(
            n=len(at),
            accuracy=float(right.mean()),
            accuracy_low=low,
            accuracy_high=high,
            fixed_accuracy=float((self.classes[-1] == self.labels).mean()),
            mean_layers=float((self.layers[at] + 1).mean()),
            shares=shares.tolist(),
        )


def exit_layers(cut_layer: int) -> list[int]:
    """Evenly spaced layers up to the cut, at most `MOST_EXITS` of them."""
    n = min(MOST_EXITS, cut_layer + 1)
    return [round((cut_layer + 1) * (i + 1) / n) - 1 for i in range(n)]


def plan_exits(said: Predictions, cut: Cut, margin: float = DEFAULT_MARGIN) -> ExitPlan:
    """Choose one threshold on validation.

    Thresholds are tried from the safest on, and the first that fails ends it: so the chance to pass
    a bad one is that of a single test. One passes if the accuracy, less that of the cut on the same
    texts, lies above -`margin` with 97.5 % confidence.

    Args:
        said: Of a finished run.
        cut: The last exit, and the chip whose kind stands at all of them.
        margin: Accuracy that is not to be lost, in (0, 1).

    Raises:
        ConfigError: If the run kept no confidences, or its chips read several layers.
    """
    if not 0 < margin < 1:
        raise ConfigError(f"The margin is {margin}, expected 0 to 1.", "0.02 means two points.")
    if cut.chip.joins:
        raise ConfigError(
            "This chip reads neurons of several layers, and so cannot answer before the last.",
            "Give a chip of one layer, such as --chip linear.",
        )
    if cut.chip not in said.temperatures:
        raise ConfigError(
            "This run kept no confidences: an older version trained it.", "Train it again."
        )
    layers = exit_layers(cut.layer)
    chips = _Chips.of(said, cut, "validation", layers)
    fixed = chips.classes[-1] == chips.labels
    threshold = NEVER
    for tried in _thresholds(chips):
        _, right = chips.leave(tried)
        if paired_lower_bound(right, fixed) <= -margin:
            break
        threshold = tried
    temperatures = said.temperatures[cut.chip]
    return ExitPlan(
        layers=layers,
        temperatures=[float(temperatures[layer]) for layer in layers],
        threshold=threshold,
        margin=margin,
        validation=chips.score(threshold),
        test=_Chips.of(said, cut, "test", layers).score(threshold),
        fixed_layer=_fixed_layer(said, cut, margin),
    )


def trade_off(said: Predictions, cut: Cut, split: Split) -> list[tuple[float, float, float]]:
    """What every threshold would give: (threshold, mean layers, accuracy), the safest first."""
    layers = exit_layers(cut.layer)
    tried = [NEVER, *_thresholds(_Chips.of(said, cut, "validation", layers))]
    chips = _Chips.of(said, cut, split, layers)
    scores = [(threshold, chips.score(threshold)) for threshold in tried]
    return [(threshold, score.mean_layers, score.accuracy) for threshold, score in scores]


def _thresholds(chips: _Chips) -> list[float]:
    """Log-odds of validation texts at the exits before the last, the highest first."""
    if len(chips.layers) == 1:
        return []
    shares = np.linspace(1, 0, N_THRESHOLDS)
    found = np.quantile(chips.sure[:-1], shares, method="lower")
    return np.unique(found)[::-1].astype(float).tolist()


def _fixed_layer(said: Predictions, cut: Cut, margin: float) -> int:
    """The shallowest layer that loses no more than `margin` to the cut, tested from it upwards."""
    correct = said.correct[cut.chip]
    layer = cut.layer
    while layer and paired_lower_bound(correct[layer - 1], correct[cut.layer]) > -margin:
        layer -= 1
    return layer
