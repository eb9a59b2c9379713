"""Where the project lies, and how a small file gets its name; knows nothing of what is in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
"""Where `python -m chipviz...` works from."""


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
