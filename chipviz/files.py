"""Where the project lies, and how a small file gets its name; knows nothing of what is in it."""

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
"""Where `python -m chipviz...` works from."""


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that its name never shows half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
