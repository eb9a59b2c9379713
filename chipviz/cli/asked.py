"""What predict asks: a bundle, several chips on one backbone, or a chip alone and its backbone.

Read now, loaded when needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chipviz.bundle.metadata import read_metadata
from chipviz.bundle.rows_out import Said
from chipviz.bundle.tasks import is_joined, read_joined
from chipviz.cli import printing
from chipviz.config import Preset
from chipviz.data.task import refuse_kind
from chipviz.errors import ConfigError
from chipviz.results.report import TaskInfo

Fields = tuple[Sequence[str], Sequence[str] | None]
"""First and second texts."""
Answer = Callable[[dict[str, Fields]], list[Said]]
"""From the fields of every task to what is said of each row."""


@dataclass(frozen=True)
class Asked:
    """What is asked. Nothing is loaded before the texts are known to be right."""

    tasks: dict[str, tuple[TaskInfo, Preset]]
    load: Callable[[], Answer]


def look_at(bundle: Path, backbone: str | None, home: Path, *, adaptive: bool = False) -> Asked:
    """What lies in a folder. Texts may leave at a bundle's early exits."""
    if is_joined(bundle):
        if backbone or adaptive:
            raise ConfigError(
                "Several tasks on one backbone are read whole.",
                "Leave out --backbone and --adaptive.",
            )
        tasks: dict[str, tuple[TaskInfo, Preset]] = {}
        for name, metadata in read_joined(bundle).items():
            tasks[name] = (metadata.task, metadata.preset)

        def load_all() -> Answer:
            from chipviz.bundle.joined import load_joined

            return load_joined(bundle).predict_each

        return Asked(tasks, load_all)
    if backbone is None:
        metadata = read_metadata(bundle)
        refuse_kind(metadata.task.kind, "text")

        def load() -> Answer:
            from chipviz.bundle import load as load_bundle

            return _of_one(load_bundle(bundle, adaptive=adaptive))

        return Asked({"": (metadata.task, metadata.preset)}, load)
    from chipviz.bundle.head import read_head

    info = read_head(bundle)

    def load_alone() -> Answer:
        from chipviz.bundle.head_reader import load_head

        alone = load_head(bundle, backbone, home=home, progress=printing.printer())
        printing.end_progress()
        return _of_one(alone)

    return Asked({"": (info.task, info.preset)}, load_alone)


def _of_one(model: Any) -> Answer:
    return lambda fields: [{"": said} for said in model.predict(*fields[""])]


def in_words(said: Said) -> str:
    """Label and score of every task, on one line."""
    return "  ".join(
        f"{f'{task}: ' if task else ''}{one.label}  {one.score:.3f}" for task, one in said.items()
    )
