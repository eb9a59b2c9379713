"""What is kept or read whole: a file has its name complete or not at all, JSON each name once."""

import glob
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

PROJECT = Path(__file__).resolve().parents[1]
"""Folder from which `python -m chipviz...` works."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary neighbour to write, and rename it to `path` when the block ends well.

    The name never shows half a file: the bytes reach the disk before they get it.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that its name never shows half of it."""
    with replacing(path) as part:
        part.write_text(text, "utf-8")


@contextmanager
def publish(final: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, and rename it to `final` when the block ends well.

    A crash, a full disk or a cancel leaves nothing at `final`. Leftovers are swept the next time.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    # Exactly what mkdtemp makes of this name: `.bundle.1.abcdefgh` is not a leftover of `bundle`.
    for leftover in final.parent.glob(f".{glob.escape(final.name)}.{'?' * 8}"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        work.chmod(0o755)
        if final.exists():
            shutil.rmtree(final)
        work.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def made_once(final: Path, make: Callable[[Path], None]) -> Path:
    """A folder that several runs may need at the same moment, made by the first of them.

    Args:
        final: Where it belongs. A folder that is there already is taken as it is.
        make: Fills the temporary folder that it is given.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.parent / f"{final.name}.lock"):
        if not final.exists():
            with publish(final) as work:
                make(work)
    return final


def bytes_below(path: Path) -> int:
    """Bytes of a file, or of all files below a folder. What goes away meanwhile counts nothing."""
    total = 0
    for file in [path, *path.rglob("*")]:
        with suppress(OSError):
            total += file.lstat().st_size if not file.is_dir() else 0
    return total


class NamedTwiceError(ValueError):
    """A name stands twice in a JSON object."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name[:80]!r} stands twice in one object")
        self.name = name


MAX_SETTINGS = 8 << 20
"""Bytes of a file of settings that may come from a stranger. Ten thousand classes take one MiB."""


def read_small(path: Path, most: int = MAX_SETTINGS) -> str:
    """The text of a file, unless it has more bytes than any that is right.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is too large, no regular file or not UTF-8.
    """
    if not path.is_file():  # a pipe or a device has no end
        raise ValueError(f"{path.name} is no file")
    if path.stat().st_size > most:
        raise ValueError(f"{path.name} has more than {most:,} bytes")
    return path.read_text("utf-8")


def read_small_json(path: Path, most: int = MAX_SETTINGS) -> Any:
    """Parse a JSON file, unless it has more bytes than any that is right.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is too large, no regular file or not well-formed.
        RecursionError: If it is nested too deep.
    """
    return json.loads(read_small(path, most))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in which every object gives each name once.

    Raises:
        NamedTwiceError: If one gives a name twice.
        ValueError: If it is not well-formed.
        RecursionError: If it is nested too deep.
    """
    return json.loads(text, object_pairs_hook=_each_once)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise NamedTwiceError(next(name for name, n in names.items() if n > 1))
    return found
