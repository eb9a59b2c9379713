"""The `chip.json` of a bundle: what was cut from what, with which scores, and how it was verified.

Loads no torch: the command line reads it before it knows whether there is anything to load.
"""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from chipviz import __version__
from chipviz.config import CutSpec, Preset
from chipviz.errors import BundleError
from chipviz.files import read_small_json
from chipviz.results.exits import ExitPlan
from chipviz.results.report import BundleKind, RunReport, TaskInfo
from chipviz.results.thresholds import Threshold

FORMAT = 1
METADATA = "chip.json"
CHIP_FILE = "chip.safetensors"
"""Where kind *chipviz* keeps its chip. The stock kinds keep it in the model."""
EXITS_FILE = "exits.safetensors"
"""Chips of early exits, where a bundle has any."""
SUMS = "SHA256SUMS"
FILES = {".safetensors", ".json", ".md", ".txt", ".model", ".jinja", ".png"}
"""What a bundle may hold, beside SHA256SUMS."""


@dataclass(frozen=True)
class Metadata:
    """The `chip.json` of a bundle, read and checked."""

    kind: BundleKind
    preset: Preset
    cut: CutSpec
    task: TaskInfo
    blocks: str | None
    """Place of the backbone's blocks, if the run had to be told."""
    padded: bool
    """Whether texts of several lengths may share a batch."""
    exits: ExitPlan | None
    """Where texts may leave early."""
    family: str
    """What the backbone's configuration calls its family."""
    threshold: Threshold | None
    """From which probability on the answer is yes, of a binary task."""
    everything: dict[str, Any]

    @property
    def takes_pair(self) -> bool:
        """Whether the bundle reads two texts."""
        return "{text_pair}" in self.task.template

    def refuse_without_exits(self, name: str) -> None:
        """Refuse early exits of a bundle that has none.

        Raises:
            BundleError: If it has none.
        """
        if self.exits is None:
            raise BundleError(
                f"{name} has no early exits.", "Build it with `cut RUN ... --exit-margin 0.02`."
            )


def describe(
    cut: CutSpec,
    report: RunReport,
    kind: BundleKind,
    exits: ExitPlan | None = None,
    threshold: Threshold | None = None,
) -> dict[str, Any]:
    """What was cut from what. Its verification is yet to come."""
    cost = report.cost_at(cut.cut)
    scores = [report.score_at(cut.cut, split).model_dump() for split in ("validation", "test")]
    return {
        "format": FORMAT,
        "kind": kind,
        "run_id": report.run_id,
        "preset": report.preset,
        "cut": cut.model_dump(),
        "backbone": report.backbone.model_dump(),
        "task": report.task.model_dump(),
        "cost": cost.model_dump(),
        "dense": report.dense.model_dump(),
        "scores": scores,
        "exits": exits and exits.model_dump(),
        "threshold": threshold and threshold.model_dump(),
        "versions": {
            "chipviz": __version__,
            **{name: version(name) for name in ("transformers", "torch")},
        },
    }


def write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Write the `chip.json` of a bundle."""
    text = json.dumps(metadata, indent=2, ensure_ascii=False)
    (folder / METADATA).write_text(text, "utf-8")


def read_metadata(path: Path) -> Metadata:
    """The `chip.json` of a bundle.

    Raises:
        BundleError: If the folder is no bundle, or holds what a bundle may not hold.
    """
    if not (path / METADATA).is_file():
        raise BundleError(
            f"{path} is no bundle: it has no chip.json.", "Give a folder written by `chipviz cut`."
        )
    for file in path.iterdir():
        if not file.is_file() or (file.name != SUMS and file.suffix not in FILES):
            raise BundleError(
                f"{path.name} holds {file.name}, which no bundle has.",
                "Remove it, or do not trust it.",
            )
    try:
        found, config = (read_small_json(path / name) for name in (METADATA, "config.json"))
        known = found["format"] == FORMAT and found["kind"] in get_args(BundleKind)
        known = known and found["preset"] in get_args(Preset)
        cut, task = CutSpec.model_validate(found["cut"]), TaskInfo.model_validate(found["task"])
        backbone = found.get("backbone", {})
        blocks, padded = backbone.get("blocks"), backbone.get("padded", True)
        exits = ExitPlan.model_validate(found["exits"]) if found.get("exits") else None
        asked = found.get("threshold")
        threshold = Threshold.model_validate(asked) if asked else None
        known = known and (threshold is None or len(task.label_names) == 2)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BundleError(
            f"{path.name} has an unreadable chip.json or config.json.", "Build the bundle again."
        ) from None
    if not known or "auto_map" in config:
        raise BundleError(
            f"{path.name} has a format this version of chipviz does not read.",
            "Update chipviz, or build the bundle again.",
        )
    return Metadata(
        found["kind"],
        found["preset"],
        cut,
        task,
        blocks,
        padded,
        exits,
        str(config.get("model_type", "")),
        threshold,
        found,
    )


def refuse_in_the_way(out: Path, mark: str, what: str) -> None:
    """A folder that is neither empty nor what will be written there belongs to somebody.

    Args:
        out: The folder.
        mark: A file that all of this kind have.
        what: The kind, in a word.

    Raises:
        BundleError: If it does.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / mark).exists()):
        raise BundleError(
            f"{out} exists and is no {what}.", "Give another folder; nothing was overwritten."
        )
