"""Every file of a run by name. No other module spells one.

Reads what pages need without torch. Who computes a run writes the files under these names.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from chipviz.config import RunConfig
from chipviz.data.task import Task
from chipviz.errors import JobError
from chipviz.files import replacing, write_atomic
from chipviz.keys import ChipKey, Cut, Split
from chipviz.results.neurons import SparsifyReport
from chipviz.results.report import Example, RunReport
from chipviz.results.selection import Correct

KEPT_EXAMPLES: dict[Split, int] = {"test": 400, "validation": 64}
"""Maximum texts kept per split: test texts for the pages, validation texts for bundle checks."""


@contextmanager
def _naming(path: Path, run: Path) -> Iterator[None]:
    """Name the file of a run that cannot be read.

    Raises:
        JobError: If the block cannot read `path`.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        missing = isinstance(error, FileNotFoundError)
        raise JobError(
            f"{path.relative_to(run)} of run {run.name} is {'gone' if missing else 'damaged'}.",
            "Its folder was changed; delete the run and train again.",
        ) from None


@lru_cache(maxsize=256)
def _digest(path: Path, _time: int, _size: int) -> str:
    """SHA-256 of a file, once as long as nobody writes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_now(path: Path) -> str:
    stat = path.stat()
    return _digest(path, stat.st_mtime_ns, stat.st_size)


@dataclass
class Predictions:
    """Classes that the chips of a run predicted, and the true ones."""

    labels: dict[Split, NDArray[np.int32]]
    """True class per text, shape (N,)."""
    classes: dict[tuple[Split, ChipKey], NDArray[np.int32]]
    """Predicted class per layer and text, shape (L, N)."""
    asked: NDArray[np.int32] | None = None
    """What the backbone itself answers to the first test texts, shape (M,)."""
    temperatures: dict[ChipKey, NDArray[np.float32]] = field(default_factory=dict)
    """Temperature of each layer's chip, fitted on validation, shape (L,). None in older runs."""
    sure: dict[tuple[Split, ChipKey], NDArray[np.float32]] = field(default_factory=dict)
    """Log-odds of the predicted class at that temperature, per layer and text, shape (L, N)."""

    def at(self, cut: Cut, split: Split) -> NDArray[np.int32]:
        """Predicted class per text of the chip at a cut, shape (N,)."""
        return self.classes[split, cut.chip][cut.layer]

    @property
    def correct(self) -> Correct:
        """Which validation texts each chip got right."""
        return {
            key: predicted == self.labels["validation"]
            for (split, key), predicted in self.classes.items()
            if split == "validation"
        }


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """Settings of the run, as JSON."""
        return self.path / "config.json"

    @property
    def log(self) -> Path:
        """Log of every process that computed the run."""
        return self.path / "log.txt"

    @property
    def prompt(self) -> Path:
        """Folder of the tokenizer, template and limit included."""
        return self.path / "prompt"

    @property
    def chips(self) -> Path:
        """Weights of all chips."""
        return self.path / "chips.safetensors"

    @property
    def predictions(self) -> Path:
        """Classes that the chips predicted. See `read_predictions`."""
        return self.path / "predictions.safetensors"

    @property
    def report(self) -> Path:
        """What the run found: a `RunReport`, as JSON."""
        return self.path / "report.json"

    @property
    def neurons(self) -> Path:
        """What Sparsify-then-Classify found: a `SparsifyReport`, as JSON. Not every run has one."""
        return self.path / "stc.json"

    @property
    def features_note(self) -> Path:
        """Key of the features that the run reads."""
        return self.path / "features.txt"

    @property
    def bundles(self) -> Path:
        """Folder of the bundles built from the run."""
        return self.path / "bundle"

    @property
    def scratch(self) -> Path:
        """Folder of the state on the way of a model's making."""
        return self.path / "scratch"

    @property
    def sums(self) -> Path:
        """SHA-256 of each file of a finished run, as JSON."""
        return self.path / "sums.json"

    def seal(self) -> None:
        """Note what the files of a finished run are: none may change unseen from now on."""
        files = [
            *(self.config, self.report, self.chips, self.predictions),
            *map(self.examples, KEPT_EXAMPLES),
            *([self.neurons] if self.neurons.exists() else []),
            *sorted(path for path in self.prompt.rglob("*") if path.is_file()),
        ]
        sums = {str(file.relative_to(self.path)): _digest_now(file) for file in files}
        write_atomic(self.sums, json.dumps(sums, indent=1))

    def whole(self, path: Path) -> Path:
        """A file or folder of the run, after every byte of it was compared with the sums.

        A run that is not finished, or that an older version finished, has no sums.

        Raises:
            JobError: Naming the file that is not what it was.
        """
        with _naming(self.sums, self.path):
            sums = json.loads(self.sums.read_text("utf-8")) if self.sums.exists() else {}
            if not isinstance(sums, dict):
                raise ValueError
        name = str(path.relative_to(self.path))
        for file, digest in sums.items():
            if file == name or file.startswith(f"{name}{os.sep}"):
                with _naming(self.path / file, self.path):
                    if _digest_now(self.path / file) != digest:
                        raise ValueError
        return path

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Read a file that is what it was, and name one that is not.

        Raises:
            JobError: As `whole` does, or if the block cannot read it.
        """
        self.whole(path)
        with _naming(path, self.path):
            yield

    def exit_note(self, bundle_job: str | None = None) -> Path:
        """How the run's process ended, or that of one of its bundle builds."""
        return self.path / (f"exit-{bundle_job}.json" if bundle_job else "exit.json")

    def examples(self, split: Split) -> Path:
        """Texts kept of a split: test texts for the pages, validation texts for bundle checks."""
        return self.path / {"test": "examples.jsonl", "validation": "checked.jsonl"}[split]

    def note_features(self, key: str) -> None:
        """Note which features the run reads, before anybody looks whether they are there."""
        write_atomic(self.features_note, key)

    def write_config(self, config: RunConfig) -> None:
        """Keep the settings of the run, which begins: what it was before is void."""
        self.sums.unlink(missing_ok=True)
        self.neurons.unlink(missing_ok=True)
        write_atomic(self.config, config.model_dump_json())

    def read_config(self) -> RunConfig:
        """The settings of the run.

        Raises:
            JobError: If there are none, or they were damaged.
        """
        with self._reading(self.config):
            return RunConfig.model_validate_json(self.config.read_text("utf-8"))

    def write_report(self, report: RunReport) -> None:
        """Keep what the run found."""
        write_atomic(self.report, report.model_dump_json())

    def read_report(self) -> RunReport:
        """The report of a finished run.

        Raises:
            JobError: If there is none, or it was damaged.
        """
        with self._reading(self.report):
            return RunReport.model_validate_json(self.report.read_text("utf-8"))

    def write_neurons(self, found: SparsifyReport) -> None:
        """Keep what Sparsify-then-Classify found."""
        write_atomic(self.neurons, found.model_dump_json())

    def read_neurons(self) -> SparsifyReport | None:
        """What Sparsify-then-Classify found. None where it was not asked for.

        Raises:
            JobError: If it was damaged.
        """
        path = self.whole(self.neurons)
        if not path.exists():
            return None
        with self._reading(path):
            return SparsifyReport.model_validate_json(path.read_text("utf-8"))

    def read_examples(self, split: Split) -> list[Example]:
        """Texts kept of a split, in the order of its predictions. None before the run is done.

        Raises:
            JobError: If they were damaged.
        """
        path = self.whole(self.examples(split))
        if not path.exists():
            return []
        with self._reading(path):
            # Not splitlines: a text may hold U+2028 and kin, which JSON does not escape.
            lines = path.read_text("utf-8").split("\n")
            return [Example.model_validate_json(line) for line in lines if line]

    def read_predictions(self) -> Predictions:
        """What the chips of a finished run predicted.

        Raises:
            JobError: If there is no such file, or it was damaged.
        """
        labels: dict[Split, NDArray[np.int32]] = {}
        classes: dict[tuple[Split, ChipKey], NDArray[np.int32]] = {}
        sure: dict[tuple[Split, ChipKey], NDArray[np.float32]] = {}
        temperatures: dict[ChipKey, NDArray[np.float32]] = {}
        with self._reading(self.predictions):
            stored = load_file(self.predictions)
        for name, values in stored.items():
            for split in ("validation", "test"):
                if name == f"labels.{split}":
                    labels[split] = values
                elif name.startswith(f"{split}."):
                    classes[split, _key_in(name, f"{split}.")] = values
                elif name.startswith(f"sure.{split}."):
                    sure[split, _key_in(name, f"sure.{split}.")] = values
            if name.startswith("temperature."):
                temperatures[_key_in(name, "temperature.")] = values
        return Predictions(labels, classes, stored.get("asked.test"), temperatures, sure)

    def write_predictions(self, predictions: Predictions) -> None:
        """Keep the predictions.

        Their names are `labels.SPLIT`, `SPLIT.VECTOR.KIND`, `sure.SPLIT.VECTOR.KIND`,
        `temperature.VECTOR.KIND` and `asked.test`.
        """
        tensors: dict[str, NDArray[np.generic]] = {
            f"labels.{split}": values for split, values in predictions.labels.items()
        }
        for (split, key), values in predictions.classes.items():
            tensors[f"{split}.{_name_of(key)}"] = values
        for (split, key), values in predictions.sure.items():
            tensors[f"sure.{split}.{_name_of(key)}"] = values
        for key, values in predictions.temperatures.items():
            tensors[f"temperature.{_name_of(key)}"] = values
        if predictions.asked is not None:
            tensors["asked.test"] = predictions.asked
        with replacing(self.predictions) as part:
            save_file(tensors, part)

    def keep_examples(self, task: Task) -> None:
        """Keep the texts that pages show, and those that a bundle is verified on."""
        for split, most in KEPT_EXAMPLES.items():
            rows = task.splits[split].take(range(min(most, len(task.splits[split]))))
            pairs = rows.pairs or [None] * len(rows)
            examples = [
                Example(text=text, text_pair=pair, label=int(label))
                for text, pair, label in zip(rows.texts, pairs, rows.labels, strict=True)
            ]
            self.write_examples(split, examples)

    def write_examples(self, split: Split, rows: list[Example]) -> None:
        """Keep texts of a split, one JSON object a line."""
        lines = [row.model_dump_json() for row in rows]
        with replacing(self.examples(split)) as part:
            part.write_text("\n".join(lines), "utf-8")


def _name_of(key: ChipKey) -> str:
    """A curve's name in the file of predictions."""
    return f"{key.vector.name}.{key.word}"


def _key_in(name: str, prefix: str) -> ChipKey:
    """The curve that a tensor of that file belongs to."""
    vector, _, kind = name.removeprefix(prefix).partition(".")
    return ChipKey.named(vector, kind)
