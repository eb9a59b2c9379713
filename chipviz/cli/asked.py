"""What predict asks: a bundle, or a chip alone and its backbone. Read now, loaded when needed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chipviz.bundle.metadata import read_metadata
from chipviz.cli import printing
from chipviz.config import Preset
from chipviz.data.task import refuse_kind
from chipviz.results.report import TaskInfo


@dataclass(frozen=True)
class Asked:
    """What is asked. Nothing is loaded before the texts are known to be right."""

    task: TaskInfo
    preset: Preset
    load: Callable[[], Any]


def look_at(bundle: Path, backbone: str | None, home: Path, *, adaptive: bool = False) -> Asked:
    """A bundle, or a chip alone and its backbone. Texts may leave at a bundle's early exits."""
    if backbone is None:
        metadata = read_metadata(bundle)
        refuse_kind(metadata.task.kind, "text")

        def load() -> Any:
            from chipviz.bundle import load as load_bundle

            return load_bundle(bundle, adaptive=adaptive)

        return Asked(metadata.task, metadata.preset, load)
    from chipviz.bundle.head import read_head

    info = read_head(bundle)

    def load_alone() -> Any:
        from chipviz.bundle.head_reader import load_head

        alone = load_head(bundle, backbone, home=home, progress=printing.printer())
        printing.end_progress()
        return alone

    return Asked(info.task, info.preset, load_alone)
