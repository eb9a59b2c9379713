"""Features + task -> chips of every layer, the live curve while features arrive, and scores.

Knows which recipe belongs to which chip, and reads features a few layers at a time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as fn
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from chipviz import metrics
from chipviz.arrays import Features
from chipviz.batching import Chunk
from chipviz.chips import Chip, Chips
from chipviz.config import PUBLISHED_MAX_TRAIN, ChipKind, Pooling, RunConfig, Split
from chipviz.linear import STRENGTHS, Read, choose_strength, fit_linear
from chipviz.metrics import EMBEDDING_LAYER, CurvePoint, Score
from chipviz.mlp import fit_mlp
from chipviz.progress import Meter, Progress, ProgressFn
from chipviz.published import fit_published
from chipviz.streams import n_streams, side_by_side
from chipviz.task import Task

PointsFn = Callable[[Sequence[CurvePoint]], None]
Key = tuple[ChipKind, Pooling]

LIVE_GROWTH = 1.5
"""From one size of the live curve to the next: all refits together cost three times the last one,
whatever the number of texts."""
LIVE_FEWEST = 32
"""Training texts of its smallest size."""
TOGETHER_BYTES = {"cpu": 0, "cuda": 8 << 30}
"""Features of layers that are fitted side by side, at most, one layer at least: a GPU is only full
with many, a CPU's cache only holds one."""
SCORE_ROWS = 8_192
"""Rows scored at once."""


@dataclass(frozen=True)
class Trainer:
    """Fits and scores the chips of one run."""

    features: Features
    task: Task
    config: RunConfig
    device: torch.device
    progress: ProgressFn
    on_points: PointsFn
    bias: bool = False
    """Whether linear chips get one: states without a final norm have no nearly constant part."""

    def keys(self) -> list[Key]:
        """Every kind of chip this run trains, by pooling; raw states take the paper's two."""
        return [
            (kind, pooling)
            for pooling in self.features.poolings
            for kind in (("linear", "mlp") if pooling == "raw" else self.config.chips)
        ]

    def fit(self) -> Chips:
        """Fit the chips of all layers on all training texts; validation chooses what is chosen.

        Every fit begins anew, so the result depends on the features alone, not on the way there.
        """
        keys = self.keys()
        meter = Meter("fitting", len(keys) * (self.features.n_layers + 1), self.progress)
        chips = Chips({}, {}, {})
        for kind, pooling in keys:
            fitted = self._fit_curve(kind, pooling, meter)
            parts, strengths, repeats = zip(*fitted, strict=True)
            stack = chips.stacks[kind, pooling] = Chip.cat(parts)
            if kind == "linear" and pooling != "raw":
                chips.strengths[kind, pooling] = [s for chosen in strengths for s in chosen]
            chips.repeats[kind, pooling] = [Chip.cat(same) for same in zip(*repeats, strict=True)]
            self.on_points(self._points(stack, kind, pooling))
        return chips

    def _fit_curve(
        self, kind: ChipKind, pooling: Pooling, meter: Meter
    ) -> list[tuple[Chip, list[float], list[Chip]]]:
        """Chips, strengths and repeats of each block of layers."""
        on_the_way: list[CurvePoint] = []

        def fit(layers: range) -> tuple[Chip, list[float], list[Chip]]:
            if pooling == "raw":  # the paper's recipe is one run in one order: it has no band
                return self._fit_published(kind, layers, meter, on_the_way), [], []
            chip, chosen = self._fit_block(kind, pooling, layers, meter)
            repeats = [
                self._fit_again(kind, pooling, layers, chip, chosen, repeat)
                for repeat in range(1, self.config.repeats)
            ]
            return chip, chosen, repeats

        found, blocks = [], list(self._blocks())
        fitted = side_by_side(fit, blocks, self.device)
        for layers, result in zip(blocks, fitted, strict=True):
            found.append(result)
            meter.advance(len(layers), f"fitting {_name(kind, pooling)} chips")
        for n_train in sorted({point.n_train for point in on_the_way}):
            self.on_points([point for point in on_the_way if point.n_train == n_train])
        return found

    def score(self, chips: Chips, run_dir: Path) -> list[Score]:
        """Score every chip on validation and, once, on test; keep what each predicted."""
        scores: list[Score] = []
        predicted: dict[str, NDArray[np.int32]] = {}
        splits: tuple[Split, ...] = ("validation", "test")
        for split in splits:
            labels = self.task.splits[split].labels
            predicted[f"labels.{split}"] = labels.astype(np.int32)
            resampled = metrics.Resamples.of(labels, self.task.n_classes, self.config.seed)
            for kind, pooling in chips.stacks:
                answers = []
                for layer in range(EMBEDDING_LAYER, self.features.n_layers):
                    self.progress(Progress("fitting", f"scoring on the {split} texts"))
                    chip = chips.at(layer, pooling, kind)
                    probabilities = self._probabilities(chip, split, pooling, layer)
                    others = (s.at(layer + 1) for s in chips.repeats.get((kind, pooling), []))
                    again = [self._accuracy(c, split, pooling, layer) for c in others]
                    answers.append(probabilities.argmax(axis=1).astype(np.int32))
                    scores.append(
                        metrics.score(
                            probabilities,
                            labels,
                            layer=layer,
                            pooling=pooling,
                            chip=kind,
                            split=split,
                            resamples=resampled,
                            repeats=tuple(again),
                        )
                    )
                predicted[f"{split}.{pooling}.{kind}"] = np.stack(answers[1:])  # no embedding
        temporary = run_dir / "predictions.tmp"
        save_file(predicted, temporary)
        temporary.replace(run_dir / "predictions.safetensors")
        return scores

    def _blocks(self) -> Iterator[range]:
        """Layers to fit side by side, embedding first."""
        n_rows, width = len(self.task.splits["train"]), self.features.hidden_size
        budget = TOGETHER_BYTES.get(self.device.type, 0)
        n = max(1, budget // (4 * n_rows * (width + 1)))
        for first in range(EMBEDDING_LAYER, self.features.n_layers, n):
            yield range(first, min(first + n, self.features.n_layers))

    def _fit_block(
        self, kind: ChipKind, pooling: Pooling, layers: range, meter: Meter
    ) -> tuple[Chip, list[float]]:
        """The chips of some layers, and the strengths of linear ones."""
        read = self._reader("train", pooling, layers)
        labels, n_classes = labels_of(self.task, "train"), self.task.n_classes
        if kind == "mlp":
            return self._fit_mlp(pooling, layers, self._row_weight(), meter=meter), []
        held_out = self._reader("validation", pooling, layers)
        if self.bias:
            read, held_out = with_constant(read), with_constant(held_out)
        grid = fit_linear(read, labels, n_classes, row_weight=self._row_weight())
        validation = labels_of(self.task, "validation").to(grid.device)
        rows = held_out(0, len(validation))
        best = [choose_strength(grid[k], rows[k], validation) for k in range(len(layers))]
        weight = torch.stack([grid[k, g] for k, g in enumerate(best)]).cpu()
        return self._linear(weight), [STRENGTHS[g] for g in best]

    def _fit_published(
        self, kind: ChipKind, layers: range, meter: Meter, on_the_way: list[CurvePoint]
    ) -> Chip:
        """The paper's chips of some layers, and what they knew while they were trained."""
        labels = labels_of(self.task, "train")
        n_rows = min(len(labels), PUBLISHED_MAX_TRAIN)
        shown = [layer for layer in layers if layer != EMBEDDING_LAYER]

        def look(rows: int, chips: Chip) -> None:
            meter.advance(0, f"training {kind} chips as published, {rows} of {n_rows} rows")
            for layer in shown if rows < n_rows else []:
                chip = chips.at(layer - layers.start).to(torch.device("cpu"))
                accuracy = self._accuracy(chip, "validation", "raw", layer)
                on_the_way.append(CurvePoint(rows, layer, "raw", kind, accuracy))

        return fit_published(
            kind,
            self._reader("train", "raw", layers),
            labels,
            self.task.n_classes,
            seed=self.config.seed,
            on_rows=look,
        )

    def _linear(self, weight: Tensor) -> Chip:
        """The chips of fitted weights, whose last column may be a bias."""
        return Chip(weight[..., :-1], weight[..., -1]) if self.bias else Chip(weight)

    def _fit_again(
        self,
        kind: ChipKind,
        pooling: Pooling,
        layers: range,
        chip: Chip,
        strengths: list[float],
        repeat: int,
    ) -> Chip:
        """The same chips from a bootstrap sample of the training texts."""
        labels = labels_of(self.task, "train")
        seed = self.config.seed + repeat
        random = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(labels), (len(labels),), generator=random)
        counts = torch.bincount(drawn, minlength=len(labels)).float()
        own = self._row_weight()
        row_weight = counts if own is None else counts * own
        if kind == "mlp":
            return self._fit_mlp(pooling, layers, row_weight, seed=seed)
        read, begin = self._reader("train", pooling, layers), chip.weight
        if chip.bias is not None:
            read, begin = with_constant(read), torch.cat([begin, chip.bias[..., None]], dim=-1)
        weights = fit_linear(
            read,
            labels,
            self.task.n_classes,
            strengths=torch.tensor(strengths)[:, None],
            row_weight=row_weight,
            start=begin,
        )
        return self._linear(weights[:, 0].cpu())

    def _fit_mlp(
        self,
        pooling: Pooling,
        layers: range,
        row_weight: Tensor | None,
        *,
        seed: int | None = None,
        meter: Meter | None = None,
    ) -> Chip:
        return fit_mlp(
            self._reader("train", pooling, layers),
            labels_of(self.task, "train"),
            self._reader("validation", pooling, layers),
            labels_of(self.task, "validation"),
            self.task.n_classes,
            seed=self.config.seed if seed is None else seed,
            row_weight=row_weight,
            on_epoch=lambda: meter.advance(0, f"fitting {pooling} MLP chips") if meter else None,
        ).to(torch.device("cpu"))

    def _row_weight(self) -> Tensor | None:
        """What each training row counts, 1 on average."""
        if self.config.class_weight == "none":
            return None
        labels = labels_of(self.task, "train")
        counts = torch.bincount(labels, minlength=self.task.n_classes).float()
        return (len(labels) / (counts.clamp_min(1) * (counts > 0).sum()))[labels]

    def _reader(self, split: Split, pooling: Pooling, layers: range) -> Read:
        return partial(read_layers, self.features, split, pooling, layers, self.device)

    def _probabilities(
        self, chip: Chip, split: Split, pooling: Pooling, layer: int
    ) -> NDArray[np.float32]:
        n_rows = len(self.task.splits[split])
        parts = [
            chip.probabilities(self.features.read(split, pooling, layer, start, start + SCORE_ROWS))
            for start in range(0, n_rows, SCORE_ROWS)
        ]
        return torch.cat(parts).numpy()

    def _accuracy(self, chip: Chip, split: Split, pooling: Pooling, layer: int) -> float:
        answers = self._probabilities(chip, split, pooling, layer).argmax(axis=1)
        return float(np.mean(answers == self.task.splits[split].labels))

    def _points(self, stack: Chip, kind: ChipKind, pooling: Pooling) -> list[CurvePoint]:
        n_train = len(self.task.splits["train"])
        n_seen = min(n_train, PUBLISHED_MAX_TRAIN) if pooling == "raw" else n_train
        return [
            CurvePoint(
                n_seen,
                layer,
                pooling,
                kind,
                self._accuracy(stack.at(layer + 1), "validation", pooling, layer),
            )
            for layer in range(self.features.n_layers)
        ]


@dataclass
class LiveCurve:
    """Refits all layers, warm, at growing sizes as soon as so many training texts have arrived.

    The sizes depend on the task alone: a resumed run ends with the same learning curve.
    """

    task: Task
    config: RunConfig
    device: torch.device
    progress: ProgressFn
    on_points: PointsFn
    seconds: float = 0.0
    """Spent on refits so far, while texts are read beside them."""
    _n_fitted: int = 0
    _n_checked: int = 0
    """Validation texts that have arrived."""
    _weights: dict[tuple[Pooling, int], Tensor] = field(default_factory=dict)

    def on_chunk(self, features: Features, chunk: Chunk) -> None:
        """Draw the curve for every size that can be fitted now."""
        if chunk.split == "validation":
            self._n_checked = chunk.stop
        if chunk.split != "train" or "linear" not in self.config.chips:
            return
        for n_rows in live_sizes(len(self.task.splits["train"])):
            if self._n_fitted < n_rows <= chunk.stop:
                self._n_fitted = n_rows
                self._draw(features, n_rows)

    def _draw(self, features: Features, n_rows: int) -> None:
        """Fit the first training texts; points of every pooling as they come."""
        labels = labels_of(self.task, "train")[:n_rows]
        validation = labels_of(self.task, "validation")[: self._n_checked]
        label = f"drawing the curve after {n_rows} of {len(self.task.splits['train'])} texts"
        for pooling in self.config.poolings:
            points = []

            def fit(layer: int, pooling: Pooling = pooling) -> tuple[float, float]:
                start = time.perf_counter()
                weight = self._fit(features, pooling, layer, labels)
                rows = read_layers(
                    features, "validation", pooling, [layer], self.device, 0, len(validation)
                )
                said = (rows[0] @ weight.T).argmax(dim=1).cpu()
                accuracy = float((said == validation).double().mean())
                return accuracy, time.perf_counter() - start

            fitted = side_by_side(fit, range(features.n_layers), self.device)
            for layer, (accuracy, seconds) in enumerate(fitted):
                self.seconds += seconds / n_streams(self.device)
                self.progress(Progress("extracting", label))
                points.append(CurvePoint(n_rows, layer, pooling, "linear", accuracy))
            self.on_points(points)

    def _fit(self, features: Features, pooling: Pooling, layer: int, labels: Tensor) -> Tensor:
        """One strength from the middle of the grid and a loose end: this curve is a preview."""
        before = self._weights.get((pooling, layer))
        weight = fit_linear(
            partial(read_layers, features, "train", pooling, [layer], self.device),
            labels,
            self.task.n_classes,
            strengths=[STRENGTHS[len(STRENGTHS) // 2]],
            start=None if before is None else before[None],
            tolerance=1e-3,
            max_steps=30,
        )[0, 0]
        self._weights[pooling, layer] = weight
        return weight


def live_sizes(n_train: int) -> list[int]:
    """Numbers of training texts at which the live curve is drawn, ascending; all of them last."""
    sizes = [n_train]
    while (fewer := round(sizes[-1] / LIVE_GROWTH)) >= LIVE_FEWEST:
        sizes.append(fewer)
    return sizes[::-1]


def with_constant(read: Read) -> Read:
    """The same rows with a column of ones at their end, whose weight is a bias."""

    def widened(start: int, stop: int) -> Tensor:
        return fn.pad(read(start, stop), (0, 1), value=1.0)

    return widened


def labels_of(task: Task, split: Split) -> Tensor:
    """Class indices of a split, shape (N,)."""
    return torch.from_numpy(task.splits[split].labels)


def read_layers(
    features: Features,
    split: Split,
    pooling: Pooling,
    layers: Sequence[int],
    device: torch.device,
    start: int,
    stop: int,
) -> Tensor:
    """Rows of some layers on the device that fits, shape (K, stop - start, D)."""
    rows = [features.read(split, pooling, layer, start, stop) for layer in layers]
    return (rows[0][None] if len(rows) == 1 else torch.stack(rows)).to(device)


def _name(kind: ChipKind, pooling: Pooling) -> str:
    published = ", as published" if pooling == "raw" else ""
    return f"{kind} {pooling}{published}"
