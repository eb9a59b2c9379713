"""What a bundle and its export are asked, so that their answers can be compared."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chipviz.backbones.backbone import pad
from chipviz.bundle.check import SELF_TEST, Row
from chipviz.bundle.classifier import Classifier
from chipviz.bundle.metadata import Metadata
from chipviz.bundle.pictures import PictureClassifier
from chipviz.bundle.vision import MADE, make_picture
from chipviz.data.pictures import Pictures
from chipviz.data.prompt import encode, hard_endings
from chipviz.results.run_folder import RunFolder

BATCH = 8
Ask = Callable[[dict[str, Tensor]], NDArray[np.float32]]
"""From a batch as tensors to class scores (B, C)."""


def rows_of_run(metadata: Metadata, home: Path) -> list[Row]:
    """What the run of a bundle kept to look at, validation rows first. Empty where it is gone.

    Args:
        metadata: Of the bundle.
        home: The folder that may hold the run.
    """
    run_id = str(metadata.everything.get("run_id", ""))
    if not re.fullmatch(r"[\w-]+", run_id):  # it becomes a path, and a bundle may be a stranger's
        return []
    folder = RunFolder(home / "runs" / run_id)
    kept = [*folder.read_examples("validation"), *folder.read_examples("test")]
    if metadata.task.kind == "text":
        return [(row.text, row.text_pair) for row in kept]
    store = Pictures(home / "data" / "pictures")
    return [(str(store.file_of(row.text)), None) for row in kept if store.has(row.text)]


@dataclass(frozen=True)
class Batches:
    """Rows as a graph takes them."""

    batches: list[dict[str, Tensor]]

    @classmethod
    def of(cls, classifier: Classifier | PictureClassifier, rows: Sequence[Row]) -> "Batches":
        """Rows, and behind them some that anyone can make. The last batch is a single one."""
        if isinstance(classifier, PictureClassifier):
            shown = [classifier.reader.open(reference) for reference, _ in rows]
            shown += [make_picture(name) for name in MADE]
            cuts = [shown[i : i + BATCH] for i in range(0, len(shown), BATCH)]
            return cls([classifier.reader.batch(part) for part in [*cuts, shown[:1]]])
        tokenizer, pairs = classifier.tokenizer, classifier.metadata.takes_pair
        asked = [*rows, *SELF_TEST, *((text, text) for text in hard_endings(tokenizer))]
        texts, seconds = [text for text, _ in asked], [pair or "" for _, pair in asked]
        ids = encode(tokenizer, texts, seconds if pairs else None)["input_ids"]
        parts = [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]
        padded = [
            pad(part, tokenizer.pad_token_id, torch.device("cpu")) for part in [*parts, ids[:1]]
        ]
        return cls([{"input_ids": t, "attention_mask": m} for t, m in padded])

    def __len__(self) -> int:
        return sum(len(next(iter(batch.values()))) for batch in self.batches)

    @property
    def example(self) -> dict[str, Tensor]:
        """A batch of several rows of several tokens."""
        return self.batches[0]

    def ask(self, answer: Ask) -> NDArray[np.float32]:
        """Class scores of all rows, (N, C)."""
        with torch.inference_mode():
            return np.concatenate([answer(batch) for batch in self.batches])
