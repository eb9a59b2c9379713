"""The tasks of a folder that holds several chips on one backbone. Loads no torch."""

import re
from pathlib import Path

from chipviz.bundle.metadata import Metadata, read_metadata
from chipviz.errors import BundleError
from chipviz.files import read_small_json

FILE, TASKS = "joined.json", "tasks"
"""The list of tasks, and the folder that holds a folder for each."""
FORMAT = 1
MAX_TASKS = 50
_NAME = re.compile(r"\w[\w.-]{0,79}")


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
