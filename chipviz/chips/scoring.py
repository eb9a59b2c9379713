"""Chips + features -> scores and predictions: validation for every choice, test once."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chipviz.chips.chip import Chips
from chipviz.chips.rows import Rows
from chipviz.config import PUBLISHED_MAX_TRAIN
from chipviz.keys import EMBEDDING_LAYER, ChipKey, Cut, Split
from chipviz.progress import Progress, ProgressFn
from chipviz.results import metrics
from chipviz.results.calibration import fit_temperature, log_odds
from chipviz.results.metrics import CurvePoint, Score
from chipviz.results.run_folder import Predictions


@dataclass(frozen=True)
class Trained:
    """The chips of a run, what each reaches and what each predicted."""

    chips: Chips
    scores: list[Score]
    predictions: Predictions


def score(rows: Rows, chips: Chips, seed: int, progress: ProgressFn) -> Trained:
    """Score every chip on validation and, once, on test.

    On validation those chips are scored that have not seen it; on test those that are shipped. With
    folds, validation means all labelled texts, each judged by a chip of the other folds.

    Args:
        rows: The features and the task.
        chips: All chips of the run.
        seed: Of the resamples that intervals rest on.
        progress: Told each step.
    """
    scores: list[Score] = []
    predictions, task = Predictions({}, {}), rows.task
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        labels = task.judged(split).labels
        predictions.labels[split] = labels.astype(np.int32)
        resamples = metrics.Resamples.of(labels, task.n_classes, seed)
        for key in chips.stacks:
            answers, sure = [], []
            temperatures = [] if split == "validation" else predictions.temperatures[key].tolist()
            for layer in range(EMBEDDING_LAYER, rows.features.n_layers):
                progress(Progress("fitting", f"scoring on the {split} texts"))
                cut = Cut(layer, key)
                probabilities = _said(rows, chips, cut, split)
                if layer != EMBEDDING_LAYER:  # nobody cuts there
                    answers.append(probabilities.argmax(axis=1).astype(np.int32))
                    if split == "validation":
                        temperatures.append(fit_temperature(probabilities, labels))
                    sure.append(log_odds(probabilities, temperatures[layer]))
                scores.append(
                    metrics.score(
                        probabilities,
                        labels,
                        cut=cut,
                        split=split,
                        resamples=resamples,
                        repeats=_repeats(rows, chips, cut, split),
                    )
                )
            predictions.classes[split, key] = np.stack(answers)
            predictions.sure[split, key] = np.stack(sure)
            predictions.temperatures[key] = np.array(temperatures, dtype=np.float32)
    return Trained(chips, scores, predictions)


def points(rows: Rows, chips: Chips, key: ChipKey) -> list[CurvePoint]:
    """Validation accuracy per layer after all training texts."""
    n_train = len(rows.task.splits["train"])
    cut_short = key.recipe == "published" and not key.lucky and rows.task.kind == "text"
    n_seen = min(n_train, PUBLISHED_MAX_TRAIN) if cut_short else n_train
    labels, found = rows.task.judged("validation").labels, []
    for layer in range(rows.features.n_layers):
        cut = Cut(layer, key)
        answers = _said(rows, chips, cut, "validation").argmax(axis=1)
        found.append(CurvePoint(n_seen, cut, float(np.mean(answers == labels))))
    return found


def _said(rows: Rows, chips: Chips, cut: Cut, split: Split) -> NDArray[np.float32]:
    """What a chip says of every text that it is judged on, shape (N, C)."""
    if split == "validation" and cut.chip in chips.held_out:
        return chips.held_out[cut.chip][cut.layer + 1].numpy()
    chip = chips.at(cut, train_only=split == "validation")
    return rows.probabilities(chip, split, cut.chip.vector, cut.layer)


def _repeats(rows: Rows, chips: Chips, cut: Cut, split: Split) -> tuple[float, ...]:
    """Accuracies of the same chip fitted again."""
    again = (stack.at(cut.layer + 1) for stack in chips.repeats.get(cut.chip, []))
    return tuple(rows.accuracy(chip, split, cut.chip.vector, cut.layer) for chip in again)
