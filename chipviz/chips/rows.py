"""Features and labels of one run as fits read them: some rows of some layers, on a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chipviz.chips.chip import Chip
from chipviz.chips.linear import Read
from chipviz.data.task import Task
from chipviz.features.storage import Features
from chipviz.keys import Split, Vector

SCORE_ROWS = 8_192
"""Maximum texts scored at once."""


@dataclass(frozen=True)
class Rows:
    """The rows of a task, each with its label and its vectors of every layer."""

    features: Features
    task: Task
    device: torch.device
    """Where chips are fitted."""

    def labels(self, split: Split) -> Tensor:
        """Class indices of a split, shape (N,)."""
        return torch.from_numpy(self.task.splits[split].labels)

    def reader(self, split: Split, vector: Vector, layers: Sequence[int]) -> Read:
        """Reads rows of some layers, by their first number and the one after their last."""
        return partial(self._read, split, vector, layers)

    def _read(
        self, split: Split, vector: Vector, layers: Sequence[int], start: int, stop: int
    ) -> Tensor:
        """Shape (K, stop - start, D), on the device."""
        rows = [self.features.read(split, vector, layer, start, stop) for layer in layers]
        return (rows[0][None] if len(rows) == 1 else torch.stack(rows)).to(self.device)

    def probabilities(
        self, chip: Chip, split: Split, vector: Vector, layer: int
    ) -> NDArray[np.float32]:
        """What a chip says of every text of a split, shape (N, C)."""
        n_rows = len(self.task.splits[split])
        parts = [
            chip.probabilities(self.features.read(split, vector, layer, start, start + SCORE_ROWS))
            for start in range(0, n_rows, SCORE_ROWS)
        ]
        return torch.cat(parts).numpy()

    def accuracy(self, chip: Chip, split: Split, vector: Vector, layer: int) -> float:
        """Share of a split's texts that a chip gets right."""
        answers = self.probabilities(chip, split, vector, layer).argmax(axis=1)
        return float(np.mean(answers == self.task.splits[split].labels))
