"""Features + task -> chips of every layer, and their scores."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from chipviz.chips.chip import Chip, Chips
from chipviz.chips.live import LiveCurve, PointsFn
from chipviz.chips.recipes import RECIPES, Block, Fitted
from chipviz.chips.rows import Rows
from chipviz.config import PUBLISHED_MAX_TRAIN, RunConfig
from chipviz.data.task import Task
from chipviz.features.storage import Features
from chipviz.keys import EMBEDDING_LAYER, ChipKey, Cut, Split
from chipviz.parallel import Pool
from chipviz.progress import Meter, Progress, ProgressFn
from chipviz.results import metrics
from chipviz.results.metrics import CurvePoint, Score
from chipviz.results.run_folder import Predictions

TOGETHER_BYTES = {"cpu": 0, "cuda": 8 << 30}
"""Maximum bytes of features of layers that are fitted as one problem, one layer at least. A GPU is
only full with many. A CPU's cache only holds one."""


@dataclass(frozen=True)
class Trained:
    """The chips of a run, what each reaches and what each predicted."""

    chips: Chips
    scores: list[Score]
    predictions: Predictions


@dataclass(frozen=True)
class Trainer:
    """Fits and scores the chips of one run."""

    task: Task
    config: RunConfig
    device: torch.device
    """Where chips are fitted."""
    pool: Pool
    """Where layers are fitted beside each other."""
    progress: ProgressFn
    on_points: PointsFn
    bias: bool = False
    """Whether linear chips get one: states without a final norm have no nearly constant part."""

    def live_curve(self) -> LiveCurve:
        """What draws the curve while features arrive."""
        return LiveCurve(
            self.task, self.config, self.device, self.pool, self.progress, self.on_points
        )

    def fit(self, features: Features) -> Chips:
        """Fit the chips of all layers on all training texts. Validation makes every choice.

        Every fit begins anew, so the result depends on the features alone, not on the way there.
        """
        rows, keys = Rows(features, self.task, self.device), self.config.chip_keys
        meter = Meter("fitting", len(keys) * (features.n_layers + 1), self.progress)
        chips = Chips({})
        for key in keys:
            blocks = self._fit_curve(rows, key, meter)
            chips.stacks[key] = Chip.cat([fitted.chip for fitted in blocks])
            if strengths := [s for fitted in blocks for s in fitted.strengths]:
                chips.strengths[key] = strengths
            refits = [fitted.refit for fitted in blocks if fitted.refit is not None]
            if refits:
                chips.refits[key] = Chip.cat(refits)
            again = zip(*(fitted.repeats for fitted in blocks), strict=True)
            chips.repeats[key] = [Chip.cat(same) for same in again]
            history = [point for fitted in blocks for point in fitted.history]
            for n_train in sorted({point.n_train for point in history}):
                self.on_points([point for point in history if point.n_train == n_train])
            self.on_points(self._points(rows, chips.stacks[key], key))
        return chips

    def _fit_curve(self, rows: Rows, key: ChipKey, meter: Meter) -> list[Fitted]:
        """The chips of each block of layers."""
        blocks, recipe = list(_blocks(rows, key)), RECIPES[key.recipe]
        fitted: list[Fitted] = []

        def fit(layers: range) -> Fitted:
            return recipe(Block(rows, key, layers, self.config, self.bias, meter))

        for layers, result in zip(blocks, self.pool.map(fit, blocks), strict=True):
            fitted.append(result)
            meter.advance(len(layers), f"fitting {_words(key)} chips")
        return fitted

    def score(self, features: Features, chips: Chips) -> Trained:
        """Score every chip on validation and, once, on test.

        On validation those chips are scored that have not seen it; on test those that are shipped.
        """
        rows = Rows(features, self.task, self.device)
        scores: list[Score] = []
        predictions = Predictions({}, {})
        splits: tuple[Split, ...] = ("validation", "test")
        for split in splits:
            labels = self.task.splits[split].labels
            predictions.labels[split] = labels.astype(np.int32)
            resamples = metrics.Resamples.of(labels, self.task.n_classes, self.config.seed)
            for key in chips.stacks:
                answers = []
                for layer in range(EMBEDDING_LAYER, features.n_layers):
                    self.progress(Progress("fitting", f"scoring on the {split} texts"))
                    cut = Cut(layer, key)
                    chip = chips.at(cut, train_only=split == "validation")
                    probabilities = rows.probabilities(chip, split, key.vector, layer)
                    answers.append(probabilities.argmax(axis=1).astype(np.int32))
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
                predictions.classes[split, key] = np.stack(answers[1:])  # no embedding
        return Trained(chips, scores, predictions)

    def _points(self, rows: Rows, stack: Chip, key: ChipKey) -> list[CurvePoint]:
        """Validation accuracy per layer after all training texts."""
        n_train = len(self.task.splits["train"])
        n_seen = min(n_train, PUBLISHED_MAX_TRAIN) if key.recipe == "published" else n_train
        return [
            CurvePoint(
                n_seen,
                Cut(layer, key),
                rows.accuracy(stack.at(layer + 1), "validation", key.vector, layer),
            )
            for layer in range(rows.features.n_layers)
        ]


def _blocks(rows: Rows, key: ChipKey) -> Iterator[range]:
    """Layers to fit as one problem, embedding first."""
    n_layers, width = rows.features.n_layers, rows.features.widths[key.site]
    bytes_of_layer = 4 * len(rows.task.splits["train"]) * (width + 1)
    n = max(1, TOGETHER_BYTES.get(rows.device.type, 0) // bytes_of_layer)
    for first in range(EMBEDDING_LAYER, n_layers, n):
        yield range(first, min(first + n, n_layers))


def _repeats(rows: Rows, chips: Chips, cut: Cut, split: Split) -> tuple[float, ...]:
    """Accuracies of the same chip fitted again."""
    again = (stack.at(cut.layer + 1) for stack in chips.repeats.get(cut.chip, []))
    return tuple(rows.accuracy(chip, split, cut.chip.vector, cut.layer) for chip in again)


def _words(key: ChipKey) -> str:
    published = ", as published" if key.recipe == "published" else ""
    return f"{key.kind} {key.vector.name}{published}"
