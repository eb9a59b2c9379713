"""Several chips on one cut backbone: every task is answered, those of one prompt in one pass."""

from collections.abc import Sequence
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


@dataclass(frozen=True)
class Joined:
    """A cut backbone and the chips of several tasks."""

    backbone: Backbone
    frames: list[list[JoinedTask]]
    """Tasks by prompt: those of one share a pass."""

    @property
    def tasks(self) -> list[JoinedTask]:
        """All of them."""
        return [task for frame in self.frames for task in frame]

    def of(self, name: str) -> "Joined":
        """The same for one task alone."""
        frames = [[task for task in frame if task.name == name] for frame in self.frames]
        return Joined(self.backbone, [frame for frame in frames if frame])

    def predict(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> list[dict[str, Prediction]]:
        """Answer every task for raw texts: one prediction a task for each text.

        Raises:
            ConfigError: If second texts are missing, or given where one text is read.
            BackboneError: If a tokenizer has more tokens than the model.
        """
        fields = dict.fromkeys((task.name for task in self.tasks), (texts, pairs))
        return self.predict_each(fields)

    @torch.inference_mode()
    def predict_each(
        self, fields: dict[str, tuple[Sequence[str], Sequence[str] | None]]
    ) -> list[dict[str, Prediction]]:
        """The same where tasks read other columns of the same rows.

        Args:
            fields: First and second texts of every task.

        Raises:
            ChipvizError: As `predict` does.
        """
        found: list[dict[str, Prediction]] = [{} for _ in next(iter(fields.values()))[0]]
        for frame in self.frames:
            left = list(frame)
            while left:  # tasks that read the same columns share the pass
                texts, pairs = fields[left[0].name]
                same = [task for task in left if fields[task.name] == (texts, pairs)]
                self._answer(same, texts, pairs, found)
                left = [task for task in left if task not in same]
        return [{task.name: row[task.name] for task in self.tasks} for row in found]

    def _answer(
        self,
        tasks: Sequence[JoinedTask],
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        found: list[dict[str, Prediction]],
    ) -> None:
        """Answer the tasks of one prompt."""
        if not texts:
            return
        tokenizer = tasks[0].tokenizer
        check_fields(tasks[0].metadata.takes_pair, texts, pairs)
        ids = encode(tokenizer, texts, pairs)["input_ids"]
        self.backbone.refuse_unknown_token(max(map(max, ids)))
        backbone = replace(self.backbone, sep=segment_break(tokenizer))
        budget = batch_tokens(backbone.device)
        for rows in batches([len(one) for one in ids], budget, padded=backbone.padded):
            part = [ids[i] for i in rows]
            padded = pad(part, tokenizer.pad_token_id, backbone.device)
            said = read_several(backbone, [(t.metadata.cut.cut, t.chip) for t in tasks], *padded)
            for task, logits in zip(tasks, said, strict=True):
                names = dict(enumerate(task.metadata.task.label_names))
                threshold = task.metadata.threshold
                decide = threshold and threshold.decide
                for i, row in zip(rows, logits.softmax(dim=1).tolist(), strict=True):
                    found[i][task.name] = Prediction.of(names, row, decide)


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
        frames: dict[str, list[JoinedTask]] = {}
        for name, metadata in tasks.items():
            folder = path / TASKS / name
            task = JoinedTask(
                name, metadata, open_tokenizer(folder, metadata.kind), _chip(folder, metadata)
            )
            _refuse_unfit(task, backbone)
            frames.setdefault(_frame(task.tokenizer), []).append(task)
    return Joined(backbone, list(frames.values()))


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


def _frame(tokenizer: Any) -> str:
    """What is the same of tasks whose texts become the same tokens."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    settings = (tokenizer.pad_token_id, tokenizer.split_special_tokens, tokenizer.model_max_length)
    return f"{settings} {tokenizer.backend_tokenizer.to_str()}"


PROGRAM = """\
import json, sys
from pathlib import Path
from chipviz.bundle.joined import load_joined
folder, asked = sys.argv[1], json.load(sys.stdin)
whole = load_joined(Path(folder))
found = []
for text, pair in asked:
    (said,) = whole.of(NAME).predict([text], [pair] if pair is not None else None)
    found.append(list(said[NAME].probabilities.values()))
print(json.dumps(found))
"""
"""Program of a fresh process that answers the test of one task, NAME."""
