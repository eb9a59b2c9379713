"""Recipes: from some layers of a curve to fitted chips."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chipviz.chips import stc_published
from chipviz.chips.chip import Chip
from chipviz.chips.judge import Judge, balanced_weights, joined, with_constant
from chipviz.chips.linear import Read, fit_linear
from chipviz.chips.mlp import fit_mlp
from chipviz.chips.published import PICTURE_EPOCHS, fit_pictures, fit_published
from chipviz.chips.rows import Rows
from chipviz.chips.sparse import Scaler, Solution, choose, solve_path
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
    fold: Tensor | None = None
    """Fold of each training and each validation text, shape (N,). None has no folds."""

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
    held_out: Tensor | None = None
    """With folds: what chips that had not seen them say of the training and validation texts, shape
    (K, N, C). The chip above is fitted on all of them then."""
    repeats: list[Chip] = field(default_factory=list)
    """The same chips fitted again on bootstrap samples of the training texts."""
    history: list[CurvePoint] = field(default_factory=list)
    """Validation accuracies while they were trained."""


def sound(block: Block) -> Fitted:
    """Chips of this project's recipe, and the same again for the band."""
    weights, seed = _class_weights(block, block.labels("train")), block.config.seed
    refit = None
    if block.key.kind == "sparse":
        return _sparse(block, weights)
    if block.key.kind == "mlp":
        chip = _mlp(block, weights, seed, tell=True)
        strengths: list[float] = []
    else:
        chosen = judge_of(block).choose()
        # The mean of the folds' weights, or those of the one fit: where a further fit begins.
        chip = _chip(chosen.weights.mean(dim=1), bias=block.bias)
        strengths = chosen.strengths.tolist()
        if block.fold is not None:
            return Fitted(_refit(block, chip, strengths), strengths, held_out=chosen.said)
        refit = _refit(block, chip, strengths) if block.config.refit else None
    repeats = [
        _again(block, chip, strengths, weights, seed + repeat)
        for repeat in range(1, block.config.repeats)
    ]
    return Fitted(chip, strengths, refit, repeats=repeats)


def _sparse(block: Block, row_weight: Tensor | None) -> Fitted:
    """Chips with an L1 penalty, its strength by validation, and the same from all texts."""
    train, validation = block.labels("train"), block.labels("validation")
    read, held = block.read("train"), block.read("validation")
    found = choose(read, train, held, validation, block.n_classes, row_weight=row_weight)
    strengths = (1 / (found.solution.penalty * len(train))).tolist()
    if not block.config.refit:
        return Fitted(_sparse_chip(found.solution, found.scaler), strengths)
    labels = torch.cat([train, validation])
    (again,) = solve_path(
        joined(read, held, len(train)),
        labels,
        block.n_classes,
        penalty=found.solution.penalty * (len(train) / len(labels)),  # C stays what it was
        row_weight=_class_weights(block, labels),
        start=found.solution,
        scaler=found.scaler,
    )
    chip = _sparse_chip(found.solution, found.scaler)
    return Fitted(chip, strengths, _sparse_chip(again, found.scaler))


def _sparse_chip(solution: Solution, scaler: Scaler) -> Chip:
    mean, scale = scaler.mean[:, 0].cpu(), scaler.scale[:, 0].cpu()
    return Chip(solution.weight, solution.bias, mean=mean, scale=scale)


def published(block: Block) -> Fitted:
    """The papers' chips, and what they knew on their way. One run in one order has no band."""
    key, labels = block.key, block.labels("train")
    if key.kind == "sparse":
        held, truth = block.read("validation"), block.labels("validation")
        chip, penalties = stc_published.probes(block.read("train"), labels, held, truth)
        return Fitted(chip, penalties)
    if block.rows.task.kind == "image":
        return Fitted(_on_pictures(block, labels))
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
    return Fitted(chip.to(torch.device("cpu")), history=history)


def _on_pictures(block: Block, labels: Tensor) -> Chip:
    def on_epoch(done: int) -> None:
        if done % 10 == 0:
            epochs = f"epoch {done} of {PICTURE_EPOCHS}"
            block.meter.advance(0, f"training {block.key.kind} chips as published, {epochs}")

    return fit_pictures(
        block.key.kind,
        block.read("train"),
        labels,
        block.n_classes,
        seed=block.config.seed,
        on_epoch=on_epoch,
    ).to(torch.device("cpu"))


RECIPES: dict[Recipe, Callable[[Block], Fitted]] = {"sound": sound, "published": published}


def judge_of(block: Block) -> Judge:
    """Who judges the linear chips of a block: the validation split, or every fold of all texts."""
    train, validation = block.labels("train"), block.labels("validation")
    balanced = block.config.class_weight == "balanced"
    read, held = (_widened(block, block.read(split)) for split in ("train", "validation"))
    if block.fold is None:
        return Judge.of_split(read, train, held, validation, block.n_classes, balanced=balanced)
    labels, both = torch.cat([train, validation]), joined(read, held, len(train))
    return Judge.of_folds(both, labels, block.fold, block.n_classes, balanced=balanced)


def _widened(block: Block, read: Read) -> Read:
    return with_constant(read) if block.bias else read


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
    """Weight per row, 1 on average. None where all weigh the same."""
    if block.config.class_weight == "none":
        return None
    return balanced_weights(labels, torch.ones_like(labels, dtype=torch.bool), block.n_classes)
