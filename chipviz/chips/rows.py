"""Features and labels of one run as fits read them: some rows of some layers, on a device."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chipviz.chips.chip import Chip
from chipviz.chips.linear import Read
from chipviz.data.task import Task
from chipviz.features.storage import Features
from chipviz.keys import Pooling, Site, Split, Vector

SCORE_ROWS = 8_192
"""Maximum texts scored at once."""
GATHERED = 4
"""Sets of neurons whose values are kept."""


@dataclass(frozen=True)
class Rows:
    """The rows of a task, each with its label and its vectors of every layer."""

    features: Features
    task: Task
    device: torch.device
    """Where chips are fitted."""
    gathered: dict[tuple[Split, Pooling, bytes], Tensor] = field(default_factory=dict, repr=False)
    """Values of neurons that were gathered last."""

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

    def gather(self, split: Split, pooling: Pooling, places: Tensor) -> Tensor:
        """The values of some neurons, each of its own site, layer and column.

        Args:
            split: Whose texts.
            pooling: How they are pooled.
            places: Site (its place in `keys.Site`), layer and column of each, shape (U, 3).

        Returns:
            Shape (N, U), float32. Kept for who asks for the same again.
        """
        known = (split, pooling, hashlib.sha256(places.contiguous().numpy().data).digest())
        if (there := self.gathered.get(known)) is not None:
            return there
        values = torch.empty(len(self.task.splits[split]), len(places))
        layers = places[:, :2].unique(dim=0).tolist() if len(places) else []
        for site, layer in layers:
            own = (places[:, 0] == site) & (places[:, 1] == layer)
            vector = Vector(get_args(Site)[site], pooling)
            values[:, own] = self.features.read(split, vector, layer)[:, places[own, 2].long()]
        if len(self.gathered) >= GATHERED:
            self.gathered.clear()
        self.gathered[known] = values
        return values

    def probabilities(
        self, chip: Chip, split: Split, vector: Vector, layer: int
    ) -> NDArray[np.float32]:
        """What a chip says of every text of a split, shape (N, C)."""
        n_rows = len(self.task.splits[split])
        if chip.neurons is not None:
            values = self.gather(split, vector.pooling, chip.neurons)
            return torch.cat(
                [chip.probabilities(part) for part in values.split(SCORE_ROWS)]
            ).numpy()
        parts = [
            chip.probabilities(self.features.read(split, vector, layer, start, start + SCORE_ROWS))
            for start in range(0, n_rows, SCORE_ROWS)
        ]
        return torch.cat(parts).numpy()

    def accuracy(self, chip: Chip, split: Split, vector: Vector, layer: int) -> float:
        """Share of a split's texts that a chip gets right."""
        answers = self.probabilities(chip, split, vector, layer).argmax(axis=1)
        return float(np.mean(answers == self.task.splits[split].labels))
