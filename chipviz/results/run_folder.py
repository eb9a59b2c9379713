"""Every file of a run by name. No other module spells one.

Reads what pages need without torch. Who computes a run writes the files under these names.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from chipviz.config import RunConfig
from chipviz.files import replacing, write_atomic
from chipviz.keys import ChipKey, Cut, Split
from chipviz.results.report import Example, RunReport
from chipviz.results.selection import Correct


@dataclass(frozen=True)
class Predictions:
    """Classes that the chips of a run predicted, and the true ones."""

    labels: dict[Split, NDArray[np.int32]]
    """True class per text, shape (N,)."""
    classes: dict[tuple[Split, ChipKey], NDArray[np.int32]]
    """Predicted class per layer and text, shape (L, N)."""

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
    def features_note(self) -> Path:
        """Key of the features that the run reads."""
        return self.path / "features.txt"

    @property
    def bundles(self) -> Path:
        """Folder of the bundles built from the run."""
        return self.path / "bundle"

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
        """Keep the settings of the run."""
        write_atomic(self.config, config.model_dump_json())

    def read_config(self) -> RunConfig:
        """The settings of the run.

        Raises:
            OSError: If there are none.
        """
        return RunConfig.model_validate_json(self.config.read_text("utf-8"))

    def write_report(self, report: RunReport) -> None:
        """Keep what the run found."""
        write_atomic(self.report, report.model_dump_json())

    def read_report(self) -> RunReport:
        """The report of a finished run.

        Raises:
            OSError: If there is none.
        """
        return RunReport.model_validate_json(self.report.read_text("utf-8"))

    def read_examples(self, split: Split) -> list[Example]:
        """Texts kept of a split, in the order of its predictions. None before the run is done."""
        path = self.examples(split)
        if not path.exists():
            return []
        # Not splitlines: a text may hold U+2028 and kin, which JSON does not escape.
        lines = path.read_text("utf-8").split("\n")
        return [Example.model_validate_json(line) for line in lines if line]

    def read_predictions(self) -> Predictions:
        """What the chips of a finished run predicted.

        Raises:
            OSError: If there is no such file.
        """
        labels: dict[Split, NDArray[np.int32]] = {}
        classes: dict[tuple[Split, ChipKey], NDArray[np.int32]] = {}
        for name, values in load_file(self.predictions).items():
            for split in ("validation", "test"):
                if name == f"labels.{split}":
                    labels[split] = values
                elif name.startswith(f"{split}."):
                    vector, _, kind = name.removeprefix(f"{split}.").partition(".")
                    classes[split, ChipKey.named(vector, kind)] = values
        return Predictions(labels, classes)

    def write_predictions(self, predictions: Predictions) -> None:
        """Keep what the chips predicted, as `labels.SPLIT` and `SPLIT.VECTOR.KIND`."""
        tensors = {f"labels.{split}": values for split, values in predictions.labels.items()}
        for (split, key), values in predictions.classes.items():
            tensors[f"{split}.{key.vector.name}.{key.kind}"] = values
        with replacing(self.predictions) as part:
            save_file(tensors, part)

    def write_examples(self, split: Split, rows: list[Example]) -> None:
        """Keep texts of a split, one JSON object a line."""
        lines = [row.model_dump_json() for row in rows]
        with replacing(self.examples(split)) as part:
            part.write_text("\n".join(lines), "utf-8")
