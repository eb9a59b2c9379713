"""What no run needs any more: found, counted in bytes, and removed when asked."""

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from chipviz.data.pictures import is_reference
from chipviz.errors import JobError
from chipviz.features import cache
from chipviz.files import bytes_below
from chipviz.results.run_folder import RunFolder
from chipviz.runs.store import Store

QUIET_S = 3_600
"""Seconds that a file must have lain untouched: whoever writes it may be about to name it."""
DRAFT_S = 30 * 24 * 3_600
"""Seconds for which the form of a new run is kept."""
_PART = re.compile(r".*\.(\d+)(?:\.[0-9a-f]+)?\.part")
_WORK = re.compile(r"\..+\.[a-z0-9_]{8}")
"""Files and folders under way, as `chipviz.files` names them."""


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nothing uses."""

    path: str
    n_bytes: int
    why: str


def leftovers(store: Store) -> list[Leftover]:
    """What can be removed from a home folder. Looks only, and changes nothing.

    Backbones, models and data sets stay: they are a cache that somebody waited for.
    """
    return [Leftover(str(path), bytes_below(path), why) for path, why in _unneeded(store)]


def sweep(store: Store) -> int:
    """Remove what crashes left behind: halves that nobody will ever finish, locks of nothing.

    Hidden states, uploads and forms stay until somebody asks.

    Returns:
        Bytes that are free again.

    Raises:
        JobError: If one cannot be removed.
    """
    remains = [*_parts(store.home), *_unused_locks(store.home)]
    return sum(_remove(path) for path, _ in remains)


def remove(store: Store, found: Sequence[Leftover]) -> int:
    """Remove leftovers that still are some.

    Returns:
        Bytes that are free again.

    Raises:
        JobError: If one cannot be removed.
    """
    now = {str(path) for path, _ in _unneeded(store)}
    return sum(_remove(Path(left.path)) for left in found if left.path in now)


def _remove(path: Path) -> int:
    n_bytes = bytes_below(path)
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise JobError(f"{path} cannot be removed: {error}.", "Remove it by hand.") from None
    return n_bytes


def to_dict(found: Sequence[Leftover]) -> dict[str, Any]:
    """Plain data of `tidy --json`."""
    return {
        "leftovers": [asdict(left) for left in found],
        "n_bytes": sum(left.n_bytes for left in found),
    }


def _unneeded(store: Store) -> list[tuple[Path, str]]:
    """Files and folders, each with the reason why nothing needs it."""
    found = [*_parts(store.home), *_unknown_runs(store), *_unused_features(store)]
    found += [*_unused_uploads(store), *_unused_pictures(store)]
    return [*found, *_old_drafts(store.home), *_unused_locks(store.home)]


def _parts(home: Path) -> Iterator[tuple[Path, str]]:
    """Files and folders that a process was filling when it died."""
    folders = [
        home,
        home / "features",
        home / "backbones",
        home / "models",
        home / "data",
        home / "data" / "uploads",
    ]
    folders += [path for path in (home / "runs").glob("*") if path.is_dir()]
    folders += [path / "bundle" for path in (home / "runs").glob("*")]
    for folder in folders:
        for path in folder.glob("*.part") if folder.is_dir() else ():
            pid = _PART.fullmatch(path.name)
            if pid and not psutil.pid_exists(int(pid[1])):
                yield path, "a process died while it wrote this"
        for path in folder.glob(".*") if folder.is_dir() else ():
            if path.is_dir() and _WORK.fullmatch(path.name) and _is_quiet(path):
                yield path, "a process died while it filled this"


def _unknown_runs(store: Store) -> Iterator[tuple[Path, str]]:
    known = {job.run_id for job in (*store.runs(), *store.models())}
    for path in (store.home / "runs").glob("*"):
        if path.is_dir() and path.name not in known and _is_quiet(path):
            yield path, "no run of the list has this folder"


def _unused_features(store: Store) -> Iterator[tuple[Path, str]]:
    """Hidden states that no run names. While a run is at work it may be about to name some."""
    if store.active():
        return
    used = {cache.used_by(RunFolder(path)) for path in (store.home / "runs").glob("*")}
    for path in (store.home / "features").glob("*"):
        if path.is_dir() and path.name not in used and not path.name.startswith("."):
            yield path, "hidden states that no run uses"


def _unused_uploads(store: Store) -> Iterator[tuple[Path, str]]:
    used = set()
    for run in store.runs():
        with suppress(JobError):
            used.add(Path(run.config.data).name)
    for draft in (store.home / "drafts").glob("*.json"):
        with suppress(OSError, ValueError, AttributeError, TypeError):
            used.add(Path(json.loads(draft.read_text("utf-8")).get("data_path", "")).name)
    for path in (store.home / "data" / "uploads").glob("*"):
        if path.is_file() and path.suffix != ".part" and path.name not in used and _is_quiet(path):
            yield path, "an upload that no run uses"


def _unused_pictures(store: Store) -> Iterator[tuple[Path, str]]:
    """All kept pictures, where no run has any. A run at work may be about to."""
    folder = store.home / "data" / "pictures"
    if not folder.is_dir() or store.active() or not _is_quiet(folder):
        return
    for run in (store.home / "runs").glob("*"):
        with suppress(JobError, OSError):
            if any(is_reference(row.text) for row in RunFolder(run).read_examples("test")[:1]):
                return
    yield folder, "pictures that no run shows"


def _old_drafts(home: Path) -> Iterator[tuple[Path, str]]:
    """Forms that nobody has touched for a month."""
    for path in (home / "drafts").glob("*.json"):
        if time.time() - path.stat().st_mtime > DRAFT_S:
            yield path, "a form that was left a month ago"


def _unused_locks(home: Path) -> Iterator[tuple[Path, str]]:
    """Locks of what is gone. A lock that somebody holds, or of what is there, stays."""
    for folder in (home / "features", home / "backbones", home / "data"):
        for path in folder.glob("*.lock"):
            if not path.with_suffix("").exists() and _is_quiet(path):
                with suppress(Timeout), FileLock(path).acquire(timeout=0):
                    yield path, "a lock of something that is gone"


def _is_quiet(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > QUIET_S
    except OSError:
        return False
