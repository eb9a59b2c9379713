"""Features + task -> chips of every layer, and their scores.

Knows which recipe belongs to which chip.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as fn
from torch import Tensor

from chipviz import metrics
from chipviz.arrays import Features
from chipviz.chips import Chip, Chips
from chipviz.config import PUBLISHED_MAX_TRAIN, RunConfig, Split
from chipviz.keys import EMBEDDING_LAYER, ChipKey, Cut, Recipe
from chipviz.linear import STRENGTHS, Read, choose_strength, fit_linear
from chipviz.live import LiveCurve, PointsFn
from chipviz.metrics import CurvePoint, Score
from chipviz.mlp import fit_mlp
from chipviz.progress import Meter, Progress, ProgressFn
from chipviz.published import fit_published
from chipviz.rows import Rows
from chipviz.run_folder import Predictions
from chipviz.streams import Pool
from chipviz.task import Task

TOGETHER_BYTES = {"cpu": 0, "cuda": 8 << 30}
"""Maximum bytes of features of layers that are fitted as one problem, one layer at least. A GPU is
only full with many; a CPU's cache only holds one."""


@dataclass(frozen=True)
class Fitted:
    """The chips of some layers, as one recipe leaves them."""

    chip: Chip
    """One chip per layer."""
    strengths: list[float] = field(default_factory=list)
    """Penalty that validation chose, per layer; none where a recipe chooses none."""
    repeats: list[Chip] = field(default_factory=list)
    """The same chips fitted again on bootstrap samples of the training texts."""
    history: list[CurvePoint] = field(default_factory=list)
    """Validation accuracies while they were trained."""


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
        """Fit the chips of all layers on all training texts; validation chooses what is chosen.

        Every fit begins anew, so the result depends on the features alone, not on the way there.
        """
        rows, keys = Rows(features, self.task, self.device), self.config.chip_keys
        meter = Meter("fitting", len(keys) * (features.n_layers + 1), self.progress)
        chips = Chips({}, {}, {})
        for key in keys:
            blocks = self._fit_curve(rows, key, meter)
            chips.stacks[key] = Chip.cat([fitted.chip for fitted in blocks])
            if strengths := [s for fitted in blocks for s in fitted.strengths]:
                chips.strengths[key] = strengths
            again = zip(*(fitted.repeats for fitted in blocks), strict=True)
            chips.repeats[key] = [Chip.cat(same) for same in again]
            history = [point for fitted in blocks for point in fitted.history]
            for n_train in sorted({point.n_train for point in history}):
                self.on_points([point for point in history if point.n_train == n_train])
            self.on_points(self._points(rows, chips.stacks[key], key))
        return chips

    def _fit_curve(self, rows: Rows, key: ChipKey, meter: Meter) -> list[Fitted]:
        """The chips of each block of layers."""
        blocks = list(_blocks(rows, key))
        fitted: list[Fitted] = []

        def fit(layers: range) -> Fitted:
            return RECIPES[key.recipe](self, rows, key, layers, meter)

        for layers, result in zip(blocks, self.pool.map(fit, blocks), strict=True):
            fitted.append(result)
            meter.advance(len(layers), f"fitting {_words(key)} chips")
        return fitted

    def score(self, features: Features, chips: Chips) -> tuple[list[Score], Predictions]:
        """Score every chip on validation and, once, on test; give back what each predicted too."""
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
                    probabilities = rows.probabilities(chips.at(cut), split, key.vector, layer)
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
        return scores, predictions

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


# --- recipes: from a curve and some of its layers to fitted chips --------------------------------


def _sound(trainer: Trainer, rows: Rows, key: ChipKey, layers: range, meter: Meter) -> Fitted:
    """Chips of this project's recipe, and the same again for the band."""
    weights = _class_weights(trainer)
    if key.kind == "mlp":
        chip = _mlp(rows, key, layers, weights, trainer.config.seed, meter)
        strengths: list[float] = []
    else:
        chip, strengths = _linear(trainer, rows, key, layers, weights)
    repeats = [
        _again(trainer, rows, key, layers, chip, strengths, weights, trainer.config.seed + repeat)
        for repeat in range(1, trainer.config.repeats)
    ]
    return Fitted(chip, strengths, repeats)


def _published(trainer: Trainer, rows: Rows, key: ChipKey, layers: range, meter: Meter) -> Fitted:
    """The paper's chips, and what they knew on their way; one run in one order has no band."""
    labels = rows.labels("train")
    n_rows = min(len(labels), PUBLISHED_MAX_TRAIN)
    history: list[CurvePoint] = []

    def look(n_done: int, chips: Chip) -> None:
        meter.advance(0, f"training {key.kind} chips as published, {n_done} of {n_rows} rows")
        for i, layer in enumerate(layers):
            if layer == EMBEDDING_LAYER or n_done == n_rows:
                continue
            chip = chips.at(i).to(torch.device("cpu"))
            accuracy = rows.accuracy(chip, "validation", key.vector, layer)
            history.append(CurvePoint(n_done, Cut(layer, key), accuracy))

    chip = fit_published(
        key.kind,
        rows.reader("train", key.vector, layers),
        labels,
        rows.task.n_classes,
        seed=trainer.config.seed,
        on_rows=look,
    )
    return Fitted(chip, history=history)


RECIPES: dict[Recipe, Callable[[Trainer, Rows, ChipKey, range, Meter], Fitted]] = {
    "sound": _sound,
    "published": _published,
}


def _linear(
    trainer: Trainer, rows: Rows, key: ChipKey, layers: range, row_weight: Tensor | None
) -> tuple[Chip, list[float]]:
    """One linear chip per layer, and the strength that validation chose for it."""
    read = rows.reader("train", key.vector, layers)
    held_out = rows.reader("validation", key.vector, layers)
    if trainer.bias:
        read, held_out = with_constant(read), with_constant(held_out)
    grid = fit_linear(read, rows.labels("train"), rows.task.n_classes, row_weight=row_weight)
    validation = rows.labels("validation").to(grid.device)
    states = held_out(0, len(validation))
    best = [choose_strength(grid[k], states[k], validation) for k in range(len(layers))]
    weight = torch.stack([grid[k, g] for k, g in enumerate(best)]).cpu()
    return _chip(weight, bias=trainer.bias), [STRENGTHS[g] for g in best]


def _mlp(
    rows: Rows,
    key: ChipKey,
    layers: range,
    row_weight: Tensor | None,
    seed: int,
    meter: Meter | None = None,
) -> Chip:
    """One MLP chip per layer."""
    label = f"fitting {key.vector.name} MLP chips"
    return fit_mlp(
        rows.reader("train", key.vector, layers),
        rows.labels("train"),
        rows.reader("validation", key.vector, layers),
        rows.labels("validation"),
        rows.task.n_classes,
        seed=seed,
        row_weight=row_weight,
        on_epoch=lambda: meter.advance(0, label) if meter else None,
    ).to(torch.device("cpu"))


def _again(
    trainer: Trainer,
    rows: Rows,
    key: ChipKey,
    layers: range,
    chip: Chip,
    strengths: list[float],
    class_weights: Tensor | None,
    seed: int,
) -> Chip:
    """The same chips from a bootstrap sample of the training texts."""
    labels = rows.labels("train")
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(labels), (len(labels),), generator=random)
    counts = torch.bincount(drawn, minlength=len(labels)).float()
    row_weight = counts if class_weights is None else counts * class_weights
    if key.kind == "mlp":
        return _mlp(rows, key, layers, row_weight, seed)
    read, begin = rows.reader("train", key.vector, layers), chip.weight
    if chip.bias is not None:
        read, begin = with_constant(read), torch.cat([begin, chip.bias[..., None]], dim=-1)
    weights = fit_linear(
        read,
        labels,
        trainer.task.n_classes,
        strengths=torch.tensor(strengths)[:, None],
        row_weight=row_weight,
        start=begin,
    )
    return _chip(weights[:, 0].cpu(), bias=trainer.bias)


def _chip(weight: Tensor, *, bias: bool) -> Chip:
    """Chips of fitted weights; with `bias` the last column of a weight is the chip's bias."""
    return Chip(weight[..., :-1], weight[..., -1]) if bias else Chip(weight)


def _class_weights(trainer: Trainer) -> Tensor | None:
    """What each training row counts, 1 on average; None where all count alike."""
    if trainer.config.class_weight == "none":
        return None
    labels = torch.from_numpy(trainer.task.splits["train"].labels)
    counts = torch.bincount(labels, minlength=trainer.task.n_classes).float()
    return (len(labels) / (counts.clamp_min(1) * (counts > 0).sum()))[labels]


def with_constant(read: Read) -> Read:
    """The same rows with a column of ones at their end, whose weight is a bias."""

    def widened(start: int, stop: int) -> Tensor:
        return fn.pad(read(start, stop), (0, 1), value=1.0)

    return widened


def _words(key: ChipKey) -> str:
    published = ", as published" if key.recipe == "published" else ""
    return f"{key.kind} {key.vector.name}{published}"
