"""Several chips on one cut backbone: every task is answered, those of one prompt in one pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from chipviz.backbones.backbone import Backbone, pad
from chipviz.backbones.batching import batch_tokens, batches
from chipviz.bundle.metadata import CHIP_FILE, Metadata
from chipviz.bundle.opening import as_refusals, open_model, open_tokenizer
from chipviz.bundle.reader import backbone_of, read_several
from chipviz.bundle.tasks import TASKS, read_joined
from chipviz.chips.chip import Chip
from chipviz.data.prompt import encode, segment_break
from chipviz.data.task import check_fields
from chipviz.results.answers import Prediction


@dataclass(frozen=True)
class JoinedTask:
    """One task: what its texts become, and the chip that reads them."""

    name: str
    metadata: Metadata
    tokenizer: Any
    chip: Chip

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[list[int]]:
        """Raw texts as tokens. A second text is left out where one is read."""
        seconds = pairs if self.metadata.takes_pair else None
        return encode(self.tokenizer, texts, seconds)["input_ids"]

    def prediction(self, row: Sequence[float]) -> Prediction:
        """What probabilities of all classes say."""
        names = dict(enumerate(self.metadata.task.label_names))
        threshold = self.metadata.threshold
        return Prediction.of(names, row, threshold and threshold.decide)


@dataclass(frozen=True)
class Joined:
    """A cut backbone and the chips of several tasks."""

    backbone: Backbone
    tasks: list[JoinedTask]

    def of(self, name: str) -> "Joined":
        """The same for one task alone."""
        return Joined(self.backbone, [task for task in self.tasks if task.name == name])

    @property
    def n_passes(self) -> int:
        """Passes that answer all tasks for a short text: tasks of one prompt share theirs."""
        return len({tuple(task.encode(["a"], ["a"])[0]) for task in self.tasks})

    def predict(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> list[dict[str, Prediction]]:
        """Answer every task for raw texts: one prediction a task for each text.

        Raises:
            ConfigError: If second texts are missing, or given where one text is read.
            BackboneError: If a tokenizer has more tokens than the model.
        """
        for task in self.tasks:
            check_fields(task.metadata.takes_pair, texts, pairs)
        return self.predict_each({task.name: (texts, pairs) for task in self.tasks})

    @torch.inference_mode()
    def predict_each(
        self, fields: dict[str, tuple[Sequence[str], Sequence[str] | None]]
    ) -> list[dict[str, Prediction]]:
        """The same where tasks read other columns of the same rows.

        What becomes the same tokens for several tasks is read once for all of them.

        Args:
            fields: First and second texts of every task.

        Raises:
            BackboneError: If a tokenizer has more tokens than the model.
        """
        wanted: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # tokens -> task and row
        n_rows = len(next(iter(fields.values()))[0])
        for t, task in enumerate(self.tasks):
            for i, ids in enumerate(task.encode(*fields[task.name]) if n_rows else []):
                wanted.setdefault(tuple(ids), []).append((t, i))
        groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}  # tasks -> tokens
        for ids, who in wanted.items():
            groups.setdefault(tuple(sorted({t for t, _ in who})), []).append(ids)
        found: list[dict[str, Prediction]] = [{} for _ in range(n_rows)]
        for asked, texts in groups.items():
            for ids, said in self._read([self.tasks[t] for t in asked], texts):
                for t, i in wanted[ids]:
                    task = self.tasks[t]
                    found[i][task.name] = task.prediction(said[task.name])
        return [{task.name: row[task.name] for task in self.tasks} for row in found]

    def _read(
        self, tasks: Sequence[JoinedTask], texts: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[tuple[int, ...], dict[str, list[float]]]]:
        """Probabilities of every task for texts as tokens."""
        first = tasks[0].tokenizer
        self.backbone.refuse_unknown_token(max(map(max, texts)))
        backbone = replace(self.backbone, sep=segment_break(first))
        budget = batch_tokens(backbone.device)
        chips = [(task.metadata.cut.cut, task.chip) for task in tasks]
        for rows in batches([len(one) for one in texts], budget, padded=backbone.padded):
            padded = pad([texts[i] for i in rows], first.pad_token_id, backbone.device)
            logits = read_several(backbone, chips, *padded)
            shares = [one.softmax(dim=1).tolist() for one in logits]
            for place, i in enumerate(rows):
                yield texts[i], {t.name: one[place] for t, one in zip(tasks, shares, strict=True)}


def load_joined(path: Path) -> Joined:
    """Several chips and their backbone.

    Raises:
        BundleError: If a file is missing or does not fit the others.
    """
    tasks = read_joined(path)
    model = open_model(path, "chipviz")
    first = next(iter(tasks.values()))
    with as_refusals(path):
        backbone = backbone_of(path, model, first, None)
        found: list[JoinedTask] = []
        for name, metadata in tasks.items():
            folder = path / TASKS / name
            words = open_tokenizer(folder, metadata.kind)
            task = JoinedTask(name, metadata, words, _chip(folder, metadata))
            _refuse_unfit(task, backbone)
            found.append(task)
    return Joined(backbone, found)


def _chip(folder: Path, metadata: Metadata) -> Chip:
    """The chip of a task.

    Raises:
        ValueError: If it is none, or none for these classes.
    """
    try:
        chip = Chip(**load_file(folder / CHIP_FILE))
    except TypeError:
        raise ValueError(f"{CHIP_FILE} holds no chip") from None
    if len(chip.weight) != len(metadata.task.label_names):
        raise ValueError(f"{CHIP_FILE} does not fit its labels")
    return chip


def _refuse_unfit(task: JoinedTask, backbone: Backbone) -> None:
    """Refuse a chip that the backbone beside it was not cut for.

    Raises:
        ValueError: If it is one.
    """
    chip = task.chip
    width = (chip.weight if chip.hidden_weight is None else chip.hidden_weight).shape[-1]
    deep = task.metadata.cut.cut_layer >= backbone.n_layers
    if deep or chip.neurons is not None or width != backbone.hidden_size:
        raise ValueError(f"the chip of task {task.name} does not fit the model beside it")


PROGRAM = """\
import json, sys
from pathlib import Path
from chipviz.bundle.joined import load_joined
folder, asked = sys.argv[1], json.load(sys.stdin)
whole = load_joined(Path(folder))
found = []
for name, text, pair in asked:
    (said,) = whole.of(name).predict([text], [pair] if pair is not None else None)
    found.append(list(said[name].probabilities.values()))
print(json.dumps(found))
"""
"""Program of a fresh process that answers the tests of all tasks."""
