"""Recipes: from some layers of a curve to fitted chips."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as fn
from torch import Tensor

from chipviz.chips.chip import Chip
from chipviz.chips.linear import STRENGTHS, Read, choose_strength, fit_linear
from chipviz.chips.mlp import fit_mlp
from chipviz.chips.published import fit_published
from chipviz.chips.rows import Rows
from chipviz.config import PUBLISHED_MAX_TRAIN, RunConfig
from chipviz.keys import EMBEDDING_LAYER, ChipKey, Cut, Recipe, Split
from chipviz.progress import Meter
from chipviz.results.metrics import CurvePoint


@dataclass(frozen=True)
class Block:
    """Some layers of one curve, which are fitted together."""

    rows: Rows
    key: ChipKey
    layers: range
    config: RunConfig
    bias: bool
    """Whether linear chips get one."""
    meter: Meter

    def read(self, split: Split) -> Read:
        """What reads rows of a split, all layers of the block at once."""
        return self.rows.reader(split, self.key.vector, self.layers)

    def labels(self, split: Split) -> Tensor:
        """Class indices of a split, shape (N,)."""
        return self.rows.labels(split)

    @property
    def n_classes(self) -> int:
        """C."""
        return self.rows.task.n_classes


@dataclass(frozen=True)
class Fitted:
    """The chips of some layers, as one recipe leaves them."""

    chip: Chip
    """One chip per layer."""
    strengths: list[float] = field(default_factory=list)
    """Penalty that validation chose, per layer. None where a recipe chooses none."""
    refit: Chip | None = None
    """The same chips fitted on training and validation texts together, at the chosen strengths."""
    repeats: list[Chip] = field(default_factory=list)
    """The same chips fitted again on bootstrap samples of the training texts."""
    history: list[CurvePoint] = field(default_factory=list)
    """Validation accuracies while they were trained."""


def sound(block: Block) -> Fitted:
    """Chips of this project's recipe, and the same again for the band."""
    weights, seed = _class_weights(block, block.labels("train")), block.config.seed
    refit = None
    if block.key.kind == "mlp":
        chip = _mlp(block, weights, seed, tell=True)
        strengths: list[float] = []
    else:
        chip, strengths = _linear(block, weights)
        refit = _refit(block, chip, strengths) if block.config.refit else None
    repeats = [
        _again(block, chip, strengths, weights, seed + repeat)
        for repeat in range(1, block.config.repeats)
    ]
    return Fitted(chip, strengths, refit, repeats)


def published(block: Block) -> Fitted:
    """The paper's chips, and what they knew on their way. One run in one order has no band."""
    key, labels = block.key, block.labels("train")
    n_rows = min(len(labels), PUBLISHED_MAX_TRAIN)
    history: list[CurvePoint] = []

    def look(n_done: int, chips: Chip) -> None:
        label = f"training {key.kind} chips as published, {n_done} of {n_rows} rows"
        block.meter.advance(0, label)
        for i, layer in enumerate(block.layers):
            if layer == EMBEDDING_LAYER or n_done == n_rows:
                continue
            chip = chips.at(i).to(torch.device("cpu"))
            accuracy = block.rows.accuracy(chip, "validation", key.vector, layer)
            history.append(CurvePoint(n_done, Cut(layer, key), accuracy))

    chip = fit_published(
        key.kind,
        block.read("train"),
        labels,
        block.n_classes,
        seed=block.config.seed,
        on_rows=look,
    )
    return Fitted(chip, history=history)


RECIPES: dict[Recipe, Callable[[Block], Fitted]] = {"sound": sound, "published": published}


def _linear(block: Block, row_weight: Tensor | None) -> tuple[Chip, list[float]]:
    """One linear chip per layer, and the strength that validation chose for it."""
    read, held_out = block.read("train"), block.read("validation")
    if block.bias:
        read, held_out = with_constant(read), with_constant(held_out)
    grid = fit_linear(read, block.labels("train"), block.n_classes, row_weight=row_weight)
    validation = block.labels("validation").to(grid.device)
    states = held_out(0, len(validation))
    best = [choose_strength(grid[k], states[k], validation) for k in range(len(block.layers))]
    weight = torch.stack([grid[k, g] for k, g in enumerate(best)]).cpu()
    return _chip(weight, bias=block.bias), [STRENGTHS[g] for g in best]


def _refit(block: Block, chip: Chip, strengths: list[float]) -> Chip:
    """The same chips from training and validation texts together; nothing is chosen any more."""
    train, validation = block.labels("train"), block.labels("validation")
    read = joined(block.read("train"), block.read("validation"), len(train))
    labels = torch.cat([train, validation])
    return _from(block, chip, strengths, read, labels, _class_weights(block, labels))


def _from(
    block: Block,
    chip: Chip,
    strengths: list[float],
    read: Read,
    labels: Tensor,
    row_weight: Tensor | None,
) -> Chip:
    """Linear chips fitted on other rows or weights, each at its strength, from where `chip` is."""
    begin = chip.weight
    if chip.bias is not None:
        read, begin = with_constant(read), torch.cat([begin, chip.bias[..., None]], dim=-1)
    weights = fit_linear(
        read,
        labels,
        block.n_classes,
        strengths=torch.tensor(strengths)[:, None],
        row_weight=row_weight,
        start=begin,
    )
    return _chip(weights[:, 0].cpu(), bias=block.bias)


def _mlp(block: Block, row_weight: Tensor | None, seed: int, *, tell: bool = False) -> Chip:
    """One MLP chip per layer. `tell` says so to the meter after each epoch."""
    label = f"fitting {block.key.vector.name} MLP chips"
    return fit_mlp(
        block.read("train"),
        block.labels("train"),
        block.read("validation"),
        block.labels("validation"),
        block.n_classes,
        seed=seed,
        row_weight=row_weight,
        on_epoch=lambda: block.meter.advance(0, label) if tell else None,
    ).to(torch.device("cpu"))


def _again(
    block: Block, chip: Chip, strengths: list[float], class_weights: Tensor | None, seed: int
) -> Chip:
    """The same chips from a bootstrap sample of the training texts."""
    labels = block.labels("train")
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(labels), (len(labels),), generator=random)
    counts = torch.bincount(drawn, minlength=len(labels)).float()
    row_weight = counts if class_weights is None else counts * class_weights
    if block.key.kind == "mlp":
        return _mlp(block, row_weight, seed)
    return _from(block, chip, strengths, block.read("train"), labels, row_weight)


def _chip(weight: Tensor, *, bias: bool) -> Chip:
    """Chips of fitted weights. With `bias` the last column of a weight is the chip's bias."""
    return Chip(weight[..., :-1], weight[..., -1]) if bias else Chip(weight)


def _class_weights(block: Block, labels: Tensor) -> Tensor | None:
    """Weight per training row, 1 on average. None where all weigh the same."""
    if block.config.class_weight == "none":
        return None
    counts = torch.bincount(labels, minlength=block.n_classes).float()
    return (len(labels) / (counts.clamp_min(1) * (counts > 0).sum()))[labels]


def with_constant(read: Read) -> Read:
    """The same rows with a column of ones at their end, whose weight is a bias."""

    def widened(start: int, stop: int) -> Tensor:
        return fn.pad(read(start, stop), (0, 1), value=1.0)

    return widened


def joined(first: Read, second: Read, n_first: int) -> Read:
    """The rows of one reader, `n_first` of them, and then those of another."""

    def read(start: int, stop: int) -> Tensor:
        parts = []
        if start < n_first:
            parts.append(first(start, min(stop, n_first)))
        if stop > n_first:
            parts.append(second(max(start, n_first) - n_first, stop - n_first))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    return read
