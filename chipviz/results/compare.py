"""Runs of one task side by side: what each reaches and keeps, and how it differs from the whole."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chipviz.config import RECOMMENDED, Rule
from chipviz.errors import ConfigError
from chipviz.keys import Cut
from chipviz.results.metrics import wilson_interval
from chipviz.results.models import Ancestor
from chipviz.results.report import RunReport
from chipviz.results.run_folder import Predictions

RESAMPLES = 2_000
"""Resamples of the test texts behind an interval of a difference."""
Mark = Literal["cut", "whole", "itself"]
"""*cut* is a chip where a rule cuts, *whole* the best chip on the last layer, *itself* what a model
answers without a chip."""


@dataclass(frozen=True)
class Compared:
    """One run that is compared."""

    report: RunReport
    predictions: Predictions

    @property
    def root(self) -> Ancestor:
        """The model that its backbone was made of, or the backbone itself."""
        backbone = self.report.backbone
        if backbone.lineage is not None:
            return backbone.lineage.root
        return Ancestor(
            name=backbone.name, n_layers=backbone.n_layers, n_parameters=backbone.n_parameters
        )

    @property
    def method(self) -> str:
        """What was done to the root."""
        lineage = self.report.backbone.lineage
        return "dense" if lineage is None else lineage.method

    @property
    def whole(self) -> Cut:
        """The chip on the last layer that validation prefers."""
        last = self.report.backbone.n_layers - 1
        scores = [s for s in self.report.scores if s.split == "validation" and s.layer == last]
        return max(scores, key=lambda s: s.accuracy).cut


@dataclass(frozen=True)
class Row:
    """One line of the table, and one point of the chart."""

    run_id: str
    backbone: str
    method: str
    """What was done to the model that the backbone was made of, and what answers."""
    mark: Mark
    layer: int
    """Last layer that is kept."""
    chip: str
    """What reads it. Empty where the model answers by itself."""
    layer_ratio: float
    """Blocks removed, over those of the model that it was made of."""
    parameter_ratio: float
    n_parameters: int
    weight_bytes: int
    latency_s: float | None
    n: int
    """Test texts that the accuracy is on."""
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    difference: float
    """Accuracy less that of the reference, on the same texts."""
    difference_low: float
    difference_high: float


def refuse_other_texts(runs: Sequence[Compared]) -> None:
    """Refuse runs that were not tested on the same texts.

    Raises:
        ConfigError: Naming two runs, or one that does not say what it was tested on.
    """
    first = runs[0].report
    for run in runs:
        report = run.report
        if report.task.test_fingerprint is None:
            raise ConfigError(
                f"Run {report.run_id} is of an older version and does not say what it was tested "
                "on.",
                "Train it again; what was read is not read again.",
            )
        if report.task.test_fingerprint != first.task.test_fingerprint:
            raise ConfigError(
                f"Runs {first.run_id} and {report.run_id} were tested on other texts.",
                "Compare runs of one task, with the same columns, seed and number of test texts.",
            )


def compare(runs: Sequence[Compared], rule: Rule = RECOMMENDED) -> list[Row]:
    """Rows of all runs: each cut by a rule, whole, and without a chip where that was asked.

    Differences are to the reference: the whole model of the first run whose backbone was not made
    here, or else of the largest.

    Args:
        runs: At least one.
        rule: Where each is cut.

    Raises:
        ConfigError: If they were not tested on the same texts.
    """
    refuse_other_texts(runs)
    reference = reference_of(runs)
    right = _right(reference, reference.whole)
    rows: list[Row] = []
    for run in runs:
        chosen = run.report.select(rule, correct=run.predictions.correct).cut
        marks: dict[Mark, Cut] = {"cut": chosen, "whole": run.whole}
        rows += [_of_chip(run, mark, cut, right) for mark, cut in marks.items()]
        if run.predictions.asked is not None:
            rows.append(_itself(run, run.predictions.asked, right))
    return rows


def reference_of(runs: Sequence[Compared]) -> Compared:
    """The run that the others are compared with."""
    dense = (run for run in runs if run.report.backbone.lineage is None)
    return next(dense, max(runs, key=lambda run: run.report.backbone.n_parameters))


def _right(run: Compared, cut: Cut) -> NDArray[np.bool_]:
    """Which test texts a chip gets right, shape (N,)."""
    return run.predictions.at(cut, "test") == run.predictions.labels["test"]


def _of_chip(run: Compared, mark: Mark, cut: Cut, reference: NDArray[np.bool_]) -> Row:
    cost = run.report.cost_at(cut)
    right = _right(run, cut)
    difference, low, high = paired_difference(right, reference)
    score = run.report.score_at(cut, "test")
    kept = run.report.backbone.n_layers - round(cost.layer_ratio * run.report.backbone.n_layers)
    return Row(
        run_id=run.report.run_id,
        backbone=run.report.backbone.name,
        method=f"{run.method}, chip {'at the cut' if mark == 'cut' else 'on the last layer'}",
        mark=mark,
        layer=cut.layer,
        chip=f"{cut.chip.vector.name} {cut.chip.word}",
        layer_ratio=1 - kept / run.root.n_layers,
        parameter_ratio=1 - cost.n_parameters / run.root.n_parameters,
        n_parameters=cost.n_parameters,
        weight_bytes=cost.weight_bytes,
        latency_s=cost.latency_s,
        n=len(right),
        accuracy=score.accuracy,
        accuracy_low=score.accuracy_low,
        accuracy_high=score.accuracy_high,
        difference=difference,
        difference_low=low,
        difference_high=high,
    )


def _itself(run: Compared, asked: NDArray[np.int32], reference: NDArray[np.bool_]) -> Row:
    right = asked == run.predictions.labels["test"][: len(asked)]
    difference, low, high = paired_difference(right, reference[: len(asked)])
    accuracy_low, accuracy_high = wilson_interval(int(right.sum()), len(right))
    backbone, dense = run.report.backbone, run.report.dense
    return Row(
        run_id=run.report.run_id,
        backbone=backbone.name,
        method=f"{run.method}, the model itself",
        mark="itself",
        layer=backbone.n_layers - 1,
        chip="",
        layer_ratio=1 - backbone.n_layers / run.root.n_layers,
        parameter_ratio=1 - backbone.n_parameters / run.root.n_parameters,
        n_parameters=backbone.n_parameters,
        weight_bytes=dense.weight_bytes,
        latency_s=dense.latency_s,
        n=len(right),
        accuracy=float(right.mean()),
        accuracy_low=accuracy_low,
        accuracy_high=accuracy_high,
        difference=difference,
        difference_low=low,
        difference_high=high,
    )


def paired_difference(
    right: NDArray[np.bool_], reference: NDArray[np.bool_], seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two accuracies on the same texts, with its 95 % interval.

    The texts are drawn again with replacement; both answers of a text stay together.

    Args:
        right: Which texts one gets right, shape (N,).
        reference: Which the other does, shape (N,).
        seed: Of the draws.
    """
    gain = right.astype(np.int64) - reference.astype(np.int64)
    n = len(gain)
    counts = np.bincount(gain + 1, minlength=3)
    # What is drawn of n texts that are +1, 0 or -1 is multinomial.
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES)
    found = (draws[:, 2] - draws[:, 0]) / n
    low, high = np.quantile(found, [0.025, 0.975])
    return float(gain.mean()), float(low), float(high)


def to_dict(rows: Sequence[Row]) -> dict[str, Any]:
    """What `compare --json` prints."""
    return {"rows": [asdict(row) for row in rows]}


def as_markdown(rows: Sequence[Row]) -> str:
    """The table, as Markdown."""
    heads = ("backbone", "method", "chip", "layer ratio", "parameter ratio", "accuracy", "to dense")
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * 3 + ['---:'] * 4)} |"]
    for row in rows:
        cells = (
            _cell(row.backbone),
            _cell(row.method),
            _cell(f"layer {row.layer}, {row.chip}" if row.chip else "none"),
            f"{100 * row.layer_ratio:.1f} %",
            f"{100 * row.parameter_ratio:.1f} %",
            f"{_percent(row.accuracy, row.accuracy_low, row.accuracy_high)}",
            f"{_percent(row.difference, row.difference_low, row.difference_high, sign='+')}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(value: float, low: float, high: float, sign: str = "") -> str:
    shown = (f"{100 * number:{sign}.1f}" for number in (value, low, high))
    return "{} ({} to {})".format(*shown)


def _cell(text: str) -> str:
    """Names are of others: nothing in them ends a cell or a line."""
    return re.sub(r"[|`<>\[\]\r\n]", " ", text)
