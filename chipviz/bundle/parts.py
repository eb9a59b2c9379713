"""A task to be joined: what its source holds, and what it says of rows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from chipviz.backbones.surgery import SURGERY
from chipviz.bundle import joined, tasks
from chipviz.bundle.asked import rows_of_run
from chipviz.bundle.check import SELF_TEST, Row
from chipviz.bundle.classifier import load
from chipviz.bundle.folders import base_weights, chip_of, stored
from chipviz.bundle.metadata import Metadata, read_metadata
from chipviz.errors import BundleError
from chipviz.results.answers import Prediction

MAX_ROWS = 64
"""Rows of each task that are compared."""


@dataclass(frozen=True)
class Part:
    """A task as it stands in a source, and what its source says of rows."""

    name: str
    files: Path
    """Folder with its metadata and its tokenizer."""
    weights: Path
    """Folder with the backbone."""
    metadata: Metadata
    tensors: dict[str, Tensor]
    """Of its chip."""
    n_layers: int
    rows: list[Row]
    said: list[Prediction]


def parts_of(bundle: Path, home: Path) -> list[Part]:
    """The tasks of a source, each asked about rows of its run and some that anyone can make."""
    if tasks.is_joined(bundle):
        whole = joined.load_joined(bundle)
        found = []
        for task in whole.tasks:
            rows = _rows(task.metadata, home)
            said = [row[task.name] for row in whole.predict(*fields(task.metadata, rows))]
            files = bundle / tasks.TASKS / task.name
            tensors, n_layers = task.chip.tensors(), whole.backbone.n_layers
            found.append(
                Part(task.name, files, bundle, task.metadata, tensors, n_layers, rows, said)
            )
        return found
    metadata = read_metadata(bundle)
    if metadata.task.kind != "text" or metadata.cut.key.joins or metadata.cut.chip == "sparse":
        raise BundleError(
            f"{bundle.name} cannot be joined: its chip reads pictures, or neurons.",
            "Join bundles of texts whose chip reads one layer.",
        )
    if (bundle / SURGERY).exists():
        raise BundleError(
            f"{bundle.name} cannot be joined: modules of its backbone were replaced.",
            "Join bundles of a backbone as it was published.",
        )
    classifier: Any = load(bundle)
    rows = _rows(metadata, home)
    said = classifier.predict(*fields(metadata, rows))
    n_layers = int(classifier.model.config.get_text_config().num_hidden_layers)
    tensors = chip_of(classifier).tensors()
    name = slug(metadata.task.name)
    return [Part(name, bundle, bundle, metadata, tensors, n_layers, rows, said)]


def slug(name: str) -> str:
    """A name of data as the name of a task and of a folder."""
    return re.sub(r"[^\w.-]+", "-", Path(name).stem or name).strip("-.")[:60] or "task"


def _rows(metadata: Metadata, home: Path) -> list[Row]:
    rows = [*rows_of_run(metadata, home)[:MAX_ROWS], *SELF_TEST]
    return [(text, (pair or "") if metadata.takes_pair else None) for text, pair in rows]


def fields(metadata: Metadata, rows: Sequence[Row]) -> tuple[list[str], list[str] | None]:
    """First and second texts of rows, as a task takes them."""
    texts = [text for text, _ in rows]
    return texts, [pair or "" for _, pair in rows] if metadata.takes_pair else None


def base_of(source: Path) -> tuple[Any, dict[str, Tensor]]:
    """The cut backbone of a source, and its weights as its files hold them."""
    if tasks.is_joined(source):
        return joined.load_joined(source).backbone.model, stored(source)
    model: Any = load(source).model
    return model.base_model, base_weights(source, model)
