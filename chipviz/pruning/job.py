"""A job that makes a model: what it starts from, and what it leaves."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from chipviz.backbones.model_folder import ModelFolder
from chipviz.backbones.surgery import Surgery
from chipviz.features.distributed import ALONE, Team
from chipviz.progress import Progress, ProgressFn
from chipviz.pruning.training import OnMark
from chipviz.results.models import ModelSpec


@dataclass
class Job:
    """A model under way: what it is made of, where, and what was found so far."""

    spec: ModelSpec
    home: Path
    scratch: Path
    """Folder of the state on the way: what a killed job goes on from."""
    folder: ModelFolder
    progress: ProgressFn
    on_mark: OnMark
    device: torch.device
    team: Team = ALONE
    """Processes that share what can be shared."""
    found: dict[str, Any] = field(default_factory=dict)
    """For the record: influence by block, the threshold, losses."""

    def say(self, label: str) -> None:
        """Report a step."""
        self.progress(Progress("fitting", label))


@dataclass(frozen=True)
class Made:
    """A model in memory, and how it does on held-out text."""

    model: Any
    n_layers: int
    removed: list[int]
    before: float | None = None
    pruned: float | None = None
    after: float | None = None
    n_perplexity: int = 0
    surgery: Surgery | None = None
    """Parts that are not those of its class."""
