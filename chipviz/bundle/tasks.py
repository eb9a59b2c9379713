"""The tasks of a folder that holds several chips on one backbone. Loads no torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from chipviz.bundle.metadata import Metadata, read_metadata
from chipviz.errors import BundleError
from chipviz.files import bytes_below, read_small_json

FILE, TASKS = "joined.json", "tasks"
"""The list of tasks, and the folder that holds a folder for each."""
FORMAT = 1
OF_PLACE = ("path", "n_bytes")
"""What a report says of the folder as it lies here: it does not travel with it."""
MAX_TASKS = 50
_NAME = re.compile(r"\w[\w.-]{0,79}")


@dataclass(frozen=True)
class TaskLine:
    """One task of a joined folder."""

    name: str
    cut_layer: int
    test_accuracy: float
    n_parameters: int
    """Of its bundle alone."""


@dataclass(frozen=True)
class JoinReport:
    """What was joined, and how its check went."""

    path: str
    tasks: list[TaskLine]
    cut_layer: int
    n_parameters: int
    n_bytes: int
    """Of the folder."""
    n_passes: int
    """Passes for all tasks: one a prompt. Texts beyond the length limit of a task take more."""
    n_checked: int
    max_difference: float
    """Largest difference of a probability to that of the task's own bundle."""


def place_of(bundle: Path) -> Path:
    """Where the page keeps what a bundle was joined to: beside it."""
    return bundle.with_name(f"{bundle.name}.joined")


def read_report(path: Path) -> JoinReport | None:
    """How a folder was joined. None if there is none."""
    try:
        found = read_small_json(path / FILE)["report"]
        real = dict(zip(OF_PLACE, (str(path), bytes_below(path)), strict=True))
        return TypeAdapter(JoinReport).validate_python(found | real)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_joined(path: Path) -> bool:
    """Whether a folder holds several chips on one backbone."""
    return (path / FILE).is_file()


def read_joined(path: Path) -> dict[str, Metadata]:
    """The tasks of a folder by name, as they were joined.

    Raises:
        BundleError: If it is none, or names a task that has no place.
    """
    try:
        said = read_small_json(path / FILE)
        names = said["tasks"]
        known = said["format"] == FORMAT and isinstance(names, list)
        known = known and 0 < len(names) <= MAX_TASKS and len(set(names)) == len(names)
        known = known and all(isinstance(n, str) and _NAME.fullmatch(n) for n in names)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        known, names = False, []
    if not known:
        raise BundleError(
            f"{path.name} has an unreadable {FILE}.", "Join the bundles again."
        ) from None
    return {name: read_metadata(path / TASKS / name) for name in names}
