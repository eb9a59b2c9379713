"""What a bundle has beside its model and its chip: early exits, a threshold, rounded weights."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from chipviz.bundle.metadata import EXITS_FILE
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec
from chipviz.data.task import refuse_kind
from chipviz.errors import ConfigError
from chipviz.results.exits import ExitPlan, plan_exits
from chipviz.results.report import RunReport
from chipviz.results.run_folder import RunFolder
from chipviz.results.thresholds import Threshold, choose_threshold


@dataclass(frozen=True)
class Drift:
    """Probabilities beside those that they should be."""

    what: str
    """What was rounded, or computed in, in words."""
    batch: int
    """Texts of a pass."""
    n: int
    n_agree: int
    """Texts whose label stays."""
    max_difference: float
    """Largest difference of a probability."""

    @classmethod
    def between(cls, found: Tensor, expected: Tensor, what: str, batch: int = 1) -> "Drift":
        """From probabilities, shape (N, C) both."""
        agree = found.argmax(dim=1) == expected.argmax(dim=1)
        difference = float((found - expected).abs().max())
        return cls(what, batch, len(found), int(agree.sum()), difference)


@dataclass(frozen=True)
class Extras:
    """What a bundle has beside its model and its chip."""

    threshold: Threshold | None = None
    plan: ExitPlan | None = None
    chips: Chip | None = None
    """Chips of the early exits, a stack of E."""
    exit_logits: Tensor | None = None
    """What these say of the texts to check, shape (E, N, C)."""
    rounding: Drift | None = None
    """What rounding the weights did, where they are not kept as they were published."""

    def write(self, folder: Path) -> None:
        """Write the chips of the early exits into a bundle, if it has any."""
        if self.chips is not None:
            tensors = {name: value.contiguous() for name, value in self.chips.tensors().items()}
            save_file(tensors, folder / EXITS_FILE)


NOTHING = Extras()


def choose_extras(spec: CutSpec, report: RunReport, folder: RunFolder) -> Extras:
    """What is chosen on validation, before anything is loaded.

    Args:
        spec: What is asked for.
        report: Of the run.
        folder: Of the run.

    Raises:
        ConfigError: If it cannot be had of this run.
    """
    if spec.threshold is None and spec.positive is not None:
        raise ConfigError(
            "A class to look for is given without a threshold.",
            "Give --threshold as well, such as fpr=5%.",
            "positive",
        )
    if spec.threshold is not None:
        if spec.exit_margin is not None:
            raise ConfigError(
                "Early exits leave by the likelier class, and a threshold moves that.",
                "Ask for one of both.",
            )
        names = report.task.label_names
        said = folder.read_predictions()
        found = choose_threshold(said, spec.cut, spec.threshold, names, spec.positive)
        return Extras(threshold=found)
    if spec.exit_margin is None:
        return NOTHING
    refuse_kind(report.task.kind, "text")
    return Extras(plan=plan_exits(folder.read_predictions(), spec.cut, spec.exit_margin))
