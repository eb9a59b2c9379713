"""The live curve: chips of every layer refitted, warm, while the features arrive."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chipviz.backbones.batching import Chunk
from chipviz.chips.linear import STRENGTHS, fit_linear
from chipviz.chips.rows import Rows
from chipviz.config import RunConfig
from chipviz.data.task import Task
from chipviz.features.storage import Features
from chipviz.keys import ChipKey, Cut
from chipviz.parallel import Pool
from chipviz.progress import Progress, ProgressFn
from chipviz.results.metrics import CurvePoint

PointsFn = Callable[[Sequence[CurvePoint]], None]
"""Told the points of a curve as they become known."""

LIVE_GROWTH = 1.5
"""Ratio of one size of the live curve to the size before. All refits together cost three times the
last one, whatever the number of texts."""
LIVE_FEWEST = 32
"""Training texts at the smallest size of the live curve."""


@dataclass
class LiveCurve:
    """Refits all layers at growing sizes, as soon as so many training texts have arrived.

    The sizes depend on the task alone: a resumed run ends with the same learning curve.
    """

    task: Task
    config: RunConfig
    device: torch.device
    pool: Pool
    """Where layers are fitted beside each other."""
    progress: ProgressFn
    on_points: PointsFn
    seconds: float = 0.0
    """Seconds spent on refits so far, while texts are read beside them."""
    _n_fitted: int = 0
    _n_checked: int = 0
    """Validation texts that have arrived."""
    _weights: dict[Cut, Tensor] = field(default_factory=dict)

    def on_chunk(self, features: Features, chunk: Chunk) -> None:
        """Draw the curve for every size that can be fitted now."""
        if chunk.split == "validation":
            self._n_checked = chunk.stop
        if chunk.split != "train":
            return
        for n_rows in live_sizes(len(self.task.splits["train"])):
            if self._n_fitted < n_rows <= chunk.stop:
                self._n_fitted = n_rows
                self._draw(Rows(features, self.task, self.device), n_rows)

    def _draw(self, rows: Rows, n_rows: int) -> None:
        """Fit the first training texts and tell the points of each pooling as they come."""
        validation = rows.labels("validation")[: self._n_checked]
        label = f"drawing the curve after {n_rows} of {len(self.task.splits['train'])} texts"
        for key in self.config.chip_keys:
            if (key.recipe, key.kind) != ("sound", "linear"):
                continue

            def fit(layer: int, key: ChipKey = key) -> tuple[float, float]:
                start = time.perf_counter()
                weight = self._fit(rows, Cut(layer, key), n_rows)
                held_out = rows.reader("validation", key.vector, [layer])(0, len(validation))
                answers = (held_out[0] @ weight.T).argmax(dim=1).cpu()
                accuracy = float((answers == validation).double().mean())
                return accuracy, time.perf_counter() - start

            points = []
            fitted = self.pool.map(fit, range(rows.features.n_layers))
            for layer, (accuracy, seconds) in enumerate(fitted):
                self.seconds += seconds / self.pool.width
                self.progress(Progress("extracting", label))
                points.append(CurvePoint(n_rows, Cut(layer, key), accuracy))
            self.on_points(points)

    def _fit(self, rows: Rows, cut: Cut, n_rows: int) -> Tensor:
        """One strength from the middle of the grid and a loose end: this curve is a preview."""
        before = self._weights.get(cut)
        weight = fit_linear(
            rows.reader("train", cut.chip.vector, [cut.layer]),
            rows.labels("train")[:n_rows],
            self.task.n_classes,
            strengths=[STRENGTHS[len(STRENGTHS) // 2]],
            start=None if before is None else before[None],
            tolerance=1e-3,
            max_steps=30,
        )[0, 0]
        self._weights[cut] = weight
        return weight


def live_sizes(n_train: int) -> list[int]:
    """Numbers of training texts at which the live curve is drawn, ascending up to all texts."""
    sizes = [n_train]
    while (fewer := round(sizes[-1] / LIVE_GROWTH)) >= LIVE_FEWEST:
        sizes.append(fewer)
    return sizes[::-1]
