"""What a run says when it is done: the object behind `show --json` and behind every page.

Plain data, checked by pydantic, without torch: pages read it in milliseconds.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load_file

from chipviz.config import ChipKind, Pooling, Preset, Rule, Split
from chipviz.metrics import Score
from chipviz.selection import Selection, select


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BackboneInfo(_Record):
    """The frozen model a run probed."""

    name: str
    n_layers: int
    hidden_size: int
    n_parameters: int
    """Of the published model, LM head included (a tied head counts once)."""
    dtype: str
    """What the forward pass computed in."""
    device: str


class TaskInfo(_Record):
    """The classification task, as it was run."""

    name: str
    n_train: int
    n_validation: int
    n_test: int
    n_classes: int
    label_names: list[str]
    template: str
    max_length: int
    """Tokens a prompt may have, template included."""
    max_chars: int
    """Where a longer text is cut, in characters: the form of the limit that travels with the
    tokenizer."""
    n_truncated: int


class Timing(_Record):
    """Where the time went, in seconds."""

    load_s: float
    extract_s: float
    fit_s: float
    total_s: float
    n_tokens: int
    """Tokens that went through the backbone in this process (0 when all features were there)."""
    tokens_per_s: float


class Controls(_Record):
    """What a chip has to beat: accuracy of reference classifiers on one split."""

    majority: float
    embedding: float
    """Best chip on the embedding output, before any layer."""
    tfidf: float
    """TF-IDF words with logistic regression."""


class CutCost(_Record):
    """What a model costs: the dense backbone, or a cut with its chip."""

    n_parameters: int
    weight_bytes: int
    """Bytes of all weights as stored in the bundle."""
    flops_per_token: int
    """Multiply-adds x 2 of the matrix products of one token at the run's length limit."""


class LayerCost(CutCost):
    """The cost of the bundle cut at `layer` for a chip on `pooling`."""

    layer: int
    pooling: Pooling
    layer_ratio: float
    """(L - 1 - layer) / L: the share of layers removed, the paper's figure."""
    parameter_ratio: float
    """Parameters removed / parameters of the published model."""


class SelectionInfo(_Record):
    """A rule's choice with what it reaches and saves."""

    cut_layer: int
    pooling: Pooling
    chip: ChipKind
    why: str
    validation_accuracy: float
    test_accuracy: float
    layer_ratio: float
    parameter_ratio: float


class RunReport(_Record):
    """Everything a finished run found."""

    run_id: str
    status: str
    preset: Preset
    backbone: BackboneInfo
    task: TaskInfo
    timing: Timing
    scores: list[Score]
    controls: Controls
    """On the test split, like the scores that are reported."""
    controls_validation: Controls
    """On the validation split, for charts of validation curves."""
    selection: dict[Rule, SelectionInfo]
    dense: CutCost
    """The published model, for comparison."""
    costs: list[LayerCost]

    def score_at(self, layer: int, pooling: Pooling, chip: ChipKind, split: Split) -> Score:
        """The score of one chip (layer -1 is the embedding control)."""
        key = (layer, pooling, chip, split)
        return next(s for s in self.scores if (s.layer, s.pooling, s.chip, s.split) == key)

    def cost_at(self, layer: int, pooling: Pooling) -> LayerCost:
        """What the cut at `layer` with a chip on `pooling` costs."""
        return next(c for c in self.costs if (c.layer, c.pooling) == (layer, pooling))

    def select(self, rule: Rule, **options: Any) -> SelectionInfo:
        """Apply a selection rule (see `chipviz.selection.select` for the options)."""
        return self.describe(select(self.scores, rule, **options))

    def describe(self, chosen: Selection) -> SelectionInfo:
        """Join a selection with what it reaches on test and what it saves."""
        cost = self.cost_at(chosen.cut_layer, chosen.pooling)
        test = self.score_at(chosen.cut_layer, chosen.pooling, chosen.chip, "test")
        return SelectionInfo(
            cut_layer=chosen.cut_layer,
            pooling=chosen.pooling,
            chip=chosen.chip,
            why=chosen.why,
            validation_accuracy=chosen.validation_accuracy,
            test_accuracy=test.accuracy,
            layer_ratio=cost.layer_ratio,
            parameter_ratio=cost.parameter_ratio,
        )


class BundleReport(_Record):
    """What was built and how its verification went."""

    path: str
    kind: str
    """sequence, token or chipviz."""
    cut_layer: int
    pooling: Pooling
    chip: ChipKind
    n_parameters: int
    weight_bytes: int
    folder_bytes: int
    n_verified: int
    """Validation texts whose prediction was compared in a fresh process."""
    max_difference: float
    """Largest probability difference found there."""
    files: dict[str, int]
    """File name -> bytes."""


class Example(_Record):
    """A test text kept with the run, for the token view and the list of mistakes."""

    text: str
    text_pair: str | None = None
    label: int


def load_examples(run_dir: Path) -> list[Example]:
    """The test texts a finished run keeps, in the order of its test predictions."""
    path = run_dir / "examples.jsonl"
    if not path.exists():
        return []
    # Not splitlines: a text may hold U+2028 and kin, which JSON does not escape.
    lines = path.read_text("utf-8").split("\n")
    return [Example.model_validate_json(line) for line in lines if line]


def load_predictions(run_dir: Path) -> dict[str, NDArray[np.int32]]:
    """Predicted classes of a finished run.

    Returns:
        `labels.test` of shape (N,) and `test.POOLING.CHIP` of shape (L, N); `validation` likewise.
    """
    return load_file(run_dir / "predictions.safetensors")
