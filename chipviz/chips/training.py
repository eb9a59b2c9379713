"""Features + task -> chips of every layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from chipviz.chips.chip import Chip, Chips
from chipviz.chips.joiner import Joiner
from chipviz.chips.live import LiveCurve, PointsFn
from chipviz.chips.recipes import RECIPES, Block, Fitted
from chipviz.chips.rows import Rows
from chipviz.chips.scoring import points
from chipviz.config import RunConfig
from chipviz.data.task import Task
from chipviz.features.storage import Features
from chipviz.keys import EMBEDDING_LAYER, ChipKey
from chipviz.parallel import Pool
from chipviz.progress import Meter, ProgressFn

TOGETHER_BYTES = {"cpu": 0, "cuda": 8 << 30}
"""Maximum bytes of features of layers that are fitted as one problem, one layer at least. A GPU is
only full with many. A CPU's cache only holds one."""
SPARSE_BYTES = 128 << 20
"""Maximum bytes of standardised columns, and of three numbers a text and class, of sparse chips
that are fitted together."""


@dataclass(frozen=True)
class Trainer:
    """Fits the chips of one run."""

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
        joiner = Joiner(rows, self.config, chips, meter)
        for key in keys:
            if key.joins:
                continue  # these rest on the others
            blocks = self._fit_curve(rows, key, meter)
            chips.stacks[key] = Chip.cat([fitted.chip for fitted in blocks])
            if strengths := [s for fitted in blocks for s in fitted.strengths]:
                chips.strengths[key] = strengths
            held_out = [fitted.held_out for fitted in blocks if fitted.held_out is not None]
            if held_out:
                chips.held_out[key] = torch.cat(held_out)
            refits = [fitted.refit for fitted in blocks if fitted.refit is not None]
            if refits:
                chips.refits[key] = Chip.cat(refits)
            again = zip(*(fitted.repeats for fitted in blocks), strict=True)
            chips.repeats[key] = [Chip.cat(same) for same in again]
            history = [point for fitted in blocks for point in fitted.history]
            for n_train in sorted({point.n_train for point in history}):
                self.on_points([point for point in history if point.n_train == n_train])
            self.on_points(points(rows, chips, key))
        joined = [key for key in keys if key.joins]
        for key, found in zip(joined, self.pool.map(joiner.join, joined), strict=True):
            joiner.keep(key, found)
            self.on_points(points(rows, chips, key))
        chips.sparsified.extend(joiner.told())
        return chips

    def _fit_curve(self, rows: Rows, key: ChipKey, meter: Meter) -> list[Fitted]:
        """The chips of each block of layers."""
        beside = self.pool.width if key.kind == "sparse" else None
        blocks, recipe = list(_blocks(rows, key, beside)), RECIPES[key.recipe]
        fold = None if self.task.fold is None else torch.from_numpy(self.task.fold)
        fitted: list[Fitted] = []
        folds = f", {self.task.folds} folds" if self.task.folds > 1 else ""

        def fit(layers: range) -> Fitted:
            return recipe(Block(rows, key, layers, self.config, self.bias, meter, fold))

        for layers, result in zip(blocks, self.pool.map(fit, blocks), strict=True):
            fitted.append(result)
            meter.advance(len(layers), f"fitting {_words(key)} chips{folds}")
        return fitted


def _blocks(rows: Rows, key: ChipKey, beside: int | None) -> Iterator[range]:
    """Layers to fit as one problem, embedding first.

    Args:
        rows: Their features.
        key: The curve.
        beside: Groups that are fitted beside each other, for chips whose steps are so small that
            many layers should share them. None fits as few together as the device allows.
    """
    n_layers, width = rows.features.n_layers, rows.features.width(key.vector)
    n_rows = len(rows.task.splits["train"])
    if beside is None:
        n = max(1, TOGETHER_BYTES.get(rows.device.type, 0) // (4 * n_rows * (width + 1)))
    else:
        most = SPARSE_BYTES // (4 * n_rows * max(width, 3 * rows.task.n_classes))
        n = max(1, min(most, -(-(n_layers + 1) // beside)))
    for first in range(EMBEDDING_LAYER, n_layers, n):
        yield range(first, min(first + n, n_layers))


def _words(key: ChipKey) -> str:
    published = ", as published" if key.recipe == "published" else ""
    return f"{key.kind} {key.vector.name}{published}"
