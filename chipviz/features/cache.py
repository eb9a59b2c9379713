"""Which runs use which features: runs share one copy, and the last one to go takes it along.

Features lie in `features/KEY` of the home folder. A run's own folder names the key that it uses.
"""

import re
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from chipviz.results.run_folder import RunFolder

_LENGTH = 24
_KEY = re.compile(rf"[0-9a-f]{{{_LENGTH}}}")


def key_of(digest: str) -> str:
    """The key of features whose identity has this hex digest."""
    return digest[:_LENGTH]


def folder_of(home: Path, key: str) -> Path:
    """Where the features of a key lie."""
    return home / "features" / key


def lock_of(folder: Path) -> FileLock:
    """Held by whoever writes or removes these features. Its file stays behind."""
    return FileLock(folder.parent / f"{folder.name}.lock")


def used_by(run: RunFolder) -> str | None:
    """The key that a run uses. None if it came to none."""
    try:
        found = _KEY.fullmatch(run.features_note.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found[0] if found else None


def users(runs: Path, key: str) -> list[Path]:
    """The folders, of those in the folder `runs`, of the runs that use these features."""
    return [run for run in runs.glob("*") if used_by(RunFolder(run)) == key]


def drop(home: Path, key: str, runs: Path) -> None:
    """Remove features, unless a run in the folder `runs` uses them or somebody writes them.

    Raises:
        OSError: If they cannot be removed.
    """
    folder = folder_of(home, key)
    if not folder.is_dir():
        return
    with suppress(Timeout), lock_of(folder).acquire(timeout=0):
        if not users(runs, key):
            shutil.rmtree(folder)
